//! The tables of the console. Columns are called as in PgBouncer where they mean the same.

use std::{borrow::Cow, net::IpAddr, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{
    dialogue::{Rows, Tables},
    pgbouncer,
    statement::Show,
};
use crate::{
    credential::MintAttempt,
    overview::{Overview, Place, VERSION},
    protocol::rows::{Column, Kind, Value},
    shutdown::Phase,
    status::{Health, Peer, RecentFailure, SessionInfo},
    telemetry::{escape, labels::Direction, total},
    upstream::{Endpoint, Security},
};

/// Text unless marked.
macro_rules! columns {
    ($($name:literal $($kind:ident)?),+ $(,)?) => {
        &[$(Column { name: $name, kind: columns!(@ $($kind)?) }),+]
    };
    (@) => { Kind::Text };
    (@ number) => { Kind::Number };
}

const CLIENTS: &[Column] = columns![
    "type", "user", "database", "state", "addr", "port" number, "connect_time", "request_time", "wait" number,
    "wait_us" number, "link" number, "remote_pid" number, "tls", "application_name", "id" number, "endpoint",
    "state_seconds" number, "bytes_received" number, "bytes_sent" number,
];
const CONFIG: &[Column] = columns!["key", "value", "default", "changeable", "source"];
const ENDPOINTS: &[Column] = columns![
    "name", "listen", "host", "port" number, "user", "database", "tls", "credential", "cl_active" number,
    "cl_waiting" number, "cl_idle" number, "cl_in_transaction" number, "sv_active" number,
];
const FAILURES: &[Column] = columns![
    "last_time", "first_time", "count" number, "endpoint", "reason", "sqlstate", "message", "detail", "hint",
    "id" number,
];
const HELP: &[Column] = columns!["command", "shows"];
const REFRESHES: &[Column] =
    columns!["time", "endpoint", "outcome", "ms" number, "expires", "error", "hint"];
const SERVERS: &[Column] = columns![
    "type", "user", "database", "state", "addr", "port" number, "connect_time", "request_time", "link" number,
    "remote_pid" number, "tls", "application_name", "id" number, "endpoint",
];
const STATE: &[Column] = columns!["key", "value"];
const STATS: &[Column] = columns![
    "database", "total_xact_count" number, "total_query_count" number, "total_server_assignment_count" number, "total_received" number, "total_sent" number,
    "total_wait_time" number, "total_client_login_count" number, "total_refused_count" number,
    "total_login_failure_count" number, "total_cancel_count" number,
];
const TOKENS: &[Column] = columns![
    "endpoint", "state", "source", "generation" number, "minted", "expires", "seconds_left" number, "refresh_due",
    "next_attempt", "last_error", "hint",
];
const VERSIONS: &[Column] = columns!["version"];
const WAKES: &[Column] = columns!["time", "endpoint", "seconds", "clients" number];

/// What the console reads from.
pub(super) struct Sources {
    pub(super) overview: Arc<Overview>,
    pub(super) health: Arc<Health>,
}

impl Tables for &Sources {
    fn columns(&self, show: Show) -> &'static [Column] {
        match show {
            Show::Clients => CLIENTS,
            Show::Config => CONFIG,
            Show::Databases => pgbouncer::DATABASES,
            Show::Endpoints => ENDPOINTS,
            Show::Failures => FAILURES,
            Show::Help => HELP,
            Show::Lists => pgbouncer::LISTS,
            Show::Pools => pgbouncer::POOLS,
            Show::Refreshes => REFRESHES,
            Show::Servers => SERVERS,
            Show::State => STATE,
            Show::Stats => STATS,
            Show::StatsTotals => pgbouncer::STATS_TOTALS,
            Show::Tokens => TOKENS,
            Show::Version => VERSIONS,
            Show::Wakes => WAKES,
        }
    }

    fn rows(&self, show: Show) -> Rows {
        let mut rows = self.table(show);
        // Names that clients gave themselves, and servers' words: they must not draw on a terminal.
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

impl Sources {
    fn table(&self, show: Show) -> Rows {
        let overview = &self.overview;
        match show {
            Show::Clients => overview
                .registry()
                .list(usize::MAX)
                .iter()
                .map(client)
                .collect(),
            Show::Config => overview
                .settings()
                .into_iter()
                .map(|setting| {
                    let changeable = if setting.changeable { "yes" } else { "no" };
                    vec![
                        text(setting.key),
                        text(setting.value),
                        text(setting.default),
                        text(changeable),
                        text(setting.origin.to_string()),
                    ]
                })
                .collect(),
            Show::Databases => pgbouncer::databases(overview),
            Show::Endpoints => endpoints(overview),
            Show::Failures => failures(overview),
            Show::Help => Show::ALL
                .iter()
                .map(|show| {
                    vec![
                        text(format!("SHOW {}", show.word().to_uppercase())),
                        text(show.help()),
                    ]
                })
                .collect(),
            Show::Lists => pgbouncer::lists(overview),
            Show::Pools => pgbouncer::pools(overview),
            Show::Refreshes => refreshes(overview),
            Show::Servers => servers(overview),
            Show::State => self.state(),
            Show::Stats => overview.places().iter().map(|place| stats(place)).collect(),
            Show::StatsTotals => pgbouncer::stats_totals(overview),
            Show::Tokens => overview.places().iter().map(|place| token(place)).collect(),
            Show::Version => vec![vec![text(format!("lakebase-proxy {VERSION}"))]],
            Show::Wakes => overview
                .registry()
                .recent()
                .wakes()
                .into_iter()
                .map(|wake| {
                    vec![
                        time(wake.at),
                        text(wake.endpoint.name()),
                        text(format!("{:.3}", wake.longest.as_secs_f64())),
                        number(wake.clients),
                    ]
                })
                .collect(),
        }
    }

    fn state(&self) -> Rows {
        let (overview, health) = (&self.overview, &self.health);
        let phase = match overview.phase() {
            Phase::Serving => "serving",
            Phase::Draining => "draining",
            Phase::Cutting => "ending",
        };
        let is = |fact: bool| if fact { "yes" } else { "no" };
        let readiness = health.readiness();
        let counts = overview.registry().counts();
        let mut rows = vec![
            ("active", is(overview.phase() == Phase::Serving).to_owned()),
            // Always, and here for those whose scripts ask.
            ("paused", "no".to_owned()),
            ("suspended", "no".to_owned()),
            ("phase", phase.to_owned()),
            ("started", is(health.startup().is_ok()).to_owned()),
            ("ready", is(readiness.is_ok()).to_owned()),
            ("reasons", readiness.reasons.join("; ")),
            ("start_time", stamp(overview.started())),
            ("uptime_seconds", overview.uptime().as_secs().to_string()),
            ("sessions", counts.all.to_string()),
        ];
        let most = overview.session_config().max_connections;
        rows.push(("max_connections", most.to_string()));
        rows.into_iter()
            .map(|(key, value)| vec![text(key), text(value)])
            .collect()
    }
}

fn client(seen: &SessionInfo) -> Vec<Value> {
    let (address, port, process) = match seen.peer {
        Peer::Tcp(address) => (address.ip().to_string(), address.port(), None),
        Peer::Unix { pid, .. } => ("unix".to_owned(), 0, pid),
    };
    let waited = match (&seen.server, seen.activity) {
        (Some(_), _) => Duration::ZERO,
        (None, _) => seen.age,
    };
    vec![
        text("C"),
        text(&*seen.user),
        text(&*seen.database),
        text(seen.activity.label()),
        text(address),
        number(port),
        time(seen.began),
        time(seen.since),
        number(waited.as_secs()),
        number(waited.subsec_micros()),
        seen.server
            .as_ref()
            .map_or(Value::Null, |_| number(seen.id)),
        process.map_or(Value::Null, number),
        text(seen.encryption.label()),
        text(&*seen.application),
        number(seen.id),
        text(seen.endpoint.label().name()),
        number(seen.lasting.as_secs()),
        number(seen.from_client),
        number(seen.from_server),
    ]
}

fn servers(overview: &Overview) -> Rows {
    let places = overview.places();
    let mut rows = Vec::new();
    for seen in overview.registry().list(usize::MAX) {
        let Some(server) = &seen.server else { continue };
        let place = places.iter().find(|place| place.sessions == seen.endpoint);
        let upstream = place.and_then(|place| place.route.found());
        let endpoint = upstream.map(|upstream| upstream.endpoint());
        let endpoint = endpoint.as_deref();
        let ip: IpAddr = server.address.ip().to_canonical();
        rows.push(vec![
            text("S"),
            text(endpoint.map_or("", |endpoint| endpoint.user.as_str())),
            text(&*server.database),
            text(seen.activity.label()),
            text(ip.to_string()),
            number(server.address.port()),
            time(seen.began),
            time(seen.since),
            number(seen.id),
            server.process_id.map_or(Value::Null, number),
            text(endpoint.map_or("", |endpoint| tls(&endpoint.security))),
            text(&*seen.application),
            number(seen.id),
            text(seen.endpoint.label().name()),
        ]);
    }
    rows
}

fn tls(security: &Security) -> &'static str {
    match security {
        Security::Plain => "",
        Security::Tls { .. } => "verify-full",
    }
}

fn endpoints(overview: &Overview) -> Rows {
    let places = overview.places();
    let row = |place: &Arc<Place>| {
        let counts = place.sessions.counts();
        let upstream = place.route.found();
        let endpoint = upstream.map(|upstream| upstream.endpoint());
        let endpoint = endpoint.as_deref();
        let of = |read: fn(&Endpoint) -> &str| {
            endpoint.map_or(Value::Null, |endpoint| text(read(endpoint)))
        };
        vec![
            text(&*place.name),
            text(place.listening.join(", ")),
            of(|endpoint| &endpoint.host),
            endpoint.map_or(Value::Null, |endpoint| number(endpoint.port)),
            of(|endpoint| &endpoint.user),
            of(|endpoint| &endpoint.database),
            of(|endpoint| tls(&endpoint.security)),
            text(place.credentials.status().state.label()),
            number(counts.active),
            number(counts.waiting),
            number(counts.idle),
            number(counts.in_transaction),
            number(place.metrics.upstream_active.get()),
        ]
    };
    places.iter().map(row).collect()
}

fn failures(overview: &Overview) -> Rows {
    let row = |failure: RecentFailure| {
        let or_null = |text: Option<String>| text.map_or(Value::Null, Value::Text);
        vec![
            time(failure.at),
            time(failure.first),
            number(failure.count),
            text(failure.endpoint.name()),
            text(failure.reason.as_str()),
            text(failure.report.sqlstate),
            text(failure.report.message),
            or_null(failure.report.detail),
            or_null(failure.report.hint),
            number(failure.session),
        ]
    };
    overview
        .registry()
        .recent()
        .failures()
        .into_iter()
        .map(row)
        .collect()
}

fn refreshes(overview: &Overview) -> Rows {
    let mut attempts: Vec<_> = overview
        .places()
        .iter()
        .flat_map(|place| {
            let attempts = place.credentials.attempts();
            attempts
                .into_iter()
                .map(|attempt| (place.name.clone(), attempt))
        })
        .collect();
    attempts.sort_by_key(|(_, attempt)| std::cmp::Reverse(attempt.at));
    let row = |(name, attempt): (String, MintAttempt)| {
        let took = number(u64::try_from(attempt.took.as_millis()).unwrap_or(u64::MAX));
        let (outcome, expires, error, hint) = match attempt.outcome {
            Ok(expires) => ("success", or_never(expires), Value::Null, Value::Null),
            Err(error) => (
                error.kind.label(),
                Value::Null,
                text(&*error.message),
                error.hint.clone().map_or(Value::Null, Value::Text),
            ),
        };
        vec![
            time(attempt.at),
            text(name),
            text(outcome),
            took,
            expires,
            error,
            hint,
        ]
    };
    attempts.into_iter().map(row).collect()
}

pub(super) fn stats(place: &Place) -> Vec<Value> {
    let metrics = &place.metrics;
    let waited =
        Duration::try_from_secs_f64(metrics.hold_seconds.get_sample_sum()).unwrap_or_default();
    vec![
        text(&*place.name),
        number(metrics.transactions.get()),
        number(metrics.queries.get()),
        number(metrics.upstream_connects.ok.get()),
        number(metrics.relay_bytes[Direction::FromClient].get()),
        number(metrics.relay_bytes[Direction::FromServer].get()),
        number(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX)),
        number(metrics.clients_opened.get()),
        number(total(&metrics.clients_refused)),
        number(total(&metrics.upstream_connects.failed)),
        number(total(&metrics.cancels)),
    ]
}

fn token(place: &Place) -> Vec<Value> {
    let status = place.credentials.status();
    let or_null = |at: Option<Timestamp>| at.map_or(Value::Null, time);
    let left = status.expires_at.map_or(Value::Null, |at| {
        number(at.duration_since(Timestamp::now()).as_secs().max(0))
    });
    let error = status.last_error.as_deref();
    vec![
        text(&*place.name),
        text(status.state.label()),
        text(place.source),
        number(status.generation),
        or_null(status.minted_at),
        if status.generation == 0 {
            Value::Null
        } else {
            or_never(status.expires_at)
        },
        left,
        or_null(status.due_at()),
        or_null(status.next_attempt),
        error.map_or(Value::Null, |error| text(&*error.message)),
        error
            .and_then(|error| error.hint.as_deref())
            .map_or(Value::Null, text),
    ]
}

pub(super) fn text(text: impl Into<String>) -> Value {
    Value::Text(text.into())
}

/// More than fits is as much as fits.
pub(super) fn number(number: impl TryInto<i64>) -> Value {
    Value::Number(number.try_into().unwrap_or(i64::MAX))
}

fn time(at: Timestamp) -> Value {
    Value::Text(stamp(at))
}

fn or_never(at: Option<Timestamp>) -> Value {
    at.map_or_else(|| text("never"), time)
}

/// As PgBouncer writes times.
fn stamp(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}
