//! What a person wants to see of the workspace: its clock, our token, our profile, a branch's roles. Asked by `doctor` alone.
//!
//! Nothing is retried: the first answer is the finding.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde::Deserialize;

use crate::expiry::Number;

use super::{
    AuthKind, CallError, EndpointInfo, EndpointName, Target, Workspace, diagnosis::Purpose,
    discovery::Explorer, error_body,
};

/// Public, needs no token, and is there on every workspace.
const CLOCK_PATH: &str = "/oidc/.well-known/oauth-authorization-server";

/// What is known of our workspace token; not the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFacts {
    /// How it was got.
    pub kind: AuthKind,
    /// When it expires, where it says so.
    pub expires_at: Option<Timestamp>,
    /// What it is good for, where it says so.
    pub scopes: Vec<String>,
}

/// Who we are, at length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The name of the Postgres role.
    pub user_name: String,
    /// The id that SCIM calls want.
    pub id: String,
    /// The groups we are in, whose roles we may log in as.
    pub groups: Vec<String>,
    /// What was granted to the identity itself; what its groups bring may be missing.
    pub entitlements: Vec<String>,
    /// The workspace that answered.
    pub workspace_id: Option<String>,
}

/// A Postgres role of a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its name in Postgres.
    pub name: String,
    /// Whether it logs in with an OAuth credential.
    pub is_oauth: bool,
}

impl Workspace {
    /// How far the workspace's clock is ahead of ours; zero for what the whole seconds of HTTP cannot tell.
    pub async fn clock_skew(&self) -> Result<SignedDuration, CallError> {
        let kind = self.auth_kind();
        let request = self.0.api.request(kind, Method::GET, CLOCK_PATH);
        match self.0.api.send(request).await {
            Ok(reply) => Ok(reply.skew.unwrap_or_default()),
            Err(error) => Err(self.diagnosed(Purpose::Clock, error)),
        }
    }

    /// Gets a workspace token and reads what it says of itself.
    pub async fn token_facts(&self) -> Result<TokenFacts, CallError> {
        let token = self.token().await?;
        let parts = &token.token;
        let (expires_at, mut scopes) = claims(parts.secret.expose_secret());
        if scopes.is_empty() {
            let told = parts.scopes.as_deref().unwrap_or_default();
            scopes = told
                .split_ascii_whitespace()
                .map(error_body::clean)
                .collect();
        }
        Ok(TokenFacts {
            kind: self.auth_kind(),
            expires_at: expires_at.or(parts.expires_at),
            scopes,
        })
    }

    /// Who we are.
    pub async fn profile(&self) -> Result<Profile, CallError> {
        let explorer = Explorer::new(self, Duration::ZERO);
        explorer.profile().await
    }

    /// What the workspace knows of an endpoint.
    pub async fn describe_now(&self, target: &Target) -> Result<EndpointInfo, CallError> {
        let explorer = Explorer::new(self, Duration::ZERO);
        explorer.describe(target).await
    }

    /// The roles on an endpoint's branch.
    pub async fn roles(&self, endpoint: &EndpointName) -> Result<Vec<Role>, CallError> {
        let explorer = Explorer::new(self, Duration::ZERO);
        explorer.role_names(endpoint.branch()).await
    }

    /// The names in Postgres of the databases on an endpoint's branch.
    pub async fn databases(&self, endpoint: &EndpointName) -> Result<Vec<String>, CallError> {
        let explorer = Explorer::new(self, Duration::ZERO);
        explorer.database_names(endpoint.branch()).await
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Claims {
    exp: Option<Number>,
    scope: Option<Scope>,
    scp: Option<Scope>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scope {
    List(Vec<String>),
    Text(String),
}

/// Expiry and scopes of a JWT; a token of any other kind says nothing of itself.
fn claims(token: &str) -> (Option<Timestamp>, Vec<String>) {
    let payload = token
        .split('.')
        .nth(1)
        .and_then(|part| URL_SAFE_NO_PAD.decode(part.trim_end_matches('=')).ok())
        .unwrap_or_default();
    let claims: Claims = serde_json::from_slice(&payload).unwrap_or_default();
    let expires_at = claims.exp.as_ref().and_then(Number::timestamp);
    let scopes = match claims.scope.or(claims.scp) {
        Some(Scope::List(list)) => list,
        Some(Scope::Text(text)) => text.split_ascii_whitespace().map(str::to_owned).collect(),
        None => Vec::new(),
    };
    let scopes = scopes
        .iter()
        .map(|scope| error_body::clean(scope))
        .filter(|scope| !scope.is_empty())
        .collect();
    (expires_at, scopes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expiry;

    fn jwt(payload: &str) -> String {
        format!("eyJh.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn a_token_says_what_it_is_good_for() {
        let (expires_at, scopes) = claims(&jwt(
            r#"{"exp":2000000000,"scope":"all-apis offline_access"}"#,
        ));
        assert_eq!(expires_at, Some("2033-05-18T03:33:20Z".parse().unwrap()));
        assert_eq!(scopes, ["all-apis", "offline_access"]);
        let (expires_at, _) = claims(&jwt(r#"{"exp":"253402300799"}"#));
        assert_eq!(expires_at, Some(expiry::FAR));
        let (_, scopes) = claims(&jwt(r#"{"scp":["postgres"]}"#));
        assert_eq!(scopes, ["postgres"]);
    }

    #[test]
    fn any_other_token_says_nothing() {
        for token in [
            "",
            "dapi0123",
            "a.b.c",
            &jwt("[]"),
            &jwt(r#"{"exp":"soon"}"#),
        ] {
            let (expires_at, scopes) = claims(token);
            assert!(expires_at.is_none() && scopes.is_empty(), "{token}");
        }
    }
}
