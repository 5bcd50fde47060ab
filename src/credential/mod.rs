//! The life of the database credential: minted by one task, published through a cell that readers never lock.

use std::{fmt, future::Future, time::Duration};

use jiff::Timestamp;
use secrecy::SecretString;

/// A database credential: what the endpoint takes as a password.
///
/// The secret does not print and is zeroed on drop.
#[derive(Clone)]
pub struct Credential {
    /// The token itself.
    pub secret: SecretString,
    /// When the server stops accepting it at login, by the wall clock. `None`: never (a static password).
    pub expires_at: Option<Timestamp>,
    /// When it was minted, by our clock.
    pub minted_at: Timestamp,
    /// Counts published credentials from 1; tells one credential from the next without looking at the secret.
    pub generation: u64,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("expires_at", &self.expires_at)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// What a mint returns: a secret and its expiry, corrected to our clock.
pub struct Minted {
    /// The token.
    pub secret: SecretString,
    /// Expiry by our wall clock (the source corrects for skew).
    pub expires_at: Option<Timestamp>,
}

/// The seam between the refresher and whatever makes credentials (the workspace, a password file, a command).
pub trait Mint: Send + Sync + 'static {
    /// Asks for a new credential. Bounded in time by the implementation.
    fn mint(&self) -> impl Future<Output = Result<Minted, MintError>> + Send;
}

/// Why no credential could be had. Written for the operator; never holds a secret.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct MintError {
    /// What happened, lower-case, no full stop, e.g. "the workspace refused the client secret".
    pub message: String,
    /// What the other side said, word for word, where it spoke.
    pub detail: Option<String>,
    /// What a person can do about it.
    pub hint: Option<String>,
    /// A value of a closed set for the metric label: see [`MintErrorKind`].
    pub kind: MintErrorKind,
    /// How long the other side asked us to wait (`Retry-After`).
    pub retry_after: Option<Duration>,
}

/// What sort of failure a mint met; decides the pace of retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MintErrorKind {
    /// 400, 401 after a fresh workspace token, 403, 404, bad settings: cannot heal by waiting; retried slowly.
    Refused,
    /// 429.
    RateLimited,
    /// 5xx, network, timeouts: heals by waiting.
    Unavailable,
    /// An answer that makes no sense.
    Malformed,
}

impl MintErrorKind {
    /// Whether waiting may heal it.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::RateLimited | Self::Unavailable | Self::Malformed
        )
    }

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::Malformed => "malformed",
        }
    }
}
