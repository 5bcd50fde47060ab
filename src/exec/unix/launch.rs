//! The last step before the program: this executable as the child sets what a process can set only for itself, and is then
//! replaced by the program.
//!
//! It restores the file descriptor limit, and requests a signal for the death of the parent: otherwise the program would
//! survive a SIGKILL of `exec`, without its database. Doing this between `fork` and `exec` would need `unsafe`.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use rustix::process::{Pid, Signal, getpid, getppid};

use super::{
    SpawnError,
    child::{killed_by, this_executable},
};
use crate::net::descriptors::DescriptorLimit;

/// The hidden subcommand, followed by the parent's id, the limit, and the program with its arguments.
const LAUNCH: &str = "__launch";
/// Sent when the parent has died, so that the program can shut down in order.
const PARENT_DIED: Signal = Signal::TERM;

/// A command for `program`, a name and arguments, with this file descriptor limit, that ends with this process.
///
/// Must be spawned by the main thread: the kernel takes the end of the spawning thread for the parent's death.
pub(super) fn command(program: &[OsString], descriptors: &DescriptorLimit) -> Command {
    let name = std::env::args_os().next().unwrap_or_default();
    let mut command = this_executable(&name);
    command
        .arg(LAUNCH)
        .arg(getpid().as_raw_nonzero().to_string())
        .arg(descriptors.soft().to_string())
        .args(program);
    command
}

/// Runs the program if the arguments are those of [`command`]. Returns an exit code if the parent has died, and an error if the
/// program cannot be run.
pub fn run(arguments: &[OsString]) -> Option<Result<ExitCode, SpawnError>> {
    let [_, word, parent, limit, program @ ..] = arguments else {
        return None;
    };
    if word != LAUNCH {
        return None;
    }
    Some(exec_program(parent, limit, program))
}

fn exec_program(
    parent: &OsStr,
    limit: &OsStr,
    program: &[OsString],
) -> Result<ExitCode, SpawnError> {
    let (name, arguments) = program.split_first().unzip();
    let name = name.cloned().unwrap_or_default();
    let spawn = |source| SpawnError {
        command: name.to_string_lossy().into_owned(),
        source,
    };
    let number = |text: &OsStr| text.to_str()?.parse::<u64>().ok();
    let parent = number(parent).and_then(|id| Pid::from_raw(id.try_into().ok()?));
    let (Some(parent), Some(limit)) = (parent, number(limit)) else {
        return Err(spawn(io::ErrorKind::InvalidInput.into()));
    };
    // A program that uses select(2) fails with descriptors above 1,023, which the raised limit would allow.
    DescriptorLimit::lower_to(limit).map_err(|error| spawn(error.into()))?;
    // Other systems have no such signal: there the program survives a proxy that is killed.
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(PARENT_DIED))
        .map_err(|error| spawn(error.into()))?;
    // If the parent has died before, no signal is sent.
    if getppid() != Some(parent) {
        return Ok(ExitCode::from(killed_by(PARENT_DIED)));
    }
    let failure = Command::new(&name)
        .args(arguments.unwrap_or_default())
        .exec();
    Err(spawn(failure))
}
