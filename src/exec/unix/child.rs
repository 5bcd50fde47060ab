//! A child process from its start to its end.
//!
//! Its status is collected here instead of by tokio: as PID 1, the proxy reaps orphans too, and stopped children matter.

use std::{io, os::unix::process::CommandExt, process::Command};

use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait, waitpid},
};
use tokio::signal::unix::{self, SignalKind, signal};

/// What shells add to the number of the signal that killed a program.
const KILLED_BY: u8 = 128;

/// A change of a child's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It ended with this code; 128 and more if a signal killed it.
    Ended(u8),
    /// It is stopped, as by job control.
    Stopped,
}

/// The processes whose status is collected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reap {
    /// Every child and orphan. Only for a process that starts no other children.
    All,
    /// The child alone.
    Own,
}

/// A running child. Dropping it does not end it.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    reap: Reap,
    changes: unix::Signal,
}

impl Child {
    /// Starts it with the standard streams of this process.
    pub(super) fn spawn(command: &mut Command, reap: Reap) -> io::Result<Self> {
        // Before the start, so that its end is not missed.
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
    pub(crate) fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends it a signal. Must not be called after its end, as the process id may be reused.
    pub(super) fn send(&self, signal: Signal) {
        if let Err(error) = kill_process(self.pid, signal) {
            tracing::warn!(%error, signal = signal.as_raw(), "cannot forward a signal");
        }
    }

    /// The next change. Cancel safe.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            // First, since the kernel merges SIGCHLDs: one may stand for several changes.
            if let Some(event) = self.poll() {
                return event;
            }
            // The stream ends with the runtime only.
            if self.changes.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn poll(&self) -> Option<Event> {
        loop {
            let seen = match self.reap {
                Reap::All => wait(WaitOptions::NOHANG),
                Reap::Own => waitpid(Some(self.pid), WaitOptions::NOHANG | WaitOptions::UNTRACED),
            };
            match seen {
                Ok(Some((pid, status))) if pid == self.pid => return Some(event(status)),
                // An orphan was reaped; there may be more.
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return None,
                // The status was collected elsewhere; the exit code is unknown.
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

/// The exit code of a program that a signal killed.
pub(super) fn killed_by(signal: Signal) -> u8 {
    KILLED_BY.saturating_add(u8::try_from(signal.as_raw()).unwrap_or(0))
}

/// A command that runs this executable again.
pub(super) fn this_executable(name: &std::ffi::OsStr) -> Command {
    // Still correct after the file has been replaced; without /proc, the name is used.
    let this = std::path::Path::new("/proc/self/exe");
    let mut command = Command::new(if this.exists() {
        this.as_os_str()
    } else {
        name
    });
    command.arg0(name);
    command
}
