//! Unix: signals are forwarded, and the proxy may be PID 1 of a container.

mod child;
pub mod init;
pub mod launch;
mod signals;
mod supervise;

use std::{
    ffi::OsString,
    io,
    process::{Command, ExitCode},
};

use rustix::process::Signal;

use self::child::{Reap, killed_by};
pub(crate) use self::{child::Child, signals::Signals, supervise::supervise};
use super::SpawnError;
use crate::net::descriptors::DescriptorLimit;

/// A command for `program`, a name and arguments, with the limit of file descriptors that it gets.
pub(super) fn command(program: &[OsString], descriptors: &DescriptorLimit) -> Command {
    launch::command(program, descriptors)
}

/// Starts a [`command`].
pub(super) fn spawn(mut command: Command) -> io::Result<Child> {
    Child::spawn(&mut command, Reap::Own)
}

/// The exit code after a signal that arrived before the program was started.
pub(crate) fn interrupted(signal: Signal, zero_on_sigterm: bool) -> ExitCode {
    let is_zero = signal == Signal::TERM && zero_on_sigterm;
    ExitCode::from(if is_zero { 0 } else { killed_by(signal) })
}
