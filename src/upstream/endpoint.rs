//! What we connect to.

use std::{net::IpAddr, sync::Arc};

use rustls::{ClientConfig, pki_types::ServerName};

use super::{Addresses, DroppedParameters};
use crate::{status::Label, workspace::HostName};

/// How the wire to the endpoint is protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Not at all: for a server on this machine, when asked for.
    Plain,
    /// TLS, verified against this name.
    Tls {
        /// Roots, versions and ALPN.
        config: Arc<ClientConfig>,
        /// What the certificate must be for, and what SNI says.
        name: ServerName<'static>,
    },
}

/// An endpoint, ready to be dialled.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// For messages.
    pub label: Label,
    /// Host name or IP literal.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The host's addresses, as far as they are known.
    pub addresses: Addresses,
    /// The role to log in as.
    pub user: String,
    /// The database for clients that name none.
    pub database: String,
    /// Whether and how TLS is spoken.
    pub security: Security,
    /// Startup parameters of clients that its server does not take.
    pub dropped: DroppedParameters,
}

impl Endpoint {
    /// The host beside a pooler's, where this is one.
    pub(super) fn direct_host(&self) -> Option<String> {
        self.host.parse::<HostName>().ok()?.direct()
    }
}

/// Whether an upstream at `address` is on this machine.
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
