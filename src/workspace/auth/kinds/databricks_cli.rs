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
    AuthKind, AuthRules, Boxed, Expiry, Freshness, Renewal, Source, TokenSource, WorkspaceToken,
    oauth::DEFAULT_LIFETIME,
};
use crate::workspace::{
    CallError, CallErrorKind, WorkspaceError,
    api::Api,
    command::{self, CommandError, Failure},
    host::Host,
    settings::ResolvedSettings,
    times::{Moment, Number},
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

/// `0001-01-01T00:00:00Z`, the zero of Go's `time.Time`.
const ZERO_TIME: i64 = -62_135_596_800;

/// The problem of an old CLI.
const OLD: &str = "is the old one";

type Version = (u64, u64, u64);

pub(super) const RULES: AuthRules = AuthRules {
    // Whether the program exists shows when its source is created.
    is_available: |_, _| true,
    ..AuthRules::new(|settings, host| {
        let tokens = DatabricksCli::new(settings, host)?;
        Ok(Source::new(
            AuthKind::DatabricksCli,
            tokens.hint.clone(),
            tokens,
        ))
    })
};

/// Failures of `auth token` by its messages (`cmd/auth/token.go`), since the CLI has one exit code for all. `HOST`, `LOGIN`
/// and `VERSION` stand for the workspace, the command that logs in, and the CLI's version.
const FAILURES: [Failure; 5] = [
    (
        &["unknown command", "unknown flag", "unknown shorthand"],
        CallErrorKind::Refused,
        "the Databricks CLI is VERSION",
        "install the current one (https://docs.databricks.com/dev-tools/cli/install)",
    ),
    (
        &[
            "refresh token is invalid",
            "invalid_grant",
            "reauthenticate",
            "has expired",
            "token is expired",
        ],
        CallErrorKind::Refused,
        EXPIRED,
        "run `LOGIN`",
    ),
    (
        &[
            "dial tcp",
            "no such host",
            "timeout",
            "deadline exceeded",
            "connection re",
            "temporarily",
            "status 5",
            "status code 5",
        ],
        CallErrorKind::Unavailable,
        "the Databricks CLI does not reach the workspace",
        "check that this machine reaches the workspace, and the proxy variables (`HTTPS_PROXY`, `NO_PROXY`)",
    ),
    (
        &[
            "databricks oauth is not",
            "no configuration file found",
            "not logged in",
            "no cached",
            "token not found",
            "cache: ",
            "try logging in",
            "has no",
        ],
        CallErrorKind::Refused,
        "the Databricks CLI is not logged in to HOST",
        "run `LOGIN`",
    ),
    (
        &[""],
        CallErrorKind::Refused,
        "`databricks auth token` failed",
        "run `LOGIN`, or use a service principal",
    ),
];
const EXPIRED: &str = "the Databricks CLI's login to HOST has expired";

struct DatabricksCli {
    program: PathBuf,
    host: String,
    profile: Option<String>,
    /// The command that logs in.
    login: String,
    /// Names that command.
    hint: String,
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
        // All of `PATH`: an old CLI must not hide a current one behind it.
        let program = all.iter().find(|path| match is_old(path) {
            Ok(false) => true,
            Ok(true) => {
                problem = OLD;
                false
            }
            Err(_) => {
                problem = "cannot be read";
                false
            }
        });
        let Some(program) = program else {
            let hint = if problem == OLD {
                "install the current Databricks CLI (https://docs.databricks.com/dev-tools/cli/install); the old one came from pip"
            } else {
                "install the Databricks CLI (https://docs.databricks.com/dev-tools/cli/install), or set `DATABRICKS_CLI_PATH` to it"
            };
            return Err(WorkspaceError::absent(format!(
                "databricks-cli needs the command `{command}`, which {problem}"
            ))
            .with_hint(hint));
        };
        let profile = settings.profile_name();
        let flag = profile.map_or(String::new(), |profile| format!(" --profile {profile}"));
        let login = format!("databricks auth login --host {host}{flag}");
        Ok(Self {
            program: program.clone(),
            host: host.to_string(),
            profile: profile.map(str::to_owned),
            hint: format!("run `{login}`"),
            login,
            version: OnceCell::new(),
        })
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
        // Without the flag the CLI may return the stored token again, which was refused or is about to expire.
        if freshness == Freshness::New && version.is_some_and(|version| version >= FORCE_SINCE) {
            arguments.push("--force-refresh");
        }
        debug!(program = %self.program.display(), ?arguments, "requesting a token from the Databricks CLI");
        let output = command::run(&self.program, &arguments, TOKEN_LIMIT)
            .await
            .map_err(|error| {
                // A CLI that waits for a locked keyring works once that is unlocked.
                let hint = format!(
                    "run `{} auth token --host {}` by hand: it may wait for the keyring to be unlocked",
                    self.program.display(),
                    self.host
                );
                error.call_error("the Databricks CLI returned no token", &hint)
            })?;
        if !output.status.success() {
            return Err(self.failed(&output.stderr, version));
        }
        // The parser's message is left out: it could quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&output.stdout).map_err(|_| {
            CallError::malformed("`databricks auth token` did not print a token")
                .with_detail("its output is not the expected JSON with an expiry")
        })?;
        let expiry = match answer.expiry {
            None => Expiry::In(DEFAULT_LIFETIME),
            // Go's zero time: no expiry.
            Some(Moment(at)) if at.as_second() <= ZERO_TIME => Expiry::In(DEFAULT_LIFETIME),
            Some(Moment(at)) => Expiry::At(at),
        };
        if matches!(expiry, Expiry::At(at) if at <= api.clock.now()) {
            return Err(CallError::refused(EXPIRED.replace("HOST", &self.host))
                .with_detail("it printed a token that has expired")
                .with_hint(&*self.hint));
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
                    .filter(|_| answer.status.success())
                    .and_then(|version| version.version()),
            )
        };
        // A version that cannot be parsed is kept as unknown; a program that failed to run is tried again.
        match self.version.get_or_try_init(probe).await {
            Ok(version) => *version,
            Err(error) => {
                warn!(program = %self.program.display(), %error, "cannot read the version of the Databricks CLI");
                None
            }
        }
    }

    fn failed(&self, stderr: &str, version: Option<Version>) -> CallError {
        let version = version.map_or("too old".to_owned(), |(major, minor, patch)| {
            format!("{major}.{minor}.{patch}, which is too old")
        });
        let error = command::explain(&FAILURES, stderr);
        let message = error.message.replace("HOST", &self.host);
        CallError {
            message: message.replace("VERSION", &version),
            hint: error.hint.map(|hint| hint.replace("LOGIN", &self.login)),
            ..error
        }
    }
}

impl TokenSource for DatabricksCli {
    fn token<'a>(&'a self, api: &'a Api, freshness: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(self.token(api, freshness))
    }

    fn renewal(&self) -> Renewal {
        Renewal::Cached
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
