//! A snapshot of the running proxy: plain values that the status page and the console render. Taking one sends nothing, so
//! that it never wakes an endpoint.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use enum_map::EnumMap;
use jiff::Timestamp;

use super::{EndpointSessions, Registry, Verdict};
use crate::{
    config::{PoolMode, PoolSettings, ShownSetting},
    shutdown::Phase,
    telemetry::{
        Metrics,
        labels::{PoolServer, RefreshOutcome},
    },
};

/// The version of the program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Takes a snapshot; the composition root provides it.
pub type TakeSnapshot = Arc<dyn Fn() -> Snapshot + Send + Sync>;

/// The proxy at one moment.
#[derive(Clone)]
pub struct Snapshot {
    /// When it started.
    pub started: Timestamp,
    /// The time since.
    pub uptime: Duration,
    /// The phase of the shutdown.
    pub phase: Phase,
    /// Whether the startup probe succeeds.
    pub is_started: bool,
    /// The readiness probe.
    pub readiness: Verdict,
    /// The connection limit.
    pub max_connections: usize,
    /// The settings in force.
    pub settings: Vec<ShownSetting>,
    /// The HTTP listeners.
    pub http: Vec<HttpListener>,
    /// The sessions.
    pub registry: Registry,
    /// The endpoints, in the order of the settings.
    pub endpoints: Vec<EndpointSnapshot>,
}

/// An HTTP listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpListener {
    /// What it serves.
    pub purpose: &'static str,
    /// Its address.
    pub address: SocketAddr,
}

/// An endpoint at one moment.
#[derive(Clone)]
pub struct EndpointSnapshot {
    /// Its name in the settings, marked if it is read-only.
    pub name: String,
    /// The addresses that its clients connect to.
    pub listening: Vec<String>,
    /// Its sessions.
    pub sessions: EndpointSessions,
    /// Its metrics.
    pub metrics: Arc<Metrics>,
    /// How its clients share server connections.
    pub pool_mode: PoolMode,
    /// The limits of its pools.
    pub pool_settings: PoolSettings,
    /// Whether all of its pools are paused, those to come included.
    pub is_paused: bool,
    /// What its clients have prepared on connections that they share.
    pub statements: StatementsSnapshot,
    /// Its pools, by database.
    pub pools: Vec<PoolSnapshot>,
    /// The upstream; `None` until discovery has found it.
    pub upstream: Option<UpstreamSnapshot>,
    /// Its credential.
    pub credential: CredentialSnapshot,
}

/// The prepared statements of shared connections at one moment, and since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatementsSnapshot {
    /// Different ones that clients have.
    pub statements: usize,
    /// Bytes of their texts.
    pub memory: usize,
    /// The most that these may be.
    pub memory_limit: usize,
    /// How often a server was sent one.
    pub sent: u64,
    /// How often a client was answered without that, as the server had it.
    pub answered: u64,
    /// How often a server gave up one for another.
    pub evicted: u64,
}

/// The pool of one database at one moment.
#[derive(Clone, Debug)]
pub struct PoolSnapshot {
    /// The database.
    pub database: String,
    /// Its server connections by state.
    pub servers: EnumMap<PoolServer, usize>,
    /// Those of the leased ones that clients keep at rest.
    pub retained: usize,
    /// Those without a client, the one that is taken last first.
    pub idle: Vec<IdleServer>,
    /// Clients that wait for one.
    pub waiting: usize,
    /// The longest wait among them.
    pub max_wait: Duration,
    /// How many server connections it may have.
    pub limit: usize,
    /// How many the server has been seen to accept, if it refused one.
    pub learned_limit: Option<usize>,
    /// Whether it grants nothing.
    pub is_paused: bool,
}

impl PoolSnapshot {
    /// Whether it has no client, connection or pause, as that of a database that does not exist.
    pub fn is_empty(&self) -> bool {
        self.waiting == 0 && !self.is_paused && self.servers.values().all(|count| *count == 0)
    }
}

/// A server connection without a client.
#[derive(Clone, Debug)]
pub struct IdleServer {
    /// Its number, from the same series as those of sessions.
    pub id: u64,
    /// The server's address.
    pub address: SocketAddr,
    /// The server's process id, if it sent one.
    pub process_id: Option<u32>,
    /// The time since its login.
    pub age: Duration,
    /// The time without a client.
    pub idle: Duration,
}

/// The upstream of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamSnapshot {
    /// The host.
    pub host: String,
    /// The port.
    pub port: u16,
    /// The role of all server connections.
    pub user: String,
    /// The default database.
    pub database: String,
    /// Whether server connections use TLS.
    pub is_encrypted: bool,
    /// Databases that clients named after their user and that do not exist.
    pub missing_databases: Vec<String>,
}

/// Phases in the lifetime of a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialState {
    /// None was minted yet.
    None,
    /// In the first half of its lifetime.
    Fresh,
    /// In the second half: a refresh is due.
    Due,
    /// Close to its expiry.
    Urgent,
    /// Expired.
    Expired,
}

/// A credential without its secret.
#[derive(Clone, Debug)]
pub struct CredentialSnapshot {
    /// Where credentials come from.
    pub source: &'static str,
    /// The phase of its lifetime.
    pub state: CredentialState,
    /// The number of credentials so far.
    pub generation: u64,
    /// When it was minted.
    pub minted_at: Option<Timestamp>,
    /// When a refresh is due.
    pub due_at: Option<Timestamp>,
    /// When a refresh is urgent.
    pub urgent_at: Option<Timestamp>,
    /// When it expires; `None` for one that never does.
    pub expires_at: Option<Timestamp>,
    /// When the next refresh is planned.
    pub next_attempt: Option<Timestamp>,
    /// Why the last refresh failed.
    pub last_error: Option<RefreshError>,
    /// The latest refreshes.
    pub attempts: Vec<RefreshAttempt>,
}

/// A refresh of a credential.
#[derive(Clone, Debug)]
pub struct RefreshAttempt {
    /// When it ended.
    pub at: Timestamp,
    /// Its duration.
    pub took: Duration,
    /// The expiry of the new credential (`None`: never), or the error.
    pub outcome: Result<Option<Timestamp>, RefreshError>,
}

/// Why a refresh failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefreshError {
    /// The kind of error, as a metric label.
    pub kind: RefreshOutcome,
    /// The message.
    pub message: String,
    /// What the workspace sent.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl CredentialState {
    /// The name in tables and logs.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Fresh => "fresh",
            Self::Due => "due",
            Self::Urgent => "urgent",
            Self::Expired => "expired",
        }
    }

    /// Whether logins can succeed.
    pub fn is_valid(self) -> bool {
        matches!(self, Self::Fresh | Self::Due | Self::Urgent)
    }
}

impl Snapshot {
    /// The refreshes of all endpoints with the endpoints' names, the latest first.
    pub fn refreshes(&self) -> Vec<(&str, &RefreshAttempt)> {
        let mut refreshes: Vec<_> = self
            .endpoints
            .iter()
            .flat_map(|endpoint| {
                let attempts = endpoint.credential.attempts.iter();
                attempts.map(|attempt| (endpoint.name.as_str(), attempt))
            })
            .collect();
        refreshes.sort_by_key(|(_, attempt)| std::cmp::Reverse(attempt.at));
        refreshes
    }
}
