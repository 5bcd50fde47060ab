//! Workload identity federation (RFC 8693): an identity token that somebody else issued, for a workspace token.
//!
//! Where the identity token comes from is each way's own; it is asked for anew at every exchange, since it is short-lived.

use secrecy::{ExposeSecret, SecretString};

use super::{
    AuthKind, Oidc, TokenResponse, WorkspaceToken,
    azure_devops_oidc::AzureDevOpsToken,
    claim,
    env_oidc::EnvToken,
    file_oidc::FileToken,
    github_oidc::GithubToken,
    oidc::{Grant, POST},
};
use crate::workspace::{
    api::Api,
    diagnosis::{self, CallError},
    settings::{Settings, SettingsError},
};

const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const TOKEN_TYPE: &str = "urn:ietf:params:oauth:token-type:jwt";

pub(in crate::workspace) struct Exchange {
    identity: IdentityToken,
    /// Absent for account-wide federation.
    client_id: Option<String>,
    audience: Option<String>,
    grant: Grant,
}

enum IdentityToken {
    AzureDevOps(AzureDevOpsToken),
    Env(EnvToken),
    File(FileToken),
    Github(GithubToken),
}

impl Exchange {
    pub(super) fn azure_devops(settings: &Settings) -> Result<Self, SettingsError> {
        Ok(Self::new(
            settings,
            IdentityToken::AzureDevOps(AzureDevOpsToken::new(settings)?),
        ))
    }

    pub(super) fn env(settings: &Settings) -> Result<Self, SettingsError> {
        Ok(Self::new(
            settings,
            IdentityToken::Env(EnvToken::new(settings)?),
        ))
    }

    pub(super) fn file(settings: &Settings) -> Result<Self, SettingsError> {
        Ok(Self::new(
            settings,
            IdentityToken::File(FileToken::new(settings)?),
        ))
    }

    pub(super) fn github(settings: &Settings) -> Result<Self, SettingsError> {
        Ok(Self::new(
            settings,
            IdentityToken::Github(GithubToken::new(settings)?),
        ))
    }

    fn new(settings: &Settings, identity: IdentityToken) -> Self {
        Self {
            identity,
            client_id: settings.client_id.clone(),
            audience: settings.token_audience.clone(),
            grant: Grant::new(settings),
        }
    }

    pub(super) fn kind(&self) -> AuthKind {
        match self.identity {
            IdentityToken::AzureDevOps(_) => AuthKind::AzureDevOpsOidc,
            IdentityToken::Env(_) => AuthKind::EnvOidc,
            IdentityToken::File(_) => AuthKind::FileOidc,
            IdentityToken::Github(_) => AuthKind::GithubOidc,
        }
    }

    pub(super) fn client_id(&self) -> Option<&str> {
        self.client_id.as_deref()
    }

    pub(super) async fn token(&self, api: &Api, oidc: &Oidc) -> Result<WorkspaceToken, CallError> {
        let kind = self.kind();
        let endpoint = oidc.endpoint(api, kind).await;
        let audience = self.audience.clone().or(endpoint.audience);
        let identity: SecretString = match &self.identity {
            IdentityToken::AzureDevOps(source) => source.ask(api).await?,
            IdentityToken::Env(source) => source.get(),
            IdentityToken::File(source) => source.read().await?,
            IdentityToken::Github(source) => {
                let audience = audience.unwrap_or_else(|| endpoint.url.to_string());
                source.ask(api, &audience).await?
            }
        };
        let identity = identity.expose_secret();
        let mut form = vec![
            ("subject_token_type", TOKEN_TYPE),
            ("subject_token", identity),
        ];
        if let Some(client_id) = &self.client_id {
            form.push(("client_id", client_id));
        }
        let request = api
            .elsewhere(kind, POST, endpoint.url)
            .form(&self.grant.form(GRANT_TYPE, form));
        let told = |error| {
            let refused = format!("did not accept the identity token ({})", kind.label());
            diagnosis::token_endpoint(api.host(), &refused, &self.mend(identity), error)
        };
        let reply = api.send(request).await.map_err(told)?;
        reply.json::<TokenResponse>().map_err(told)?.into_token()
    }

    /// The three claims that a federation policy compares are no secret, and what one needs to compare them by hand.
    fn mend(&self, identity: &str) -> String {
        let claims: Vec<String> = ["iss", "aud", "sub"]
            .iter()
            .filter_map(|name| Some(format!("{name} `{}`", claim(identity, name)?)))
            .collect();
        let claims = if claims.is_empty() {
            "; it is no JWT at all".to_owned()
        } else {
            format!(": it has {}", diagnosis::clean(&claims.join(", ")))
        };
        let whose = match &self.client_id {
            Some(id) => format!("the federation policy of the service principal `{id}`"),
            None => "the account's federation policy (without `DATABRICKS_CLIENT_ID` no service principal's is used)".to_owned(),
        };
        format!("compare the token with {whose}{claims}")
    }
}
