//! A program as child process: its environment, its signals, its end. It knows nothing of the proxy beside it.
//!
//! On SIGTERM the program ends first, as it may need its database to finish. The rest of the grace time is left to its
//! sessions.

mod environment;
#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::{ffi::OsString, io};

pub use self::environment::ProxyAddress;
pub(crate) use self::system::{Child, Signals, interrupted, supervise};
pub use self::system::{init, launch};
#[cfg(unix)]
use self::unix as system;
#[cfg(windows)]
use self::windows as system;
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
        let mut command = system::command(&self.command, &self.descriptors);
        let inherited = self.inherited.iter().cloned();
        command
            // Removed variables would be inherited otherwise.
            .env_clear()
            .envs(environment::variables(inherited, proxy, &self.secrets));
        system::spawn(command).map_err(|source| SpawnError {
            command: self.name(),
            source,
        })
    }
}
