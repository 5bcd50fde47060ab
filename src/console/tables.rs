//! The tables of the console. Columns have PgBouncer's names where they mean the same.

use std::{borrow::Cow, time::Duration};

use jiff::Timestamp;

use super::pgbouncer;
use crate::{
    protocol::rows::{Column, Kind, Value},
    shutdown::Phase,
    status::{
        EndpointSnapshot, Peer, RefreshError, SessionInfo, Snapshot, UpstreamSnapshot, VERSION,
    },
    telemetry::{escape, labels::Direction, total},
};

/// The rows of a table.
pub(super) type Rows = Vec<Vec<Value>>;

/// A table that SHOW displays.
#[derive(Debug)]
pub(super) struct Table {
    /// Its name, in lower case.
    pub(super) name: &'static str,
    help: &'static str,
    pub(super) columns: &'static [Column],
    rows: fn(&Snapshot) -> Rows,
}

impl Table {
    /// The table with this name, in lower case.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        TABLES.iter().find(|table| table.name == name)
    }

    /// The rows of a snapshot.
    pub(super) fn rows(&self, snapshot: &Snapshot) -> Rows {
        let mut rows = (self.rows)(snapshot);
        // Clients choose names and servers send messages: their control characters must not reach a terminal.
        for value in rows.iter_mut().flatten() {
            if let Value::Text(text) = value
                && let Cow::Owned(escaped) = escape(text)
            {
                *text = escaped;
            }
        }
        rows
    }
}

/// Columns of text, unless marked as numbers.
macro_rules! columns {
    ($($name:ident $($kind:ident)?),+ $(,)?) => {
        &[$(Column { name: stringify!($name), kind: columns!(@ $($kind)?) }),+]
    };
    (@) => { Kind::Text };
    (@ number) => { Kind::Number };
}

/// Every table, in alphabetical order.
static TABLES: &[Table] = &[
    Table {
        name: "clients",
        help: "client connections: peer, activity and its duration",
        columns: columns![
            type, user, database, state, addr, port number, connect_time, request_time, wait number, wait_us number,
            link number, remote_pid number, tls, application_name, id number, endpoint, state_seconds number,
            bytes_received number, bytes_sent number,
        ],
        rows: |snapshot| {
            snapshot
                .registry
                .list(usize::MAX)
                .iter()
                .map(client)
                .collect()
        },
    },
    Table {
        name: "config",
        help: "settings in force, and their defaults",
        columns: columns![key, value, default, changeable, source],
        rows: config,
    },
    Table {
        name: "databases",
        help: "endpoints, as PgBouncer's monitoring requests them",
        columns: columns![
            name, host, port number, database, force_user, pool_mode, max_connections number,
            current_connections number, paused number, disabled number,
        ],
        rows: pgbouncer::databases,
    },
    Table {
        name: "endpoints",
        help: "endpoints, their addresses and sessions",
        columns: columns![
            name, listen, host, port number, user, database, tls, credential, cl_active number, cl_waiting number,
            cl_idle number, cl_in_transaction number, sv_active number,
        ],
        rows: |snapshot| snapshot.endpoints.iter().map(endpoint).collect(),
    },
    Table {
        name: "failures",
        help: "recently refused clients, with the reason and a hint",
        columns: columns![
            last_time, first_time, count number, endpoint, reason, sqlstate, message, detail, hint, id number,
        ],
        rows: failures,
    },
    Table {
        name: "help",
        help: "this list",
        columns: columns![command, shows],
        rows: |_| {
            let row = |table: &Table| {
                let command = format!("SHOW {}", table.name.to_uppercase());
                vec![text(command), text(table.help)]
            };
            TABLES.iter().map(row).collect()
        },
    },
    Table {
        name: "lists",
        help: "numbers of clients and servers, as PgBouncer's monitoring requests them",
        columns: columns![list, items number],
        rows: pgbouncer::lists,
    },
    Table {
        name: "pools",
        help: "waiting clients by endpoint, as PgBouncer's monitoring requests them",
        columns: columns![
            database, user, cl_active number, cl_waiting number, sv_active number, sv_idle number, sv_used number,
            sv_tested number, sv_login number, maxwait number, maxwait_us number, pool_mode,
        ],
        rows: pgbouncer::pools,
    },
    Table {
        name: "refreshes",
        help: "recent refreshes of credentials",
        columns: columns![time, endpoint, outcome, ms number, expires, error, hint],
        rows: refreshes,
    },
    Table {
        name: "servers",
        help: "connections to the endpoints",
        columns: columns![
            type, user, database, state, addr, port number, connect_time, request_time, link number,
            remote_pid number, tls, application_name, id number, endpoint,
        ],
        rows: servers,
    },
    Table {
        name: "state",
        help: "readiness of the proxy, and the reasons against it",
        columns: columns![key, value],
        rows: state,
    },
    Table {
        name: "stats",
        help: "totals of each endpoint since the start",
        columns: columns![
            database, total_xact_count number, total_query_count number, total_server_assignment_count number,
            total_received number, total_sent number, total_wait_time number, total_client_login_count number,
            total_refused_count number, total_login_failure_count number, total_cancel_count number,
        ],
        rows: |snapshot| snapshot.endpoints.iter().map(stats).collect(),
    },
    Table {
        name: "stats_totals",
        help: "totals, as PgBouncer's monitoring requests them",
        columns: columns![
            database, xact_count number, query_count number, server_assignment_count number, bytes_received number,
            bytes_sent number, wait_time number,
        ],
        rows: pgbouncer::stats_totals,
    },
    Table {
        name: "tokens",
        help: "credentials: state and lifetime, never the secret",
        columns: columns![
            endpoint, state, source, generation number, minted, expires, seconds_left number, refresh_due,
            next_attempt, last_error, hint,
        ],
        rows: |snapshot| snapshot.endpoints.iter().map(token).collect(),
    },
    Table {
        name: "version",
        help: "the version of this program",
        columns: columns![version],
        rows: |_| vec![vec![text(format!("lakebase-proxy {VERSION}"))]],
    },
    Table {
        name: "wakes",
        help: "recent wakes of endpoints and their duration",
        columns: columns![time, endpoint, seconds, clients number],
        rows: wakes,
    },
];

fn client(session: &SessionInfo) -> Vec<Value> {
    let (address, port, process) = match session.peer {
        Peer::Tcp(address) => (address.ip().to_string(), address.port(), None),
        Peer::Unix { pid, .. } => ("unix".to_owned(), 0, pid),
    };
    let is_connected = session.server.is_some();
    let waited = if is_connected {
        Duration::ZERO
    } else {
        session.age
    };
    vec![
        text("C"),
        text(&*session.user),
        text(&*session.database),
        text(session.activity.label()),
        text(address),
        number(port),
        time(session.began),
        time(session.since),
        number(waited.as_secs()),
        number(waited.subsec_micros()),
        or_null(is_connected.then_some(session.id), number),
        or_null(process, number),
        text(session.encryption.label()),
        text(&*session.application),
        number(session.id),
        text(session.endpoint.label().name()),
        number(session.lasting.as_secs()),
        number(session.from_client),
        number(session.from_server),
    ]
}

fn servers(snapshot: &Snapshot) -> Rows {
    let mut rows = Vec::new();
    for session in snapshot.registry.list(usize::MAX) {
        let Some(server) = &session.server else {
            continue;
        };
        let mut endpoints = snapshot.endpoints.iter();
        let endpoint = endpoints.find(|endpoint| endpoint.sessions == session.endpoint);
        let upstream = endpoint.and_then(|endpoint| endpoint.upstream.as_ref());
        rows.push(vec![
            text("S"),
            text(upstream.map_or("", |upstream| upstream.user.as_str())),
            text(&*server.database),
            text(session.activity.label()),
            text(server.address.ip().to_canonical().to_string()),
            number(server.address.port()),
            time(session.began),
            time(session.since),
            number(session.id),
            or_null(server.process_id, number),
            text(upstream.map_or("", tls)),
            text(&*session.application),
            number(session.id),
            text(session.endpoint.label().name()),
        ]);
    }
    rows
}

fn tls(upstream: &UpstreamSnapshot) -> &'static str {
    if upstream.is_encrypted {
        "verify-full"
    } else {
        ""
    }
}

fn config(snapshot: &Snapshot) -> Rows {
    let rows = snapshot.settings.iter().map(|setting| {
        let changeable = if setting.changeable { "yes" } else { "no" };
        vec![
            text(&*setting.key),
            text(&*setting.value),
            text(&*setting.default),
            text(changeable),
            text(setting.origin.to_string()),
        ]
    });
    rows.collect()
}

fn endpoint(endpoint: &EndpointSnapshot) -> Vec<Value> {
    let counts = endpoint.sessions.counts();
    let upstream = endpoint.upstream.as_ref();
    vec![
        text(&*endpoint.name),
        text(endpoint.listening.join(", ")),
        or_null(upstream, |upstream| text(&*upstream.host)),
        or_null(upstream, |upstream| number(upstream.port)),
        or_null(upstream, |upstream| text(&*upstream.user)),
        or_null(upstream, |upstream| text(&*upstream.database)),
        or_null(upstream, |upstream| text(tls(upstream))),
        text(endpoint.credential.state.label()),
        number(counts.active),
        number(counts.waiting),
        number(counts.idle),
        number(counts.in_transaction),
        number(endpoint.metrics.upstream_active.get()),
    ]
}

fn failures(snapshot: &Snapshot) -> Rows {
    let failures = snapshot.registry.recent().failures().into_iter();
    let rows = failures.map(|failure| {
        vec![
            time(failure.at),
            time(failure.first),
            number(failure.count),
            text(failure.endpoint.name()),
            text(failure.reason.as_str()),
            text(failure.report.sqlstate),
            text(failure.report.message),
            or_null(failure.report.detail, Value::Text),
            or_null(failure.report.hint, Value::Text),
            number(failure.session),
        ]
    });
    rows.collect()
}

fn refreshes(snapshot: &Snapshot) -> Rows {
    let rows = snapshot.refreshes().into_iter().map(|(name, attempt)| {
        let error = attempt.outcome.as_ref().err();
        vec![
            time(attempt.at),
            text(name),
            text(error.map_or("success", |error| error.kind.as_str())),
            number(attempt.took.as_millis()),
            attempt
                .outcome
                .as_ref()
                .map_or(Value::Null, |at| or_never(*at)),
            or_null(error, |error| text(&*error.message)),
            or_null(error.and_then(|error| error.hint.as_deref()), text),
        ]
    });
    rows.collect()
}

fn state(snapshot: &Snapshot) -> Rows {
    let phase = match snapshot.phase {
        Phase::Serving => "serving",
        Phase::Draining => "draining",
        Phase::Cutting => "ending",
    };
    let yes_no = |fact: bool| if fact { "yes" } else { "no" }.to_owned();
    [
        ("active", yes_no(snapshot.phase == Phase::Serving)),
        // For scripts written for PgBouncer, which can be paused.
        ("paused", yes_no(false)),
        ("suspended", yes_no(false)),
        ("phase", phase.to_owned()),
        ("started", yes_no(snapshot.is_started)),
        ("ready", yes_no(snapshot.readiness.is_ok())),
        ("reasons", snapshot.readiness.reasons.join("; ")),
        ("start_time", format_time(snapshot.started)),
        ("uptime_seconds", snapshot.uptime.as_secs().to_string()),
        ("sessions", snapshot.registry.counts().all.to_string()),
        ("max_connections", snapshot.max_connections.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| vec![text(key), text(value)])
    .collect()
}

pub(super) fn stats(endpoint: &EndpointSnapshot) -> Vec<Value> {
    let metrics = &endpoint.metrics;
    let waited =
        Duration::try_from_secs_f64(metrics.hold_seconds.get_sample_sum()).unwrap_or_default();
    vec![
        text(&*endpoint.name),
        number(metrics.transactions.get()),
        number(metrics.queries.get()),
        number(metrics.upstream_connects.ok.get()),
        number(metrics.relay_bytes[Direction::FromClient].get()),
        number(metrics.relay_bytes[Direction::FromServer].get()),
        number(waited.as_micros()),
        number(metrics.clients_opened.get()),
        number(total(&metrics.clients_refused)),
        number(total(&metrics.upstream_connects.failed)),
        number(total(&metrics.cancels)),
    ]
}

fn token(endpoint: &EndpointSnapshot) -> Vec<Value> {
    let credential = &endpoint.credential;
    let error: Option<&RefreshError> = credential.last_error.as_ref();
    let expires = if credential.generation == 0 {
        Value::Null
    } else {
        or_never(credential.expires_at)
    };
    vec![
        text(&*endpoint.name),
        text(credential.state.label()),
        text(credential.source),
        number(credential.generation),
        or_null(credential.minted_at, time),
        expires,
        or_null(credential.expires_at, |at| {
            number(at.duration_since(Timestamp::now()).as_secs().max(0))
        }),
        or_null(credential.due_at, time),
        or_null(credential.next_attempt, time),
        or_null(error, |error| text(&*error.message)),
        or_null(error.and_then(|error| error.hint.as_deref()), text),
    ]
}

fn wakes(snapshot: &Snapshot) -> Rows {
    let wakes = snapshot.registry.recent().wakes().into_iter();
    let rows = wakes.map(|wake| {
        vec![
            time(wake.at),
            text(wake.endpoint.name()),
            text(format!("{:.3}", wake.longest.as_secs_f64())),
            number(wake.clients),
        ]
    });
    rows.collect()
}

pub(super) fn text(text: impl Into<String>) -> Value {
    Value::Text(text.into())
}

/// A number, at most `i64::MAX`.
pub(super) fn number(number: impl TryInto<i64>) -> Value {
    Value::Number(number.try_into().unwrap_or(i64::MAX))
}

pub(super) fn or_null<T>(value: Option<T>, show: impl FnOnce(T) -> Value) -> Value {
    value.map_or(Value::Null, show)
}

fn time(at: Timestamp) -> Value {
    Value::Text(format_time(at))
}

fn or_never(at: Option<Timestamp>) -> Value {
    at.map_or_else(|| text("never"), time)
}

/// PgBouncer's format of times.
fn format_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}
