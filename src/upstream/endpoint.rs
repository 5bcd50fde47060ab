//! An endpoint that can be dialed.

use std::sync::Arc;

use rustls::{ClientConfig, pki_types::ServerName};

use super::{Addresses, DroppedParameters};
use crate::{status::Label, workspace::HostName};

/// The encryption towards the endpoint.
#[derive(Clone, Debug)]
pub enum Security {
    /// None: for a server on this machine, if configured.
    Plain,
    /// TLS, verified against this name.
    Tls {
        /// Roots, versions and ALPN.
        config: Arc<ClientConfig>,
        /// The name for the certificate and SNI.
        name: ServerName<'static>,
    },
}

/// An endpoint with everything that a login needs.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// For messages.
    pub label: Label,
    /// Host name or IP literal.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The cache of the host's addresses.
    pub addresses: Addresses,
    /// The role to log in as.
    pub user: String,
    /// The database for clients that name none.
    pub database: String,
    /// The encryption.
    pub security: Security,
    /// Startup parameters that its server refuses.
    pub dropped: DroppedParameters,
}

impl Endpoint {
    /// The direct host, if this is a pooler's.
    pub(super) fn direct_host(&self) -> Option<String> {
        self.host.parse::<HostName>().ok()?.direct()
    }
}
