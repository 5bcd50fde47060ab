//! The duration of each phase of a login, recorded in the session's span, whose fields the listener declares.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use enum_map::Enum;
use tokio::sync::SetOnce;
use tracing::{Span, field::debug};

use crate::telemetry::labels::LoginPhase;

/// The current phase of an attempt, for the error of a timeout.
#[derive(Debug, Default)]
pub(super) struct Progress {
    phase: AtomicUsize,
    /// Set when the server has requested the password.
    pub(super) password_requested: SetOnce<()>,
}

impl Progress {
    pub(super) fn enter(&self, phase: LoginPhase) {
        self.phase.store(phase.into_usize(), Ordering::Relaxed);
    }

    pub(super) fn phase(&self) -> LoginPhase {
        LoginPhase::from_usize(self.phase.load(Ordering::Relaxed))
    }
}

/// The duration of each phase of one attempt.
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

/// Records a client's waits over all attempts: for its turn, and for a credential.
pub(super) fn record_waits(queue: Duration, credential: Duration) {
    let span = Span::current();
    if !span.is_disabled() {
        span.record("queue", debug(queue));
        span.record("credential", debug(credential));
    }
}
