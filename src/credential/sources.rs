//! The sources of credentials beside the workspace: a password, a password file, and a command.

use std::{
    future::ready,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use secrecy::SecretString;
use serde::Deserialize;

use super::{BoxFuture, CallError, Mint, Minted};
use crate::{
    config::CredentialSource,
    net::{FileWatch, file},
    workspace::{command, times::Moment},
};

/// How long a command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest file, in bytes; tokens have one or two thousand.
const MAX_LEN: u64 = 64 * 1024;

/// The source that the settings of an endpoint name; `None`: the workspace, which needs a target.
pub(crate) fn of_settings(setting: &CredentialSource) -> Option<Arc<dyn Mint>> {
    Some(match setting {
        CredentialSource::Command(command) => Arc::new(CredentialCommand(command.clone())),
        CredentialSource::Password(password) => Arc::new(Password(password.clone())),
        CredentialSource::PasswordFile(path) => Arc::new(PasswordFile::new(path.clone())),
        CredentialSource::Workspace => return None,
    })
}

/// A static password.
struct Password(SecretString);

impl Mint for Password {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        let secret = self.0.clone();
        Box::pin(ready(Ok(Minted {
            secret,
            expires_at: None,
        })))
    }
}

/// A file that holds a password, with or without a line end.
struct PasswordFile {
    path: PathBuf,
    watch: FileWatch,
}

impl PasswordFile {
    fn new(path: PathBuf) -> Self {
        let watch = FileWatch::new(vec![path.clone()]);
        Self { path, watch }
    }

    async fn read(&self) -> Result<Minted, CallError> {
        let path = self.path.display();
        let refused = |message: String| {
            CallError::refused(message).with_hint(
                "check the path in `credential = { password_file = ... }` and that the proxy may read it",
            )
        };
        let unreadable =
            |error: io::Error| refused(format!("cannot read the password file `{path}`: {error}"));
        // Before the read: a change during it is noticed as one, and read again.
        self.watch.mark().await;
        let bytes = file::read_off_runtime(self.path.clone(), MAX_LEN).await;
        let bytes = bytes.map_err(unreadable)?;
        let text = file::text(&bytes).map_err(unreadable)?;
        // One line end, as editors and `echo` add it; other white space may belong to the password.
        let line = text.strip_suffix('\n').unwrap_or(text);
        let password = line.strip_suffix('\r').unwrap_or(line);
        if password.is_empty() {
            return Err(refused(format!("the password file `{path}` is empty")));
        }
        Ok(Minted {
            secret: SecretString::from(password),
            expires_at: None,
        })
    }
}

impl Mint for PasswordFile {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        Box::pin(self.read())
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.watch.changed())
    }
}

/// A program that prints `{"token": "...", "expires_at": "..."}`; the expiry is optional.
struct CredentialCommand(Vec<String>);

#[derive(Deserialize)]
struct Printed {
    // Beside its own names, those of the workspace API and of the Databricks CLI, so that their output fits unchanged.
    #[serde(alias = "access_token", alias = "password")]
    token: SecretString,
    #[serde(
        alias = "expire_time",
        alias = "expiration_time",
        alias = "expiration",
        alias = "expiry"
    )]
    expires_at: Option<Moment>,
}

impl CredentialCommand {
    async fn run(&self) -> Result<Minted, CallError> {
        let [program, arguments @ ..] = &self.0[..] else {
            return Err(CallError::refused("the credential command is empty")
                .with_hint("write it as a list"));
        };
        let hint = "run it by hand: it must print JSON with `token` and optionally `expires_at`, and exit with 0";
        let failed = |what: &str| format!("the credential command `{program}` {what}");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = command::run(Path::new(program), &arguments, COMMAND_TIMEOUT)
            .await
            .map_err(|error| error.call_error(failed("failed"), hint))?;
        if !output.status.success() {
            let message = failed(&format!("ended with {}", output.status));
            return Err(CallError::unavailable(message).with_hint(hint));
        }
        // The parser's error could quote the output, and with it the token.
        let answer: Printed = serde_json::from_slice(&output.stdout).map_err(|_| {
            CallError::malformed(failed("did not print JSON with a token")).with_hint(hint)
        })?;
        Ok(Minted {
            secret: answer.token,
            expires_at: answer.expires_at.map(|Moment(at)| at),
        })
    }
}

impl Mint for CredentialCommand {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        Box::pin(self.run())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use secrecy::ExposeSecret;
    use tokio::task::JoinSet;
    use tokio_util::sync::CancellationToken;

    use tokio::time::Instant;

    use super::*;
    use crate::{
        clock::Clock,
        credential::{CallErrorKind, CredentialCell, Refresher},
        telemetry::Metrics,
    };

    fn shell(script: &str) -> CredentialCommand {
        CredentialCommand(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    #[tokio::test]
    async fn a_command_prints_a_token_and_optionally_its_expiry() {
        let minted = shell(r#"echo '{"token": "t", "expires_at": "2030-01-01T00:00:00Z"}'"#)
            .mint()
            .await
            .unwrap();
        assert_eq!(minted.secret.expose_secret(), "t");
        assert_eq!(
            minted.expires_at,
            Some("2030-01-01T00:00:00Z".parse().unwrap())
        );
        assert_eq!(
            shell(r#"echo '{"access_token": "t"}'"#)
                .mint()
                .await
                .unwrap()
                .expires_at,
            None
        );
    }

    #[tokio::test]
    async fn the_error_of_a_command_holds_its_status_and_not_its_output() {
        let error = shell("echo hush-hush; exit 3").mint().await.err().unwrap();
        assert!(error.message.contains("exit status: 3") && error.kind.is_transient());
        let error = shell("echo hush-hush").mint().await.err().unwrap();
        assert_eq!(error.kind, CallErrorKind::Malformed);
        assert!(!format!("{error:?}").contains("hush"));
        let error = CredentialCommand(vec!["/nowhere/at/all".to_owned()])
            .mint()
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind, CallErrorKind::Refused);
    }

    /// Runs a refresher with this file.
    fn follow(path: &Path) -> (CredentialCell, JoinSet<()>) {
        let cell = CredentialCell::new(Clock::system());
        let file = Arc::new(PasswordFile::new(path.to_owned()));
        let refresher = Refresher::new(file, cell.clone(), Metrics::new().unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(refresher.run(CancellationToken::new()));
        (cell, tasks)
    }

    async fn secret(cell: &CredentialCell) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        let credential = cell.get(deadline).await.unwrap();
        credential.secret.expose_secret().to_owned()
    }

    #[tokio::test]
    async fn the_refresher_follows_a_password_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, "first\n").unwrap();
        let (cell, _tasks) = follow(&path);
        assert_eq!(secret(&cell).await, "first");
        let mut changes = cell.subscribe();
        let new = directory.path().join("new");

        // An unusable file changes nothing, and is reported like any failed refresh.
        std::fs::write(&new, "").unwrap();
        std::fs::rename(&new, &path).unwrap();
        let failed = changes.wait_for(|status| status.last_error.is_some());
        let message = failed
            .await
            .unwrap()
            .last_error
            .clone()
            .unwrap()
            .message
            .clone();
        assert!(message.contains("is empty"), "{message}");
        assert_eq!(secret(&cell).await, "first");

        std::fs::write(&new, " second, longer ").unwrap();
        std::fs::rename(&new, &path).unwrap();
        let renewed =
            changes.wait_for(|status| status.generation == 2 && status.last_error.is_none());
        renewed.await.unwrap();
        assert_eq!(secret(&cell).await, " second, longer ", "byte for byte");
        assert_eq!(cell.attempts().len(), 3);

        // The same password again is not a new generation.
        std::fs::write(&path, " second, longer ").unwrap();
        let settled = changes.wait_for(|status| status.settled == 4);
        assert_eq!(settled.await.unwrap().generation, 2);
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_device_or_pipe_as_password_file_is_refused_at_once() {
        for path in ["/dev/zero", "/dev/tty", "/proc"] {
            let error = PasswordFile::new(path.into()).mint().await.err().unwrap();
            assert_eq!(error.kind, CallErrorKind::Refused, "{path}");
        }
    }

    #[tokio::test]
    async fn a_missing_or_empty_password_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        assert_eq!(
            PasswordFile::new(path.clone())
                .mint()
                .await
                .err()
                .unwrap()
                .kind,
            CallErrorKind::Refused
        );
        std::fs::write(&path, "\n").unwrap();
        assert_eq!(
            PasswordFile::new(path).mint().await.err().unwrap().kind,
            CallErrorKind::Refused
        );
    }
}
