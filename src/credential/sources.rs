//! Credentials that no workspace mints: a password, a file that holds one, a command that prints one.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime},
};

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::{fs, io::AsyncReadExt, process::Command, time::timeout};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::expiry::Moment;

use super::{CredentialCell, Mint, MintError, MintErrorKind, Minted};

/// How long a command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest file or answer, in bytes; tokens have one or two thousand.
const MAX_LEN: u64 = 64 * 1024;
/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A password that stays as it is.
#[derive(Clone, Debug)]
pub struct Password(pub SecretString);

impl Mint for Password {
    async fn mint(&self) -> Result<Minted, MintError> {
        Ok(Minted {
            secret: self.0.clone(),
            expires_at: None,
        })
    }
}

/// A file that holds a password, and a line end or none behind it.
#[derive(Clone, Debug)]
pub struct PasswordFile(pub PathBuf);

impl Mint for PasswordFile {
    async fn mint(&self) -> Result<Minted, MintError> {
        let path = self.0.display();
        let refused = |message: String| {
            refused(
                message,
                "check the path in `credential = { password_file = ... }` and that the proxy may read it",
            )
        };
        let file = fs::File::open(&self.0)
            .await
            .map_err(|error| refused(format!("cannot read the password file `{path}`: {error}")))?;
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_LEN)
            .read_to_string(&mut text)
            .await
            .map_err(|error| refused(format!("cannot read the password file `{path}`: {error}")))?;
        let password = text.trim_end_matches(['\r', '\n']);
        if password.is_empty() {
            return Err(refused(format!("the password file `{path}` is empty")));
        }
        Ok(Minted {
            secret: SecretString::from(password),
            expires_at: None,
        })
    }
}

impl PasswordFile {
    /// Publishes the password anew whenever the file has come to hold another, until stopped.
    pub async fn watch(self, cell: CredentialCell, stop: CancellationToken) {
        let mut seen = None;
        while stop
            .run_until_cancelled(tokio::time::sleep(LOOK_EVERY))
            .await
            .is_some()
        {
            let now = stamp(&self.0).await;
            if now.is_none() || now == seen {
                continue;
            }
            match self.mint().await {
                Ok(minted) => {
                    seen = now;
                    let is_current = cell.current().is_some_and(|current| {
                        current.secret.expose_secret() == minted.secret.expose_secret()
                    });
                    if !is_current {
                        cell.publish(minted, 0.0);
                        tracing::info!(file = %self.0.display(), "the password file has changed; new logins use it");
                    }
                }
                // Seen half-written, perhaps: looked at again.
                Err(error) => tracing::debug!(%error, "the password file cannot be used"),
            }
        }
    }
}

/// Follows symbolic links, as a mounted Kubernetes secret is replaced by turning one.
async fn stamp(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = fs::metadata(path).await.ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// A program that prints `{"token": "...", "expires_at": "..."}`; the expiry may be left out.
#[derive(Clone, Debug)]
pub struct CredentialCommand(pub Vec<String>);

#[derive(Deserialize)]
struct Printed {
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

impl Mint for CredentialCommand {
    async fn mint(&self) -> Result<Minted, MintError> {
        let [program, arguments @ ..] = &self.0[..] else {
            return Err(refused(
                "the credential command is empty".to_owned(),
                "write it as a list",
            ));
        };
        let hint = "run it by hand: it must print JSON with `token` and, if it likes, `expires_at`, and exit with 0";
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                refused(
                    format!("cannot run the credential command `{program}`: {error}"),
                    hint,
                )
            })?;
        let mut printed = Zeroizing::new(Vec::new());
        let run = async {
            if let Some(output) = child.stdout.take() {
                output.take(MAX_LEN).read_to_end(&mut printed).await?;
            }
            child.wait().await
        };
        let failed = |what: String, kind| MintError {
            message: format!("the credential command `{program}` {what}"),
            detail: None,
            hint: Some(hint.to_owned()),
            kind,
            retry_after: None,
        };
        let status = timeout(COMMAND_TIMEOUT, run)
            .await
            .map_err(|_| failed("did not end in time".to_owned(), MintErrorKind::Unavailable))?
            .map_err(|error| failed(format!("broke: {error}"), MintErrorKind::Unavailable))?;
        if !status.success() {
            return Err(failed(
                format!("ended with {status}"),
                MintErrorKind::Unavailable,
            ));
        }
        // The parser's words could quote what was printed.
        let answer: Printed = serde_json::from_slice(&printed).map_err(|_| {
            failed(
                "printed something else than JSON with a token".to_owned(),
                MintErrorKind::Malformed,
            )
        })?;
        Ok(Minted {
            secret: answer.token,
            expires_at: answer.expires_at.map(|Moment(at)| at),
        })
    }
}

fn refused(message: String, hint: &str) -> MintError {
    MintError {
        message,
        detail: None,
        hint: Some(hint.to_owned()),
        kind: MintErrorKind::Refused,
        retry_after: None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::clock::Clock;

    fn shell(script: &str) -> CredentialCommand {
        CredentialCommand(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    #[tokio::test]
    async fn a_command_prints_a_token_and_maybe_its_expiry() {
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
    async fn a_command_that_fails_says_how_and_never_what_it_printed() {
        let error = shell("echo hush-hush; exit 3").mint().await.err().unwrap();
        assert!(error.message.contains("exit status: 3") && error.kind.is_transient());
        let error = shell("echo hush-hush").mint().await.err().unwrap();
        assert_eq!(error.kind, MintErrorKind::Malformed);
        assert!(!format!("{error:?}").contains("hush"));
        let error = CredentialCommand(vec!["/nowhere/at/all".to_owned()])
            .mint()
            .await
            .err()
            .unwrap();
        assert_eq!(error.kind, MintErrorKind::Refused);
    }

    #[tokio::test]
    async fn a_changed_password_file_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        std::fs::write(&path, "first\n").unwrap();
        let file = PasswordFile(path.clone());
        let cell = CredentialCell::new(Clock::system());
        cell.publish(file.mint().await.unwrap(), 0.0);
        let stop = CancellationToken::new();
        let watching = file.watch(cell.clone(), stop.clone());
        let change = async {
            let mut changes = cell.subscribe();
            std::fs::write(directory.path().join("new"), "second, longer").unwrap();
            std::fs::rename(directory.path().join("new"), &path).unwrap();
            changes
                .wait_for(|status| status.generation == 2)
                .await
                .unwrap();
            stop.cancel();
        };
        tokio::join!(watching, change);
        let deadline = Instant::now() + Duration::from_secs(1);
        assert_eq!(
            cell.get(deadline).await.unwrap().secret.expose_secret(),
            "second, longer"
        );
    }

    #[tokio::test]
    async fn a_missing_or_empty_password_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        assert_eq!(
            PasswordFile(path.clone()).mint().await.err().unwrap().kind,
            MintErrorKind::Refused
        );
        std::fs::write(&path, "\n").unwrap();
        assert_eq!(
            PasswordFile(path).mint().await.err().unwrap().kind,
            MintErrorKind::Refused
        );
    }
}
