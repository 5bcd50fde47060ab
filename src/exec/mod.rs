//! `exec`: the proxy as the parent of one program, for places that run one process.
//!
//! The program begins once the proxy holds a credential, finds the proxy in its libpq variables, and sees the signals
//! that the proxy is sent. Its end is the proxy's end, and its exit code the proxy's.
//!
//! On SIGTERM the program goes first: it may still need its database to finish. Then the sessions drain, all within
//! `--max-sigterm-delay`. If the proxy cannot go on, the program is told by its connections, not killed.

mod child;
mod environment;
pub mod init;
pub mod launch;
mod signals;

use std::{
    ffi::OsString,
    future::pending,
    io::{self, IsTerminal},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use rustix::process::{Signal, getpid, kill_process};
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    child::{Child, Event, Reap, killed_by},
    signals::terminal_is_ours,
};
pub use self::{environment::Secrets, signals::Signals};
use crate::{
    app::{Running, StartError},
    config::{DurationSetting, Environment, PortSetting, Settings, Source},
    credential::{CredentialCell, CredentialError},
    descriptors::DescriptorLimit,
    protocol::error::Report,
    shutdown::Cause,
};

/// The longest part of the time to end in that is kept for the sessions, after the program's share.
const KEPT_FOR_SESSIONS: Duration = Duration::from_secs(1);
/// How often a credential is asked for that the workspace refuses for now.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a killed program may take to be gone; one that waits for a device may never be.
const GONE: Duration = Duration::from_secs(1);
/// What the log says in a terminal that the program draws on.
const QUIET_FILTER: &str = "warn";

/// What to run, and with which proxy.
#[derive(Args, Clone, Debug)]
pub struct ExecArgs {
    /// Keep the variables that hold secrets of the workspace from CMD
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Child")]
    pub strip_secrets: Option<bool>,
    /// As for `serve`.
    #[command(flatten)]
    pub settings: Settings,
    /// The program to run, and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Why the program was not run.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No credential came in time.
    #[error("`{command}` was not started")]
    Credential {
        /// The program.
        command: String,
        /// Why there is none.
        #[source]
        source: CredentialError,
    },
    /// The endpoint is not found, or refuses the test login.
    #[error("`{command}` was not started: {}", report.line())]
    Endpoint {
        /// The program.
        command: String,
        /// What a client would be told.
        report: Box<Report>,
    },
    /// The program cannot be started.
    #[error("cannot run `{command}`")]
    Spawn {
        /// The program.
        command: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The test login was refused.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl ExecError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Credential { source, .. } => source.hint(),
            Self::Endpoint { report, .. } => report.hint.clone(),
            Self::Spawn { .. } => None,
            Self::Start(error) => error.hint(),
        }
    }

    /// As shells and `env` have it: 127 for a program that is not there, 126 for one that cannot be run, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Spawn { .. } => 126,
            Self::Credential { .. } | Self::Endpoint { .. } | Self::Start(_) => 1,
        }
    }
}

/// The settings of a proxy that serves its child: any free port and no health port unless asked for, since two must
/// live side by side; and the child's end is the proxy's, not its being idle.
pub fn source(mut given: Settings, environment: Environment) -> Source {
    let quiet = io::stderr().is_terminal().then(|| QUIET_FILTER.to_owned());
    given.exit_when_idle = Some(DurationSetting(Duration::ZERO));
    Source::new(given, environment).with_defaults(Settings {
        port: Some(PortSetting::Port(0)),
        http_port: Some(PortSetting::None),
        log_filter: quiet,
        ..Settings::default()
    })
}

/// A program that is yet to be started.
#[derive(Debug)]
pub struct Program {
    /// Its name and arguments.
    pub command: Vec<OsString>,
    /// The variables that it would have without us.
    pub inherited: Vec<(OsString, OsString)>,
    /// What it does not get of them.
    pub secrets: Secrets,
    /// The limit of open files that it would have without us.
    pub descriptors: DescriptorLimit,
}

impl Program {
    fn name(&self) -> String {
        self.command
            .first()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Waits until `running` holds a credential, `patience` at most, and starts the program.
    ///
    /// Not cancel safe: a program may have been started. Until the last step it only waits.
    async fn start(&self, running: &Running, patience: Duration) -> Result<Child, ExecError> {
        let deadline = Instant::now() + patience;
        running.ready().await?;
        let target = running.target().await;
        let target = target.map_err(|refusal| ExecError::Endpoint {
            command: self.name(),
            report: Box::new(refusal.report),
        })?;
        first_credential(running.credentials(), deadline)
            .await
            .map_err(|source| ExecError::Credential {
                command: self.name(),
                source,
            })?;
        let mut command = launch::command(&self.command, &self.descriptors);
        command.env_clear().envs(environment::variables(
            self.inherited.iter().cloned(),
            &target,
            &self.secrets,
        ));
        // By the main thread, which drives the command to its end.
        Child::spawn(&mut command, Reap::Own).map_err(|source| ExecError::Spawn {
            command: self.name(),
            source,
        })
    }
}

/// Waits for a credential, also where a client would be refused early because the workspace asks to wait for long.
async fn first_credential(
    credentials: &CredentialCell,
    deadline: Instant,
) -> Result<(), CredentialError> {
    loop {
        match credentials.get(deadline).await {
            Ok(_) => return Ok(()),
            Err(CredentialError::Failed(error))
                if error.kind.is_transient() && Instant::now() + ASK_EVERY < deadline =>
            {
                sleep(ASK_EVERY).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The exit code after a signal that came before there was a program to pass it on to.
pub fn interrupted(signal: Signal, zero_on_sigterm: bool) -> ExitCode {
    let is_zero = signal == Signal::TERM && zero_on_sigterm;
    ExitCode::from(if is_zero { 0 } else { killed_by(signal) })
}

/// Runs `program` beside the proxy, to the end of both, and returns the exit code of both.
///
/// # Errors
/// When the program was not started.
pub async fn run(
    running: Running,
    program: &Program,
    mut signals: Signals,
    patience: Duration,
    zero_on_sigterm: bool,
) -> Result<ExitCode, ExecError> {
    let started = tokio::select! {
        started = program.start(&running, patience) => Ok(started),
        signal = signals.ending() => Err(signal),
    };
    let child = match started {
        Ok(Ok(child)) => child,
        Ok(Err(error)) => {
            running.end_within(Duration::ZERO, pending()).await;
            return Err(error);
        }
        Err(signal) => {
            running.end_within(Duration::ZERO, pending()).await;
            return Ok(interrupted(signal, zero_on_sigterm));
        }
    };
    tracing::info!(command = program.name(), pid = child.id(), "started");
    let (code, ending) = supervise(child, &running, &mut signals).await;
    tracing::info!(command = program.name(), code, "ended");
    let spent = ending.map_or(Duration::ZERO, |(_, since)| since.elapsed());
    let grace = running.grace().saturating_sub(spent);
    let hurry = async {
        signals.ending().await;
    };
    running.end_within(grace, hurry).await;
    // A program that ends by the signal it was passed has done what was asked of it.
    let is_zero = code == killed_by(Signal::TERM)
        && match ending.map(|(cause, _)| cause) {
            Some(Cause::Request) => true,
            Some(Cause::Terminate) => zero_on_sigterm,
            Some(Cause::Hangup | Cause::Interrupt) | None => false,
        };
    Ok(ExitCode::from(if is_zero { 0 } else { code }))
}

/// Passes signals on until the child has ended; returns its code, and why and when it was told to end, if it was.
async fn supervise(
    mut child: Child,
    running: &Running,
    signals: &mut Signals,
) -> (u8, Option<(Cause, Instant)>) {
    let grace = running.grace();
    let patience = grace.saturating_sub((grace / 10).min(KEPT_FOR_SESSIONS));
    let mut ending: Option<(Cause, Instant)> = None;
    let mut kill_at = None;
    let mut give_up_at = None;
    loop {
        let told = tokio::select! {
            event = child.next() => match event {
                Event::Ended(code) => return (code, ending),
                Event::Stopped => {
                    stop_with(&child);
                    None
                }
            },
            signal = signals.next() => match signal {
                Signal::TERM if ending.is_some() => {
                    kill_at = Some(Instant::now());
                    None
                }
                Signal::TERM => Some(Cause::Terminate),
                // From the keys of a terminal that our child has as well.
                Signal::INT | Signal::QUIT if terminal_is_ours() => None,
                signal => {
                    child.send(signal);
                    None
                }
            },
            () = running.asked_to_end(), if ending.is_none() => Some(Cause::Request),
            () = until(kill_at) => {
                tracing::warn!(pid = child.id(), "the program does not end by SIGTERM; killed");
                child.send(Signal::KILL);
                kill_at = None;
                give_up_at = Some(Instant::now() + GONE);
                None
            }
            () = until(give_up_at) => return (killed_by(Signal::KILL), ending),
        };
        if let Some(cause) = told {
            let now = Instant::now();
            ending = Some((cause, now));
            kill_at = Some(now + patience);
            child.send(Signal::TERM);
            // A stopped program would not see it.
            child.send(Signal::CONT);
        }
    }
}

/// A child that stops itself (not through the terminal, which stops us both) stops us too: else whoever watches us, the
/// shell, would not take the terminal back.
fn stop_with(child: &Child) {
    if terminal_is_ours() && kill_process(getpid(), Signal::STOP).is_ok() {
        child.send(Signal::CONT);
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
