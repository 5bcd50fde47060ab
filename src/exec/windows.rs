//! Windows: the console sends its events to the child as well, and nothing can be forwarded. The child is in a job object,
//! which ends it with the proxy.

use std::{
    ffi::OsString,
    future::pending,
    io,
    pin::pin,
    process::{Command, ExitCode, ExitStatus},
    time::Duration,
};

use tokio::{
    process,
    time::{Instant, sleep_until},
};
use win32job::{ExtendedLimitInfo, Job};

use super::SpawnError;
use crate::{
    net::descriptors::DescriptorLimit,
    shutdown::{self, Cause},
};

/// The longest part of the grace time that is kept for the sessions.
const MAX_SESSION_GRACE: Duration = Duration::from_secs(1);
/// STATUS_CONTROL_C_EXIT: how a program ends that does not handle Ctrl-C.
const CONTROL_C_EXIT: i32 = 0xC000_013A_u32.cast_signed();
/// What a Unix shell reports for that.
const INTERRUPTED: u8 = 130;
/// The exit code of a program that is killed.
const KILLED: u8 = 1;

/// The last step before the program, which Windows does not need.
pub mod launch {
    use super::{ExitCode, OsString, SpawnError};

    /// Does nothing.
    pub fn run(_: &[OsString]) -> Option<Result<ExitCode, SpawnError>> {
        None
    }
}

/// PID 1 of a container, which Windows does not have.
pub mod init {
    use super::{ExitCode, OsString, io};

    /// Fails.
    pub fn run(_: &[OsString]) -> io::Result<ExitCode> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A running child.
#[derive(Debug)]
pub(crate) struct Child {
    process: process::Child,
    id: u32,
    /// The kernel kills the child when this is closed, as it is at the end of this process, whatever its cause.
    job: Job,
}

impl Child {
    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The code at its end. Cancel safe.
    async fn end(&mut self) -> u8 {
        let code = match self.process.wait().await {
            Ok(status) => code(status),
            Err(error) => {
                tracing::warn!(%error, "cannot wait for the program");
                KILLED
            }
        };
        // What it has started may outlive it, as on Unix.
        let _ = self.job.set_extended_limit_info(&ExtendedLimitInfo::new());
        code
    }
}

fn code(status: ExitStatus) -> u8 {
    match status.code() {
        Some(CONTROL_C_EXIT) => INTERRUPTED,
        // An `ExitCode` has no more than eight bits; an error must not become a success.
        Some(code) => u8::try_from(code).unwrap_or(KILLED),
        None => KILLED,
    }
}

/// A command for `program`, a name and arguments.
pub(super) fn command(program: &[OsString], _: &DescriptorLimit) -> Command {
    let (name, arguments) = program.split_first().unzip();
    let mut command = Command::new(name.cloned().unwrap_or_default());
    command.args(arguments.unwrap_or_default());
    command
}

/// Starts a [`command`].
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    let mut limit = ExtendedLimitInfo::new();
    limit.limit_kill_on_job_close();
    let job = Job::create_with_limit_info(&limit).map_err(io::Error::other)?;
    let process = process::Command::from(command).spawn()?;
    let (id, handle) = process.id().zip(process.raw_handle()).unzip();
    if let Some(handle) = handle {
        job.assign_process(handle as isize)
            .map_err(io::Error::other)?;
    }
    Ok(Child {
        process,
        id: id.unwrap_or_default(),
        job,
    })
}

/// The exit code after an event that arrived before the program was started.
pub(crate) fn interrupted(cause: Cause, zero_on_sigterm: bool) -> ExitCode {
    cause.exit_code(zero_on_sigterm)
}

/// The events of the console.
#[derive(Debug)]
pub(crate) struct Signals(shutdown::Signals);

impl Signals {
    /// Starts to catch them.
    pub(crate) fn catch() -> io::Result<Self> {
        shutdown::Signals::catch().map(Self)
    }

    /// The next one that ends a program, as all do. Cancel safe.
    pub(crate) async fn ending(&mut self) -> Cause {
        self.0.next().await
    }
}

/// The end of a child.
pub(crate) struct Exit {
    /// Its exit code.
    pub(crate) code: u8,
    terminated: Option<Termination>,
}

/// The request to end, which the child has got from the console, or a kill in its place.
struct Termination {
    cause: Cause,
    at: Instant,
}

impl Exit {
    /// The time since the child was requested to end; zero if it ended by itself.
    pub(crate) fn since_termination(&self) -> Duration {
        let terminated = self.terminated.as_ref();
        terminated.map_or(Duration::ZERO, |terminated| terminated.at.elapsed())
    }

    /// The exit code of the proxy.
    pub(crate) fn exit_code(&self, zero_on_sigterm: bool) -> ExitCode {
        let as_requested = match self.terminated.as_ref().map(|terminated| terminated.cause) {
            Some(Cause::Request) => true,
            Some(Cause::Terminate) => zero_on_sigterm,
            Some(Cause::Hangup | Cause::Interrupt) | None => false,
        };
        ExitCode::from(if as_requested { 0 } else { self.code })
    }
}

/// Waits for the child's end. Ctrl-C is the child's; after another event it is killed before the end of `grace`, and at
/// `request` at once, since Windows has no request that a program without a window would handle.
pub(crate) async fn supervise(
    mut child: Child,
    grace: Duration,
    request: impl Future<Output = ()>,
    signals: &mut Signals,
) -> Exit {
    // The program's sessions must end within the grace time, too.
    let kill_after = grace.saturating_sub((grace / 10).min(MAX_SESSION_GRACE));
    let mut request = pin!(request);
    let mut terminated: Option<Termination> = None;
    let mut kill_at = None;
    loop {
        let (cause, grace) = tokio::select! {
            code = child.end() => return Exit { code, terminated },
            cause = signals.ending() => match cause {
                Cause::Interrupt => continue,
                _ if terminated.is_some() => {
                    kill_at = Some(Instant::now());
                    continue;
                }
                cause => (cause, kill_after),
            },
            // A future that has completed must not be polled again.
            () = &mut request, if terminated.is_none() => (Cause::Request, Duration::ZERO),
            () = until(kill_at) => {
                tracing::warn!(pid = child.id, "program did not end in time; killed");
                kill_at = None;
                if let Err(error) = child.process.start_kill() {
                    tracing::warn!(%error, "cannot kill the program");
                    return Exit { code: KILLED, terminated };
                }
                continue;
            }
        };
        let at = Instant::now();
        terminated = Some(Termination { cause, at });
        kill_at = Some(at + grace);
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
