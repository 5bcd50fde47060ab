//! OAuth machine-to-machine (RFC 6749 section 4.4): a service principal's id and secret for a token of about an hour.

use secrecy::SecretString;

use super::{
    AuthKind, AuthRules, Boxed, CHECK_ASSIGNMENT, Freshness, Source, TokenSource, WorkspaceToken,
    oauth,
    oauth::{Grant, TokenEndpointDiscovery},
    required, required_secret,
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{WorkspaceError, api::Api, diagnosis, settings::ResolvedSettings},
};

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::OAuth),
    is_selected: |settings| settings.client_secret.is_some(),
    can_assume_group: true,
    ..AuthRules::new(|settings, _| {
        let tokens = OAuthM2m::new(settings)?;
        let id = tokens.client_id.clone();
        let source = Source::new(AuthKind::OAuthM2m, CHECK_ASSIGNMENT, tokens);
        Ok(source.of_service_principal(Some(id)))
    })
};

struct OAuthM2m {
    client_id: String,
    client_secret: SecretString,
    discovery: TokenEndpointDiscovery,
    grant: Grant,
    /// What to check when the token endpoint refuses id or secret.
    hint: String,
}

impl OAuthM2m {
    fn new(settings: &ResolvedSettings) -> Result<Self, WorkspaceError> {
        let because = "a service principal needs both its id and its secret";
        let client_id = required(settings, Attribute::ClientId, because)?;
        let client_secret = required_secret(settings, Attribute::ClientSecret, because)?;
        // RFC 7617: a colon would end the id early.
        if client_id.contains(':') || client_id.chars().any(char::is_control) {
            let name = settings.named(Attribute::ClientId);
            return Err(WorkspaceError::unsendable(&name));
        }
        Ok(Self {
            client_id,
            client_secret,
            discovery: TokenEndpointDiscovery::new(settings)?,
            grant: Grant::new(settings),
            hint: format!(
                "check {} and {}: the secret may have expired, or belong to another service principal",
                settings.named(Attribute::ClientId),
                settings.named(Attribute::ClientSecret)
            ),
        })
    }
}

impl TokenSource for OAuthM2m {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(async move {
            let endpoint = self.discovery.find(api, AuthKind::OAuthM2m).await;
            let call = api
                .post(AuthKind::OAuthM2m, endpoint.url)
                .basic(&self.client_id, &self.client_secret)
                .form(&self.grant.form("client_credentials", []), None);
            let explain = |error| {
                let refused = "refused the client id or its secret";
                diagnosis::token_endpoint(&api.host, refused, &self.hint, error)
            };
            oauth::request_token(api, call, explain).await
        })
    }
}
