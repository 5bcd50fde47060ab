//! The end: what sets it off, and the phases every session goes by.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not at all.
    Serving,
    /// New clients are refused and idle sessions ended; work under way may finish.
    Draining,
    /// Whatever still runs is ended.
    Cutting,
}

/// What all tasks watch; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// The phase once more as a number: sessions look at it for every message, where a token's lock would be felt.
    phase: AtomicU8,
    drain: CancellationToken,
    cut: CancellationToken,
}

impl Shutdown {
    /// Nothing is ending yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The phase now.
    #[inline]
    pub fn phase(&self) -> Phase {
        match self.0.phase.load(Ordering::Acquire) {
            0 => Phase::Serving,
            1 => Phase::Draining,
            _ => Phase::Cutting,
        }
    }

    /// Begins to drain.
    pub fn drain(&self) {
        self.0.phase.fetch_max(1, Ordering::AcqRel);
        self.0.drain.cancel();
    }

    /// Ends whatever still runs.
    pub fn cut(&self) {
        self.0.phase.fetch_max(2, Ordering::AcqRel);
        self.0.drain.cancel();
        self.0.cut.cancel();
    }

    /// Cancelled when draining begins.
    pub fn draining(&self) -> &CancellationToken {
        &self.0.drain
    }

    /// Cancelled when the grace time is over.
    pub fn cutting(&self) -> &CancellationToken {
        &self.0.cut
    }
}

/// Why the program ends, which decides its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// SIGINT.
    Interrupt,
    /// It was asked to over its own interface.
    Request,
    /// SIGTERM.
    Terminate,
}

impl Cause {
    /// 0 after a request, 130 after SIGINT, 143 after SIGTERM unless zero was asked for.
    pub fn exit_code(self, zero_on_sigterm: bool) -> ExitCode {
        ExitCode::from(match self {
            Self::Interrupt => 130,
            Self::Request => 0,
            Self::Terminate if zero_on_sigterm => 0,
            Self::Terminate => 143,
        })
    }
}

/// SIGTERM and SIGINT, caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Catches both.
    pub fn catch() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> Cause {
        tokio::select! {
            _ = self.interrupt.recv() => Cause::Interrupt,
            _ = self.terminate.recv() => Cause::Terminate,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
