//! Keeps one workspace token and renews it ahead of its expiry; many askers share one renewal.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use secrecy::SecretString;
use tokio::sync::Mutex;
use tracing::debug;

use super::{TokenSource, WorkspaceToken};
use crate::{
    clock::Clock,
    workspace::api::{Api, ApiError},
};

/// A token is renewed when this is left of it, or half of its life if that is shorter (as the Databricks SDKs do).
const STALE: Duration = Duration::from_mins(20);
/// ... and is not used any more when this is left: a call takes time (as the Databricks SDKs do).
const EXPIRED: SignedDuration = SignedDuration::from_secs(40);
/// After a failed renewal of a token that still works, the next waits this long (as the Databricks SDKs do).
const COOL_DOWN: SignedDuration = SignedDuration::from_mins(1);

pub(in crate::workspace) struct TokenCache {
    source: TokenSource,
    clock: Clock,
    /// Held while a token is fetched: whoever comes meanwhile waits for that one.
    held: Mutex<Option<Held>>,
}

#[derive(Clone)]
pub(in crate::workspace) struct CachedToken {
    pub(in crate::workspace) secret: Arc<SecretString>,
    /// Whether it was fetched for this very call, so that a refusal is final.
    pub(in crate::workspace) is_new: bool,
    generation: u64,
}

struct Held {
    secret: Arc<SecretString>,
    generation: u64,
    renew_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
}

impl TokenCache {
    pub(in crate::workspace) fn new(source: TokenSource, clock: Clock) -> Self {
        Self {
            source,
            clock,
            held: Mutex::new(None),
        }
    }

    pub(in crate::workspace) fn source(&self) -> &TokenSource {
        &self.source
    }

    /// A token that should work. Cancel safe.
    pub(in crate::workspace) async fn token(&self, api: &Api) -> Result<CachedToken, ApiError> {
        let mut held = self.held.lock().await;
        let now = self.clock.now();
        if let Some(token) = held
            .as_mut()
            .filter(|token| token.expires_at.is_none_or(|at| now < at))
        {
            if token.renew_at.is_none_or(|at| now < at) {
                return Ok(token.cached());
            }
            return match self.source.token(api).await {
                Ok(new) => Ok(self.keep(&mut held, new)),
                Err(error) => {
                    debug!(
                        ?error,
                        "the workspace token could not be renewed ahead of its expiry"
                    );
                    token.renew_at = self.clock.now().checked_add(COOL_DOWN).ok();
                    Ok(token.cached())
                }
            };
        }
        let new = self.source.token(api).await?;
        Ok(self.keep(&mut held, new))
    }

    /// Another token than the one that the workspace has just refused; `None` if there can be none. Cancel safe.
    pub(in crate::workspace) async fn another(
        &self,
        api: &Api,
        refused: &CachedToken,
    ) -> Option<Result<CachedToken, ApiError>> {
        if refused.is_new || !self.source.is_renewable() {
            return None;
        }
        let mut held = self.held.lock().await;
        if let Some(token) = held
            .as_ref()
            .filter(|token| token.generation != refused.generation)
        {
            return Some(Ok(token.cached()));
        }
        Some(
            self.source
                .token(api)
                .await
                .map(|new| self.keep(&mut held, new)),
        )
    }

    fn keep(&self, held: &mut Option<Held>, new: WorkspaceToken) -> CachedToken {
        let now = self.clock.now();
        let generation = held.as_ref().map_or(1, |token| token.generation + 1);
        let expires_at = new.lifetime.and_then(|lifetime| {
            now.checked_add(SignedDuration::try_from(lifetime).ok()?)
                .ok()
        });
        let stale = new
            .lifetime
            .map(|lifetime| (lifetime / 2).min(STALE))
            .and_then(|d| SignedDuration::try_from(d).ok());
        let token = Held {
            secret: Arc::new(new.secret),
            generation,
            renew_at: expires_at
                .zip(stale)
                .and_then(|(at, stale)| at.checked_sub(stale).ok()),
            expires_at: expires_at.and_then(|at| at.checked_sub(EXPIRED).ok()),
        };
        let cached = CachedToken {
            is_new: true,
            ..token.cached()
        };
        *held = Some(token);
        cached
    }
}

impl Held {
    fn cached(&self) -> CachedToken {
        CachedToken {
            secret: Arc::clone(&self.secret),
            is_new: false,
            generation: self.generation,
        }
    }
}
