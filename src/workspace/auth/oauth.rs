//! OAuth at the workspace: the token endpoint, requests to it, and its answers (RFC 6749).
//!
//! The endpoint is named by `DATABRICKS_DISCOVERY_URL`, else by the workspace's metadata (`/.well-known/databricks-config`),
//! else by its RFC 8414 document; discovered once, with the documented address as the default.

use std::time::Duration;

use secrecy::SecretString;
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::Value;
use tokio::sync::OnceCell;
use tracing::debug;
use url::Url;

use super::{
    AuthKind,
    token::{Expiry, WorkspaceToken},
};
use crate::{
    config::Attribute,
    workspace::{
        CallError, WorkspaceError,
        api::{Api, ApiError, Call},
        settings::ResolvedSettings,
        times::Number,
    },
};

/// The workspace's metadata.
const HOST_METADATA: &str = "/.well-known/databricks-config";
/// RFC 8414's document, where a workspace has it.
const DISCOVERY: &str = "/oidc/.well-known/oauth-authorization-server";
/// The token endpoint that Databricks documents.
const TOKEN_ENDPOINT: &str = "/oidc/v1/token";
/// RFC 6749 lets a server leave `expires_in` out; the token is renewed soon then.
pub(super) const DEFAULT_LIFETIME: Duration = Duration::from_mins(10);

/// The token endpoint, discovered at the first use.
pub(super) struct TokenEndpointDiscovery {
    discovery_url: Option<Url>,
    account_id: Option<String>,
    endpoint: OnceCell<TokenEndpoint>,
}

#[derive(Clone, Debug)]
pub(super) struct TokenEndpoint {
    pub(super) url: Url,
    /// The audience that the workspace expects in identity tokens, if it names one.
    pub(super) audience: Option<String>,
}

#[derive(Deserialize)]
struct Metadata {
    token_endpoint: String,
}

/// An id, written as text or as a number.
fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    })
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HostMetadata {
    oidc_endpoint: Option<String>,
    #[serde(deserialize_with = "id")]
    account_id: Option<String>,
    #[serde(deserialize_with = "id")]
    workspace_id: Option<String>,
    token_federation_default_oidc_audiences: Vec<String>,
}

/// The result of a request for a document.
enum Found<T> {
    Document(T),
    /// It does not exist.
    Missing,
    /// Unknown: to be requested again with the next token.
    Unknown,
}

impl TokenEndpointDiscovery {
    pub(super) fn new(settings: &ResolvedSettings) -> Result<Self, WorkspaceError> {
        let url = settings.discovery_url.as_deref().map(Url::parse);
        let problem = "is not an https address";
        Ok(Self {
            discovery_url: url
                .transpose()
                .map_err(|_| settings.invalid(Attribute::DiscoveryUrl, problem))?,
            account_id: settings.account_id.clone(),
            endpoint: OnceCell::new(),
        })
    }

    /// The token endpoint. Cancel safe.
    pub(super) async fn find(&self, api: &Api, kind: AuthKind) -> TokenEndpoint {
        let found = self
            .endpoint
            .get_or_try_init(|| async { self.discover(api, kind).await });
        match found.await {
            Ok(endpoint) => endpoint.clone(),
            // Not kept: a short outage must not decide for the life of the process.
            Err(fallback) => fallback,
        }
    }

    /// `Err` holds the default until the next attempt.
    async fn discover(&self, api: &Api, kind: AuthKind) -> Result<TokenEndpoint, TokenEndpoint> {
        let mut endpoint = TokenEndpoint {
            url: api.host.join(TOKEN_ENDPOINT),
            audience: None,
        };
        let document = if let Some(url) = &self.discovery_url {
            url.clone()
        } else {
            match optional(api, kind, api.host.join(HOST_METADATA)).await {
                Found::Document(metadata) => self
                    .learn(api, metadata, &mut endpoint)
                    .unwrap_or_else(|| api.host.join(DISCOVERY)),
                // Where a workspace has the document itself, as in the SDK for Go.
                Found::Missing => api.host.join(DISCOVERY),
                Found::Unknown => return Err(endpoint),
            }
        };
        match optional::<Metadata>(api, kind, document).await {
            Found::Document(metadata) => {
                // Secrets are sent there.
                let url = Url::parse(&metadata.token_endpoint).ok();
                if let Some(url) = url.filter(|url| api.host.may_trust(url)) {
                    endpoint.url = url;
                }
            }
            // The documented address stays.
            Found::Missing => {}
            Found::Unknown => return Err(endpoint),
        }
        debug!(endpoint = %endpoint.url, "token endpoint chosen");
        Ok(endpoint)
    }

    /// Applies the workspace's metadata; returns the address of its RFC 8414 document.
    fn learn(
        &self,
        api: &Api,
        metadata: HostMetadata,
        endpoint: &mut TokenEndpoint,
    ) -> Option<Url> {
        if let Some(id) = metadata.workspace_id {
            api.learn_workspace_id(&id);
        }
        endpoint.audience = metadata
            .token_federation_default_oidc_audiences
            .into_iter()
            .next();
        let root = metadata.oidc_endpoint?;
        // The address of an account's endpoint has a placeholder (`oauth.py` of the SDK for Python).
        let root = match self.account_id.as_ref().or(metadata.account_id.as_ref()) {
            Some(account) => root.replace("{account_id}", account),
            None if root.contains("{account_id}") => return None,
            None => root,
        };
        let address = format!(
            "{}/.well-known/oauth-authorization-server",
            root.trim_end_matches('/')
        );
        // This document names the address that secrets are sent to.
        Url::parse(&address)
            .ok()
            .filter(|url| api.host.may_trust(url))
    }
}

async fn optional<T: DeserializeOwned>(api: &Api, kind: AuthKind, url: Url) -> Found<T> {
    // Public documents, requested without a token.
    match api.send(api.probe(kind, url)).await {
        Ok(reply) => reply.json().map_or(Found::Missing, Found::Document),
        Err(ApiError::Network { .. }) => Found::Unknown,
        Err(ApiError::Status { status, .. })
            // The document may exist: the workspace is busy or fails.
            if status.is_server_error() || status.as_u16() == 429 =>
        {
            Found::Unknown
        }
        Err(_) => Found::Missing,
    }
}

/// The parameters of all requests for OAuth tokens of the workspace.
pub(super) struct Grant {
    scopes: String,
    authorization_details: Option<String>,
    group: Option<String>,
}

impl Grant {
    pub(super) fn new(settings: &ResolvedSettings) -> Self {
        let scopes = settings.scopes.as_deref().unwrap_or_default();
        let mut scopes: Vec<&str> = scopes
            .split([',', ' '])
            .filter(|scope| !scope.is_empty())
            .collect();
        scopes.sort_unstable();
        scopes.dedup();
        if scopes.is_empty() {
            // The default of the SDKs.
            scopes.push("all-apis");
        }
        Self {
            scopes: scopes.join(" "),
            authorization_details: settings.authorization_details.clone(),
            group: settings.group_id.clone(),
        }
    }

    pub(super) fn form<'a>(
        &'a self,
        grant_type: &'a str,
        more: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Vec<(&'a str, &'a str)> {
        let mut form = vec![("grant_type", grant_type), ("scope", self.scopes.as_str())];
        if let Some(details) = &self.authorization_details {
            form.push(("authorization_details", details));
        }
        if let Some(group) = &self.group {
            form.push(("assume_group", group));
        }
        form.extend(more);
        form
    }
}

/// The answer of a token endpoint.
#[derive(Deserialize)]
pub(super) struct TokenResponse {
    access_token: SecretString,
    #[serde(default)]
    pub(super) expires_in: Option<Number>,
    /// Azure's instance metadata service sends the time beside the lifetime.
    #[serde(default)]
    pub(super) expires_on: Option<Number>,
    #[serde(default)]
    scope: Option<String>,
}

impl TokenResponse {
    pub(super) fn into_token(self) -> Result<WorkspaceToken, CallError> {
        let lifetime = self.expires_in.as_ref().and_then(Number::value);
        let end = self.expires_on.as_ref().and_then(Number::timestamp);
        let expiry = match (lifetime.and_then(seconds), end) {
            // The lifetime first: it does not depend on how far the clocks agree.
            (Some(lifetime), _) => Expiry::In(lifetime),
            (None, Some(end)) => Expiry::At(end),
            (None, None) => Expiry::In(DEFAULT_LIFETIME),
        };
        let mut token = WorkspaceToken::new(self.access_token, expiry)?;
        // RFC 6749 section 5.1: a server may leave the scope out if it is the requested one.
        token.scopes = self.scope.or(token.scopes);
        Ok(token)
    }
}

/// Requests a token. Cancel safe.
pub(super) async fn request_token(
    api: &Api,
    call: Call,
    explain: impl FnOnce(ApiError) -> CallError,
) -> Result<WorkspaceToken, CallError> {
    api.json::<TokenResponse>(call, explain).await?.into_token()
}

/// A lifetime; one above the range of `Duration` never ends.
fn seconds(seconds: f64) -> Option<Duration> {
    (seconds >= 0.0).then(|| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
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
        /// A token with any expiry is accepted or refused.
        #[test]
        fn no_expiry_makes_it_panic(expires_in in number(), expires_on in number()) {
            let body = serde_json::json!({ "access_token": "a.b.c", "expires_in": expires_in, "expires_on": expires_on });
            if let Ok(response) = serde_json::from_value::<TokenResponse>(body) {
                prop_assert!(response.into_token().is_ok());
            }
        }
    }
}
