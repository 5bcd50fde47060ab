//! The workspace's OAuth token endpoint: discovered once, with the documented address as the default.
//!
//! `DATABRICKS_DISCOVERY_URL`, else the workspace's metadata (`/.well-known/databricks-config`), else its RFC 8414 document.

use serde::{Deserialize, de::DeserializeOwned};
use tokio::sync::OnceCell;
use tracing::debug;
use url::Url;

use super::{AuthKind, invalid};
use crate::{
    config::Attribute,
    workspace::{
        WorkspaceError,
        api::{Api, ApiError},
        settings::ResolvedSettings,
    },
};

/// The workspace's metadata.
const HOST_METADATA: &str = "/.well-known/databricks-config";
/// RFC 8414's document, where a workspace has it.
const DISCOVERY: &str = "/oidc/.well-known/oauth-authorization-server";
/// The token endpoint that Databricks documents.
const TOKEN_ENDPOINT: &str = "/oidc/v1/token";

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

/// Written as text or as a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Number(u64),
    Text(String),
}

impl Id {
    fn into_text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HostMetadata {
    oidc_endpoint: Option<String>,
    account_id: Option<Id>,
    workspace_id: Option<Id>,
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
                .map_err(|_| invalid(settings, Attribute::DiscoveryUrl, problem))?,
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
            url: api.host().join(TOKEN_ENDPOINT),
            audience: None,
        };
        let document = if let Some(url) = &self.discovery_url {
            url.clone()
        } else {
            match request(api, kind, api.host().join(HOST_METADATA)).await {
                Found::Document(metadata) => self
                    .learn(api, metadata, &mut endpoint)
                    .unwrap_or_else(|| api.host().join(DISCOVERY)),
                // Where a workspace has the document itself, as in the SDK for Go.
                Found::Missing => api.host().join(DISCOVERY),
                Found::Unknown => return Err(endpoint),
            }
        };
        match request::<Metadata>(api, kind, document).await {
            Found::Document(metadata) => {
                // Secrets are sent there.
                let url = Url::parse(&metadata.token_endpoint).ok();
                if let Some(url) = url.filter(|url| api.host().may_trust(url)) {
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
            api.learn_workspace_id(&id.into_text());
        }
        endpoint.audience = metadata
            .token_federation_default_oidc_audiences
            .into_iter()
            .next();
        let root = metadata.oidc_endpoint?;
        // The address of an account's endpoint has a placeholder (`oauth.py` of the SDK for Python).
        let root = match self
            .account_id
            .clone()
            .or(metadata.account_id.map(Id::into_text))
        {
            Some(account) => root.replace("{account_id}", &account),
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
            .filter(|url| api.host().may_trust(url))
    }
}

async fn request<T: DeserializeOwned>(api: &Api, kind: AuthKind, url: Url) -> Found<T> {
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
