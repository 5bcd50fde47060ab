//! The kinds of authentication: one file each, and the table of all.
//!
//! To add a kind:
//! 1. Its file, with a const `RULES` ([`AuthRules`]: when it is used, its secret variables, and a function that makes its
//!    [`Source`]), and a type with the method `token` of [`TokenSource`]. If it exchanges another issuer's identity token, the
//!    type implements [`exchange::IdentitySource`] instead. Secrets of its calls go through
//!    [`Call`](crate::workspace::api::Call), which masks them in errors.
//! 2. Here, a `mod` line and a row of the table `kinds!`, in the order in which kinds are tried.
//! 3. If it has settings of its own: a row of `attributes!` for each in `config::workspace`, and an `AuthFamily` if they
//!    select the kind. A setting that counts only with a certain value is a case in `choice::families`.
//! 4. If it was refused so far, its row in `unsupported` goes. Tests: `choice`, `tests/it/auth.rs`; guides: `operations.md`.

mod azure_cli;
mod azure_client_secret;
mod azure_devops_oidc;
pub(super) mod azure_msi;
mod databricks_cli;
mod env_oidc;
mod file_oidc;
pub(super) mod github_oidc;
mod metadata_service;
pub(super) mod model_serving;
mod oauth_m2m;
mod pat;

use secrecy::{ExposeSecret, SecretString};

use super::{
    azure, exchange, oauth,
    token::{
        Boxed, CHECK_ASSIGNMENT, Expiry, Freshness, Renewal, Source, TOKEN_TIMEOUT, TokenSource,
        WorkspaceToken,
    },
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{WorkspaceError, host::Host, settings::ResolvedSettings},
};

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

            pub(super) fn rules(self) -> &'static AuthRules {
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

/// When a kind is used, and how its source is made.
pub(super) struct AuthRules {
    /// The family of settings that select it.
    pub(super) family: Option<AuthFamily>,
    /// Whether it is the one of its family.
    pub(super) is_selected: fn(&ResolvedSettings) -> bool,
    /// Whether it is tried without a setting that selects it.
    pub(super) is_available: fn(&ResolvedSettings, &Host) -> bool,
    /// Whether its tokens can assume the rights of a group (`DATABRICKS_GROUP_ID`).
    pub(super) can_assume_group: bool,
    /// Variables that it reads and that are secrets, beside secret attributes; `exec` can keep them from its command.
    pub(super) secret_variables: &'static [&'static str],
    pub(super) create: Constructor,
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
            create,
        }
    }
}

/// The secret variables of all kinds.
pub(in crate::workspace) fn secret_variables() -> impl Iterator<Item = &'static str> {
    let kinds = AuthKind::ALL.iter();
    kinds.flat_map(|kind| kind.rules().secret_variables.iter().copied())
}

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
