//! OAuth machine-to-machine (RFC 6749 section 4.4): a service principal's id and secret for a token of about an hour.

use secrecy::SecretString;

use super::{
    AuthKind, Oidc, TokenResponse, WorkspaceToken, needed, needed_secret,
    oidc::{Grant, POST},
};
use crate::workspace::{
    api::Api,
    diagnosis::{self, CallError},
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::OAuthM2m;

pub(in crate::workspace) struct OAuthM2m {
    client_id: String,
    client_secret: SecretString,
    grant: Grant,
    mend: String,
}

impl OAuthM2m {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let because = "a service principal needs both its id and its secret";
        let client_id = needed(settings, Attribute::ClientId, because)?;
        let client_secret = needed_secret(settings, Attribute::ClientSecret, because)?;
        // RFC 7617: a colon in the id would end it early.
        if client_id.contains(':') || client_id.chars().any(char::is_control) {
            return Err(SettingsError::InvalidValue {
                name: settings.named(Attribute::ClientId),
                problem: "holds characters that cannot be sent",
            });
        }
        let mend = format!(
            "check {} and {}: the secret may have expired, or belong to another service principal",
            settings.named(Attribute::ClientId),
            settings.named(Attribute::ClientSecret)
        );
        Ok(Self {
            client_id,
            client_secret,
            grant: Grant::new(settings),
            mend,
        })
    }

    pub(super) fn client_id(&self) -> &str {
        &self.client_id
    }

    pub(super) async fn token(&self, api: &Api, oidc: &Oidc) -> Result<WorkspaceToken, CallError> {
        let endpoint = oidc.endpoint(api, KIND).await;
        let request = api
            .elsewhere(KIND, POST, endpoint.url)
            .basic(&self.client_id, &self.client_secret)
            .form(&self.grant.form("client_credentials", []));
        let told = |error| {
            let refused = "refused the client id or its secret";
            diagnosis::token_endpoint(api.host(), refused, &self.mend, error)
        };
        let reply = api.send(request).await.map_err(told)?;
        reply.json::<TokenResponse>().map_err(told)?.into_token()
    }
}
