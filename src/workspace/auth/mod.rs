//! Authentication to the workspace: one file per kind, and the table of kinds.
//!
//! A kind gets workspace tokens; the cache keeps one and renews it before it expires. To add a kind, write a file with its
//! [`TokenSource`] and its [`Kind`], and add a line to the table below.

mod azure;
mod azure_cli;
mod azure_client_secret;
mod azure_devops_oidc;
mod azure_msi;
mod cache;
mod choice;
mod command;
mod databricks_cli;
mod env_oidc;
mod exchange;
mod file_oidc;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod github_oidc;
mod metadata_service;
mod model_serving;
mod oauth_m2m;
mod oidc;
mod pat;
mod refused;
mod token;

use std::pin::Pin;

use secrecy::{ExposeSecret, SecretString};

use super::{
    WorkspaceError, api::Api, diagnosis::CallError, host::Host, settings::ResolvedSettings,
};
use crate::config::{Attribute, AuthFamily};

pub(super) use cache::{CachedToken, TokenCache};
pub(super) use choice::choose;
pub(super) use model_serving::host as serving_host;
pub(super) use token::claim;
use token::{Expiry, TokenResponse, WorkspaceToken};

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $label:literal in $file:ident;)+) => {
        /// The kinds of authentication, by the names that `DATABRICKS_AUTH_TYPE` takes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum AuthKind { $($(#[$doc])* $kind,)+ }

        impl AuthKind {
            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),+];

            /// The name in settings and in the user agent.
            pub fn label(self) -> &'static str {
                match self { $(Self::$kind => $label,)+ }
            }

            fn of_label(label: &str) -> Option<Self> {
                match label { $($label => Some(Self::$kind),)+ _ => None }
            }

            fn rules(self) -> &'static Kind {
                match self { $(Self::$kind => &$file::KIND,)+ }
            }
        }
    };
}

// In the order of the SDK for Go (`config/auth_default.go`), in which kinds that are found on the machine are tried.
kinds! {
    /// A personal access token.
    Pat = "pat" in pat;
    /// OAuth machine-to-machine: the id and secret of a service principal.
    OAuthM2m = "oauth-m2m" in oauth_m2m;
    /// The login of the Databricks CLI.
    DatabricksCli = "databricks-cli" in databricks_cli;
    /// A local service that hands out tokens.
    MetadataService = "metadata-service" in metadata_service;
    /// The identity token of a GitHub Actions job, exchanged.
    GithubOidc = "github-oidc" in github_oidc;
    /// The identity token of an Azure DevOps pipeline, exchanged.
    AzureDevOpsOidc = "azure-devops-oidc" in azure_devops_oidc;
    /// An identity token in a variable, exchanged.
    EnvOidc = "env-oidc" in env_oidc;
    /// An identity token in a file, exchanged.
    FileOidc = "file-oidc" in file_oidc;
    /// The managed identity of an Azure machine.
    AzureMsi = "azure-msi" in azure_msi;
    /// An application of Entra ID, by its secret.
    AzureClientSecret = "azure-client-secret" in azure_client_secret;
    /// The login of the Azure CLI.
    AzureCli = "azure-cli" in azure_cli;
    /// The identity that Databricks Model Serving gives to a model.
    ModelServing = "model-serving" in model_serving;
}

/// When a kind is used, and how its source is made.
struct Kind {
    /// The family of settings that select it.
    family: Option<AuthFamily>,
    /// Whether it is the one of its family.
    is_selected: fn(&ResolvedSettings) -> bool,
    /// Whether it is tried without a setting that selects it.
    is_available: fn(&ResolvedSettings, &Host) -> bool,
    /// Whether its tokens can assume the rights of a group (`DATABRICKS_GROUP_ID`).
    takes_group: bool,
    create: Constructor,
}

type Constructor = fn(&ResolvedSettings, &Host) -> Result<Box<dyn TokenSource>, WorkspaceError>;

impl Kind {
    /// A kind that nothing selects but its name.
    const fn new(create: Constructor) -> Self {
        Self {
            family: None,
            is_selected: |_| true,
            is_available: |_, _| false,
            takes_group: false,
            create,
        }
    }
}

/// A future, boxed for use in trait objects.
type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, CallError>> + Send + 'a>>;

/// A source of workspace tokens.
pub(super) trait TokenSource: Send + Sync {
    fn kind(&self) -> AuthKind;

    fn token<'a>(&'a self, api: &'a Api, freshness: Freshness) -> Boxed<'a, WorkspaceToken>;

    /// What to check when the workspace refuses the token: a setting, or a command to run.
    fn hint(&self) -> String;

    /// The service principal's application id, which is also its Postgres role, if it is known.
    fn service_principal(&self) -> Option<&str> {
        None
    }

    /// Whether it may return a token that it returned before.
    fn has_cache(&self) -> bool {
        false
    }

    /// Whether another call can return another token.
    fn is_renewable(&self) -> bool {
        true
    }
}

/// How new a token has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// Any that works.
    Any,
    /// Another than the last.
    New,
}

/// The hint of kinds whose tokens the workspace issues itself.
const CHECK_ASSIGNMENT: &str = "check that the service principal is assigned to this workspace and that `DATABRICKS_HOST` names it";

/// A required setting.
fn required(
    settings: &ResolvedSettings,
    attribute: Attribute,
    because: impl Into<String>,
) -> Result<String, WorkspaceError> {
    let value = settings.text(attribute).map(str::to_owned);
    value.ok_or_else(|| WorkspaceError::Incomplete {
        missing: attribute.variables().first().copied().unwrap_or_default(),
        because: because.into(),
    })
}

/// A required secret that a header or a form can carry.
fn required_secret(
    settings: &ResolvedSettings,
    attribute: Attribute,
    because: impl Into<String>,
) -> Result<SecretString, WorkspaceError> {
    let secret = SecretString::from(required(settings, attribute, because)?);
    let text = secret.expose_secret();
    if text.chars().any(|c| !c.is_ascii_graphic() && c != ' ') {
        return Err(WorkspaceError::InvalidValue {
            name: settings.named(attribute),
            problem: "holds characters that cannot be sent",
        });
    }
    Ok(secret)
}
