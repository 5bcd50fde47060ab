//! A program as child process: its environment, its signals, its end. It knows nothing of the proxy beside it.
//!
//! On SIGTERM the program ends first, as it may need its database to finish. The rest of the grace time is left to its
//! sessions.

mod child;
mod environment;
pub mod init;
pub mod launch;
mod signals;
mod supervise;

use std::{ffi::OsString, io, process::ExitCode};

use rustix::process::Signal;

use self::child::{Reap, killed_by};
pub use self::environment::ProxyAddress;
pub(crate) use self::{child::Child, signals::Signals, supervise::supervise};
use crate::net::descriptors::DescriptorLimit;

/// The program cannot be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot run `{command}`")]
pub struct SpawnError {
    command: String,
    source: io::Error,
}

impl SpawnError {
    /// The codes of shells and `env`: 127 for a program that does not exist, 126 for one that cannot be run.
    pub(crate) fn exit_code(&self) -> u8 {
        match self.source.kind() {
            io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}

/// A program to start.
#[derive(Debug)]
pub(crate) struct Program {
    /// Its name and arguments.
    pub(crate) command: Vec<OsString>,
    /// The variables of this process.
    pub(crate) inherited: Vec<(OsString, OsString)>,
    /// The names of secrets among them that the program does not get.
    pub(crate) secrets: Vec<String>,
    /// The file descriptor limit before it was raised.
    pub(crate) descriptors: DescriptorLimit,
}

impl Program {
    pub(crate) fn name(&self) -> String {
        let name = self.command.first();
        name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Starts it as a client of `proxy`. Call it on the main thread, whose end the kernel takes for the parent's.
    pub(crate) fn spawn(&self, proxy: &ProxyAddress) -> Result<Child, SpawnError> {
        let mut command = launch::command(&self.command, &self.descriptors);
        let inherited = self.inherited.iter().cloned();
        command
            // Removed variables would be inherited otherwise.
            .env_clear()
            .envs(environment::variables(inherited, proxy, &self.secrets));
        Child::spawn(&mut command, Reap::Own).map_err(|source| SpawnError {
            command: self.name(),
            source,
        })
    }
}

/// The exit code after a signal that arrived before the program was started.
pub(crate) fn interrupted(signal: Signal, zero_on_sigterm: bool) -> ExitCode {
    let is_zero = signal == Signal::TERM && zero_on_sigterm;
    ExitCode::from(if is_zero { 0 } else { killed_by(signal) })
}
