//! The tables that PgBouncer's exporter for Prometheus requests (`POOLS`, `LISTS`, `DATABASES`, `STATS_TOTALS`), in
//! PgBouncer's terms.
//!
//! Without pooling a "pool" is an endpoint, each of whose clients has a connection of its own. Columns without a meaning
//! here are left out, except those that dashboards add up.

use std::{collections::BTreeSet, iter::once};

use super::tables::{Rows, number, or_null, stats, text};
use crate::status::{EndpointSnapshot, Snapshot};

/// PgBouncer's name for a server connection that a client keeps.
const POOL_MODE: &str = "session";
/// Columns of `STATS_TOTALS`, which are the first of `STATS`.
const STATS_TOTALS: usize = 7;

pub(super) fn databases(snapshot: &Snapshot) -> Rows {
    // Besides the endpoint, the names that clients send by default and that it does not have.
    let rows = |endpoint: &EndpointSnapshot| {
        let upstream = endpoint.upstream.as_ref();
        let missing = upstream.map_or(&[][..], |upstream| &upstream.missing_databases);
        let row = |name: &String| {
            vec![
                text(name),
                or_null(upstream, |upstream| text(&*upstream.host)),
                or_null(upstream, |upstream| number(upstream.port)),
                or_null(upstream, |upstream| text(&*upstream.database)),
                or_null(upstream, |upstream| text(&*upstream.user)),
                text(POOL_MODE),
                number(snapshot.max_connections),
                number(endpoint.metrics.upstream_active.get()),
                number(0),
                number(0),
            ]
        };
        once(&endpoint.name)
            .chain(missing)
            .map(row)
            .collect::<Rows>()
    };
    snapshot.endpoints.iter().flat_map(rows).collect()
}

pub(super) fn lists(snapshot: &Snapshot) -> Rows {
    let endpoints = &snapshot.endpoints;
    let sessions = snapshot.registry.counts().all;
    let upstreams = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.upstream.as_ref());
    let users: BTreeSet<&str> = upstreams.map(|upstream| upstream.user.as_str()).collect();
    let sum = |gauge: fn(&EndpointSnapshot) -> i64| -> i64 { endpoints.iter().map(gauge).sum() };
    let clients = sum(|endpoint| endpoint.metrics.clients_active.get());
    let servers = sum(|endpoint| endpoint.metrics.upstream_active.get());
    // Clients in the handshake, and those of the console.
    let logins = clients.saturating_sub_unsigned(u64::try_from(sessions).unwrap_or(u64::MAX));
    let free = snapshot.max_connections.saturating_sub(sessions);
    [
        ("databases", number(endpoints.len())),
        ("users", number(users.len())),
        ("pools", number(endpoints.len())),
        ("free_clients", number(free)),
        ("used_clients", number(sessions)),
        ("login_clients", number(logins.max(0))),
        ("free_servers", number(0)),
        ("used_servers", number(servers)),
    ]
    .into_iter()
    .map(|(list, items)| vec![text(list), items])
    .collect()
}

pub(super) fn pools(snapshot: &Snapshot) -> Rows {
    let row = |endpoint: &EndpointSnapshot| {
        let counts = endpoint.sessions.counts();
        vec![
            text(&*endpoint.name),
            or_null(endpoint.upstream.as_ref(), |upstream| text(&*upstream.user)),
            number(counts.all.saturating_sub(counts.waiting)),
            number(counts.waiting),
            number(endpoint.metrics.upstream_active.get()),
            number(0),
            number(0),
            number(0),
            // A waiting client is being logged in, or waits for that.
            number(counts.waiting),
            number(counts.max_wait.as_secs()),
            number(counts.max_wait.subsec_micros()),
            text(POOL_MODE),
        ]
    };
    snapshot.endpoints.iter().map(row).collect()
}

pub(super) fn stats_totals(snapshot: &Snapshot) -> Rows {
    let row = |endpoint: &EndpointSnapshot| {
        let mut row = stats(endpoint);
        row.truncate(STATS_TOTALS);
        row
    };
    snapshot.endpoints.iter().map(row).collect()
}
