//! A process that we have started, up to its end.
//!
//! It is waited for by hand: as PID 1 we reap what is not ours as well, and a child that stops is of interest.

use std::{io, os::unix::process::CommandExt, process::Command};

use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait, waitpid},
};
use tokio::signal::unix::{self, SignalKind, signal};

/// What a shell adds to the number of the signal that has killed a program.
const KILLED_BY: u8 = 128;

/// What happens to a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It has ended with this code, 128 and more when killed.
    Ended(u8),
    /// It is stopped, as by job control.
    Stopped,
}

/// Whose status is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reap {
    /// That of every process without another parent: right only where nobody else starts any.
    Everyone,
    /// The child's alone.
    Own,
}

/// A child that has been started. Dropping it leaves it alone.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    reap: Reap,
    changes: unix::Signal,
}

impl Child {
    /// Starts it, with our standard streams.
    pub(super) fn spawn(command: &mut Command, reap: Reap) -> io::Result<Self> {
        // Before the start, lest its end be missed.
        let changes = signal(SignalKind::child())?;
        let id = command.spawn()?.id();
        let pid = i32::try_from(id).ok().and_then(Pid::from_raw);
        Ok(Self {
            pid: pid.ok_or(io::ErrorKind::InvalidData)?,
            reap,
            changes,
        })
    }

    /// Its process id.
    pub(super) fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends it a signal. Only until it has ended: then its id may be another's.
    pub(super) fn send(&self, signal: Signal) {
        if let Err(error) = kill_process(self.pid, signal) {
            tracing::warn!(%error, signal = signal.as_raw(), "cannot pass a signal on");
        }
    }

    /// The next thing that happens to it. Cancel safe.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.look() {
                return event;
            }
            // Not before we end ourselves does the stream.
            if self.changes.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn look(&self) -> Option<Event> {
        loop {
            let seen = match self.reap {
                Reap::Everyone => wait(WaitOptions::NOHANG),
                Reap::Own => waitpid(Some(self.pid), WaitOptions::NOHANG | WaitOptions::UNTRACED),
            };
            match seen {
                Ok(Some((pid, status))) if pid == self.pid => return Some(event(status)),
                // An orphan, buried; there may be more.
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return None,
                // Somebody else has collected the status: it has ended, and nobody knows how.
                Err(_) => return Some(Event::Ended(1)),
            }
        }
    }
}

fn event(status: WaitStatus) -> Event {
    if status.stopped() {
        return Event::Stopped;
    }
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    Event::Ended(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => byte(code),
        (None, Some(signal)) => KILLED_BY.saturating_add(byte(signal)),
        (None, None) => 1,
    })
}

/// The exit code of a program that a signal has ended.
pub(super) fn killed_by(signal: Signal) -> u8 {
    KILLED_BY.saturating_add(u8::try_from(signal.as_raw()).unwrap_or(0))
}

/// A command that is this very program with other arguments.
pub(super) fn ourselves(name: &std::ffi::OsStr) -> Command {
    // Right also when the file has been replaced meanwhile; without /proc the name has to do.
    let this = std::path::Path::new("/proc/self/exe");
    let mut command = Command::new(if this.exists() {
        this.as_os_str()
    } else {
        name
    });
    command.arg0(name);
    command
}
