//! The error of the program's start and of a reload.

use std::{error::Error, io, time::Duration};

use crate::{
    admin::AdminError,
    config::ConfigError,
    credential::CallErrorKind,
    listener::{ListenError, Taken},
    net::tls::TlsError,
    session::ClientTlsError,
    telemetry::{LogError, chain},
    workspace::{LocateError, WorkspaceError},
};

/// Why the program cannot start, or settings cannot be applied: one line, and a hint that describes the fix.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct AppError {
    message: String,
    hint: Option<String>,
    /// Decides the pace of retries. Only a person can fix errors of settings, so that attempts are rare.
    pub(super) kind: CallErrorKind,
    /// The wait that the workspace requests.
    pub(super) retry_after: Option<Duration>,
    /// The port, if another process listens on it.
    pub(crate) taken_port: Option<u16>,
}

impl AppError {
    pub(super) fn new(message: impl Into<String>, hint: Option<impl Into<String>>) -> Self {
        Self {
            message: message.into(),
            hint: hint.map(Into::into),
            kind: CallErrorKind::Refused,
            retry_after: None,
            taken_port: None,
        }
    }

    /// The message of an error with its causes.
    fn of(error: &(dyn Error + 'static), hint: Option<impl Into<String>>) -> Self {
        Self::new(chain(error).to_string(), hint)
    }

    fn caused_by(what: &str, error: &(dyn Error + 'static), hint: Option<&str>) -> Self {
        Self::new(format!("{what}: {}", chain(error)), hint.map(str::to_owned))
    }

    pub(super) fn no_endpoint() -> Self {
        Self::new("no endpoint is configured", None::<String>)
    }

    /// The threads that serve clients cannot be started.
    pub(super) fn threads(error: &io::Error) -> Self {
        let hint = "raise the limits of threads and of open files (ulimit -u, ulimit -n)";
        Self::caused_by(
            "cannot start the threads that serve clients",
            error,
            Some(hint),
        )
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl From<ListenError> for AppError {
    fn from(error: ListenError) -> Self {
        let taken_port = match &error.taken {
            Some(Taken::Tcp(address)) => Some(address.port()),
            Some(Taken::Unix(_)) | None => None,
        };
        Self {
            taken_port,
            ..Self::of(&error, error.hint())
        }
    }
}

impl From<LocateError> for AppError {
    fn from(error: LocateError) -> Self {
        let (kind, retry_after) = match &error {
            LocateError::Call { source, .. } => (source.kind, source.retry_after),
            // An endpoint that is being created has no host yet.
            LocateError::NoHost { kind: "", .. } | LocateError::TooLong { .. } => {
                (CallErrorKind::Unavailable, None)
            }
            _ => (CallErrorKind::Refused, None),
        };
        Self {
            kind,
            retry_after,
            ..Self::of(&error, error.hint())
        }
    }
}

impl From<TlsError> for AppError {
    fn from(error: TlsError) -> Self {
        let hint = match &error {
            TlsError::Roots { .. } => "PGSSLROOTCERT is a PEM file of trusted roots, or `system`",
            // The workspace is verified against them, too, whatever PGSSLROOTCERT is for the endpoint.
            TlsError::Unusable(_) => {
                "install the system's root certificates (Debian: ca-certificates), or name a PEM file of them in SSL_CERT_FILE"
            }
        };
        Self::caused_by("cannot set up TLS", &error, Some(hint))
    }
}

impl From<AdminError> for AppError {
    fn from(error: AdminError) -> Self {
        Self::caused_by("cannot serve health and metrics", &error, None)
    }
}

impl From<prometheus::Error> for AppError {
    /// A defect.
    fn from(error: prometheus::Error) -> Self {
        Self::caused_by("cannot register metrics", &error, None)
    }
}

impl From<LogError> for AppError {
    fn from(error: LogError) -> Self {
        Self::of(&error, None::<String>)
    }
}

macro_rules! with_hints {
    ($($error:ty),+) => {
        $(impl From<$error> for AppError {
            fn from(error: $error) -> Self {
                Self::of(&error, error.hint())
            }
        })+
    };
}

with_hints!(ClientTlsError, ConfigError, WorkspaceError);
