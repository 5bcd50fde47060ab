//! PID 1 of a container: bury orphans, pass signals on, end with the exit code of the one that counts.
//!
//! The proxy itself then runs as our child, so that its own children (a credential command, the program of `exec`) are
//! its own to wait for: two who collect the status of all comers would steal each other's.

use std::{ffi::OsString, io, process::ExitCode};

use rustix::process::Signal;

use super::{
    child::{Child, Event, Reap, ourselves},
    signals::{Signals, terminal_is_ours},
};

/// Runs this program again with the same arguments, as a child, and returns its exit code.
pub fn run(arguments: &[OsString]) -> io::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::catch()?;
        let (name, arguments) = arguments.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut child = Child::spawn(ourselves(name).args(arguments), Reap::Everyone)?;
        loop {
            tokio::select! {
                event = child.next() => if let Event::Ended(code) = event {
                    return Ok(ExitCode::from(code));
                },
                signal = signals.next() => {
                    let from_keys = [Signal::INT, Signal::QUIT].contains(&signal);
                    if !(from_keys && terminal_is_ours()) {
                        child.send(signal);
                    }
                }
            }
        }
    })
}
