//! Errors of setting up a workspace, each with a hint.

use std::{io, path::PathBuf};

use super::{auth::AuthKind, databrickscfg::SyntaxError};

/// Why a workspace cannot be set up. Calls fail with [`CallError`](super::CallError).
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages describe variants and fields")]
pub enum WorkspaceError {
    #[error("`{host}` is an account console, not a workspace")]
    AccountConsole { host: String },
    #[error("cannot set up HTTPS towards the workspace")]
    Client(#[source] reqwest::Error),
    #[error("more than one way to authenticate is configured: {}", families.join(" and "))]
    Ambiguous {
        families: Vec<String>,
        choices: String,
    },
    #[error("cannot read the profiles in `{}`", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot understand the profiles in `{}`", path.display())]
    FileSyntax {
        path: PathBuf,
        #[source]
        source: SyntaxError,
    },
    // The message of the Databricks SDKs.
    #[error(
        "auth type \"{kind}\" does not support group role assumption. Use Databricks OAuth authentication"
    )]
    Group { kind: &'static str, setting: String },
    #[error("`{missing}` is not set, but {because}")]
    Incomplete {
        missing: &'static str,
        because: String,
    },
    #[error("`DATABRICKS_HOST` is not an address: `{host}`")]
    InvalidHost {
        host: String,
        #[source]
        source: Option<url::ParseError>,
    },
    #[error("{name} {problem}")]
    InvalidValue { name: String, problem: &'static str },
    #[error("the profile `{profile}` is selected, but `{}` does not exist", path.display())]
    MissingFile { profile: String, path: PathBuf },
    #[error("{kind} needs the command `{command}`, which {problem}")]
    NoCommand {
        kind: &'static str,
        command: String,
        problem: &'static str,
    },
    #[error("no way to authenticate to the workspace is configured")]
    NoAuthentication { notes: Vec<String>, host: String },
    #[error("`DATABRICKS_HOST` is not set")]
    NoHost { resource_id: bool },
    #[error("`{}` has no profile `{profile}`", path.display())]
    NoProfile {
        profile: String,
        path: PathBuf,
        known: Vec<String>,
    },
    #[error("model-serving needs the token in `{}`, which does not exist", path.display())]
    NoServingToken { path: PathBuf },
    #[error("`DATABRICKS_HOST` must be https: `{host}`")]
    NotHttps { host: String },
    #[error("signing in with {kind} is not supported")]
    Refused {
        kind: &'static str,
        instead: &'static str,
    },
    #[error("`__settings__` is a reserved name, not a profile")]
    ReservedProfile,
    #[error("{setting} is `{auth_type}`, which is no way to authenticate")]
    UnknownAuthType { setting: String, auth_type: String },
}

impl WorkspaceError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::AccountConsole { .. }
            | Self::InvalidHost { .. }
            | Self::NoHost { resource_id: false } => {
                "set `DATABRICKS_HOST` to the workspace's address, such as `https://dbc-1234.cloud.databricks.com`, or name a profile of ~/.databrickscfg with --profile"
            }
            Self::NoHost { resource_id: true } => {
                "`DATABRICKS_AZURE_RESOURCE_ID` alone is not enough: set `DATABRICKS_HOST`, which `az databricks workspace show --ids RESOURCE_ID --query workspaceUrl` prints"
            }
            Self::Ambiguous { choices, .. } => {
                return Some(format!(
                    "remove all but one, or choose with `DATABRICKS_AUTH_TYPE` (`{choices}`)"
                ));
            }
            Self::File { .. } => "check the file's permissions, or `DATABRICKS_CONFIG_FILE`",
            Self::FileSyntax { .. } => {
                "a profile is a line `[name]` and lines `key = value` below it"
            }
            Self::Group { setting, .. } => {
                return Some(format!(
                    "unset {setting}, or sign in as a service principal (oauth-m2m, or one of the oidc kinds)"
                ));
            }
            Self::Incomplete {
                missing: "DATABRICKS_CLIENT_ID" | "DATABRICKS_CLIENT_SECRET",
                ..
            } => "set both `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`",
            Self::Incomplete { missing, .. } => return Some(format!("set `{missing}`")),
            Self::InvalidValue { problem, .. } if problem.contains("characters") => {
                "look for line breaks and other stray characters in the value"
            }
            Self::Client(_) | Self::InvalidValue { .. } => return None,
            Self::MissingFile { .. } => {
                "run `databricks auth login`, which writes it, or set `DATABRICKS_HOST` and unset `DATABRICKS_CONFIG_PROFILE`"
            }
            Self::NoCommand { kind, problem, .. } => match (*kind, problem.contains("old")) {
                ("azure-cli", _) => {
                    "install the Azure CLI (https://learn.microsoft.com/cli/azure) and run `az login`"
                }
                (_, true) => {
                    "install the current Databricks CLI (https://docs.databricks.com/dev-tools/cli/install); the old one came from pip"
                }
                (_, false) => {
                    "install the Databricks CLI (https://docs.databricks.com/dev-tools/cli/install), or set `DATABRICKS_CLI_PATH` to it"
                }
            },
            Self::NoAuthentication { notes, host } => {
                let mut parts = vec![
                    format!("on a laptop: `databricks auth login --host {host}`"),
                    "elsewhere: set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET` of a service principal".to_owned(),
                ];
                parts.extend(notes.iter().cloned());
                return Some(parts.join("; "));
            }
            Self::NoProfile { known, .. } => {
                return Some(if known.is_empty() {
                    "the file has no profile at all: run `databricks auth login`".to_owned()
                } else {
                    format!("it has {}", listed(known))
                });
            }
            Self::NoServingToken { .. } => {
                "log the model with the resources that it uses, so that Model Serving gives it a token, or set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`"
            }
            Self::NotHttps { .. } => "only an address on this machine's loopback may be http",
            Self::Refused { instead, .. } => instead,
            Self::ReservedProfile => "name a profile that holds a host",
            Self::UnknownAuthType { .. } => {
                return Some(format!(
                    "one of {}",
                    listed(
                        &AuthKind::ALL
                            .iter()
                            .map(|kind| kind.label())
                            .collect::<Vec<_>>()
                    )
                ));
            }
        };
        Some(hint.to_owned())
    }
}

/// The most names in a hint.
const LISTED: usize = 12;

fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let mut text: Vec<String> = names
        .iter()
        .take(LISTED)
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    if names.len() > LISTED {
        text.push(format!("{} more", names.len() - LISTED));
    }
    text.join(", ")
}
