//! Errors of setting up a workspace, each with a hint.

use std::{io, path::PathBuf};

use super::{auth::AuthKind, databrickscfg::SyntaxError};

/// Why a workspace cannot be set up. Calls fail with [`CallError`](super::CallError).
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// The address belongs to the account console.
    #[error("`{host}` is an account console, not a workspace")]
    AccountConsole {
        /// The host given.
        host: String,
    },
    /// The HTTP client cannot be made.
    #[error("cannot set up HTTPS towards the workspace")]
    Client(#[source] reqwest::Error),
    /// The settings of two ways to authenticate are present.
    #[error("more than one way to authenticate is configured: {}", families.join(" and "))]
    Ambiguous {
        /// Each family, with a setting of it.
        families: Vec<String>,
        /// What `DATABRICKS_AUTH_TYPE` could choose.
        choices: String,
    },
    /// The file of profiles cannot be read.
    #[error("cannot read the profiles in `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of profiles is not what it should be.
    #[error("cannot understand the profiles in `{}`", path.display())]
    FileSyntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: SyntaxError,
    },
    /// A group is to be assumed in a way that cannot.
    /// The words are those of the Databricks SDKs.
    #[error(
        "auth type \"{kind}\" does not support group role assumption. Use Databricks OAuth authentication"
    )]
    Group {
        /// The kind.
        kind: &'static str,
        /// The setting that asks for it.
        setting: String,
    },
    /// A way to authenticate lacks one of its settings.
    #[error("`{missing}` is not set, but {because}")]
    Incomplete {
        /// The variable that is missing.
        missing: &'static str,
        /// Why it is needed.
        because: String,
    },
    /// The address cannot be understood.
    #[error("`DATABRICKS_HOST` is not an address: `{host}`")]
    InvalidHost {
        /// What was given.
        host: String,
        /// Why.
        #[source]
        source: Option<url::ParseError>,
    },
    /// A value is not what it should be.
    #[error("{name} {problem}")]
    InvalidValue {
        /// The setting, as it was written.
        name: String,
        /// What is wrong; never the value.
        problem: &'static str,
    },
    /// A profile was asked for in a file that is not there, and nothing else does.
    #[error("the profile `{profile}` is asked for, but `{}` does not exist", path.display())]
    MissingFile {
        /// The profile.
        profile: String,
        /// The file.
        path: PathBuf,
    },
    /// A program that is needed is not there.
    #[error("{kind} needs the command `{command}`, which {problem}")]
    NoCommand {
        /// The way.
        kind: &'static str,
        /// The command.
        command: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nothing to authenticate with.
    #[error("no way to authenticate to the workspace is configured")]
    NoAuthentication {
        /// What was looked for and found unfit.
        notes: Vec<String>,
        /// The workspace, for the hint.
        host: String,
    },
    /// No address.
    #[error("`DATABRICKS_HOST` is not set")]
    NoHost {
        /// How the workspace is named otherwise.
        resource_id: bool,
    },
    /// The file has no profile of that name.
    #[error("`{}` has no profile `{profile}`", path.display())]
    NoProfile {
        /// The profile asked for.
        profile: String,
        /// The file.
        path: PathBuf,
        /// Those that it has.
        known: Vec<String>,
    },
    /// Model Serving has put no token beside the model.
    #[error("model-serving needs the token in `{}`, which does not exist", path.display())]
    NoServingToken {
        /// Where it should be.
        path: PathBuf,
    },
    /// Secrets would travel in the clear.
    #[error("`DATABRICKS_HOST` must be https: `{host}`")]
    NotHttps {
        /// What was given.
        host: String,
    },
    /// A way that the SDKs have and we do not.
    #[error("signing in with {kind} is not supported")]
    Refused {
        /// Its name.
        kind: &'static str,
        /// What to use instead.
        instead: &'static str,
    },
    /// `[__settings__]` is no profile.
    #[error("`__settings__` is a reserved name, not a profile")]
    ReservedProfile,
    /// `DATABRICKS_AUTH_TYPE` names nothing that anybody knows.
    #[error("{setting} is `{auth_type}`, which is no way to authenticate")]
    UnknownAuthType {
        /// The setting, as it was written.
        setting: String,
        /// What was given.
        auth_type: String,
    },
}

impl WorkspaceError {
    /// What a person can do about it.
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

/// At most so many names are listed in a hint.
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
