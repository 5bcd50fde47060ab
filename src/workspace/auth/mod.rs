//! Authentication to the workspace: one file per kind, and the table of kinds.
//!
//! A kind gets workspace tokens; `cache` keeps one and renews it before it expires. `choice` picks the kind.
//! No kinds: `azure`, `exchange`, `token` and `token_endpoint` (shared by kinds), and `unsupported` (kinds of the SDKs only).
//!
//! To add a kind:
//! 1. Its file, with a const `RULES` ([`AuthRules`]: when it is used, its secret variables, and a function that makes its
//!    [`Source`]), and a type with the one method of [`TokenSource`]. If it exchanges another issuer's identity token, the
//!    type implements [`exchange::IdentitySource`] instead. Secrets of its calls go through [`Call`](super::api::Call),
//!    which masks them in errors.
//! 2. Here, a `mod` line and a row of the table `kinds!`, in the order in which kinds are tried.
//! 3. If it has settings of its own: a row of `attributes!` for each in `config::workspace`, and an `AuthFamily` if they
//!    select the kind. A setting that counts only with a certain value is a case in `choice::families`.
//! 4. If it was refused so far, its row in `unsupported` goes. Tests: `choice`, `tests/it/auth.rs`; guides: `operations.md`.

mod azure;
mod azure_cli;
mod azure_client_secret;
mod azure_devops_oidc;
mod azure_msi;
mod cache;
mod choice;
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
mod pat;
mod token;
mod token_endpoint;
mod unsupported;

use std::pin::Pin;

use secrecy::{ExposeSecret, SecretString};

use super::{CallError, WorkspaceError, api::Api, host::Host, settings::ResolvedSettings};
use crate::config::{Attribute, AuthFamily};

pub(super) use cache::{CachedToken, TokenCache};
pub(super) use choice::choose;
pub(super) use model_serving::host as serving_host;
pub(super) use token::WorkspaceToken;
pub(crate) use token::claim;
use token::{Expiry, TokenResponse};

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

            fn rules(self) -> &'static AuthRules {
                match self { $(Self::$kind => &$file::RULES,)+ }
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

/// When a kind is used, how its source is made, and what its tokens are like.
struct AuthRules {
    /// The family of settings that select it.
    family: Option<AuthFamily>,
    /// Whether it is the one of its family.
    is_selected: fn(&ResolvedSettings) -> bool,
    /// Whether it is tried without a setting that selects it.
    is_available: fn(&ResolvedSettings, &Host) -> bool,
    /// Whether its tokens can assume the rights of a group (`DATABRICKS_GROUP_ID`).
    can_assume_group: bool,
    /// Variables that it reads and that are secrets, beside secret attributes; `exec` can keep them from its command.
    secret_variables: &'static [&'static str],
    /// Whether it may return a token that it returned before.
    has_cache: bool,
    /// Whether another call can return another token.
    is_renewable: bool,
    create: Constructor,
}

type Constructor = fn(&ResolvedSettings, &Host) -> Result<Source, WorkspaceError>;

impl AuthRules {
    /// A kind that nothing selects but its name.
    const fn new(create: Constructor) -> Self {
        Self {
            family: None,
            is_selected: |_| true,
            is_available: |_, _| false,
            can_assume_group: false,
            secret_variables: &[],
            has_cache: false,
            is_renewable: true,
            create,
        }
    }
}

/// The secret variables of all kinds.
pub(super) fn secret_variables() -> impl Iterator<Item = &'static str> {
    let kinds = AuthKind::ALL.iter();
    kinds.flat_map(|kind| kind.rules().secret_variables.iter().copied())
}

/// A future, boxed for use in trait objects.
pub(super) type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, CallError>> + Send + 'a>>;

/// A kind with its settings.
pub(super) struct Source {
    pub(super) kind: AuthKind,
    /// What to check when the workspace refuses its token: a setting, or a command to run.
    pub(super) hint: String,
    /// The service principal's application id, which is also its Postgres role, if it is known.
    service_principal: Option<String>,
    // Boxed, so that the cache holds sources of different kinds.
    tokens: Box<dyn TokenSource>,
}

impl Source {
    pub(super) fn new(
        kind: AuthKind,
        hint: impl Into<String>,
        tokens: impl TokenSource + 'static,
    ) -> Self {
        Self {
            kind,
            hint: hint.into(),
            service_principal: None,
            tokens: Box::new(tokens),
        }
    }

    fn of_service_principal(self, id: Option<String>) -> Self {
        Self {
            service_principal: id,
            ..self
        }
    }
}

/// Gets workspace tokens.
pub(super) trait TokenSource: Send + Sync {
    fn token<'a>(&'a self, api: &'a Api, freshness: Freshness) -> Boxed<'a, WorkspaceToken>;
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
    because: &str,
) -> Result<String, WorkspaceError> {
    let value = settings.text(attribute).map(str::to_owned);
    let missing = attribute.variables().first().copied().unwrap_or_default();
    value.ok_or_else(|| WorkspaceError::incomplete(missing, because))
}

/// The value of a setting is of no use.
fn invalid(settings: &ResolvedSettings, attribute: Attribute, problem: &str) -> WorkspaceError {
    WorkspaceError::new(format!("{} {problem}", settings.named(attribute)))
}

/// A required secret that a header or a form can carry.
fn required_secret(
    settings: &ResolvedSettings,
    attribute: Attribute,
    because: &str,
) -> Result<SecretString, WorkspaceError> {
    let secret = SecretString::from(required(settings, attribute, because)?);
    let text = secret.expose_secret();
    if text.chars().any(|c| !c.is_ascii_graphic() && c != ' ') {
        return Err(WorkspaceError::unsendable(&settings.named(attribute)));
    }
    Ok(secret)
}
