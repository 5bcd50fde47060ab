//! Authentication to the workspace: a kind gets workspace tokens, and a cache keeps one.
//!
//! `choice` picks the kind, one of `kinds`. `azure`, `exchange` and `oauth` are shared by kinds; `unsupported` names those
//! that only the SDKs have.

mod azure;
mod choice;
mod exchange;
#[cfg(fuzzing)]
pub(super) mod fuzzing;
mod kinds;
mod oauth;
mod token;
mod unsupported;

pub(super) use choice::choose;
pub use kinds::AuthKind;
pub(super) use kinds::{model_serving::host as serving_host, secret_variables};
pub(crate) use token::claim;
#[cfg(test)]
pub(super) use token::{Boxed, Freshness, TokenSource, WorkspaceToken};
pub(super) use token::{CachedToken, Source, TOKEN_TIMEOUT, TokenCache};
