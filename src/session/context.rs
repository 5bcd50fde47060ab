//! What sessions share: per process and per endpoint.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use super::{AccessPolicy, CancelKeys, Console, LostSessions};
use crate::{
    config::{DatabaseMapping, Settings},
    net::descriptors,
    pool::Pools,
    shutdown::Shutdown,
    status::EndpointSessions,
    telemetry::Metrics,
    upstream::{ConnectSettings, Route},
};

/// Shared by all sessions of the process.
pub(crate) struct ProcessContext {
    /// The configuration in force.
    pub(crate) config: SharedConfig,
    /// The phase of the shutdown.
    pub(crate) shutdown: Shutdown,
    /// Maximum unfinished handshakes per endpoint.
    pub(crate) max_handshakes: usize,
    /// The admin console.
    pub(crate) console: Option<Arc<dyn Console>>,
}

/// Shared by all sessions of one endpoint.
pub(crate) struct EndpointContext {
    /// The process.
    pub(crate) process: Arc<ProcessContext>,
    /// Leads to the endpoint once that has been found.
    pub(crate) route: Route,
    /// The endpoint's sessions in the registry.
    pub(crate) registry: EndpointSessions,
    /// The cancel keys of its sessions.
    pub(crate) cancel_keys: Arc<CancelKeys>,
    /// Its metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// The server connections that its clients share.
    pub(crate) pools: Pools,
    /// Logs the sessions that it ends.
    pub(crate) lost_sessions: Arc<LostSessions>,
}

impl EndpointContext {
    /// A context without sessions yet.
    pub(crate) fn new(
        process: Arc<ProcessContext>,
        route: Route,
        registry: EndpointSessions,
        metrics: Arc<Metrics>,
        pools: Pools,
    ) -> Self {
        Self {
            lost_sessions: Arc::new(LostSessions::new(route.label().clone())),
            process,
            route,
            registry,
            cancel_keys: Arc::default(),
            metrics,
            pools,
        }
    }
}

/// The configuration that a session takes a snapshot of at its start; a reload affects new sessions only.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Who may connect, and how.
    pub access: Arc<AccessPolicy>,
    /// The meaning of the database names that clients send.
    pub database_mapping: DatabaseMapping,
    /// Time for a client to complete its handshake.
    pub client_login_timeout: Duration,
    /// Maximum concurrent sessions of the process.
    pub max_connections: usize,
    /// Timeouts and keepalive towards the endpoint.
    pub connect: ConnectSettings,
}

impl SessionConfig {
    /// The settings that sessions use.
    pub(crate) fn new(settings: &Settings, access: Arc<AccessPolicy>) -> Self {
        Self {
            access,
            database_mapping: settings.database_mapping(),
            client_login_timeout: settings.client_login_timeout().0,
            max_connections: descriptors::max_connections(settings.max_connections()),
            connect: ConnectSettings {
                timeouts: settings.timeouts(),
                keepalive: settings.keepalive(),
            },
        }
    }
}

/// The configuration in force; loading it takes no lock.
pub type SharedConfig = Arc<ArcSwap<SessionConfig>>;
