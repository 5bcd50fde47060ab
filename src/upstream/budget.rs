//! The time limit of one client's connect, from the end of the endpoint's look-up to a session or a refusal.

use std::time::Duration;

use tokio::time::Instant;

use super::failure::Failure;

/// The limit for a name that does not resolve: a typing error should not cost a minute.
const DNS: Duration = Duration::from_secs(10);

/// A deadline, and whether it is the full time of the settings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    began: Instant,
    ends_at: Instant,
    is_whole: bool,
    has_attempted: bool,
}

impl Budget {
    /// `time` from now.
    pub(super) fn new(time: Duration) -> Self {
        let began = Instant::now();
        Self {
            began,
            ends_at: began + time,
            is_whole: true,
            has_attempted: false,
        }
    }

    pub(super) fn ends_at(&self) -> Instant {
        self.ends_at
    }

    /// Time spent so far.
    pub(super) fn spent(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether it has not been shortened.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// Whether the client has made an attempt of its own.
    pub(super) fn has_attempted(&self) -> bool {
        self.has_attempted
    }

    pub(super) fn attempt(&mut self) {
        self.has_attempted = true;
    }

    /// Shortens it to `time` from its start, if that is less.
    pub(super) fn shorten(&mut self, time: Duration) {
        let ends_at = self.began + time;
        if ends_at < self.ends_at {
            self.ends_at = ends_at;
            self.is_whole = false;
        }
    }

    /// Adapts to the failure of any client's attempt.
    pub(super) fn observe(&mut self, failure: &Failure) {
        if failure.is_dns {
            self.shorten(DNS);
        }
    }
}
