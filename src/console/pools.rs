//! The rows of POOLS and DATABASES: for each endpoint one of its own database, and one for each other database that its
//! clients share connections of.
//!
//! The row of the endpoint has its name and includes the connections that no pool has: all of them without pooling, those of
//! replication with it. So the names that monitoring sees do not depend on the mode.

use std::time::Duration;

use enum_map::EnumMap;

use crate::{
    config::{PoolMode, PoolSettings},
    status::{EndpointSnapshot, PoolSnapshot, Snapshot, UpstreamSnapshot},
    telemetry::labels::PoolServer,
};

/// A row of POOLS.
pub(super) struct PoolRow<'a> {
    /// What the commands of the console call it.
    pub(super) name: String,
    pub(super) endpoint: &'a EndpointSnapshot,
    /// The server's name of it.
    pub(super) database: Option<&'a str>,
    /// Clients with a server connection.
    pub(super) active: usize,
    /// Clients without one.
    pub(super) waiting: usize,
    pub(super) max_wait: Duration,
    pub(super) servers: EnumMap<PoolServer, usize>,
    pub(super) pool: Option<&'a PoolSnapshot>,
}

impl<'a> PoolRow<'a> {
    pub(super) fn all(snapshot: &'a Snapshot) -> Vec<Self> {
        let endpoints = snapshot.endpoints.iter();
        endpoints
            .flat_map(|endpoint| {
                let others = others(endpoint).map(|pool| Self::of_pool(endpoint, pool));
                std::iter::once(Self::of_endpoint(endpoint)).chain(others)
            })
            .collect()
    }

    /// The row of the endpoint's own database: what the others do not have.
    pub(super) fn of_endpoint(endpoint: &'a EndpointSnapshot) -> Self {
        let own = own_database(endpoint);
        let mut pools = endpoint.pools.iter();
        let pool = pools.find(|pool| Some(pool.database.as_str()) == own);
        let sum =
            |count: fn(&PoolSnapshot) -> usize| -> usize { others(endpoint).map(count).sum() };
        let elsewhere = sum(|pool| pool.waiting);
        let counts = endpoint.sessions.counts();
        let waiting = counts.waiting.saturating_sub(elsewhere);
        let connected = counts.all.saturating_sub(counts.waiting);
        let logged_in = usize::try_from(endpoint.metrics.upstream_active.get()).unwrap_or_default();
        let pooled: usize = endpoint.pools.iter().map(|pool| count(&pool.servers)).sum();
        let mut servers = pool.map_or_else(EnumMap::default, |pool| pool.servers);
        servers[PoolServer::Leased] += logged_in.saturating_sub(pooled);
        // Without a pool a waiting client is being logged in, or waits for that.
        servers[PoolServer::Opening] += waiting.saturating_sub(pool.map_or(0, |pool| pool.waiting));
        Self {
            name: endpoint.name.clone(),
            endpoint,
            database: own,
            active: connected.saturating_sub(sum(|pool| pool.servers[PoolServer::Leased])),
            waiting,
            max_wait: match pool {
                Some(pool) if elsewhere > 0 => pool.max_wait,
                _ => counts.max_wait,
            },
            servers,
            pool,
        }
    }

    fn of_pool(endpoint: &'a EndpointSnapshot, pool: &'a PoolSnapshot) -> Self {
        Self {
            name: format!("{}/{}", endpoint.name, pool.database),
            endpoint,
            database: Some(&pool.database),
            active: pool.servers[PoolServer::Leased],
            waiting: pool.waiting,
            max_wait: pool.max_wait,
            servers: pool.servers,
            pool: Some(pool),
        }
    }

    pub(super) fn upstream(&self) -> Option<&'a UpstreamSnapshot> {
        self.endpoint.upstream.as_ref()
    }

    /// Its settings; `None` without pooling.
    pub(super) fn settings(&self) -> Option<PoolSettings> {
        (self.endpoint.pool_mode != PoolMode::None).then_some(self.endpoint.pool_settings)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.pool
            .map_or(self.endpoint.is_paused, |pool| pool.is_paused)
    }

    /// Server connections that clients keep at rest, until another one needs them.
    pub(super) fn retained(&self) -> usize {
        self.pool.map_or(0, |pool| pool.retained)
    }

    /// Server connections that are logged in.
    pub(super) fn logged_in(&self) -> usize {
        count(&self.servers)
    }
}

fn own_database(endpoint: &EndpointSnapshot) -> Option<&str> {
    let upstream = endpoint.upstream.as_ref();
    upstream.map(|upstream| upstream.database.as_str())
}

fn others(endpoint: &EndpointSnapshot) -> impl Iterator<Item = &PoolSnapshot> {
    let own = own_database(endpoint);
    let pools = endpoint.pools.iter();
    pools.filter(move |pool| Some(pool.database.as_str()) != own && !pool.is_empty())
}

/// Those that are logged in.
fn count(servers: &EnumMap<PoolServer, usize>) -> usize {
    let logged_in = servers
        .iter()
        .filter(|(state, _)| *state != PoolServer::Opening);
    logged_in.map(|(_, count)| count).sum()
}
