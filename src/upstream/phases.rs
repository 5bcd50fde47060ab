//! Where the time of a login went, written into the span of the session that it is for.
//!
//! The span's fields are declared where it is opened, by the listener.

use std::time::Duration;

use tracing::{Span, field::debug};

/// How long each part of one attempt took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Phases {
    /// Host name to addresses.
    pub(super) resolve: Duration,
    /// TCP connect.
    pub(super) dial: Duration,
    /// `SSLRequest` and TLS handshake.
    pub(super) tls: Duration,
    /// Startup message up to `ReadyForQuery`.
    pub(super) login: Duration,
}

impl Phases {
    pub(super) fn record(&self) {
        let span = Span::current();
        if !span.is_disabled() {
            span.record("resolve", debug(self.resolve));
            span.record("dial", debug(self.dial));
            span.record("tls", debug(self.tls));
            span.record("login", debug(self.login));
        }
    }
}

/// How long a client waited over all attempts: for its turn, and for a valid credential.
pub(super) fn record_waits(queue: Duration, credential: Duration) {
    let span = Span::current();
    if !span.is_disabled() {
        span.record("queue", debug(queue));
        span.record("credential", debug(credential));
    }
}
