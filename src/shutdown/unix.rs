//! Signals.

use std::{
    fs::File,
    future::{pending, poll_fn},
    io,
    task::Poll,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Cause;

/// Signals without a meaning for the proxy that would end the process: those that other programs use to reopen logs or to
/// raise the log level, those of timers, and that of a file at its size limit, which is also an error of the write.
pub(crate) const MEANINGLESS: &[rustix::process::Signal] = {
    use rustix::process::Signal;
    &[
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        #[cfg(target_os = "linux")]
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

/// SIGHUP, which reads the settings again.
#[derive(Debug)]
pub struct ReloadSignal(Signal);

impl ReloadSignal {
    /// Starts to catch it.
    pub fn catch() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}
