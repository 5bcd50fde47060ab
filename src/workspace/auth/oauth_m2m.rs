//! OAuth machine-to-machine (RFC 6749 section 4.4): a service principal's id and secret for a token of about an hour.

use std::{sync::OnceLock, time::Duration};

use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tracing::debug;
use url::Url;

use super::WorkspaceToken;
use crate::workspace::api::{Api, ApiError};

/// RFC 8414's document, where a workspace has it.
const DISCOVERY: &str = "/oidc/.well-known/oauth-authorization-server";
/// The token endpoint that Databricks documents.
const TOKEN_ENDPOINT: &str = "/oidc/v1/token";
const SCOPE: &str = "all-apis";
/// RFC 6749 lets a server leave `expires_in` out; then we ask again soon.
const DEFAULT_LIFETIME: Duration = Duration::from_mins(10);

pub(in crate::workspace) struct OAuthM2m {
    client_id: String,
    client_secret: SecretString,
    endpoint: OnceLock<Url>,
}

#[derive(Deserialize)]
struct Metadata {
    token_endpoint: String,
}

#[derive(Deserialize)]
struct TokenResponse {
    access_token: SecretString,
    #[serde(default)]
    expires_in: Option<Seconds>,
}

/// Some servers quote the number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Seconds {
    Number(f64),
    Text(String),
}

impl OAuthM2m {
    pub(super) fn new(client_id: String, client_secret: SecretString) -> Self {
        Self {
            client_id,
            client_secret,
            endpoint: OnceLock::new(),
        }
    }

    pub(super) fn client_id(&self) -> &str {
        &self.client_id
    }

    pub(super) async fn token(&self, api: &Api) -> Result<WorkspaceToken, ApiError> {
        let endpoint = self.endpoint(api).await;
        let request = api
            .request(Method::POST, endpoint)
            .basic_auth(&self.client_id, Some(self.client_secret.expose_secret()))
            .form(&[("grant_type", "client_credentials"), ("scope", SCOPE)]);
        let response: TokenResponse = api.send(request).await?.json()?;
        let token = response.access_token.expose_secret();
        if token.is_empty() || token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(ApiError::Malformed {
                reason: "the workspace token is not a token".to_owned(),
            });
        }
        let lifetime = response
            .expires_in
            .and_then(Seconds::duration)
            .unwrap_or(DEFAULT_LIFETIME);
        Ok(WorkspaceToken {
            secret: response.access_token,
            lifetime: Some(lifetime),
        })
    }

    /// The token endpoint: discovered once; the documented one where discovery has no answer.
    async fn endpoint(&self, api: &Api) -> Url {
        if let Some(endpoint) = self.endpoint.get() {
            return endpoint.clone();
        }
        let fallback = api.host().join(TOKEN_ENDPOINT);
        let discovered = match api
            .send(api.request(Method::GET, api.host().join(DISCOVERY)))
            .await
        {
            Ok(reply) => reply
                .json::<Metadata>()
                .ok()
                .and_then(|metadata| Url::parse(&metadata.token_endpoint).ok()),
            // Whether there is a document is still open: try again with the next token.
            Err(ApiError::Network { .. }) => return fallback,
            Err(ApiError::Status { status, .. })
                if status.is_server_error() || status.as_u16() == 429 =>
            {
                return fallback;
            }
            Err(_) => None,
        };
        // The client secret goes there.
        let endpoint = discovered
            .filter(|url| api.host().may_trust(url))
            .unwrap_or(fallback);
        debug!(%endpoint, "token endpoint chosen");
        self.endpoint.get_or_init(|| endpoint).clone()
    }
}

impl Seconds {
    fn duration(self) -> Option<Duration> {
        let seconds = match self {
            Self::Number(seconds) => seconds,
            Self::Text(text) => text.trim().parse().ok()?,
        };
        Duration::try_from_secs_f64(seconds).ok()
    }
}
