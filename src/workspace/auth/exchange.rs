//! Workload identity federation (RFC 8693): exchanges another issuer's identity token for a workspace token.
//!
//! Each kind gets the identity token in its own way, anew for every exchange since it is short-lived.

use secrecy::{ExposeSecret, SecretString};

use super::{
    AuthKind,
    oauth::{self, Grant, TokenEndpointDiscovery},
    token::{Boxed, CHECK_ASSIGNMENT, Freshness, Source, TokenSource, WorkspaceToken, claim},
};
use crate::workspace::{
    WorkspaceError,
    api::Api,
    diagnosis::{self, clean},
    settings::ResolvedSettings,
};

const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const TOKEN_TYPE: &str = "urn:ietf:params:oauth:token-type:jwt";

/// A source of identity tokens.
pub(super) trait IdentitySource: Send + Sync {
    /// A token for this audience, if the source can choose it.
    fn identity_token<'a>(&'a self, api: &'a Api, audience: &'a str) -> Boxed<'a, SecretString>;
}

pub(super) struct Exchange {
    kind: AuthKind,
    identity: Box<dyn IdentitySource>,
    /// Absent for account-wide federation.
    client_id: Option<String>,
    audience: Option<String>,
    discovery: TokenEndpointDiscovery,
    grant: Grant,
}

impl Exchange {
    pub(super) fn create(
        kind: AuthKind,
        settings: &ResolvedSettings,
        identity: impl IdentitySource + 'static,
    ) -> Result<Source, WorkspaceError> {
        let client_id = settings.client_id.clone();
        let exchange = Self {
            kind,
            identity: Box::new(identity),
            client_id: client_id.clone(),
            audience: settings.token_audience.clone(),
            discovery: TokenEndpointDiscovery::new(settings)?,
            grant: Grant::new(settings),
        };
        Ok(Source::new(kind, CHECK_ASSIGNMENT, exchange).of_service_principal(client_id))
    }

    /// What to check when the identity token is refused. The claims that a federation policy compares are no secret.
    fn policy_hint(&self, identity: &str) -> String {
        let claims: Vec<String> = ["iss", "aud", "sub"]
            .iter()
            .filter_map(|name| Some(format!("{name} `{}`", claim(identity, name)?)))
            .collect();
        let claims = if claims.is_empty() {
            "; it is not a JWT".to_owned()
        } else {
            format!(": it has {}", clean(&claims.join(", ")))
        };
        let policy = match &self.client_id {
            Some(id) => format!("the federation policy of the service principal `{id}`"),
            None => "the account's federation policy (without `DATABRICKS_CLIENT_ID` no service principal's is used)".to_owned(),
        };
        format!("compare the token with {policy}{claims}")
    }
}

impl TokenSource for Exchange {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(async move {
            let endpoint = self.discovery.find(api, self.kind).await;
            let audience = self.audience.as_ref().or(endpoint.audience.as_ref());
            // As in the SDKs, the token endpoint's address is the audience if nothing names another.
            let audience = audience.map_or(endpoint.url.as_str(), String::as_str);
            let identity = self.identity.identity_token(api, audience).await?;
            let client_id = self.client_id.as_deref().map(|id| ("client_id", id));
            // Without client authentication: the identity token is the proof, and the id selects the federation policy.
            let form = [("subject_token_type", TOKEN_TYPE)].into_iter();
            let form = self.grant.form(GRANT_TYPE, form.chain(client_id));
            let call = api
                .post(self.kind, endpoint.url.clone())
                .form(&form, Some(("subject_token", &identity)));
            let explain = |error| {
                let refused = format!("did not accept the identity token ({})", self.kind.label());
                let hint = self.policy_hint(identity.expose_secret());
                diagnosis::token_endpoint(&api.host, &refused, &hint, error)
            };
            oauth::request_token(api, call, explain).await
        })
    }
}
