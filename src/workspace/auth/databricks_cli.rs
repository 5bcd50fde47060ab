//! Whoever is logged in to the Databricks CLI, through `databricks auth token`; its own store of tokens is never read.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use secrecy::SecretString;
use serde::Deserialize;
use tokio::sync::OnceCell;
use tracing::{debug, warn};

use super::{
    AuthKind, DEFAULT_LIFETIME, Expiry, Freshness, WorkspaceToken,
    command::{self, CommandError, Output},
};
use crate::workspace::{
    api::Api,
    diagnosis::CallError,
    host::Host,
    settings::{Settings, SettingsError},
};

const COMMAND: &str = "databricks";
/// A file at least this large is the current CLI without a look inside (as in the Databricks SDKs); a smaller one may be the
/// shim of a version manager, a wrapper, or the old CLI.
const MIN_SIZE: u64 = 1024 * 1024;
/// Stands in the entry point that pip wrote for the old CLI (below 0.100); the name that is imported changed between versions.
const OLD_CLI: &[u8] = b"from databricks_cli.cli import ";
/// As the Databricks SDKs.
const VERSION_LIMIT: Duration = Duration::from_secs(5);
/// It may have to renew its own token over the network.
const TOKEN_LIMIT: Duration = Duration::from_secs(30);
/// `auth token` takes `--profile` since then; before, it was accepted and ignored.
const PROFILE_SINCE: Version = (0, 207, 1);
/// `auth token` takes `--force-refresh` since then.
const FORCE_SINCE: Version = (0, 296, 0);

type Version = (u64, u64, u64);

pub(in crate::workspace) struct DatabricksCli {
    program: PathBuf,
    host: String,
    profile: Option<String>,
    version: OnceCell<Option<Version>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VersionAnswer {
    major: u64,
    minor: u64,
    patch: u64,
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: SecretString,
    #[serde(default)]
    expiry: Option<String>,
}

impl DatabricksCli {
    pub(super) fn new(settings: &Settings, host: &Host) -> Result<Self, SettingsError> {
        let command = settings.databricks_cli_path.as_deref().unwrap_or(COMMAND);
        let all = command::find(command, &settings.variables);
        let mut problem = "is not installed";
        let program = all.iter().find(|path| match is_old(path) {
            Ok(false) => true,
            Ok(true) => {
                problem = "is the old one";
                false
            }
            Err(_) => {
                problem = "cannot be read";
                false
            }
        });
        let Some(program) = program else {
            return Err(SettingsError::NoCommand {
                kind: AuthKind::DatabricksCli.label(),
                command: command.to_owned(),
                problem,
            });
        };
        Ok(Self {
            program: program.clone(),
            host: host.to_string(),
            profile: settings
                .origin
                .profile
                .as_ref()
                .map(|(name, _)| name.clone()),
            version: OnceCell::new(),
        })
    }

    /// What logs in for us.
    pub(super) fn login(&self) -> String {
        let profile = self.profile.as_ref();
        let profile = profile.map_or(String::new(), |profile| format!(" --profile {profile}"));
        format!("databricks auth login --host {}{profile}", self.host)
    }

    pub(super) async fn token(
        &self,
        api: &Api,
        freshness: Freshness,
    ) -> Result<WorkspaceToken, CallError> {
        let version = self.version().await;
        let mut arguments = vec!["auth", "token"];
        match &self.profile {
            Some(profile) if version.is_some_and(|version| version >= PROFILE_SINCE) => {
                arguments.extend(["--profile", profile]);
            }
            _ => arguments.extend(["--host", &self.host]),
        }
        if freshness == Freshness::New && version.is_some_and(|version| version >= FORCE_SINCE) {
            arguments.push("--force-refresh");
        }
        debug!(program = %self.program.display(), ?arguments, "asking the Databricks CLI for a token");
        let output = command::run(&self.program, &arguments, TOKEN_LIMIT)
            .await
            .map_err(|error| self.broken(&error))?;
        if !output.is_success {
            return Err(self.failed(&output, version));
        }
        let answer: TokenAnswer = serde_json::from_slice(&output.stdout).map_err(|_| {
            CallError::malformed(
                "`databricks auth token` did not print a token",
                Some("its output is not the expected JSON".to_owned()),
            )
        })?;
        let expiry = match answer.expiry.as_deref().map(|text| expiry(text).ok_or(())) {
            None => Expiry::In(DEFAULT_LIFETIME),
            Some(Ok(at)) => Expiry::At(at),
            Some(Err(())) => {
                return Err(CallError::malformed(
                    "`databricks auth token` printed an expiry that is no time",
                    None,
                ));
            }
        };
        if matches!(expiry, Expiry::At(at) if at <= api.clock().now()) {
            return Err(self.expired("it printed a token that has expired"));
        }
        WorkspaceToken::new(answer.access_token, expiry)
    }

    /// `None`: it does not say, so nothing new is asked of it.
    async fn version(&self) -> Option<Version> {
        let probe = || async {
            let output = command::run(
                &self.program,
                &["version", "--output", "json"],
                VERSION_LIMIT,
            );
            let answer = output.await?;
            Ok::<_, CommandError>(
                serde_json::from_slice::<VersionAnswer>(&answer.stdout)
                    .ok()
                    .filter(|_| answer.is_success)
                    .map(|version| (version.major, version.minor, version.patch)),
            )
        };
        match self.version.get_or_try_init(probe).await {
            Ok(version) => *version,
            Err(error) => {
                warn!(program = %self.program.display(), %error, "the Databricks CLI does not tell its version");
                None
            }
        }
    }

    fn broken(&self, error: &CommandError) -> CallError {
        CallError::unavailable(
            "the Databricks CLI gives no token".to_owned(),
            Some(error.to_string()),
            format!(
                "run `{} auth token --host {}` by hand: it may wait for the keyring to be unlocked",
                self.program.display(),
                self.host
            ),
        )
    }

    fn failed(&self, output: &Output, version: Option<Version>) -> CallError {
        let words = output.stderr.to_ascii_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
        let detail = Some(output.stderr.clone()).filter(|words| !words.is_empty());
        if has(&["unknown command", "unknown flag", "unknown shorthand"]) {
            let version = version.map_or("too old".to_owned(), |(major, minor, patch)| {
                format!("{major}.{minor}.{patch}, which is too old")
            });
            return CallError::refused(
                format!("the Databricks CLI is {version}"),
                detail,
                "install the current one (https://docs.databricks.com/dev-tools/cli/install)",
            );
        }
        if has(&[
            "refresh token is invalid",
            "invalid_grant",
            "reauthenticate",
            "has expired",
            "token is expired",
        ]) {
            return self.expired(&output.stderr);
        }
        if has(&[
            "dial tcp",
            "no such host",
            "timeout",
            "deadline exceeded",
            "connection re",
            "temporarily",
            "status 5",
            "status code 5",
        ]) {
            return CallError::unavailable(
                "the Databricks CLI does not reach the workspace".to_owned(),
                detail,
                "check that this machine reaches the workspace, and the proxy variables (`HTTPS_PROXY`, `NO_PROXY`)".to_owned(),
            );
        }
        if has(&[
            "databricks oauth is not",
            "no configuration file found",
            "not logged in",
            "no cached",
            "token not found",
            "cache: ",
            "try logging in",
            "has no",
        ]) {
            return CallError::refused(
                format!("the Databricks CLI is not logged in to {}", self.host),
                detail,
                format!("run `{}`", self.login()),
            );
        }
        CallError::refused(
            "`databricks auth token` failed",
            detail,
            format!("run `{}`, or use a service principal", self.login()),
        )
    }

    fn expired(&self, words: &str) -> CallError {
        CallError::refused(
            format!("the Databricks CLI's login to {} has expired", self.host),
            Some(words.to_owned()),
            format!("run `{}`", self.login()),
        )
    }
}

/// Whether this is the CLI that pip installed, which knows no `auth token`.
fn is_old(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    if file.metadata()?.len() >= MIN_SIZE {
        return Ok(false);
    }
    let mut content = Vec::new();
    file.take(MIN_SIZE).read_to_end(&mut content)?;
    Ok(content.windows(OLD_CLI.len()).any(|part| part == OLD_CLI))
}

/// RFC 3339 with any offset, or without one and with a blank (then in UTC, as the Go SDK takes it).
pub(super) fn expiry(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    text.parse().ok().or_else(|| {
        let time: DateTime = text.parse().ok()?;
        Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expiry_may_carry_an_offset_or_none() {
        let expected: Timestamp = "2026-08-28T13:04:05.5Z".parse().unwrap();
        for text in [
            "2026-08-28T15:04:05.500000000+02:00",
            "2026-08-28T13:04:05.5Z",
            "2026-08-28 13:04:05.500",
            " 2026-08-28T08:04:05.5-05:00 ",
        ] {
            assert_eq!(expiry(text), Some(expected), "{text}");
        }
        for text in ["", "soon", "2026-08-28", "1787000000"] {
            assert!(
                expiry(text).is_none_or(|at| at.as_second() % 86_400 == 0),
                "{text}"
            );
        }
    }
}
