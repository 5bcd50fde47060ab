//! Workspace tokens: their sources, and the cache that renews one before it expires.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use reqwest::header::{HeaderName, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::Mutex;
use tracing::{debug, info};
use zeroize::Zeroizing;

use super::AuthKind;
use crate::{
    clock::Clock,
    workspace::{CallError, CallErrorKind, api::Api},
};

/// A token is renewed this long before its expiry, or after half of its life if that is later (as the Databricks SDKs do).
const RENEW_BEFORE: SignedDuration = SignedDuration::from_mins(20);
/// A token is not used this shortly before its expiry, since a call takes time (as the Databricks SDKs do).
const UNUSABLE_BEFORE: SignedDuration = SignedDuration::from_secs(40);
/// After a failed renewal of a token that still works, the next waits this long (as the Databricks SDKs do).
const COOL_DOWN: SignedDuration = SignedDuration::from_mins(1);

/// The longest request for a token whose steps all succeed, each within its own timeout: that of `azure-cli`.
pub(in crate::workspace) const TOKEN_TIMEOUT: Duration = Duration::from_secs(160);

/// The hint of kinds whose tokens the workspace issues itself.
pub(super) const CHECK_ASSIGNMENT: &str = "check that the service principal is assigned to this workspace and that `DATABRICKS_HOST` names it";

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

/// A future, boxed for use in trait objects.
pub(in crate::workspace) type Boxed<'a, T> =
    Pin<Box<dyn Future<Output = Result<T, CallError>> + Send + 'a>>;

/// A kind with its settings.
pub(in crate::workspace) struct Source {
    pub(in crate::workspace) kind: AuthKind,
    /// What to check when the workspace refuses its token: a setting, or a command to run.
    pub(in crate::workspace) hint: String,
    /// The service principal's application id, which is also its Postgres role, if it is known.
    service_principal: Option<String>,
    // Boxed, so that the cache holds sources of different kinds.
    tokens: Box<dyn TokenSource>,
}

impl Source {
    pub(in crate::workspace) fn new(
        kind: AuthKind,
        hint: impl Into<String>,
        tokens: impl TokenSource + 'static,
    ) -> Self {
        Self {
            kind,
            hint: hint.into(),
            service_principal: None,
            tokens: Box::new(tokens),
        }
    }

    pub(super) fn of_service_principal(self, id: Option<String>) -> Self {
        Self {
            service_principal: id,
            ..self
        }
    }
}

/// Gets workspace tokens.
pub(in crate::workspace) trait TokenSource: Send + Sync {
    /// Requests a token. Cancel safe.
    fn token<'a>(&'a self, api: &'a Api, freshness: Freshness) -> Boxed<'a, WorkspaceToken>;

    /// What another request can return.
    fn renewal(&self) -> Renewal {
        Renewal::New
    }
}

/// What another request to a source can return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::workspace) enum Renewal {
    /// Always a new token.
    New,
    /// Perhaps a token that it returned before, from a cache of its own.
    Cached,
    /// Only the same token.
    Same,
}

/// How new a token has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::workspace) enum Freshness {
    /// Any that works.
    Any,
    /// Another than the last.
    New,
}

pub(in crate::workspace) struct TokenCache {
    /// At least one.
    sources: Vec<Source>,
    /// The index of the source that worked; the others are not tried any more.
    settled: OnceLock<usize>,
    clock: Clock,
    /// Locked during a request, so that concurrent callers wait for its result.
    held: Mutex<Option<Held>>,
}

#[derive(Clone)]
pub(in crate::workspace) struct CachedToken {
    pub(in crate::workspace) token: Arc<WorkspaceToken>,
    pub(in crate::workspace) expires_at: Option<Timestamp>,
    /// Whether it was requested for this call, so that a refusal is final.
    pub(in crate::workspace) is_new: bool,
}

struct Held {
    token: CachedToken,
    renew_at: Option<Timestamp>,
    /// When it can no longer be used.
    unusable_at: Option<Timestamp>,
}

impl TokenCache {
    /// `sources` holds at least one.
    pub(in crate::workspace) fn new(sources: Vec<Source>, clock: Clock) -> Self {
        Self {
            sources,
            settled: OnceLock::new(),
            clock,
            held: Mutex::new(None),
        }
    }

    /// The source that worked, or the one that is tried first.
    pub(in crate::workspace) fn source(&self) -> &Source {
        &self.sources[self.settled.get().copied().unwrap_or_default()]
    }

    fn is_settled(&self) -> bool {
        self.sources.len() == 1 || self.settled.get().is_some()
    }

    /// The service principal's application id, if it is known without a request.
    pub(in crate::workspace) fn service_principal(&self) -> Option<&str> {
        // Before one has settled, a source with another identity may turn out to work.
        let source = self.is_settled().then(|| self.source());
        source.and_then(|source| source.service_principal.as_deref())
    }

    /// A token that should work. Cancel safe.
    pub(in crate::workspace) async fn token(&self, api: &Api) -> Result<CachedToken, CallError> {
        let mut held = self.held.lock().await;
        let now = self.clock.now();
        let is_past = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        let Some(old) = held.as_mut().filter(|old| !is_past(old.unusable_at)) else {
            return self.fetch(api, &mut held, Freshness::Any).await;
        };
        if !is_past(old.renew_at) {
            return Ok(old.token.clone());
        }
        // The old token serves if the renewal fails.
        // Before the request, so that one that is cancelled counts as a failure as well.
        old.renew_at = now.checked_add(COOL_DOWN).ok();
        let old = old.token.clone();
        let renewed = self.fetch(api, &mut held, Freshness::New).await;
        Ok(renewed.unwrap_or_else(|error| {
            debug!(?error, "cannot renew the workspace token before its expiry");
            old
        }))
    }

    /// A new token after a refusal; `None` if there can be none. Cancel safe.
    pub(in crate::workspace) async fn another(
        &self,
        api: &Api,
        refused: &CachedToken,
    ) -> Option<Result<CachedToken, CallError>> {
        // If even a token requested for this call is refused, another would be, too.
        if refused.is_new || self.source().tokens.renewal() == Renewal::Same {
            return None;
        }
        let mut held = self.held.lock().await;
        match &*held {
            // Another caller has renewed it.
            Some(held) if !Arc::ptr_eq(&held.token.token, &refused.token) => {
                Some(Ok(held.token.clone()))
            }
            _ => Some(self.fetch(api, &mut held, Freshness::New).await),
        }
    }

    async fn fetch(
        &self,
        api: &Api,
        held: &mut Option<Held>,
        freshness: Freshness,
    ) -> Result<CachedToken, CallError> {
        let new = self.request(api, freshness).await?;
        let now = self.clock.now();
        let lifetime = match new.expiry {
            // A time in the past shows a wrong clock or an old token; either is renewed with the next call.
            Expiry::At(at) => Some(at.duration_since(now).max(SignedDuration::ZERO)),
            Expiry::In(lifetime) => SignedDuration::try_from(lifetime).ok(),
            Expiry::Unknown => None,
        };
        let expires_at = lifetime.and_then(|lifetime| now.checked_add(lifetime).ok());
        let renew_before = lifetime.map(|lifetime| (lifetime / 2).min(RENEW_BEFORE));
        let token = CachedToken {
            token: Arc::new(new),
            expires_at,
            is_new: false,
        };
        let renew_at = expires_at.zip(renew_before);
        *held = Some(Held {
            token: token.clone(),
            renew_at: renew_at.and_then(|(at, before)| at.checked_sub(before).ok()),
            unusable_at: expires_at.and_then(|at| at.checked_sub(UNUSABLE_BEFORE).ok()),
        });
        Ok(CachedToken {
            // A source with a cache may return an old token.
            is_new: freshness == Freshness::New
                || self.source().tokens.renewal() != Renewal::Cached,
            ..token
        })
    }

    /// Requests a token from the source that worked, or from each in turn.
    async fn request(&self, api: &Api, freshness: Freshness) -> Result<WorkspaceToken, CallError> {
        if self.is_settled() {
            return self.source().tokens.token(api, freshness).await;
        }
        // As in the SDK for Go, the order decides, and the first source that works is kept.
        let mut failures = Vec::new();
        for (index, source) in self.sources.iter().enumerate() {
            let kind = source.kind.label();
            match source.tokens.token(api, freshness).await {
                Ok(token) => {
                    let _ = self.settled.set(index);
                    info!(kind, "authenticated to the workspace");
                    return Ok(token);
                }
                // The next source may have another identity, which a short outage must not select.
                Err(error) if error.kind != CallErrorKind::Refused => return Err(error),
                Err(error) => {
                    debug!(kind, %error, "this kind of authentication failed");
                    failures.push((kind, error));
                }
            }
        }
        Err(none_works(&failures))
    }
}

/// One error of many: all messages and all hints.
fn none_works(failures: &[(&'static str, CallError)]) -> CallError {
    let kinds: Vec<&str> = failures.iter().map(|(kind, _)| *kind).collect();
    let details = failures.iter().map(|(kind, error)| match &error.detail {
        Some(detail) => format!("{kind}: {error} ({detail})"),
        None => format!("{kind}: {error}"),
    });
    let hints = failures.iter().filter_map(|(_, error)| error.hint.clone());
    CallError::refused(format!(
        "none of the ways to sign in works: {}",
        kinds.join(", ")
    ))
    .with_detail(details.collect::<Vec<_>>().join("; "))
    .with_hint(hints.collect::<Vec<_>>().join(", or "))
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

    proptest! {
        #[test]
        fn no_token_makes_it_panic(token: String, payload: Vec<u8>) {
            let _ = claim(&token, "scope");
            let _ = claim(&format!("h.{}.s", URL_SAFE_NO_PAD.encode(payload)), "scope");
        }
    }
}
