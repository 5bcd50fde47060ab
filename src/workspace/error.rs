//! The two errors of this module, each with a hint: settings that cannot be used, and a call that failed.
//!
//! Neither holds a secret.

use std::{error::Error, time::Duration};

use crate::telemetry::labels::RefreshOutcome;

/// Why a workspace cannot be set up from its settings.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct WorkspaceError {
    message: String,
    hint: Option<String>,
    pub(super) problem: Problem,
    source: Option<Box<dyn Error + Send + Sync>>,
}

/// Problems that the choice among the kinds of authentication distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// The machine lacks a program or a file; another kind may work.
    Absent,
    /// A setting is missing.
    Incomplete,
    Other,
}

impl WorkspaceError {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            problem: Problem::Other,
            source: None,
        }
    }

    pub(super) fn absent(message: impl Into<String>) -> Self {
        Self {
            problem: Problem::Absent,
            ..Self::new(message)
        }
    }

    pub(super) fn incomplete(missing: &str, because: &str) -> Self {
        let hint = match missing {
            "DATABRICKS_CLIENT_ID" | "DATABRICKS_CLIENT_SECRET" => {
                "set both `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`".to_owned()
            }
            _ => format!("set `{missing}`"),
        };
        let error = Self::new(format!("`{missing}` is not set, but {because}")).with_hint(hint);
        Self {
            problem: Problem::Incomplete,
            ..error
        }
    }

    /// The value of this setting cannot stand in a header.
    pub(super) fn unsendable(name: &str) -> Self {
        Self::new(format!("{name} holds characters that cannot be sent"))
            .with_hint("look for line breaks and other stray characters in the value")
    }

    pub(super) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn with_source(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        self.hint.clone()
    }
}

/// A failed call: to the workspace, to another token service, or of a program or a file that holds a token.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What happened, lower-case, no full stop, e.g. "the workspace refused the client secret".
    pub message: String,
    /// The other side's own message, or the network's error.
    pub detail: Option<String>,
    /// What a person can do about it.
    pub hint: Option<String>,
    /// The kind of failure, which is the metric label too.
    pub kind: CallErrorKind,
    /// The wait that the other side requests (`Retry-After`).
    pub retry_after: Option<Duration>,
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
}

/// Kinds of failure; they decide the pace of retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CallErrorKind {
    /// 400, 401 after a fresh workspace token, 403, 404, bad settings: waiting does not help; retried slowly.
    Refused,
    /// 429.
    RateLimited,
    /// 5xx, network errors, timeouts: waiting helps.
    Unavailable,
    /// A malformed response.
    Malformed,
}

impl CallErrorKind {
    /// Whether waiting may help.
    pub fn is_transient(self) -> bool {
        self != Self::Refused
    }

    /// The metric label.
    pub fn label(self) -> &'static str {
        RefreshOutcome::from(self).as_str()
    }
}

impl From<CallErrorKind> for RefreshOutcome {
    fn from(kind: CallErrorKind) -> Self {
        match kind {
            CallErrorKind::Refused => Self::Refused,
            CallErrorKind::RateLimited => Self::RateLimited,
            CallErrorKind::Unavailable => Self::Unavailable,
            CallErrorKind::Malformed => Self::Malformed,
        }
    }
}

impl CallError {
    pub(crate) fn new(kind: CallErrorKind, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            detail: None,
            hint: None,
            kind,
            retry_after: None,
            status: None,
        }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(CallErrorKind::Refused, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(CallErrorKind::Unavailable, message)
    }

    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(CallErrorKind::Malformed, message)
    }

    /// An empty detail is absent.
    pub(crate) fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into()).filter(|detail| !detail.is_empty());
        self
    }

    /// An empty hint is absent.
    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into()).filter(|hint| !hint.is_empty());
        self
    }

    /// Whether the identity lacks the right to make the call, as opposed to a failed authentication or a blocked network.
    pub fn is_forbidden(&self) -> bool {
        self.kind == CallErrorKind::Refused
            && self.status == Some(403)
            // A blocked address and a network policy have the same status, and other hints.
            && self.hint.as_deref() == Some(super::diagnosis::GRANT_ACCESS)
    }
}
