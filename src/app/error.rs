//! Why the program cannot start.

use std::{io, net::SocketAddr};

use crate::{
    admin::AdminError,
    tls::TlsError,
    workspace::{CallError, WorkspaceError},
};

/// Why the program cannot start. Display is one line, [`hint`](Self::hint) says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The health port cannot be served.
    #[error("cannot serve health and metrics")]
    Admin(#[from] AdminError),
    /// An address cannot be bound.
    #[error("cannot listen on {address} (--{flag})")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The flag that changes it.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The endpoint is switched off.
    #[error("the endpoint `{name}` is disabled")]
    Disabled {
        /// Which.
        name: String,
    },
    /// The host cannot be verified by name.
    #[error("`{host}` is not a host name")]
    HostName {
        /// What was given.
        host: String,
    },
    /// The upstream is ourselves.
    #[error("PGHOST `{host}` with PGPORT {port} is this proxy itself")]
    Loop {
        /// Host.
        host: String,
        /// Port.
        port: u16,
    },
    /// What the settings leave open could not be looked up.
    #[error("cannot look up {what}")]
    LookUp {
        /// What was looked up.
        what: &'static str,
        /// Why it could not be.
        #[source]
        source: CallError,
    },
    /// Metrics cannot be registered; a defect.
    #[error("cannot register metrics")]
    Metrics(#[from] prometheus::Error),
    /// The workspace knows no host for the endpoint.
    #[error("the workspace names no {what} for the endpoint `{name}`")]
    NoHost {
        /// What sort of host.
        what: &'static str,
        /// Which endpoint.
        name: String,
    },
    /// An endpoint given by its host alone.
    #[error("the endpoint at `{host}` has no name, and a credential is minted for a name")]
    NoName {
        /// Which.
        host: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    /// The workspace's settings do not do.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

impl StartError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Bind { flag, source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                return Some(format!(
                    "something listens there already: stop it, or choose another port with --{flag} (0 = any free one)"
                ));
            }
            Self::Disabled { .. } => "enable the compute: no connection can wake a disabled one",
            Self::HostName { .. } | Self::NoHost { .. } => {
                "set PGHOST to the endpoint's host name (ep-...database...)"
            }
            Self::Loop { .. } => {
                "PGHOST and PGPORT name the Lakebase endpoint, --address and --port where this proxy listens"
            }
            Self::NoName { .. } => "set ENDPOINT_NAME, or `name` in its table",
            Self::LookUp { source, .. } => return source.hint.clone(),
            Self::Tls(TlsError::Roots { .. } | TlsError::NoRoots { .. }) => {
                "PGSSLROOTCERT is a PEM file of trusted roots, or `system`"
            }
            Self::Tls(TlsError::Unusable(_)) => {
                "install the system's root certificates (Debian: ca-certificates), or set PGSSLROOTCERT"
            }
            Self::Workspace(error) => return error.hint(),
            Self::Admin(_) | Self::Bind { .. } | Self::Metrics(_) => return None,
        };
        Some(hint.to_owned())
    }

    /// Whether trying again may help without anybody doing anything.
    pub(super) fn may_heal(&self) -> bool {
        matches!(self, Self::LookUp { .. })
    }
}
