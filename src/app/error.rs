//! Errors that keep the program from starting.

use std::{io, sync::Arc, time::Duration};

use crate::{
    admin::AdminError,
    credential::CallErrorKind,
    listener::{ListenError, Taken},
    net::tls::TlsError,
    protocol::error::Report,
    session::ClientTlsError,
    workspace::{LocateError, WorkspaceError},
};

/// Why the program cannot start. Display is one line; [`hint`](Self::hint) is the fix.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The health port cannot be served.
    #[error("cannot serve health and metrics")]
    Admin(#[from] AdminError),
    /// The host cannot be verified by name.
    #[error("`{host}` is not a host name")]
    HostName {
        /// What was given.
        host: String,
    },
    /// TLS for clients cannot be set up.
    #[error(transparent)]
    ClientTls(#[from] ClientTlsError),
    /// The password verifier cannot be derived; a defect.
    #[error("cannot derive a verifier from the password for clients")]
    LocalPassword,
    /// A socket cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No endpoint can be used, and retries do not help; the first one's error.
    #[error(transparent)]
    Endpoint(Arc<StartError>),
    /// The endpoint could not be found.
    #[error(transparent)]
    Locate(#[from] Box<LocateError>),
    /// The upstream is ourselves.
    #[error("PGHOST `{host}` with PGPORT {port} is this proxy itself")]
    Loop {
        /// Host.
        host: String,
        /// Port.
        port: u16,
    },
    /// Metrics cannot be registered; a defect.
    #[error("cannot register metrics")]
    Metrics(#[from] prometheus::Error),
    /// The settings hold no endpoint.
    #[error("no endpoint is configured")]
    NoEndpoint,
    /// The login of `--run-connection-test` was refused.
    #[error("connection test failed: {}", .0.line())]
    Test(Box<Report>),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    /// The threads that serve clients cannot be started.
    #[error("cannot start the threads that serve clients")]
    Runtimes(#[source] io::Error),
    /// The settings of the workspace are invalid.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

impl StartError {
    /// The port that another process listens on, if that keeps the program from starting.
    pub(crate) fn taken_port(&self) -> Option<u16> {
        match self {
            Self::Listen(error) => match &error.taken {
                Some(Taken::Tcp(address)) => Some(address.port()),
                _ => None,
            },
            _ => None,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::HostName { .. } => "set PGHOST to the endpoint's host name (ep-...database...)",
            Self::Loop { .. } => {
                "PGHOST and PGPORT name the Lakebase endpoint, --address and --port where this proxy listens"
            }
            Self::ClientTls(error) => return error.hint().map(str::to_owned),
            Self::Listen(error) => return error.hint().map(str::to_owned),
            Self::Endpoint(error) => return error.hint(),
            Self::Locate(error) => return error.hint(),
            Self::Tls(TlsError::Roots { .. }) => {
                "PGSSLROOTCERT is a PEM file of trusted roots, or `system`"
            }
            Self::Tls(TlsError::Unusable(_)) => {
                // The workspace is verified against them, too, whatever PGSSLROOTCERT is for the endpoint.
                "install the system's root certificates (Debian: ca-certificates), or name a PEM file of them in SSL_CERT_FILE"
            }
            Self::Test(report) => return report.hint.clone(),
            Self::Runtimes(_) => {
                "raise the limits of threads and of open files (ulimit -u, ulimit -n)"
            }
            Self::Workspace(error) => return error.hint(),
            Self::Admin(_) | Self::LocalPassword | Self::Metrics(_) | Self::NoEndpoint => {
                return None;
            }
        };
        Some(hint.to_owned())
    }

    /// The kind of a discovery failure, which decides the pace of retries, and the wait that the workspace requested.
    pub(super) fn kind(&self) -> (CallErrorKind, Option<Duration>) {
        match self {
            Self::Endpoint(error) => error.kind(),
            Self::Locate(error) => match &**error {
                LocateError::Call { source, .. } => (source.kind, source.retry_after),
                // An endpoint that is being created has no host yet.
                LocateError::NoHost { kind: "", .. } | LocateError::TooLong { .. } => {
                    (CallErrorKind::Unavailable, None)
                }
                _ => (CallErrorKind::Refused, None),
            },
            // Errors of settings: only a person can fix them, so that attempts are rare.
            _ => (CallErrorKind::Refused, None),
        }
    }
}
