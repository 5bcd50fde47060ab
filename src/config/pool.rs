//! Settings of the connection pools.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Settings;

/// Whether and how clients share server connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PoolMode {
    /// Each client has a server connection of its own, closed when it leaves
    #[default]
    None,
    /// A client has a server connection until it leaves; then that is reset and the next client's
    Session,
    /// A client has a server connection for a transaction; state that outlives transactions keeps it until the client leaves
    Transaction,
    /// A client keeps its server connection until another needs it; then they share it as with `transaction`
    Auto,
}

impl PoolMode {
    /// The setting's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Auto => "auto",
        }
    }
}

/// What becomes of a client that needs its server connection beyond the end of a transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PinSessions {
    /// It keeps the connection until it leaves
    #[default]
    Pin,
    /// With `transaction`, the request that would need it is refused
    Refuse,
}

/// Sizes and times of the pools of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSettings {
    /// A connection that another client has left is reset, even if nothing that is known was left there.
    pub pool_strict: bool,
    /// What becomes of a client that needs its connection for longer than a transaction.
    pub pin_sessions: PinSessions,
    /// Server connections of one database.
    pub default_pool_size: usize,
    /// Copies of the proxy that share the compute.
    pub fleet_size: usize,
    /// Further ones once a client has waited for `reserve_pool_timeout`.
    pub reserve_pool_size: usize,
    /// See there.
    pub reserve_pool_timeout: Duration,
    /// Upper limit of both together; 0 is none.
    pub max_db_connections: usize,
    /// How long a client waits for a server connection that others use.
    pub query_wait_timeout: Duration,
    /// Connections opened ahead of need while clients come; depends on the mode if unset.
    pub spare_pool_size: Option<usize>,
    /// How long a connection is kept without a client.
    pub server_idle_timeout: Duration,
    /// The age from which a connection is closed between two clients.
    pub server_lifetime: Duration,
    /// Prepared statements of a connection that clients share.
    pub max_prepared_statements: usize,
    /// Bytes of the texts that clients of shared connections have prepared.
    pub prepared_statement_memory: usize,
}

impl PoolSettings {
    /// Connections opened ahead of need while clients come.
    pub fn spares(&self, mode: PoolMode) -> usize {
        self.spare_pool_size.unwrap_or(match mode {
            PoolMode::None => 0,
            PoolMode::Session | PoolMode::Transaction | PoolMode::Auto => 1,
        })
    }

    /// The most server connections of a pool, with its reserve.
    pub fn max_size(&self) -> usize {
        let size = self
            .default_pool_size
            .saturating_add(self.reserve_pool_size);
        match self.max_db_connections {
            0 => size,
            max => size.min(max),
        }
    }
}

impl Settings {
    /// The settings of pools in force.
    pub fn pool(&self) -> PoolSettings {
        PoolSettings {
            pool_strict: self.pool_strict(),
            pin_sessions: self.pin_sessions(),
            default_pool_size: self.default_pool_size().get(),
            fleet_size: self.fleet_size().get(),
            reserve_pool_size: self.reserve_pool_size(),
            reserve_pool_timeout: self.reserve_pool_timeout().0,
            max_db_connections: self.max_db_connections(),
            query_wait_timeout: self.query_wait_timeout().0,
            spare_pool_size: self.spare_pool_size,
            server_idle_timeout: self.server_idle_timeout().0,
            server_lifetime: self.server_lifetime().0,
            max_prepared_statements: self.max_prepared_statements(),
            prepared_statement_memory: self
                .prepared_statement_memory()
                .get()
                .saturating_mul(1024 * 1024),
        }
    }
}

impl Default for PoolSettings {
    fn default() -> Self {
        Settings::default().pool()
    }
}
