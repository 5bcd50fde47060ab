//! Where the time of a login went.

use std::time::Duration;

use tracing::{Span, field::debug};

/// How long each part took: of the attempt that worked, but for the waiting, which is of all attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Phases {
    /// Behind the client that wakes the endpoint, or behind too many others.
    pub queue: Duration,
    /// For a valid credential.
    pub credential: Duration,
    /// Host name to addresses.
    pub resolve: Duration,
    /// TCP connect.
    pub dial: Duration,
    /// `SSLRequest` and TLS handshake.
    pub tls: Duration,
    /// Startup message up to `ReadyForQuery`.
    pub login: Duration,
}

impl Phases {
    /// Writes them into a span that has a field for each.
    pub fn record(&self, span: &Span) {
        if span.is_disabled() {
            return;
        }
        span.record("queue", debug(self.queue));
        span.record("credential", debug(self.credential));
        span.record("resolve", debug(self.resolve));
        span.record("dial", debug(self.dial));
        span.record("tls", debug(self.tls));
        span.record("login", debug(self.login));
    }
}
