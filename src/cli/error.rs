//! The error of a command, its hint and its exit code.

use std::{error::Error, io, process::ExitCode};

use super::PROGRAM;
use crate::{
    app::AppError, config::ConfigError, exec::SpawnError, listener::ListenError, telemetry,
};

/// A bad command line or configuration, or a failed start.
const FAILURE: u8 = 1;

/// A command that failed, or a request for help.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A failure of the command.
    #[error("{}", telemetry::chain(source.as_ref()))]
    Failed {
        /// The error.
        source: Box<dyn Error>,
        /// What the user can do.
        hint: Option<String>,
        /// The exit code.
        code: u8,
    },
    /// An invalid command line; also help and version, which clap reports as errors.
    #[error(transparent)]
    Usage(#[from] clap::Error),
}

impl CommandError {
    pub(super) fn new(source: impl Into<Box<dyn Error>>, hint: Option<String>) -> Self {
        Self::Failed {
            source: source.into(),
            hint,
            code: FAILURE,
        }
    }

    pub(super) fn signals(error: io::Error) -> Self {
        Self::new(Context("cannot handle signals", error), None)
    }

    pub(super) fn runtime(error: io::Error) -> Self {
        Self::new(Context("cannot start the runtime", error), None)
    }

    /// Prints the error and returns the exit code. There may be no log yet.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Usage(message) => {
                // clap reports `--help` and `--version` as errors, which go to standard output and succeed.
                let _ = message.print();
                ExitCode::from(if message.use_stderr() { FAILURE } else { 0 })
            }
            Self::Failed { source, hint, code } => {
                let mut text = format!("{PROGRAM}: {}\n", telemetry::chain(source.as_ref()));
                if let Some(hint) = hint {
                    // A hint may quote a name from the settings or the workspace.
                    text.extend(["hint: ", &telemetry::escape(&hint), "\n"]);
                }
                telemetry::write_stderr(&text);
                ExitCode::from(code)
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Context(&'static str, #[source] io::Error);

macro_rules! from_errors {
    ($($error:ty),+ $(,)?) => {
        $(impl From<$error> for CommandError {
            fn from(error: $error) -> Self {
                let hint = error.hint().map(str::to_owned);
                Self::new(error, hint)
            }
        })+
    };
}

from_errors!(ConfigError, ListenError, AppError);

impl From<telemetry::LogError> for CommandError {
    fn from(error: telemetry::LogError) -> Self {
        Self::new(error, None)
    }
}

#[cfg(feature = "demo")]
impl From<crate::emulator::EmulatorError> for CommandError {
    fn from(error: crate::emulator::EmulatorError) -> Self {
        Self::new(error, None)
    }
}

impl From<SpawnError> for CommandError {
    fn from(error: SpawnError) -> Self {
        let code = error.exit_code();
        Self::Failed {
            source: error.into(),
            hint: None,
            code,
        }
    }
}

impl From<io::Error> for CommandError {
    fn from(error: io::Error) -> Self {
        Self::new(error, None)
    }
}
