//! The signals to forward, except those that the terminal has delivered to the child already.

use std::{
    fs::{self, File},
    future::poll_fn,
    io,
    task::Poll,
};

use rustix::{
    process::{Signal, getpgrp},
    termios::tcgetpgrp,
};
use tokio::signal::unix::{self, SignalKind, signal};

use crate::shutdown::{MEANINGLESS, has_terminal};

/// Always forwarded. gunicorn, nginx and others handle USR1, USR2 and WINCH.
const ALWAYS: [Signal; 7] = [
    Signal::TERM,
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
];

/// Job control, forwarded only without a terminal: with one, the kernel stops and continues both processes.
const WITHOUT_TERMINAL: [Signal; 3] = [Signal::TSTP, Signal::TTIN, Signal::TTOU];

/// Handlers of the signals to forward.
#[derive(Debug)]
pub(crate) struct Signals {
    forwarded: Vec<(Signal, unix::Signal)>,
    /// Handled so that they do not end the process.
    _ignored: Vec<unix::Signal>,
}

impl Signals {
    /// Installs the handlers. Signals that are ignored stay ignored, in the child too, as `nohup` and a shell's `&` rely on
    /// that. SIGTERM is always handled.
    pub(crate) fn catch() -> io::Result<Self> {
        let ignored = ignored();
        let job_control: &[Signal] = if has_terminal() {
            &[]
        } else {
            &WITHOUT_TERMINAL
        };
        // Bit 0 of SigIgn is signal 1 (proc_pid_status(5)).
        let is_ignored = |which: Signal| ignored >> which.as_raw().saturating_sub(1) & 1 == 1;
        let catch = |which: Signal| signal(SignalKind::from_raw(which.as_raw()));
        let mut forwarded = Vec::new();
        for &which in ALWAYS.iter().chain(job_control) {
            if which == Signal::TERM || !is_ignored(which) {
                forwarded.push((which, catch(which)?));
            }
        }
        let unforwarded = MEANINGLESS
            .iter()
            .copied()
            .filter(|which| !ALWAYS.contains(which) && !is_ignored(*which));
        Ok(Self {
            forwarded,
            _ignored: unforwarded.map(catch).collect::<io::Result<_>>()?,
        })
    }

    /// The next signal. Cancel safe.
    pub(crate) async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            for (which, stream) in &mut self.forwarded {
                if let Poll::Ready(Some(())) = stream.poll_recv(cx) {
                    return Poll::Ready(*which);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next signal that ends a program; others are dropped. Cancel safe.
    pub(crate) async fn ending(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if [Signal::TERM, Signal::INT, Signal::QUIT, Signal::HUP].contains(&signal) {
                return signal;
            }
        }
    }
}

/// Whether this process is in the terminal's foreground: then keys send INT and QUIT to the child as well.
pub(super) fn is_in_foreground() -> bool {
    File::open("/dev/tty")
        .is_ok_and(|terminal| tcgetpgrp(&terminal).is_ok_and(|foreground| foreground == getpgrp()))
}

/// The ignored signals, one bit each from 1 on; none if the system does not report them.
fn ignored() -> u64 {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| parse_ignored(&status))
        .unwrap_or(0)
}

fn parse_ignored(status: &str) -> Option<u64> {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status = "Name:\tx\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001003\nSigCgt:\t0\n";
        assert_eq!(parse_ignored(status), Some(0x1003));
        assert_eq!(parse_ignored("Name:\tx\n"), None);
    }
}
