//! The end: what sets it off, and the phases every session goes by.

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
    /// The terminal that it was started from has gone.
    Hangup,
    /// SIGINT.
    Interrupt,
    /// It was asked to over its own interface.
    Request,
    /// SIGTERM.
    Terminate,
}

impl Cause {
    /// 0 after a request, 129 after the terminal's end, 130 after SIGINT, 143 after SIGTERM unless zero was asked for.
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

/// Signals that mean nothing to us and would end the process: those that others take to reopen logs or to turn up debugging,
/// timers', and that of a file that has reached its size limit, which is an error of the write.
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

/// What tells the program to end: SIGTERM, SIGINT, and SIGHUP where it says that the terminal has gone. Caught from the
/// moment this is made.
#[derive(Debug)]
pub struct Signals {
    /// Where there is a terminal that can go.
    hangup: Option<Signal>,
    interrupt: Signal,
    terminate: Signal,
    meaningless: Vec<(i32, Signal)>,
}

impl Signals {
    /// Catches them.
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

/// SIGHUP as servers take it: the settings are to be read again. Caught from the moment this is made.
#[derive(Debug)]
pub struct Hangup(Signal);

impl Hangup {
    /// Catches it.
    pub fn catch() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// Whether we have a terminal, be it in the background.
pub(crate) fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
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
