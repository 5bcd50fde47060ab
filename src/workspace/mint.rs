//! The result of minting a database credential, whatever mints it.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use secrecy::SecretString;

use crate::telemetry::labels::RefreshOutcome;

/// A new database credential.
pub struct Minted {
    /// The token.
    pub secret: SecretString,
    /// Expiry by the local wall clock (the source corrects for skew); `None`: never.
    pub expires_at: Option<Timestamp>,
}

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minted")
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Why a credential could not be minted. Written for the operator; never holds a secret.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct MintError {
    /// What happened, lower-case, no full stop, e.g. "the workspace refused the client secret".
    pub message: String,
    /// The other side's own message.
    pub detail: Option<String>,
    /// What a person can do about it.
    pub hint: Option<String>,
    /// The kind of failure, which is the metric label too.
    pub kind: MintErrorKind,
    /// The wait that the other side requests (`Retry-After`).
    pub retry_after: Option<Duration>,
}

/// Kinds of failure; they decide the pace of retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MintErrorKind {
    /// 400, 401 after a fresh workspace token, 403, 404, bad settings: waiting does not help; retried slowly.
    Refused,
    /// 429.
    RateLimited,
    /// 5xx, network errors, timeouts: waiting helps.
    Unavailable,
    /// A malformed response.
    Malformed,
}

impl MintErrorKind {
    /// Whether waiting may help.
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
