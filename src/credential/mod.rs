//! The life of the database credential: one task mints it and publishes it through a cell that clients read without a lock.
//!
//! | step | where |
//! |---|---|
//! | setting of the source | `config::CredentialSource` |
//! | the source | [`Mint`]: a password, a file or a command by [`of_settings`]; else `workspace::CredentialMinter`, made with the look-up of its target in `app` |
//! | when to mint | [`Refresher`], by `schedule`; sooner for waiting clients and rejected logins (`demand`) |
//! | the request | `workspace`: with a token that `workspace::auth::token` keeps, of a kind that `choice` picked |
//! | publication | [`CredentialCell`], which `upstream` reads at a login |
//! | verdict of the endpoint | `demand` (a new credential) and `propagation` (the same one again while it is young) |
//!
//! Imports nothing of sessions or of the connection to the endpoint.

mod cell;
mod demand;
mod propagation;
mod refresher;
mod schedule;
mod sources;

use std::{sync::Arc, time::Duration};

pub use crate::status::CredentialState;
pub use cell::{Credential, CredentialCell, MintAttempt};
pub use demand::Cause;
pub(crate) use demand::Demand;
pub(crate) use propagation::Probe;
pub use refresher::{BoxFuture, Mint, Refresher};
pub use schedule::CredentialStatus;
pub(crate) use schedule::Pace;
pub(crate) use sources::of_settings;

pub use crate::workspace::{CallError, CallErrorKind, Minted};

/// How long a client waits for an attempt that the pace does not allow yet. If the attempt is further off, the client is
/// refused at once. Equal to the shortest interval between two mints.
pub(crate) const HOLD: Duration = Duration::from_secs(5);

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
