//! How we prove to the workspace who we are: one file per way, and the chain that picks among them.
//!
//! A way yields workspace tokens; the cache keeps one and renews it ahead of its expiry. A new way is a file here, a row
//! of [`AuthKind`], an arm of [`TokenSource`], and its place in the chain.

mod azure;
mod azure_cli;
mod azure_client_secret;
mod azure_devops_oidc;
mod azure_msi;
mod cache;
mod chain;
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

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use reqwest::header::{HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;

use super::{
    api::Api,
    diagnosis::CallError,
    settings::{Attribute, Settings, SettingsError},
};
use crate::expiry::Number;

pub(super) use cache::{CachedToken, TokenCache};
pub(super) use chain::choose;
pub(super) use model_serving::{HOSTS as SERVING_HOSTS, is_serving};
pub(super) use oidc::Oidc;

use azure_cli::AzureCli;
use azure_client_secret::AzureClientSecret;
use azure_msi::AzureMsi;
use databricks_cli::DatabricksCli;
use exchange::Exchange;
use metadata_service::MetadataService;
use model_serving::ModelServing;
use oauth_m2m::OAuthM2m;
use pat::Pat;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $label:literal,)+) => {
        /// The ways to authenticate, by the names that `DATABRICKS_AUTH_TYPE` takes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum AuthKind { $($(#[$doc])* $kind,)+ }

        impl AuthKind {
            /// The name in settings and in the user agent.
            pub fn label(self) -> &'static str {
                match self { $(Self::$kind => $label,)+ }
            }

            /// Every kind.
            pub const ALL: &[Self] = &[$(Self::$kind),+];

            /// Every name.
            pub(super) fn labels() -> Vec<&'static str> {
                vec![$($label),+]
            }

            fn of_label(label: &str) -> Option<Self> {
                match label { $($label => Some(Self::$kind),)+ _ => None }
            }
        }
    };
}

kinds! {
    /// A personal access token.
    Pat = "pat",
    /// OAuth machine-to-machine: the id and secret of a service principal.
    OAuthM2m = "oauth-m2m",
    /// Whoever is logged in to the Databricks CLI.
    DatabricksCli = "databricks-cli",
    /// A service on this machine that hands out tokens.
    MetadataService = "metadata-service",
    /// The identity token of a GitHub Actions job, exchanged.
    GithubOidc = "github-oidc",
    /// The identity token of an Azure DevOps pipeline, exchanged.
    AzureDevOpsOidc = "azure-devops-oidc",
    /// An identity token in a variable, exchanged.
    EnvOidc = "env-oidc",
    /// An identity token in a file, exchanged.
    FileOidc = "file-oidc",
    /// The managed identity of an Azure machine.
    AzureMsi = "azure-msi",
    /// An application of Entra ID, by its secret.
    AzureClientSecret = "azure-client-secret",
    /// The account that is logged in to the Azure CLI.
    AzureCli = "azure-cli",
    /// The identity that Databricks Model Serving gives to a model.
    ModelServing = "model-serving",
}

/// A token that the workspace's API accepts.
pub(super) struct WorkspaceToken {
    pub(super) secret: SecretString,
    pub(super) expiry: Expiry,
    /// What it may be used for, where that is said.
    pub(super) scopes: Option<String>,
    /// What must be sent beside it.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

/// When a token ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expiry {
    /// At this time, by the clock of whoever issued it.
    At(Timestamp),
    /// So long from now.
    In(Duration),
    /// Nobody knows.
    Unknown,
}

/// How new a token has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// Any that works.
    Any,
    /// Another than the last.
    New,
}

/// RFC 6749 lets a server leave `expires_in` out; then we ask again soon.
const DEFAULT_LIFETIME: Duration = Duration::from_mins(10);

impl WorkspaceToken {
    /// A token that can stand in a header, and nothing else with it.
    fn new(secret: SecretString, expiry: Expiry) -> Result<Self, CallError> {
        let token = secret.expose_secret();
        if token.is_empty() || token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(CallError::malformed(
                "the workspace token is not a token",
                None,
            ));
        }
        let scopes = claim(token, "scope").or_else(|| claim(token, "scp"));
        Ok(Self {
            secret,
            expiry,
            scopes,
            headers: Vec::new(),
        })
    }
}

/// One way to get workspace tokens.
pub(super) enum TokenSource {
    AzureCli(AzureCli),
    AzureClientSecret(AzureClientSecret),
    AzureMsi(AzureMsi),
    DatabricksCli(DatabricksCli),
    /// Of an identity token from somewhere else.
    Exchange(Exchange),
    MetadataService(MetadataService),
    ModelServing(ModelServing),
    OAuthM2m(OAuthM2m),
    Pat(Pat),
}

impl TokenSource {
    pub(super) fn kind(&self) -> AuthKind {
        match self {
            Self::AzureCli(_) => AuthKind::AzureCli,
            Self::AzureClientSecret(_) => AuthKind::AzureClientSecret,
            Self::AzureMsi(_) => AuthKind::AzureMsi,
            Self::DatabricksCli(_) => AuthKind::DatabricksCli,
            Self::Exchange(exchange) => exchange.kind(),
            Self::MetadataService(_) => AuthKind::MetadataService,
            Self::ModelServing(_) => AuthKind::ModelServing,
            Self::OAuthM2m(_) => AuthKind::OAuthM2m,
            Self::Pat(_) => AuthKind::Pat,
        }
    }

    /// The service principal's application id, which is also its Postgres role, where this way knows it.
    fn service_principal(&self) -> Option<&str> {
        match self {
            Self::Exchange(source) => source.client_id(),
            Self::OAuthM2m(source) => Some(source.client_id()),
            // Entra ID's applications keep their id in the workspace.
            Self::AzureClientSecret(source) => Some(source.client_id()),
            Self::AzureMsi(source) => source.client_id(),
            Self::AzureCli(_)
            | Self::DatabricksCli(_)
            | Self::MetadataService(_)
            | Self::ModelServing(_)
            | Self::Pat(_) => None,
        }
    }

    /// What a person would look at if the workspace refuses the token: a setting, or a command to run.
    pub(super) fn mend(&self) -> String {
        match self {
            Self::AzureCli(_) => "check with `az account show` that the right account is logged in, and that it is a user of this workspace".to_owned(),
            Self::AzureClientSecret(_) | Self::AzureMsi(_) => {
                "check that the identity is a service principal of this workspace; one that is not yet needs `DATABRICKS_AZURE_RESOURCE_ID` and the Contributor role on it".to_owned()
            }
            Self::DatabricksCli(source) => format!("run `{}`", source.login()),
            Self::Exchange(_) | Self::OAuthM2m(_) => {
                "check that the service principal is assigned to this workspace and that `DATABRICKS_HOST` names it".to_owned()
            }
            Self::MetadataService(_) => "restart the tool that set `DATABRICKS_METADATA_SERVICE_URL`".to_owned(),
            Self::ModelServing(_) => {
                "check that the model was logged with the resources that it uses, and that `DATABRICKS_HOST`, if set, is their workspace".to_owned()
            }
            Self::Pat(source) => format!(
                "check {}: it may have expired, been revoked, or belong to another workspace",
                source.setting()
            ),
        }
    }

    /// Whether what it gives may be a token that it gave before.
    fn has_cache(&self) -> bool {
        matches!(
            self,
            Self::AzureCli(_)
                | Self::AzureMsi(_)
                | Self::DatabricksCli(_)
                | Self::MetadataService(_)
                | Self::ModelServing(_)
        )
    }

    /// Whether asking again can yield another token.
    fn is_renewable(&self) -> bool {
        !matches!(self, Self::Pat(_))
    }

    async fn token(
        &self,
        api: &Api,
        oidc: &Oidc,
        freshness: Freshness,
    ) -> Result<WorkspaceToken, CallError> {
        match self {
            Self::AzureCli(source) => source.token(api).await,
            Self::AzureClientSecret(source) => source.token(api).await,
            Self::AzureMsi(source) => source.token(api).await,
            Self::DatabricksCli(source) => source.token(api, freshness).await,
            Self::Exchange(source) => source.token(api, oidc).await,
            Self::MetadataService(source) => source.token(api).await,
            Self::ModelServing(source) => source.token().await,
            Self::OAuthM2m(source) => source.token(api, oidc).await,
            Self::Pat(source) => Ok(source.token()),
        }
    }
}

/// RFC 6749 section 5.1, as far as it concerns us.
#[derive(Deserialize)]
struct TokenResponse {
    access_token: SecretString,
    #[serde(default)]
    expires_in: Option<Number>,
    #[serde(default)]
    expires_on: Option<Number>,
    #[serde(default)]
    scope: Option<String>,
}

impl TokenResponse {
    fn into_token(self) -> Result<WorkspaceToken, CallError> {
        let lifetime = self.expires_in.as_ref().and_then(Number::value);
        let end = self.expires_on.as_ref().and_then(Number::timestamp);
        let expiry = match (lifetime.and_then(seconds), end) {
            (Some(lifetime), _) => Expiry::In(lifetime),
            (None, Some(end)) => Expiry::At(end),
            (None, None) => Expiry::In(DEFAULT_LIFETIME),
        };
        let mut token = WorkspaceToken::new(self.access_token, expiry)?;
        token.scopes = self.scope.or(token.scopes);
        Ok(token)
    }
}

/// A lifetime; one that a `Duration` cannot hold never ends.
fn seconds(seconds: f64) -> Option<Duration> {
    (seconds >= 0.0).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// A claim of a JWT, unverified: for people and for messages, never for a decision about access.
fn claim(token: &str, name: &str) -> Option<String> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: Value = serde_json::from_slice(&payload).ok()?;
    match claims.get(name)? {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => {
            let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
            Some(words.join(" "))
        }
        _ => None,
    }
}

/// A setting that is needed.
fn needed(
    settings: &Settings,
    attribute: Attribute,
    because: impl Into<String>,
) -> Result<String, SettingsError> {
    let value = settings.text(attribute).map(str::to_owned);
    value.ok_or_else(|| SettingsError::Incomplete {
        missing: attribute.variables().first().copied().unwrap_or_default(),
        because: because.into(),
    })
}

/// ... and that is a secret which can stand in a header or a form.
fn needed_secret(
    settings: &Settings,
    attribute: Attribute,
    because: impl Into<String>,
) -> Result<SecretString, SettingsError> {
    let secret = needed(settings, attribute, because)?;
    if secret.chars().any(|c| !c.is_ascii_graphic() && c != ' ') {
        return Err(SettingsError::InvalidValue {
            name: settings.named(attribute),
            problem: "holds characters that cannot be sent",
        });
    }
    Ok(secret.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn number() -> impl Strategy<Value = Value> {
        prop_oneof![
            any::<f64>().prop_map(|number| serde_json::json!(number)),
            any::<u64>().prop_map(|number| serde_json::json!(number)),
            any::<i64>().prop_map(|number| serde_json::json!(number.to_string())),
            "[-+0-9.eE]{0,25}".prop_map(Value::String),
            Just(Value::Null),
        ]
    }

    proptest! {
        /// Whatever a token endpoint says of the token's end, it is taken with an end or refused.
        #[test]
        fn no_expiry_makes_it_panic(expires_in in number(), expires_on in number()) {
            let body = serde_json::json!({ "access_token": "a.b.c", "expires_in": expires_in, "expires_on": expires_on });
            if let Ok(response) = serde_json::from_value::<TokenResponse>(body) {
                prop_assert!(response.into_token().is_ok());
            }
        }

        #[test]
        fn no_token_makes_it_panic(token: String, payload: Vec<u8>) {
            let _ = claim(&token, "scope");
            let _ = claim(&format!("h.{}.s", URL_SAFE_NO_PAD.encode(payload)), "scope");
        }
    }
}
