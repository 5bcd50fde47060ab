//! The login of the Databricks CLI, through `databricks auth token`; the CLI's own store of tokens is never read.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;
use serde::Deserialize;
use tokio::sync::OnceCell;
use tracing::{debug, warn};

use super::{
    AuthKind, Boxed, Expiry, Freshness, Kind, TokenSource, WorkspaceToken,
    command::{self, CommandError, Output},
    token::DEFAULT_LIFETIME,
};
use crate::workspace::{
    CallError, WorkspaceError,
    api::Api,
    expiry::{Moment, Number},
    host::Host,
    settings::ResolvedSettings,
};

const COMMAND: &str = "databricks";
/// A file of this size or more is the current CLI (as in the Databricks SDKs); a smaller one may be a version manager's
/// shim, a wrapper, or the old CLI.
const MIN_SIZE: u64 = 1024 * 1024;
/// In the entry point that pip wrote for the old CLI (below 0.100); the imported name varies between its versions.
const OLD_CLI: &[u8] = b"from databricks_cli.cli import ";
/// As the Databricks SDKs.
const VERSION_LIMIT: Duration = Duration::from_secs(5);
/// It may renew its own token over the network.
const TOKEN_LIMIT: Duration = Duration::from_secs(30);
/// `auth token` takes `--profile` since then; before, it was accepted and ignored.
const PROFILE_SINCE: Version = (0, 207, 1);
/// `auth token` takes `--force-refresh` since then.
const FORCE_SINCE: Version = (0, 296, 0);

/// `0001-01-01T00:00:00Z`.
const ZERO_TIME: i64 = -62_135_596_800;

type Version = (u64, u64, u64);

pub(super) const KIND: Kind = Kind {
    is_available: |_, _| true,
    ..Kind::new(|settings, host| Ok(Box::new(DatabricksCli::new(settings, host)?)))
};

struct DatabricksCli {
    program: PathBuf,
    host: String,
    profile: Option<String>,
    version: OnceCell<Option<Version>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct VersionAnswer {
    major: Number,
    minor: Number,
    patch: Number,
}

impl VersionAnswer {
    fn version(&self) -> Option<Version> {
        let part = |number: &Number| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "saturates"
            )]
            let part = number.value()? as u64;
            Some(part)
        };
        Some((part(&self.major)?, part(&self.minor)?, part(&self.patch)?))
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    access_token: SecretString,
    #[serde(default)]
    expiry: Option<Moment>,
}

impl DatabricksCli {
    fn new(settings: &ResolvedSettings, host: &Host) -> Result<Self, WorkspaceError> {
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
            return Err(WorkspaceError::NoCommand {
                kind: AuthKind::DatabricksCli.label(),
                command: command.to_owned(),
                problem,
            });
        };
        Ok(Self {
            program: program.clone(),
            host: host.to_string(),
            profile: settings.profile_name().map(str::to_owned),
            version: OnceCell::new(),
        })
    }

    /// The command that logs in.
    fn login(&self) -> String {
        let profile = self.profile.as_ref();
        let profile = profile.map_or(String::new(), |profile| format!(" --profile {profile}"));
        format!("databricks auth login --host {}{profile}", self.host)
    }

    async fn token(&self, api: &Api, freshness: Freshness) -> Result<WorkspaceToken, CallError> {
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
        debug!(program = %self.program.display(), ?arguments, "requesting a token from the Databricks CLI");
        let output = command::run(&self.program, &arguments, TOKEN_LIMIT)
            .await
            .map_err(|error| self.broken(&error))?;
        if !output.is_success {
            return Err(self.failed(&output, version));
        }
        // The parser's message is left out: it could quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&output.stdout).map_err(|_| {
            CallError::malformed(
                "`databricks auth token` did not print a token",
                Some("its output is not the expected JSON with an expiry".to_owned()),
            )
        })?;
        let expiry = match answer.expiry {
            None => Expiry::In(DEFAULT_LIFETIME),
            // Go's zero time: no expiry.
            Some(Moment(at)) if at.as_second() <= ZERO_TIME => Expiry::In(DEFAULT_LIFETIME),
            Some(Moment(at)) => Expiry::At(at),
        };
        if matches!(expiry, Expiry::At(at) if at <= api.clock().now()) {
            return Err(self.expired("it printed a token that has expired"));
        }
        WorkspaceToken::new(answer.access_token, expiry)
    }

    /// `None` if it is unknown; flags of newer versions are left out then.
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
                    .and_then(|version| version.version()),
            )
        };
        match self.version.get_or_try_init(probe).await {
            Ok(version) => *version,
            Err(error) => {
                warn!(program = %self.program.display(), %error, "cannot read the version of the Databricks CLI");
                None
            }
        }
    }

    fn broken(&self, error: &CommandError) -> CallError {
        CallError::unavailable(
            "the Databricks CLI returned no token".to_owned(),
            Some(error.to_string()),
            format!(
                "run `{} auth token --host {}` by hand: it may wait for the keyring to be unlocked",
                self.program.display(),
                self.host
            ),
        )
    }

    fn failed(&self, output: &Output, version: Option<Version>) -> CallError {
        // The CLI has one exit code for all failures, so its messages are matched (`cmd/auth/token.go`).
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
                self.hint(),
            );
        }
        CallError::refused(
            "`databricks auth token` failed",
            detail,
            format!("run `{}`, or use a service principal", self.login()),
        )
    }

    fn expired(&self, detail: &str) -> CallError {
        CallError::refused(
            format!("the Databricks CLI's login to {} has expired", self.host),
            Some(detail.to_owned()),
            self.hint(),
        )
    }
}

impl TokenSource for DatabricksCli {
    fn kind(&self) -> AuthKind {
        AuthKind::DatabricksCli
    }

    fn token<'a>(&'a self, api: &'a Api, freshness: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(self.token(api, freshness))
    }

    fn hint(&self) -> String {
        format!("run `{}`", self.login())
    }

    fn has_cache(&self) -> bool {
        true
    }
}

/// Whether this is the CLI from pip, which lacks `auth token`.
fn is_old(path: &Path) -> io::Result<bool> {
    let file = File::open(path)?;
    if file.metadata()?.len() >= MIN_SIZE {
        return Ok(false);
    }
    let mut content = Vec::new();
    file.take(MIN_SIZE).read_to_end(&mut content)?;
    Ok(content.windows(OLD_CLI.len()).any(|part| part == OLD_CLI))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cli_s_version_may_be_in_quotes() {
        let version: VersionAnswer =
            serde_json::from_str(r#"{"Major":"1","Minor":22,"Patch":"0"}"#).unwrap();
        assert_eq!(version.version(), Some((1, 22, 0)));
    }
}
