//! Shutdown: the signals that start it, and its phases.

use std::{
    fs::File,
    future::{pending, poll_fn},
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::Poll,
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

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
    /// SIGINT.
    Interrupt,
    /// A request over HTTP, or the idle exit.
    Request,
    /// SIGTERM.
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

/// Signals without a meaning for the proxy that would end the process: those that other programs use to reopen logs or to
/// raise the log level, those of timers, and that of a file at its size limit, which is also an error of the write.
pub(crate) const MEANINGLESS: [rustix::process::Signal; 8] = {
    use rustix::process::Signal;
    [
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::POWER,
        Signal::XFSZ,
    ]
};

/// The signals that end the program: SIGTERM, SIGINT, and SIGHUP when the terminal is gone. Caught from its creation on.
#[derive(Debug)]
pub struct Signals {
    /// Present if there is a controlling terminal.
    hangup: Option<Signal>,
    interrupt: Signal,
    terminate: Signal,
    meaningless: Vec<(i32, Signal)>,
}

impl Signals {
    /// Starts to catch them.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            hangup: has_terminal()
                .then(|| signal(SignalKind::hangup()))
                .transpose()?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            meaningless: MEANINGLESS
                .iter()
                .map(|which| {
                    let number = which.as_raw();
                    Ok((number, signal(SignalKind::from_raw(number))?))
                })
                .collect::<io::Result<_>>()?,
        })
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> Cause {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => {
                    hangup.recv().await;
                    // With the terminal present it is a request to reload, which `app` handles.
                    while has_terminal() {
                        hangup.recv().await;
                    }
                }
                None => pending().await,
            }
        };
        let meaningless = &mut self.meaningless;
        let ignored = poll_fn(|cx| {
            for (number, stream) in &mut *meaningless {
                while let Poll::Ready(Some(())) = stream.poll_recv(cx) {
                    tracing::info!(
                        signal = number,
                        "signal ignored; hint: SIGHUP reads the settings again, SIGTERM ends the proxy"
                    );
                }
            }
            Poll::<std::convert::Infallible>::Pending
        });
        tokio::select! {
            never = ignored => match never {},
            () = hangup => Cause::Hangup,
            _ = self.interrupt.recv() => Cause::Interrupt,
            _ = self.terminate.recv() => Cause::Terminate,
        }
    }
}

/// Whether there is a controlling terminal, also in the background.
pub(crate) fn has_terminal() -> bool {
    // Opening it fails with ENXIO where the process has none.
    File::open("/dev/tty").is_ok()
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
