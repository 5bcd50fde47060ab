//! The tables that PgBouncer's monitoring asks for (its exporter for Prometheus: `POOLS`, `LISTS`, `DATABASES`,
//! `STATS_TOTALS`), in PgBouncer's words.
//!
//! There is no pool: a "pool" is an endpoint, each of whose clients has a connection of its own. Columns that could only
//! ever say nothing are left out, but for those that dashboards add up.

use std::sync::Arc;

use super::{
    dialogue::Rows,
    tables::{number, stats, text},
};
use crate::{
    overview::{Overview, Place},
    protocol::rows::{Column, Kind, Value},
};

const fn name(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Text,
    }
}

const fn count(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Number,
    }
}

pub(super) const DATABASES: &[Column] = &[
    name("name"),
    name("host"),
    count("port"),
    name("database"),
    name("force_user"),
    name("pool_mode"),
    count("max_connections"),
    count("current_connections"),
    count("paused"),
    count("disabled"),
];
pub(super) const LISTS: &[Column] = &[name("list"), count("items")];
pub(super) const POOLS: &[Column] = &[
    name("database"),
    name("user"),
    count("cl_active"),
    count("cl_waiting"),
    count("sv_active"),
    count("sv_idle"),
    count("sv_used"),
    count("sv_tested"),
    count("sv_login"),
    count("maxwait"),
    count("maxwait_us"),
    name("pool_mode"),
];
pub(super) const STATS_TOTALS: &[Column] = &[
    name("database"),
    count("xact_count"),
    count("query_count"),
    count("server_assignment_count"),
    count("bytes_received"),
    count("bytes_sent"),
    count("wait_time"),
];

/// What PgBouncer calls it where a client keeps its connection.
const POOL_MODE: &str = "session";

pub(super) fn databases(overview: &Overview) -> Rows {
    let most = overview.session_config().max_connections;
    // Besides the endpoint itself, the names that its clients send by default and that it does not have.
    let rows = |place: &Arc<Place>| {
        let upstream = place.route.found();
        let names = upstream
            .as_ref()
            .map(|upstream| upstream.missing_databases())
            .unwrap_or_default();
        let endpoint = upstream.map(|upstream| upstream.endpoint());
        let endpoint = endpoint.as_deref();
        let row = |name: &str| {
            vec![
                text(name),
                endpoint.map_or(Value::Null, |endpoint| text(&*endpoint.host)),
                endpoint.map_or(Value::Null, |endpoint| number(endpoint.port)),
                endpoint.map_or(Value::Null, |endpoint| text(&*endpoint.database)),
                endpoint.map_or(Value::Null, |endpoint| text(&*endpoint.user)),
                text(POOL_MODE),
                number(most),
                number(place.metrics.upstream_active.get()),
                number(0),
                number(0),
            ]
        };
        let names = std::iter::once(place.name.as_str()).chain(names.iter().map(String::as_str));
        names.map(row).collect::<Rows>()
    };
    overview.places().iter().flat_map(rows).collect()
}

pub(super) fn lists(overview: &Overview) -> Rows {
    let places = overview.places();
    let used = overview.registry().counts().all;
    let users: std::collections::BTreeSet<String> = places
        .iter()
        .filter_map(|place| place.route.found())
        .map(|upstream| upstream.endpoint().user.clone())
        .collect();
    let sum = |of: fn(&Place) -> i64| -> i64 { places.iter().map(|place| of(place)).sum() };
    let connected = sum(|place| place.metrics.clients_active.get());
    let begun = i64::try_from(used).unwrap_or(i64::MAX);
    let free = overview
        .session_config()
        .max_connections
        .saturating_sub(used);
    [
        ("databases", number(places.len())),
        ("users", number(users.len())),
        ("pools", number(places.len())),
        ("free_clients", number(free)),
        ("used_clients", number(used)),
        // Connected, and no session yet (or the console's).
        (
            "login_clients",
            number(connected.saturating_sub(begun).max(0)),
        ),
        ("free_servers", number(0)),
        (
            "used_servers",
            number(sum(|place| place.metrics.upstream_active.get())),
        ),
    ]
    .into_iter()
    .map(|(list, items)| vec![text(list), items])
    .collect()
}

pub(super) fn pools(overview: &Overview) -> Rows {
    let places = overview.places();
    let row = |place: &Arc<Place>| {
        let counts = place.sessions.counts();
        let upstream = place.route.found();
        let user = upstream.map(|upstream| upstream.endpoint().user.clone());
        vec![
            text(&*place.name),
            user.map_or(Value::Null, text),
            number(counts.all.saturating_sub(counts.waiting)),
            number(counts.waiting),
            number(place.metrics.upstream_active.get()),
            number(0),
            number(0),
            number(0),
            // Each that waits is being logged in, or waits for that.
            number(counts.waiting),
            number(counts.max_wait.as_secs()),
            number(counts.max_wait.subsec_micros()),
            text(POOL_MODE),
        ]
    };
    places.iter().map(row).collect()
}

pub(super) fn stats_totals(overview: &Overview) -> Rows {
    let row = |place: &Arc<Place>| {
        let mut row = stats(place);
        row.truncate(STATS_TOTALS.len());
        row
    };
    overview.places().iter().map(row).collect()
}
