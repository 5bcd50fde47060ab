//! The life of the database credential: one task mints it and publishes it through a cell that clients read without a lock.
//!
//! | step | where |
//! |---|---|
//! | setting of the source | `config::CredentialSource` |
//! | the source | [`Mint`]: a password, a file or a command by [`of_settings`]; else `workspace::CredentialMinter`, made with the look-up of its target in `app` |
//! | the workspace token that it needs | `workspace::auth`: a `TokenSource`, chosen by `choice`, kept by `cache` |
//! | when to mint | [`Refresher`], by `schedule`; sooner for waiting clients (`demand`) and rejected logins (`forced`) |
//! | publication | [`CredentialCell`], which `upstream` reads at a login |
//! | verdict of the endpoint | `forced` (a new credential) and `propagation` (the same one again while it is young) |
//!
//! Imports nothing of sessions or of the connection to the endpoint.

mod cell;
mod demand;
mod forced;
mod propagation;
mod refresher;
mod schedule;
mod sources;

use std::{
    fmt,
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use crate::workspace::claim;
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};

pub use crate::status::CredentialState;
pub use cell::{CredentialCell, CredentialStatus, MintAttempt};
pub(crate) use demand::Demand;
pub use forced::Cause;
pub(crate) use propagation::Probe;
pub use refresher::Refresher;
pub(crate) use schedule::Pace;
pub(crate) use sources::of_settings;

pub use crate::workspace::{CallError, CallErrorKind, Minted};

/// How long a client waits for an attempt that the pace does not allow yet. If the attempt is further off, the client is
/// refused at once. Equal to the shortest interval between two mints.
pub(crate) const HOLD: Duration = Duration::from_secs(5);

/// A database credential, which the endpoint accepts as a password.
///
/// The secret does not print and is zeroed on drop.
#[derive(Clone)]
pub struct Credential {
    /// The token.
    pub secret: SecretString,
    /// When the server stops accepting it at logins, by the wall clock; `None`: never (a static password).
    pub expires_at: Option<Timestamp>,
    /// When it was minted, by the local clock.
    pub minted_at: Timestamp,
    /// Counts published credentials from 1.
    pub generation: u64,
}

impl Credential {
    /// Whether a server accepts it at a login at this time.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|expires_at| now < expires_at)
    }

    /// The identity that the token names, if it does. Not verified: for messages only.
    pub fn identity(&self) -> Option<String> {
        let token = self.secret.expose_secret();
        // Users and service principals alike by `sub`, else by `client_id`.
        let identity = claim(token, "sub").or_else(|| claim(token, "client_id"))?;
        // Messages show it in backticks, on one line.
        let is_a_name = (1..=256).contains(&identity.len())
            && !identity
                .chars()
                .any(|character| character.is_control() || character == '`');
        is_a_name.then_some(identity)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("expires_at", &self.expires_at)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// A boxed future, which keeps [`Mint`] usable as a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A source of credentials: the workspace, a password, a password file, a command.
pub trait Mint: Send + Sync + 'static {
    /// Requests a new credential. The implementation limits the time that takes. Cancel safe: the refresher drops it at
    /// its own timeout and at shutdown.
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>>;

    /// Completes when the source holds another credential, which is then minted at once. Cancel safe.
    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(pending())
    }
}

/// Whether a client waits for the next attempt after such a failure: not if waiting does not help, nor if the other side
/// requests a longer wait than [`HOLD`].
pub(crate) fn is_held_for(kind: CallErrorKind, retry_after: Option<Duration>) -> bool {
    kind.is_transient() && retry_after.is_none_or(|wait| wait <= HOLD)
}

/// Why there is no credential for a client, which is refused with SQLSTATE 28000.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The credential has expired, and no new one was minted in time.
    #[error("the database credential has expired and no new one was minted in time")]
    Expired,
    /// The last attempt to mint failed.
    #[error("cannot obtain a database credential")]
    Failed(#[source] Arc<CallError>),
    /// No credential was ever minted.
    #[error("no database credential was minted in time")]
    Missing,
    /// The endpoint rejected the credential, and another must not be requested yet.
    #[error("the endpoint rejected the database credential, as it did the one before")]
    RateLimited {
        /// Until another may be requested.
        retry_in: Duration,
    },
    /// The endpoint rejected the credential, and no new one was minted in time.
    #[error("the endpoint rejected the database credential and no new one was minted in time")]
    TimedOut,
}

impl CredentialError {
    /// One line for the refused client.
    pub fn message(&self) -> String {
        match self {
            Self::Failed(error) => format!("{self}: {error}"),
            _ => self.to_string(),
        }
    }

    /// The other side's own message, if there is one.
    pub fn detail(&self) -> Option<String> {
        match self {
            Self::Failed(error) => error.detail.clone(),
            Self::RateLimited { retry_in } => Some(format!(
                "another credential is requested in {} s at the earliest",
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
