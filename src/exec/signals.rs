//! The signals that are passed on, and which of them the terminal has delivered already.

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

/// Passed on whoever sends them. USR1, USR2 and WINCH mean something to gunicorn, nginx and others.
const ALWAYS: [Signal; 7] = [
    Signal::TERM,
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
];

/// Job control: left to the kernel where there is a terminal, so that we stop and go on with our child.
const WITHOUT_TERMINAL: [Signal; 3] = [Signal::TSTP, Signal::TTIN, Signal::TTOU];

/// Signals to pass on, caught from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    passed_on: Vec<(Signal, unix::Signal)>,
    /// Caught, so that they do not end us.
    _meaningless: Vec<unix::Signal>,
}

impl Signals {
    /// Catches them. What was ignored when we began stays ignored, in our child too: `nohup` and a shell's `&` rely on
    /// that. SIGTERM is always caught.
    pub fn catch() -> io::Result<Self> {
        let ignored = ignored();
        let job_control: &[Signal] = if has_terminal() {
            &[]
        } else {
            &WITHOUT_TERMINAL
        };
        let is_ignored = |which: Signal| ignored >> which.as_raw().saturating_sub(1) & 1 == 1;
        let catch = |which: Signal| signal(SignalKind::from_raw(which.as_raw()));
        let mut passed_on = Vec::new();
        for &which in ALWAYS.iter().chain(job_control) {
            if which == Signal::TERM || !is_ignored(which) {
                passed_on.push((which, catch(which)?));
            }
        }
        let meaningless = MEANINGLESS
            .into_iter()
            .filter(|which| !ALWAYS.contains(which) && !is_ignored(*which));
        Ok(Self {
            passed_on,
            _meaningless: meaningless.map(catch).collect::<io::Result<_>>()?,
        })
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            for (which, stream) in &mut self.passed_on {
                if let Poll::Ready(Some(())) = stream.poll_recv(cx) {
                    return Poll::Ready(*which);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// The next that ends a program by default; the others pass unseen. Cancel safe.
    pub async fn ending(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if [Signal::TERM, Signal::INT, Signal::QUIT, Signal::HUP].contains(&signal) {
                return signal;
            }
        }
    }
}

/// Whether we are in the terminal's foreground: then INT and QUIT come from its keys, and our child has had them too.
pub(super) fn terminal_is_ours() -> bool {
    File::open("/dev/tty")
        .is_ok_and(|terminal| tcgetpgrp(&terminal).is_ok_and(|foreground| foreground == getpgrp()))
}

/// The signals ignored now, a bit each from 1 on; none where the system does not tell.
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
