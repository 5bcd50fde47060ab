//! Facts for `doctor`: the workspace's clock, and our token's expiry and scopes. Nothing is retried.

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use secrecy::ExposeSecret;

use super::{
    AuthKind, CallError, Workspace,
    auth::claim,
    diagnosis::{Purpose, clean},
    times,
};

/// Public, needs no token, and exists on every workspace.
const CLOCK_PATH: &str = "/oidc/.well-known/oauth-authorization-server";

/// Facts of a workspace token; not the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFacts {
    /// The kind of authentication that returned it.
    pub kind: AuthKind,
    /// Its expiry, if that is known.
    pub expires_at: Option<Timestamp>,
    /// Its scopes, if they are known.
    pub scopes: Vec<String>,
}

impl Workspace {
    /// How far the workspace's clock is ahead of ours; zero for a difference that `Date` cannot show.
    pub async fn clock_skew(&self) -> Result<SignedDuration, CallError> {
        let call = self.0.api.call(self.auth_kind(), CLOCK_PATH, None);
        match self.0.api.send(call).await {
            Ok(reply) => Ok(reply.skew.unwrap_or_default()),
            Err(error) => Err(self.diagnosed(Purpose::Clock, error)),
        }
    }

    /// Gets a workspace token and reads its facts.
    pub async fn token_facts(&self) -> Result<TokenFacts, CallError> {
        let cached = self.token().await?;
        let scopes = cached.token.scopes.as_deref().unwrap_or_default();
        let in_token = expires_at(cached.token.secret.expose_secret());
        Ok(TokenFacts {
            kind: self.auth_kind(),
            expires_at: in_token.or(cached.expires_at),
            scopes: scopes.split_ascii_whitespace().map(clean).collect(),
        })
    }
}

/// The expiry in a JWT.
fn expires_at(token: &str) -> Option<Timestamp> {
    times::from_text(&claim(token, "exp")?, &TimeZone::UTC)
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;

    fn jwt(payload: &str) -> String {
        format!("eyJh.{}.c2ln", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn a_jwt_holds_its_expiry_and_scopes() {
        let token = jwt(r#"{"exp":2000000000,"scope":"all-apis offline_access"}"#);
        let expected = "2033-05-18T03:33:20Z".parse().unwrap();
        assert_eq!(expires_at(&token), Some(expected));
        let scopes = claim(&token, "scope");
        assert_eq!(scopes.as_deref(), Some("all-apis offline_access"));
        let token = jwt(r#"{"exp":"253402300799","scp":["postgres","sql"]}"#);
        assert_eq!(expires_at(&token), Some(times::FAR));
        assert_eq!(claim(&token, "scp").as_deref(), Some("postgres sql"));
    }

    #[test]
    fn other_tokens_hold_nothing() {
        for token in [
            "",
            "dapi0123",
            "a.b.c",
            &jwt("[]"),
            &jwt(r#"{"exp":"soon"}"#),
        ] {
            assert!(expires_at(token).is_none(), "{token}");
            assert!(claim(token, "scope").is_none(), "{token}");
        }
    }
}
