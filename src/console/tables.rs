//! The tables of the console.
//!
//! Columns have PgBouncer's names where they mean the same. `POOLS`, `LISTS`, `DATABASES` and `STATS_TOTALS` are for
//! PgBouncer's exporter for Prometheus: without pooling a "pool" is an endpoint, each of whose clients has a connection of
//! its own. Columns without a meaning here are left out, except those that dashboards add up.

use std::{collections::BTreeSet, iter::once, net::SocketAddr, time::Duration};

use jiff::Timestamp;

use super::table::{Table, table};
use crate::{
    protocol::rows::{Column, Kind, Value},
    shutdown::Phase,
    status::{
        Counts, EndpointSnapshot, Peer, RefreshAttempt, RefreshError, Server, SessionInfo,
        Snapshot, UpstreamSnapshot, VERSION,
    },
    telemetry::{Metrics, labels::Direction, total},
};

/// PgBouncer's name for a server connection that a client keeps.
const POOL_MODE: &str = "session";

/// The table with this name, in lower case.
pub(super) fn named(name: &str) -> Option<&'static Table> {
    TABLES.iter().find(|table| table.name == name)
}

/// Every table, in alphabetical order.
static TABLES: &[Table] = &[
    table!(clients "client connections: peer, activity and its duration"
        |snapshot| snapshot.registry.list(usize::MAX), |session| {
        type: Text = "C";
        user: Text = session.user.as_str();
        database: Text = session.database.as_str();
        state: Text = session.activity.label();
        addr: Text = tcp_address(session.peer).map_or_else(|| "unix".to_owned(), |address| address.ip().to_string());
        port: Number = tcp_address(session.peer).map_or(0, |address| address.port());
        connect_time: Text = session.began;
        request_time: Text = session.since;
        wait: Number = waited(&session).as_secs();
        wait_us: Number = waited(&session).subsec_micros();
        link: Number = session.server.as_ref().map(|_| session.id);
        remote_pid: Number = process(session.peer);
        tls: Text = session.encryption.label();
        application_name: Text = session.application.as_str();
        id: Number = session.id;
        endpoint: Text = session.endpoint.label().name();
        state_seconds: Number = session.lasting.as_secs();
        bytes_received: Number = session.from_client;
        bytes_sent: Number = session.from_server;
    }),
    table!(config "settings in force, and their defaults"
        |snapshot| &snapshot.settings, |setting| {
        key: Text = setting.key.as_str();
        value: Text = setting.value.as_str();
        default: Text = setting.default.as_str();
        changeable: Text = yes_no(setting.changeable);
        source: Text = setting.origin.to_string();
    }),
    table!(databases "endpoints, as PgBouncer's monitoring requests them"
        |snapshot| databases(snapshot), |(name, endpoint, upstream)| {
        name: Text = name;
        host: Text = upstream.map(|upstream| upstream.host.as_str());
        port: Number = upstream.map(|upstream| upstream.port);
        database: Text = upstream.map(|upstream| upstream.database.as_str());
        force_user: Text = upstream.map(|upstream| upstream.user.as_str());
        pool_mode: Text = POOL_MODE;
        // Of the process; the endpoints share it.
        max_connections: Number = snapshot.max_connections;
        current_connections: Number = endpoint.metrics.upstream_active.get();
        paused: Number = 0;
        disabled: Number = 0;
    }),
    table!(endpoints "endpoints, their addresses and sessions"
        |snapshot| endpoints(snapshot), |(endpoint, upstream, counts)| {
        name: Text = endpoint.name.as_str();
        listen: Text = endpoint.listening.join(", ");
        host: Text = upstream.map(|upstream| upstream.host.as_str());
        port: Number = upstream.map(|upstream| upstream.port);
        user: Text = upstream.map(|upstream| upstream.user.as_str());
        database: Text = upstream.map(|upstream| upstream.database.as_str());
        tls: Text = upstream.map(tls);
        credential: Text = endpoint.credential.state.label();
        cl_active: Number = counts.active;
        cl_waiting: Number = counts.waiting;
        cl_idle: Number = counts.idle;
        cl_in_transaction: Number = counts.in_transaction;
        sv_active: Number = endpoint.metrics.upstream_active.get();
    }),
    table!(failures "recently refused clients, with the reason and a hint"
        |snapshot| snapshot.registry.recent().failures(), |failure| {
        last_time: Text = failure.at;
        first_time: Text = failure.first;
        count: Number = failure.count;
        endpoint: Text = failure.endpoint.name();
        reason: Text = failure.reason.as_str();
        sqlstate: Text = failure.report.sqlstate;
        message: Text = failure.report.message;
        detail: Text = failure.report.detail;
        hint: Text = failure.report.hint;
        id: Number = failure.session;
    }),
    table!(help "this list"
        |_| TABLES, |table| {
        command: Text = format!("SHOW {}", table.name.to_uppercase());
        shows: Text = table.help;
    }),
    table!(lists "numbers of clients and servers, as PgBouncer's monitoring requests them"
        |snapshot| lists(snapshot), |(list, items)| {
        list: Text = list;
        items: Number = items;
    }),
    table!(pools "waiting clients by endpoint, as PgBouncer's monitoring requests them"
        |snapshot| endpoints(snapshot), |(endpoint, upstream, counts)| {
        database: Text = endpoint.name.as_str();
        user: Text = upstream.map(|upstream| upstream.user.as_str());
        cl_active: Number = counts.all.saturating_sub(counts.waiting);
        cl_waiting: Number = counts.waiting;
        sv_active: Number = endpoint.metrics.upstream_active.get();
        sv_idle: Number = 0;
        sv_used: Number = 0;
        sv_tested: Number = 0;
        // A waiting client is being logged in, or waits for that.
        sv_login: Number = counts.waiting;
        maxwait: Number = counts.max_wait.as_secs();
        maxwait_us: Number = counts.max_wait.subsec_micros();
        pool_mode: Text = POOL_MODE;
    }),
    table!(refreshes "recent refreshes of credentials"
        |snapshot| refreshes(snapshot), |(endpoint, attempt, error)| {
        time: Text = attempt.at;
        endpoint: Text = endpoint;
        outcome: Text = error.map_or("success", |error| error.kind.as_str());
        ms: Number = attempt.took.as_millis();
        expires: Text = attempt.outcome.as_ref().ok().map(|at| or_never(*at));
        error: Text = error.map(|error| error.message.as_str());
        hint: Text = error.and_then(|error| error.hint.as_deref());
    }),
    table!(servers "connections to the endpoints"
        |snapshot| servers(snapshot), |(session, server, upstream)| {
        type: Text = "S";
        user: Text = upstream.map_or("", |upstream| upstream.user.as_str());
        database: Text = &*server.database;
        state: Text = session.activity.label();
        addr: Text = server.address.ip().to_canonical().to_string();
        port: Number = server.address.port();
        connect_time: Text = session.began;
        request_time: Text = session.since;
        link: Number = session.id;
        remote_pid: Number = server.process_id;
        tls: Text = upstream.map_or("", tls);
        application_name: Text = session.application.as_str();
        id: Number = session.id;
        endpoint: Text = session.endpoint.label().name();
    }),
    table!(state "readiness of the proxy, and the reasons against it"
        |snapshot| state(snapshot), |(key, value)| {
        key: Text = key;
        value: Text = value;
    }),
    table!(stats "totals of each endpoint since the start"
        |snapshot| &snapshot.endpoints, |endpoint| {
        database: Text = endpoint.name.as_str();
        total_xact_count: Number = endpoint.metrics.transactions.get();
        total_query_count: Number = endpoint.metrics.queries.get();
        total_server_assignment_count: Number = endpoint.metrics.upstream_connects.ok.get();
        total_received: Number = endpoint.metrics.relay_bytes[Direction::FromClient].get();
        total_sent: Number = endpoint.metrics.relay_bytes[Direction::FromServer].get();
        total_wait_time: Number = wait_time(&endpoint.metrics);
        total_client_login_count: Number = endpoint.metrics.clients_opened.get();
        total_refused_count: Number = total(&endpoint.metrics.clients_refused);
        total_login_failure_count: Number = total(&endpoint.metrics.upstream_connects.failed);
        total_cancel_count: Number = total(&endpoint.metrics.cancels);
    }),
    table!(stats_totals "totals, as PgBouncer's monitoring requests them"
        |snapshot| &snapshot.endpoints, |endpoint| {
        database: Text = endpoint.name.as_str();
        xact_count: Number = endpoint.metrics.transactions.get();
        query_count: Number = endpoint.metrics.queries.get();
        server_assignment_count: Number = endpoint.metrics.upstream_connects.ok.get();
        bytes_received: Number = endpoint.metrics.relay_bytes[Direction::FromClient].get();
        bytes_sent: Number = endpoint.metrics.relay_bytes[Direction::FromServer].get();
        wait_time: Number = wait_time(&endpoint.metrics);
    }),
    table!(tokens "credentials: state and lifetime, never the secret"
        |snapshot| &snapshot.endpoints, |endpoint| {
        endpoint: Text = endpoint.name.as_str();
        state: Text = endpoint.credential.state.label();
        source: Text = endpoint.credential.source;
        generation: Number = endpoint.credential.generation;
        minted: Text = endpoint.credential.minted_at;
        expires: Text = (endpoint.credential.generation > 0).then(|| or_never(endpoint.credential.expires_at));
        seconds_left: Number = endpoint.credential.expires_at.map(seconds_left);
        refresh_due: Text = endpoint.credential.due_at;
        next_attempt: Text = endpoint.credential.next_attempt;
        last_error: Text = endpoint.credential.last_error.as_ref().map(|error| error.message.as_str());
        hint: Text = endpoint.credential.last_error.as_ref().and_then(|error| error.hint.as_deref());
    }),
    table!(version "the version of this program"
        |_| once(()), |()| {
        version: Text = format!("lakebase-proxy {VERSION}");
    }),
    table!(wakes "recent wakes of endpoints and their duration"
        |snapshot| snapshot.registry.recent().wakes(), |wake| {
        time: Text = wake.at;
        endpoint: Text = wake.endpoint.name();
        seconds: Text = format!("{:.3}", wake.longest.as_secs_f64());
        clients: Number = wake.clients;
    }),
];

type Endpoint<'a> = (&'a EndpointSnapshot, Option<&'a UpstreamSnapshot>, Counts);

fn endpoints(snapshot: &Snapshot) -> impl Iterator<Item = Endpoint<'_>> {
    let endpoints = snapshot.endpoints.iter();
    endpoints.map(|endpoint| {
        let upstream = endpoint.upstream.as_ref();
        (endpoint, upstream, endpoint.sessions.counts())
    })
}

/// Besides the endpoints, the names that clients send by default and that the endpoints do not have.
fn databases(
    snapshot: &Snapshot,
) -> impl Iterator<Item = (&str, &EndpointSnapshot, Option<&UpstreamSnapshot>)> {
    snapshot.endpoints.iter().flat_map(|endpoint| {
        let upstream = endpoint.upstream.as_ref();
        let missing = upstream.map_or(&[][..], |upstream| &upstream.missing_databases);
        let names = once(&endpoint.name).chain(missing);
        names.map(move |name| (name.as_str(), endpoint, upstream))
    })
}

fn servers(
    snapshot: &Snapshot,
) -> impl Iterator<Item = (SessionInfo, Server, Option<&UpstreamSnapshot>)> {
    let row = |session: SessionInfo| {
        let mut endpoints = snapshot.endpoints.iter();
        let endpoint = endpoints.find(|endpoint| endpoint.sessions == session.endpoint);
        let upstream = endpoint.and_then(|endpoint| endpoint.upstream.as_ref());
        Some((session.clone(), session.server?, upstream))
    };
    snapshot
        .registry
        .list(usize::MAX)
        .into_iter()
        .filter_map(row)
}

fn refreshes(
    snapshot: &Snapshot,
) -> impl Iterator<Item = (&str, &RefreshAttempt, Option<&RefreshError>)> {
    let refreshes = snapshot.refreshes().into_iter();
    refreshes.map(|(endpoint, attempt)| (endpoint, attempt, attempt.outcome.as_ref().err()))
}

fn state(snapshot: &Snapshot) -> [(&'static str, Value); 11] {
    let phase = match snapshot.phase {
        Phase::Serving => "serving",
        Phase::Draining => "draining",
        Phase::Cutting => "ending",
    };
    [
        ("active", yes_no(snapshot.phase == Phase::Serving).into()),
        // For scripts written for PgBouncer, which can be paused.
        ("paused", yes_no(false).into()),
        ("suspended", yes_no(false).into()),
        ("phase", phase.into()),
        ("started", yes_no(snapshot.is_started).into()),
        ("ready", yes_no(snapshot.readiness.is_ok()).into()),
        ("reasons", snapshot.readiness.reasons.join("; ").into()),
        ("start_time", snapshot.started.into()),
        (
            "uptime_seconds",
            snapshot.uptime.as_secs().to_string().into(),
        ),
        (
            "sessions",
            snapshot.registry.counts().all.to_string().into(),
        ),
        (
            "max_connections",
            snapshot.max_connections.to_string().into(),
        ),
    ]
}

fn lists(snapshot: &Snapshot) -> [(&'static str, Value); 8] {
    let endpoints = &snapshot.endpoints;
    let sessions = snapshot.registry.counts().all;
    let upstreams = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.upstream.as_ref());
    let users: BTreeSet<&str> = upstreams.map(|upstream| upstream.user.as_str()).collect();
    let sum = |gauge: fn(&Metrics) -> i64| -> i64 {
        endpoints
            .iter()
            .map(|endpoint| gauge(&endpoint.metrics))
            .sum()
    };
    let clients = sum(|metrics| metrics.clients_active.get());
    // Clients in the handshake, and those of the console.
    let logins = clients.saturating_sub_unsigned(u64::try_from(sessions).unwrap_or(u64::MAX));
    [
        ("databases", endpoints.len().into()),
        ("users", users.len().into()),
        ("pools", endpoints.len().into()),
        (
            "free_clients",
            snapshot.max_connections.saturating_sub(sessions).into(),
        ),
        ("used_clients", sessions.into()),
        ("login_clients", logins.max(0).into()),
        ("free_servers", 0.into()),
        (
            "used_servers",
            sum(|metrics| metrics.upstream_active.get()).into(),
        ),
    ]
}

fn tcp_address(peer: Peer) -> Option<SocketAddr> {
    match peer {
        Peer::Tcp(address) => Some(address),
        Peer::Unix { .. } => None,
    }
}

fn process(peer: Peer) -> Option<i32> {
    match peer {
        Peer::Tcp(_) => None,
        Peer::Unix { pid, .. } => pid,
    }
}

/// The time that a client has waited for its server connection; zero once it has one.
fn waited(session: &SessionInfo) -> Duration {
    match session.server {
        Some(_) => Duration::ZERO,
        None => session.age,
    }
}

fn tls(upstream: &UpstreamSnapshot) -> &'static str {
    if upstream.is_encrypted {
        "verify-full"
    } else {
        ""
    }
}

fn wait_time(metrics: &Metrics) -> u128 {
    // PgBouncer reports `wait_time` in microseconds.
    let waited = Duration::try_from_secs_f64(metrics.hold_seconds.get_sample_sum());
    waited.unwrap_or_default().as_micros()
}

fn seconds_left(expires: Timestamp) -> i64 {
    expires.duration_since(Timestamp::now()).as_secs().max(0)
}

fn yes_no(fact: bool) -> &'static str {
    if fact { "yes" } else { "no" }
}

fn or_never(at: Option<Timestamp>) -> Value {
    at.map_or_else(|| "never".into(), Value::from)
}
