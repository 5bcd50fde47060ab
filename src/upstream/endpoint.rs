//! What we connect to.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use rustls::{ClientConfig, pki_types::ServerName};

use super::{Addresses, DroppedParameters};
use crate::workspace::HostName;

/// The endpoint's name as people know it, for messages: its resource name, or else its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label(Arc<str>);

impl Label {
    /// A label.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// Whether this is that very label, or a copy of it: two endpoints may be called the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// As it is, unquoted.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.0)
    }
}

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

/// TCP keepalive and its kin, for both sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up.
    pub count: u32,
    /// How long sent data may stay unacknowledged (`TCP_USER_TIMEOUT`); zero leaves it to the kernel.
    pub user_timeout: Duration,
}

impl Keepalive {
    /// How long the endpoint may leave a request unacknowledged before the path to it counts as lost: as long as probes of an
    /// idle connection take. Keepalive itself sends no probe while sent data is unacknowledged, and Linux alone goes on
    /// retransmitting for 15 minutes. `None` where the settings have a time of their own, or no keepalive.
    pub(crate) fn loss_timeout(&self) -> Option<Duration> {
        let probing = self.idle + self.interval * self.count;
        (self.user_timeout.is_zero() && !self.idle.is_zero()).then_some(probing)
    }
}

impl Default for Keepalive {
    /// 30 s, 10 s, 5 probes; no unconditional user timeout, as libpq: Linux also ends a connection whose peer is alive but
    /// has not read for that long, such as a server that waits for a lock in the middle of a COPY.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 5,
            user_timeout: Duration::ZERO,
        }
    }
}

/// Whether an upstream at `address` is on this machine.
pub fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
