//! Runs a program for its output: found on `PATH`, bounded in time and size, never through a shell.

use std::{
    env::split_paths,
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    time::timeout,
};
use zeroize::Zeroizing;

use super::{CallError, CallErrorKind, diagnosis::clean};
use crate::config::Variables;

/// The largest output that is read, of each kind.
const MAX_OUTPUT: u64 = 1024 * 1024;

/// The output of a program that ended.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Zeroizing<Vec<u8>>,
    /// One line, fit to be shown.
    pub(crate) stderr: String,
}

/// Why a program has no usable output.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    #[error("it does not start: {0}")]
    Start(#[source] io::Error),
    #[error("its output cannot be read: {0}")]
    Broken(#[source] io::Error),
    #[error("it did not end within {} seconds", .0.as_secs())]
    Timeout(Duration),
    #[error("it printed more than 1 MiB")]
    TooMuch,
}

impl CommandError {
    /// The error of a call that needs the program's output, by one rule for all programs: one that cannot be started needs a
    /// person, and one that started may have met an outage. `hint` is for the second.
    pub(crate) fn call_error(&self, message: impl Into<String>, hint: &str) -> CallError {
        let (kind, hint) = match self {
            Self::Start(_) => (
                CallErrorKind::Refused,
                "check that the program exists and that the proxy may execute it",
            ),
            Self::Broken(_) | Self::Timeout(_) => (CallErrorKind::Unavailable, hint),
            Self::TooMuch => (CallErrorKind::Malformed, hint),
        };
        CallError::new(kind, message)
            .with_detail(self.to_string())
            .with_hint(hint)
    }
}

/// Runs to the end, or kills. Cancel safe: the program is killed.
pub(crate) async fn run(
    program: &Path,
    arguments: &[&str],
    limit: Duration,
) -> Result<Output, CommandError> {
    let mut child = Command::new(program)
        .args(arguments)
        // A program that prompts reads the end of its input instead of waiting.
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(CommandError::Start)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // All at the same time: a program that fills one pipe would wait for its reader, and never end.
    let all = async { tokio::try_join!(read(stdout), read(stderr), child.wait()) };
    let (stdout, stderr, status) = timeout(limit, all)
        .await
        .map_err(|_| CommandError::Timeout(limit))?
        .map_err(CommandError::Broken)?;
    // Not for stderr, which holds messages only and is cut.
    if stdout.len() as u64 > MAX_OUTPUT {
        return Err(CommandError::TooMuch);
    }
    Ok(Output {
        status,
        stdout,
        stderr: clean(&String::from_utf8_lossy(&stderr)),
    })
}

/// Reads one byte more than the limit, which shows that there is more; the pipe closes then, so that the program ends.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    if let Some(pipe) = pipe {
        let mut limited = pipe.take(MAX_OUTPUT + 1);
        limited.read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// A row of a table of failures: parts of the program's messages, and the kind, message and hint of the error.
pub(super) type Failure = (
    &'static [&'static str],
    CallErrorKind,
    &'static str,
    &'static str,
);

/// The error of the first row with a part in what the program printed, in any case. The last row has the part "".
pub(super) fn explain(failures: &[Failure], stderr: &str) -> CallError {
    let words = stderr.to_ascii_lowercase();
    let has = |part: &&str| words.contains(&part.to_ascii_lowercase());
    let row = failures.iter().find(|(parts, ..)| parts.iter().any(has));
    let (_, kind, message, hint) = row.copied().unwrap_or(UNEXPLAINED);
    CallError::new(kind, message)
        .with_detail(stderr)
        .with_hint(hint)
}

const UNEXPLAINED: Failure = (&[], CallErrorKind::Refused, "the command failed", "");

/// Every program of this name, by `PATH`; a name with a slash is a path already.
pub(super) fn find(name: &str, variables: &Variables) -> Vec<PathBuf> {
    if name.contains(std::path::is_separator) {
        return system::programs(PathBuf::from(name)).collect();
    }
    let path = variables.get("PATH").unwrap_or_default();
    split_paths(path)
        // A relative entry would run a program from the current directory.
        .filter(|directory| directory.is_absolute())
        .flat_map(|directory| system::programs(directory.join(name)))
        .collect()
}

#[cfg(unix)]
mod system {
    use std::{os::unix::fs::PermissionsExt, path::PathBuf};

    /// The path, if it is executable.
    pub(super) fn programs(path: PathBuf) -> impl Iterator<Item = PathBuf> {
        let is_executable = path
            .metadata()
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0);
        is_executable.then_some(path).into_iter()
    }
}

#[cfg(windows)]
mod system {
    use std::path::PathBuf;

    /// The path with each of the extensions of programs. A shell's script without one, which installers put beside it, cannot
    /// be run.
    pub(super) fn programs(path: PathBuf) -> impl Iterator<Item = PathBuf> {
        let has_extension = path.extension().is_some();
        let extensions: &[&str] = if has_extension {
            &[""]
        } else {
            &[".exe", ".cmd", ".bat"]
        };
        extensions.iter().filter_map(move |extension| {
            let mut program = path.clone().into_os_string();
            program.push(extension);
            let program = PathBuf::from(program);
            program.is_file().then_some(program)
        })
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell() -> &'static Path {
        Path::new("/bin/sh")
    }

    #[tokio::test]
    async fn output_and_status_are_returned_without_secrets() {
        let script = format!("echo out; echo \"bad dapi{}\" >&2; exit 3", "0".repeat(32));
        let output = run(shell(), &["-c", &script], Duration::from_secs(20))
            .await
            .unwrap();
        assert_eq!(output.stdout.as_slice(), b"out\n");
        assert_eq!(output.stderr, "bad [removed]");
        assert_eq!(output.status.code(), Some(3));
    }

    #[tokio::test]
    async fn a_program_without_end_is_killed() {
        let error = run(shell(), &["-c", "exec sleep 60"], Duration::from_millis(50)).await;
        assert!(matches!(error, Err(CommandError::Timeout(_))));
        let endless = "exec head -c 3000000 /dev/zero";
        let error = run(shell(), &["-c", endless], Duration::from_secs(20)).await;
        assert!(matches!(error, Err(CommandError::TooMuch)));
        let missing = run(Path::new("/nowhere"), &[], Duration::from_secs(1)).await;
        assert!(matches!(missing, Err(CommandError::Start(_))));
    }

    #[test]
    fn relative_directories_on_the_path_are_ignored() {
        let variables = |path: &str| {
            [("PATH".to_owned(), path.to_owned())]
                .into_iter()
                .collect::<Variables>()
        };
        assert_eq!(
            find("sh", &variables(".::/nowhere:/bin")),
            [Path::new("/bin/sh")]
        );
        assert!(find("sh", &variables("bin:")).is_empty());
        assert_eq!(
            find("/bin/sh", &Variables::default()),
            [Path::new("/bin/sh")]
        );
    }
}
