//! The last step before the program: this binary as the child, which sets what a process can set only for itself, and then
//! becomes the program.
//!
//! That is the limit of open files as it was before ours was raised, and the signal that the kernel sends when the parent
//! has died: without it a program whose `exec` was killed by SIGKILL lives on, with a database that is gone. Between `fork`
//! and `exec` this would be `unsafe`.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

use super::{
    ExecError,
    child::{killed_by, ourselves},
};
use crate::descriptors::DescriptorLimit;

/// Stands before the parent's id, the limit, and the program with its arguments.
const LAUNCH: &str = "__launch";
/// When the parent has died: the program may end its own children and what it is about. Whoever ends `exec` by SIGKILL
/// after a SIGTERM has had it sent to the program already.
const PARENT_DIED: Signal = Signal::TERM;

/// A command that becomes `program`, a name and arguments, with this limit of open files, and that ends with us.
///
/// It must be started by a thread that lives as long as the process: the kernel takes that thread's end for the parent's.
pub(super) fn command(program: &[OsString], descriptors: &DescriptorLimit) -> Command {
    let name = std::env::args_os().next().unwrap_or_default();
    let mut command = ourselves(&name);
    command
        .arg(LAUNCH)
        .arg(getpid().as_raw_nonzero().to_string())
        .arg(descriptors.soft().to_string())
        .args(program);
    command
}

/// Becomes the program if that is what these arguments ask for; returns the failure if it cannot.
///
/// # Errors
/// The exit code after the parent has died meanwhile is no error.
pub fn run(arguments: &[OsString]) -> Option<Result<ExitCode, ExecError>> {
    let [_, word, parent, limit, program @ ..] = arguments else {
        return None;
    };
    if word != LAUNCH {
        return None;
    }
    Some(become_program(parent, limit, program))
}

fn become_program(
    parent: &OsStr,
    limit: &OsStr,
    program: &[OsString],
) -> Result<ExitCode, ExecError> {
    let (name, arguments) = program.split_first().unzip();
    let name = name.cloned().unwrap_or_default();
    let spawn = |source| ExecError::Spawn {
        command: name.to_string_lossy().into_owned(),
        source,
    };
    let number = |text: &OsStr| text.to_str()?.parse::<u64>().ok();
    let parent = number(parent)
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw)
        .ok_or_else(|| spawn(io::ErrorKind::InvalidInput.into()))?;
    let limit = number(limit).ok_or_else(|| spawn(io::ErrorKind::InvalidInput.into()))?;
    DescriptorLimit::lower_to(limit).map_err(|error| spawn(error.into()))?;
    set_parent_process_death_signal(Some(PARENT_DIED)).map_err(|error| spawn(error.into()))?;
    // It may have died before that: then the signal does not come.
    if getppid() != Some(parent) {
        return Ok(ExitCode::from(killed_by(PARENT_DIED)));
    }
    let failure = Command::new(&name)
        .args(arguments.unwrap_or_default())
        .exec();
    Err(spawn(failure))
}
