//! Shutdown: the signals that start it, and its phases.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

#[cfg(unix)]
pub(crate) use self::unix::{MEANINGLESS, has_terminal};
#[cfg(unix)]
pub use self::unix::{ReloadSignal, Signals};
#[cfg(windows)]
pub use self::windows::{ReloadSignal, Signals};

/// The phase of the shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No shutdown.
    Serving,
    /// New clients are refused and idle sessions are ended; running queries may finish.
    Draining,
    /// The grace time is over: all sessions are ended.
    Cutting,
}

/// The phase, for tasks to wait on; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    parent: Option<Shutdown>,
    /// The phase as a number: sessions read it for every message, where the lock of a token would cost too much.
    phase: AtomicU8,
    drain: CancellationToken,
    cut: CancellationToken,
}

impl Shutdown {
    /// In phase [`Serving`](Phase::Serving).
    pub fn new() -> Self {
        Self::default()
    }

    /// One that can end before this one, and ends with it.
    #[must_use]
    pub fn child(&self) -> Self {
        Self(Arc::new(Inner {
            parent: Some(self.clone()),
            phase: AtomicU8::new(0),
            drain: self.0.drain.child_token(),
            cut: self.0.cut.child_token(),
        }))
    }

    /// The current phase.
    #[inline]
    pub fn phase(&self) -> Phase {
        let number = |shutdown: &Self| shutdown.0.phase.load(Ordering::Acquire);
        let parent = self.0.parent.as_ref().map_or(0, number);
        match number(self).max(parent) {
            0 => Phase::Serving,
            1 => Phase::Draining,
            _ => Phase::Cutting,
        }
    }

    /// Whether this one has ended by itself, while the parent goes on.
    pub fn is_alone(&self) -> bool {
        let parent = self.0.parent.as_ref();
        parent.is_some_and(|parent| parent.phase() == Phase::Serving)
            && self.phase() != Phase::Serving
    }

    /// Starts draining.
    pub fn drain(&self) {
        // `max`, so that a drain after a cut changes nothing. Before the token, as woken tasks read the phase.
        self.0.phase.fetch_max(1, Ordering::AcqRel);
        self.0.drain.cancel();
    }

    /// Ends all sessions.
    pub fn cut(&self) {
        self.0.phase.fetch_max(2, Ordering::AcqRel);
        // Also ends those that wait for the drain alone.
        self.0.drain.cancel();
        self.0.cut.cancel();
    }

    /// Cancelled when draining starts.
    pub fn draining(&self) -> &CancellationToken {
        &self.0.drain
    }

    /// Cancelled when the grace time is over.
    pub fn cutting(&self) -> &CancellationToken {
        &self.0.cut
    }
}

/// The cause of a shutdown, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The controlling terminal is gone.
    Hangup,
    /// SIGINT, or Ctrl-C on Windows.
    Interrupt,
    /// A request over HTTP, or the idle exit.
    Request,
    /// SIGTERM, or Windows' other requests to end: Ctrl-Break, a closed console, the end of the user's session or of the
    /// system.
    Terminate,
}

impl Cause {
    /// 0 after a request, 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM unless `zero_on_sigterm`.
    pub fn exit_code(self, zero_on_sigterm: bool) -> ExitCode {
        ExitCode::from(match self {
            Self::Hangup => 129,
            Self::Interrupt => 130,
            Self::Request => 0,
            Self::Terminate if zero_on_sigterm => 0,
            Self::Terminate => 143,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_ends_alone_or_with_its_parent() {
        let parent = Shutdown::new();
        let (one, other) = (parent.child(), parent.child());
        one.cut();
        one.cutting().cancelled().await;
        assert_eq!((one.phase(), one.is_alone()), (Phase::Cutting, true));
        assert_eq!(
            (parent.phase(), other.phase()),
            (Phase::Serving, Phase::Serving)
        );
        assert!(!other.is_alone() && !parent.draining().is_cancelled());
        parent.drain();
        other.draining().cancelled().await;
        assert_eq!((other.phase(), other.is_alone()), (Phase::Draining, false));
        assert!(!other.cutting().is_cancelled());
    }

    #[test]
    fn phases_only_go_forward() {
        let shutdown = Shutdown::new();
        assert_eq!(shutdown.phase(), Phase::Serving);
        shutdown.cut();
        shutdown.drain();
        assert_eq!(shutdown.phase(), Phase::Cutting);
        assert!(shutdown.draining().is_cancelled() && shutdown.cutting().is_cancelled());
    }
}
