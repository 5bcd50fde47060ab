//! Workspace tokens: their expiry, and the answers of token endpoints (RFC 6749 section 5.1).

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use reqwest::header::{HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use crate::workspace::{
    CallError,
    api::{Api, ApiError, Call},
    expiry::Number,
};

/// RFC 6749 lets a server leave `expires_in` out; the token is renewed soon then.
pub(super) const DEFAULT_LIFETIME: Duration = Duration::from_mins(10);

/// A token that the workspace's API accepts.
pub(in crate::workspace) struct WorkspaceToken {
    pub(in crate::workspace) secret: SecretString,
    pub(super) expiry: Expiry,
    /// Its scopes, if they are known.
    pub(in crate::workspace) scopes: Option<String>,
    /// Headers to send beside it.
    pub(in crate::workspace) headers: Vec<(HeaderName, HeaderValue)>,
}

/// When a token expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expiry {
    /// At this time, by the issuer's clock.
    At(Timestamp),
    /// After this time.
    In(Duration),
    Unknown,
}

impl WorkspaceToken {
    /// A token that a header can carry.
    pub(super) fn new(secret: SecretString, expiry: Expiry) -> Result<Self, CallError> {
        let token = secret.expose_secret();
        if token.is_empty() || token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(CallError::malformed("the workspace token is not a token"));
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
pub(super) async fn request(
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

/// A claim of a JWT, unverified: for messages, never for a decision about access.
pub(crate) fn claim(token: &str, name: &str) -> Option<String> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let payload = Zeroizing::new(payload);
    let claims: Value = serde_json::from_slice(&payload).ok()?;
    match claims.get(name)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        // RFC 7519 section 4.1.3: `aud` may be a list.
        Value::Array(list) => {
            let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
            Some(words.join(" "))
        }
        _ => None,
    }
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

        #[test]
        fn no_token_makes_it_panic(token: String, payload: Vec<u8>) {
            let _ = claim(&token, "scope");
            let _ = claim(&format!("h.{}.s", URL_SAFE_NO_PAD.encode(payload)), "scope");
        }
    }
}
