//! Keeps one workspace token and renews it before it expires; concurrent callers share one renewal.

use std::sync::{Arc, OnceLock};

use jiff::{SignedDuration, Timestamp};
use reqwest::header::{HeaderName, HeaderValue};
use secrecy::SecretString;
use tokio::sync::Mutex;
use tracing::{debug, info};

use super::{Expiry, Freshness, TokenSource, WorkspaceToken};
use crate::{
    clock::Clock,
    workspace::{
        MintErrorKind,
        api::Api,
        diagnosis::{CallError, SignedIn},
    },
};

/// A token is renewed when this is left of it, or half of its life if that is shorter (as the Databricks SDKs do).
const STALE: SignedDuration = SignedDuration::from_mins(20);
/// ... and is not used any more when this is left: a call takes time (as the Databricks SDKs do).
const EXPIRED: SignedDuration = SignedDuration::from_secs(40);
/// After a failed renewal of a token that still works, the next waits this long (as the Databricks SDKs do).
const COOL_DOWN: SignedDuration = SignedDuration::from_mins(1);

pub(in crate::workspace) struct TokenCache {
    sources: Sources,
    clock: Clock,
    /// Locked during a request, so that concurrent callers wait for its result.
    held: Mutex<Option<Held>>,
}

/// The sources that may work, until one has.
struct Sources {
    /// At least one.
    all: Vec<Box<dyn TokenSource>>,
    /// The index of the one that worked.
    settled: OnceLock<usize>,
}

#[derive(Clone)]
pub(in crate::workspace) struct CachedToken {
    pub(in crate::workspace) token: Arc<Parts>,
    /// Whether it was fetched for this very call, so that a refusal is final.
    pub(in crate::workspace) is_new: bool,
    generation: u64,
}

/// What goes into a request, and what people may know of it.
pub(in crate::workspace) struct Parts {
    pub(in crate::workspace) secret: SecretString,
    pub(in crate::workspace) headers: Vec<(HeaderName, HeaderValue)>,
    pub(in crate::workspace) scopes: Option<String>,
    pub(in crate::workspace) expires_at: Option<Timestamp>,
}

struct Held {
    token: Arc<Parts>,
    generation: u64,
    renew_at: Option<Timestamp>,
    /// When it is not used any more.
    useless_at: Option<Timestamp>,
}

impl Sources {
    /// The one that worked, or the one that is tried first.
    fn current(&self) -> &dyn TokenSource {
        &*self.all[self.settled.get().copied().unwrap_or_default()]
    }

    fn is_settled(&self) -> bool {
        self.all.len() == 1 || self.settled.get().is_some()
    }

    async fn token(&self, api: &Api, freshness: Freshness) -> Result<WorkspaceToken, CallError> {
        if self.is_settled() {
            return self.current().token(api, freshness).await;
        }
        let mut failures = Vec::new();
        for (index, source) in self.all.iter().enumerate() {
            match source.token(api, freshness).await {
                Ok(token) => {
                    let _ = self.settled.set(index);
                    info!(
                        kind = source.kind().label(),
                        "authenticated to the workspace"
                    );
                    return Ok(token);
                }
                // The next source may have another identity, which a short outage must not select.
                Err(error) if error.kind != MintErrorKind::Refused => return Err(error),
                Err(error) => {
                    debug!(kind = source.kind().label(), %error, "this kind of authentication failed");
                    failures.push((source.kind().label(), error));
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
    CallError::refused(
        format!("none of the ways to sign in works: {}", kinds.join(", ")),
        Some(details.collect::<Vec<_>>().join("; ")),
        hints.collect::<Vec<_>>().join(", or "),
    )
}

impl TokenCache {
    /// `sources` holds at least one.
    pub(in crate::workspace) fn new(sources: Vec<Box<dyn TokenSource>>, clock: Clock) -> Self {
        Self {
            sources: Sources {
                all: sources,
                settled: OnceLock::new(),
            },
            clock,
            held: Mutex::new(None),
        }
    }

    /// The source that worked, or the one that is tried first.
    pub(in crate::workspace) fn source(&self) -> &dyn TokenSource {
        self.sources.current()
    }

    /// For the words of an error.
    pub(in crate::workspace) fn signed_in(&self) -> SignedIn {
        SignedIn {
            kind: self.source().kind(),
            hint: self.source().hint(),
        }
    }

    /// The service principal's application id, if it is known without a request.
    pub(in crate::workspace) fn service_principal(&self) -> Option<&str> {
        let source = self.sources.is_settled().then(|| self.source());
        source.and_then(|source| source.service_principal())
    }

    /// A token that should work. Cancel safe.
    pub(in crate::workspace) async fn token(&self, api: &Api) -> Result<CachedToken, CallError> {
        let mut held = self.held.lock().await;
        let now = self.clock.now();
        if let Some(token) = held
            .as_mut()
            .filter(|token| token.useless_at.is_none_or(|at| now < at))
        {
            if token.renew_at.is_none_or(|at| now < at) {
                return Ok(token.cached());
            }
            return match self.fetch(api, &mut held, Freshness::New).await {
                Ok(new) => Ok(new),
                Err(error) => {
                    debug!(
                        ?error,
                        "the workspace token could not be renewed ahead of its expiry"
                    );
                    let retry_at = self.clock.now().checked_add(COOL_DOWN).ok();
                    let token = held.as_mut().map(|token| {
                        token.renew_at = retry_at;
                        token.cached()
                    });
                    token.ok_or(error)
                }
            };
        }
        self.fetch(api, &mut held, Freshness::Any).await
    }

    /// Another token than the one that the workspace has just refused; `None` if there can be none. Cancel safe.
    pub(in crate::workspace) async fn another(
        &self,
        api: &Api,
        refused: &CachedToken,
    ) -> Option<Result<CachedToken, CallError>> {
        if refused.is_new || !self.source().is_renewable() {
            return None;
        }
        let mut held = self.held.lock().await;
        if let Some(token) = held
            .as_ref()
            .filter(|token| token.generation != refused.generation)
        {
            return Some(Ok(token.cached()));
        }
        Some(self.fetch(api, &mut held, Freshness::New).await)
    }

    async fn fetch(
        &self,
        api: &Api,
        held: &mut Option<Held>,
        freshness: Freshness,
    ) -> Result<CachedToken, CallError> {
        let new = self.sources.token(api, freshness).await?;
        let now = self.clock.now();
        let generation = held.as_ref().map_or(1, |token| token.generation + 1);
        let lifetime = match new.expiry {
            Expiry::At(at) => Some(at.duration_since(now).max(SignedDuration::ZERO)),
            Expiry::In(lifetime) => SignedDuration::try_from(lifetime).ok(),
            Expiry::Unknown => None,
        };
        let expires_at = lifetime.and_then(|lifetime| now.checked_add(lifetime).ok());
        let stale = lifetime.map(|lifetime| (lifetime / 2).min(STALE));
        let token = Held {
            token: Arc::new(Parts {
                secret: new.secret,
                headers: new.headers,
                scopes: new.scopes,
                expires_at,
            }),
            generation,
            renew_at: expires_at
                .zip(stale)
                .and_then(|(at, stale)| at.checked_sub(stale).ok()),
            useless_at: expires_at.and_then(|at| at.checked_sub(EXPIRED).ok()),
        };
        let cached = CachedToken {
            // What a way keeps itself may be old already.
            is_new: freshness == Freshness::New || !self.source().has_cache(),
            ..token.cached()
        };
        *held = Some(token);
        Ok(cached)
    }
}

impl Held {
    fn cached(&self) -> CachedToken {
        CachedToken {
            token: Arc::clone(&self.token),
            is_new: false,
            generation: self.generation,
        }
    }
}
