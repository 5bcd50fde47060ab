//! The tables of the console.
//!
//! Columns have PgBouncer's names and order where they mean the same. `POOLS`, `LISTS`, `DATABASES` and `STATS_TOTALS` are
//! for PgBouncer's exporter for Prometheus: without pooling a "pool" is an endpoint, each of whose clients has a connection
//! of its own. Columns without a meaning here are left out, except those that dashboards add up.

use std::{collections::BTreeSet, iter::once, net::SocketAddr, time::Duration};

use jiff::Timestamp;

use super::{
    control::Action,
    pools::PoolRow,
    table::{Table, table},
};
use crate::{
    protocol::rows::{Column, Kind, Value},
    shutdown::Phase,
    status::{
        Counts, EndpointSnapshot, Peer, Pin, RefreshAttempt, RefreshError, SessionInfo, Snapshot,
        UpstreamSnapshot, VERSION,
    },
    telemetry::{
        Metrics,
        labels::{Direction, PoolServer},
        total,
    },
};

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
        link: Number = session.server.as_ref().map(|server| server.id);
        remote_pid: Number = process(session.peer);
        tls: Text = session.encryption.label();
        application_name: Text = session.application.as_str();
        id: Number = session.id;
        endpoint: Text = session.endpoint.label().name();
        state_seconds: Number = session.lasting.as_secs();
        bytes_received: Number = session.from_client;
        bytes_sent: Number = session.from_server;
        pin: Text = session.pin.map(|pin| pin.reason.as_str());
        pin_seconds: Number = session.pin.map(|pin| pin.lasting.as_secs());
    }),
    table!(config "settings in force, and their defaults"
        |snapshot| &snapshot.settings, |setting| {
        key: Text = setting.key.as_str();
        value: Text = setting.value.as_str();
        default: Text = setting.default.as_str();
        changeable: Text = yes_no(setting.changeable);
        source: Text = setting.origin.to_string();
    }),
    table!(databases "databases of the endpoints, and the limits of their pools"
        |snapshot| databases(snapshot), |(name, row)| {
        name: Text = name;
        host: Text = row.upstream().map(|upstream| upstream.host.as_str());
        port: Number = row.upstream().map(|upstream| upstream.port);
        database: Text = row.database;
        force_user: Text = row.upstream().map(|upstream| upstream.user.as_str());
        pool_size: Number = row.settings().map(|settings| settings.default_pool_size);
        // No connection is kept for the pool's sake, so that the compute can suspend.
        min_pool_size: Number = 0;
        reserve_pool_size: Number = row.settings().map(|settings| settings.reserve_pool_size);
        server_lifetime: Number = row.settings().map(|settings| settings.server_lifetime.as_secs());
        pool_mode: Text = row.endpoint.pool_mode.as_str();
        // Without pooling a client is a connection; the endpoints share the limit of the process.
        max_connections: Number = row.settings().map_or(snapshot.max_connections, |settings| settings.max_db_connections);
        current_connections: Number = row.logged_in();
        max_client_connections: Number = snapshot.max_connections;
        current_client_connections: Number = row.active.saturating_add(row.waiting);
        paused: Number = usize::from(row.is_paused());
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
        |_| help(), |(command, shows)| {
        command: Text = command;
        shows: Text = shows;
    }),
    table!(lists "numbers of clients and servers, as PgBouncer's monitoring requests them"
        |snapshot| lists(snapshot), |(list, items)| {
        list: Text = list;
        items: Number = items;
    }),
    table!(pins "clients that cannot part with their server connections, and why"
        |snapshot| pinned(snapshot), |(session, pin)| {
        endpoint: Text = session.endpoint.label().name();
        reason: Text = pin.reason.as_str();
        pin_seconds: Number = pin.lasting.as_secs();
        user: Text = session.user.as_str();
        database: Text = session.database.as_str();
        application_name: Text = session.application.as_str();
        state: Text = session.activity.label();
        link: Number = session.server.as_ref().map(|server| server.id);
        id: Number = session.id;
        advice: Text = pin.reason.advice();
    }),
    table!(pools "clients and server connections of each database"
        |snapshot| PoolRow::all(snapshot), |row| {
        database: Text = row.name.as_str();
        user: Text = row.upstream().map(|upstream| upstream.user.as_str());
        cl_active: Number = row.active;
        cl_waiting: Number = row.waiting;
        sv_active: Number = row.servers[PoolServer::Leased].saturating_sub(row.retained());
        sv_idle: Number = row.servers[PoolServer::Idle];
        // Kept by clients at rest.
        sv_used: Number = row.retained();
        sv_tested: Number = row.servers[PoolServer::Resetting];
        sv_login: Number = row.servers[PoolServer::Opening];
        maxwait: Number = row.max_wait.as_secs();
        maxwait_us: Number = row.max_wait.subsec_micros();
        pool_mode: Text = row.endpoint.pool_mode.as_str();
        sv_limit: Number = row.pool.map(|pool| pool.limit);
        sv_learned_limit: Number = row.pool.and_then(|pool| pool.learned_limit);
    }),
    table!(prepared_statements "numbers of prepared statements of clients that share connections, never their texts"
        |snapshot| &snapshot.endpoints, |endpoint| {
        endpoint: Text = endpoint.name.as_str();
        statements: Number = endpoint.statements.statements;
        memory: Number = endpoint.statements.memory;
        memory_limit: Number = endpoint.statements.memory_limit;
        max_per_server: Number = endpoint.pool_settings.max_prepared_statements;
        sent: Number = endpoint.statements.sent;
        answered: Number = endpoint.statements.answered;
        evicted: Number = endpoint.statements.evicted;
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
    table!(servers "connections to the endpoints; those without a link are idle in a pool"
        |snapshot| servers(snapshot), |server| {
        type: Text = "S";
        user: Text = server.upstream.map_or("", |upstream| upstream.user.as_str());
        database: Text = server.database;
        state: Text = server.session.as_ref().map_or("idle", |session| session.activity.label());
        addr: Text = server.address.ip().to_canonical().to_string();
        port: Number = server.address.port();
        connect_time: Text = server.began;
        request_time: Text = server.since;
        link: Number = server.session.as_ref().map(|session| session.id);
        remote_pid: Number = server.process_id;
        tls: Text = server.upstream.map_or("", tls);
        application_name: Text = server.session.as_ref().map_or("", |session| session.application.as_str());
        id: Number = server.id;
        endpoint: Text = server.endpoint;
    }),
    table!(state "readiness of the proxy, and the reasons against it"
        |snapshot| state(snapshot), |(key, value)| {
        key: Text = key;
        value: Text = value;
    }),
    table!(stats "totals of each endpoint since the start; times in microseconds"
        |snapshot| &snapshot.endpoints, |endpoint| {
        database: Text = endpoint.name.as_str();
        total_server_assignment_count: Number = endpoint.metrics.server_assignments.get();
        total_xact_count: Number = endpoint.metrics.transactions.get();
        total_query_count: Number = endpoint.metrics.queries.get();
        total_received: Number = endpoint.metrics.relay_bytes[Direction::FromClient].get();
        total_sent: Number = endpoint.metrics.relay_bytes[Direction::FromServer].get();
        total_xact_time: Number = endpoint.metrics.transaction_seconds.micros();
        total_query_time: Number = endpoint.metrics.query_seconds.micros();
        total_wait_time: Number = wait_time(&endpoint.metrics);
        total_client_login_count: Number = endpoint.metrics.clients_opened.get();
        total_refused_count: Number = total(&endpoint.metrics.clients_refused);
        total_login_failure_count: Number = total(&endpoint.metrics.upstream_connects.failed);
        total_cancel_count: Number = total(&endpoint.metrics.cancels);
    }),
    table!(stats_totals "totals, as PgBouncer's monitoring requests them"
        |snapshot| &snapshot.endpoints, |endpoint| {
        database: Text = endpoint.name.as_str();
        server_assignment_count: Number = endpoint.metrics.server_assignments.get();
        xact_count: Number = endpoint.metrics.transactions.get();
        query_count: Number = endpoint.metrics.queries.get();
        bytes_received: Number = endpoint.metrics.relay_bytes[Direction::FromClient].get();
        bytes_sent: Number = endpoint.metrics.relay_bytes[Direction::FromServer].get();
        xact_time: Number = endpoint.metrics.transaction_seconds.micros();
        query_time: Number = endpoint.metrics.query_seconds.micros();
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

fn pinned(snapshot: &Snapshot) -> impl Iterator<Item = (SessionInfo, Pin)> {
    let sessions = snapshot.registry.list(usize::MAX).into_iter();
    sessions.filter_map(|session| session.pin.map(|pin| (session, pin)))
}

fn help() -> impl Iterator<Item = (String, &'static str)> {
    let tables = TABLES.iter();
    let tables = tables.map(|table| (format!("SHOW {}", table.name.to_uppercase()), table.help));
    let actions = Action::ALL.iter().map(|action| {
        let (command, help) = action.help();
        (command.to_owned(), help)
    });
    tables.chain(actions)
}

type Endpoint<'a> = (&'a EndpointSnapshot, Option<&'a UpstreamSnapshot>, Counts);

fn endpoints(snapshot: &Snapshot) -> impl Iterator<Item = Endpoint<'_>> {
    let endpoints = snapshot.endpoints.iter();
    endpoints.map(|endpoint| {
        let upstream = endpoint.upstream.as_ref();
        (endpoint, upstream, endpoint.sessions.counts())
    })
}

/// Besides the pools, the names that clients send by default and that the endpoints do not have.
fn databases(snapshot: &Snapshot) -> impl Iterator<Item = (String, PoolRow<'_>)> {
    let missing = snapshot.endpoints.iter().flat_map(|endpoint| {
        let names = endpoint
            .upstream
            .iter()
            .flat_map(|upstream| &upstream.missing_databases);
        names.map(move |name| (name.clone(), PoolRow::of_endpoint(endpoint)))
    });
    let pools = PoolRow::all(snapshot).into_iter();
    pools.map(|row| (row.name.clone(), row)).chain(missing)
}

/// A row of SERVERS.
struct ServerRow<'a> {
    id: u64,
    upstream: Option<&'a UpstreamSnapshot>,
    endpoint: String,
    database: String,
    address: SocketAddr,
    process_id: Option<u32>,
    began: Timestamp,
    since: Timestamp,
    /// The client that has it.
    session: Option<SessionInfo>,
}

fn servers(snapshot: &Snapshot) -> impl Iterator<Item = ServerRow<'_>> {
    let of_session = |session: SessionInfo| {
        let mut endpoints = snapshot.endpoints.iter();
        let endpoint = endpoints.find(|endpoint| endpoint.sessions == session.endpoint);
        let server = session.server.clone()?;
        Some(ServerRow {
            id: server.id,
            upstream: endpoint.and_then(|endpoint| endpoint.upstream.as_ref()),
            endpoint: session.endpoint.label().name().to_owned(),
            database: server.database.into(),
            address: server.address,
            process_id: server.process_id,
            began: session.began,
            since: session.since,
            session: Some(session),
        })
    };
    let now = Timestamp::now();
    let idle = snapshot.endpoints.iter().flat_map(move |endpoint| {
        let servers = endpoint.pools.iter().flat_map(|pool| {
            let idle = pool.idle.iter();
            idle.map(|server| (&pool.database, server))
        });
        servers.map(move |(database, server)| ServerRow {
            id: server.id,
            upstream: endpoint.upstream.as_ref(),
            endpoint: endpoint.sessions.label().name().to_owned(),
            database: database.clone(),
            address: server.address,
            process_id: server.process_id,
            began: now.saturating_sub(server.age).unwrap_or(now),
            since: now.saturating_sub(server.idle).unwrap_or(now),
            session: None,
        })
    });
    let sessions = snapshot.registry.list(usize::MAX).into_iter();
    sessions.filter_map(of_session).chain(idle)
}

fn refreshes(
    snapshot: &Snapshot,
) -> impl Iterator<Item = (&str, &RefreshAttempt, Option<&RefreshError>)> {
    let refreshes = snapshot.refreshes().into_iter();
    refreshes.map(|(endpoint, attempt)| (endpoint, attempt, attempt.outcome.as_ref().err()))
}

fn state(snapshot: &Snapshot) -> [(&'static str, Value); 11] {
    let is_paused = snapshot.endpoints.iter().any(|it| it.is_paused);
    let phase = match snapshot.phase {
        Phase::Serving => "serving",
        Phase::Draining => "draining",
        Phase::Cutting => "ending",
    };
    [
        ("active", yes_no(snapshot.phase == Phase::Serving).into()),
        ("paused", yes_no(is_paused).into()),
        // For scripts written for PgBouncer, which can be suspended.
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
    let pools = PoolRow::all(snapshot);
    let free = pools.iter().map(|row| row.servers[PoolServer::Idle]);
    let free: usize = free.sum();
    let logged_in: usize = pools.iter().map(PoolRow::logged_in).sum();
    let endpoints = &snapshot.endpoints;
    let sessions = snapshot.registry.counts().all;
    let upstreams = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.upstream.as_ref());
    let users: BTreeSet<&str> = upstreams.map(|upstream| upstream.user.as_str()).collect();
    let clients = endpoints.iter();
    let clients: i64 = clients
        .map(|endpoint| endpoint.metrics.clients_active.get())
        .sum();
    // Clients in the handshake, and those of the console.
    let logins = clients.saturating_sub_unsigned(u64::try_from(sessions).unwrap_or(u64::MAX));
    [
        ("databases", pools.len().into()),
        ("users", users.len().into()),
        ("pools", pools.len().into()),
        (
            "free_clients",
            snapshot.max_connections.saturating_sub(sessions).into(),
        ),
        ("used_clients", sessions.into()),
        ("login_clients", logins.max(0).into()),
        ("free_servers", free.into()),
        ("used_servers", logged_in.saturating_sub(free).into()),
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
