//! The life of the database credential: minted by one task, published through a cell that readers never lock.

mod cell;
mod forced;
mod history;
mod refresher;
mod schedule;
mod sources;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use zeroize::Zeroizing;

use crate::telemetry::labels::RefreshOutcome;

pub use cell::{CredentialCell, CredentialStatus};
pub use forced::Cause;
pub use history::MintAttempt;
pub use refresher::Refresher;
pub(crate) use schedule::Pace;
pub use sources::{CredentialCommand, Password, PasswordFile};

/// How long a client is held for an attempt that the pace does not allow yet; if it is further off, the client is
/// refused at once. Equal to the shortest interval between two mints.
pub(crate) const HOLD: Duration = Duration::from_secs(5);

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

impl Credential {
    /// Whether a server would still take it at login at this time.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|expires_at| now < expires_at)
    }

    /// Whose it is, where it is a token that says so; unverified, for messages only.
    pub fn identity(&self) -> Option<String> {
        let payload = self.secret.expose_secret().split('.').nth(1)?;
        let payload = Zeroizing::new(URL_SAFE_NO_PAD.decode(payload).ok()?);
        let claims: Claims = serde_json::from_slice(&payload).ok()?;
        let identity = claims.sub.or(claims.client_id)?;
        let is_a_name = (1..=256).contains(&identity.len())
            && !identity
                .chars()
                .any(|character| character.is_control() || character == '`');
        is_a_name.then_some(identity)
    }
}

/// The claims that name the identity: users and service principals alike by `sub`, else by `client_id`.
#[derive(serde::Deserialize)]
struct Claims {
    sub: Option<String>,
    client_id: Option<String>,
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

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minted")
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// The seam between the refresher and whatever makes credentials (the workspace, a password file, a command).
pub trait Mint: Send + Sync + 'static {
    /// Asks for a new credential. Bounded in time by the implementation.
    fn mint(&self) -> impl Future<Output = Result<Minted, MintError>> + Send;

    /// Completes when the source has come to hold another credential, which is then minted at once. Cancel safe.
    fn changed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
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

/// Whether a client is held for the next attempt after such a failure. It is not for what waiting does not cure, nor where
/// the other side asks to wait for longer than a client is held.
pub(crate) fn is_held_for(kind: MintErrorKind, retry_after: Option<Duration>) -> bool {
    kind.is_transient() && retry_after.is_none_or(|wait| wait <= HOLD)
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
        RefreshOutcome::from(self).as_str()
    }
}

impl From<MintErrorKind> for RefreshOutcome {
    fn from(kind: MintErrorKind) -> Self {
        match kind {
            MintErrorKind::Refused => Self::Refused,
            MintErrorKind::RateLimited => Self::RateLimited,
            MintErrorKind::Unavailable => Self::Unavailable,
            MintErrorKind::Malformed => Self::Malformed,
        }
    }
}

/// Where a credential stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialState {
    /// There has been none yet.
    None,
    /// Nothing to do.
    Fresh,
    /// Past half of its life: to be replaced without haste.
    Due,
    /// About to run out.
    Urgent,
    /// No login works with it any more.
    Expired,
}

impl CredentialState {
    /// The name for status pages and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Fresh => "fresh",
            Self::Due => "due",
            Self::Urgent => "urgent",
            Self::Expired => "expired",
        }
    }

    /// Whether logins can work.
    pub fn is_valid(self) -> bool {
        matches!(self, Self::Fresh | Self::Due | Self::Urgent)
    }
}

/// Why a client could not be given a credential. The client is refused with SQLSTATE 28000.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The credential has expired, and no new one came in time.
    #[error("the database credential has expired and no new one came in time")]
    Expired,
    /// The last attempt to mint failed.
    #[error("cannot obtain a database credential")]
    Failed(#[source] Arc<MintError>),
    /// There has never been one, and none came in time.
    #[error("no database credential came in time")]
    Missing,
    /// The endpoint rejected the credential, and another may not be asked for yet.
    #[error("the endpoint rejected the database credential, as it did the one before")]
    RateLimited {
        /// How long until another may be asked for.
        retry_in: Duration,
    },
    /// The endpoint rejected the credential, and no new one came in time.
    #[error("the endpoint rejected the database credential and no new one came in time")]
    TimedOut,
}

impl CredentialError {
    /// One line for the client that is refused.
    pub fn message(&self) -> String {
        match self {
            Self::Failed(error) => format!("{self}: {error}"),
            _ => self.to_string(),
        }
    }

    /// The other side's own words, where it spoke.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::Failed(error) => error.detail.clone(),
            Self::RateLimited { retry_in } => Some(format!(
                "another credential is asked for in {} s at the earliest",
                retry_in.as_secs().max(1)
            )),
            Self::Expired | Self::Missing | Self::TimedOut => None,
        }
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Failed(error) if error.hint.is_some() => error.hint.clone(),
            Self::RateLimited { .. } | Self::TimedOut => Some(
                "check that a Postgres role with exactly this identity's name exists on the branch (`databricks_create_role`) and that the workspace owns the project"
                    .to_owned(),
            ),
            Self::Expired | Self::Failed(_) | Self::Missing => {
                Some("check that the workspace can be reached; the proxy keeps trying".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests;
