//! PID 1 of a container: reaps orphans, forwards signals, and ends with the exit code of its child.
//!
//! The proxy runs as that child, so that it can wait for its own children (a credential command, the program of `exec`):
//! within one process, the reaper of all would collect their status first.

use std::{ffi::OsString, io, process::ExitCode};

use rustix::process::Signal;

use super::{
    child::{Child, Event, Reap, this_executable},
    signals::{Signals, is_in_foreground},
};

/// Runs this executable as a child with the same arguments; returns its exit code.
pub fn run(arguments: &[OsString]) -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::catch()?;
        let (name, arguments) = arguments.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut child = Child::spawn(this_executable(name).args(arguments), Reap::All)?;
        loop {
            tokio::select! {
                event = child.next() => if let Event::Ended(code) = event {
                    return Ok(ExitCode::from(code));
                },
                signal = signals.next() => {
                    // The terminal sends these to its whole foreground process group, so to the child, too.
                    let from_keys = [Signal::INT, Signal::QUIT].contains(&signal);
                    if !(from_keys && is_in_foreground()) {
                        child.send(signal);
                    }
                }
            }
        }
    })
}
