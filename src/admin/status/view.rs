//! The values on the status page; the template places and escapes them.

use std::{cmp::Reverse, time::Duration};

use askama::Template;
use jiff::Timestamp;

use super::{
    credential::CredentialView,
    format::{Figure, Severity, ago, between, bytes, clock, datetime, grouped, short_span, span},
    pools::PoolsView,
};
use crate::{
    shutdown::Phase,
    status::{
        Activity, Counts, CredentialSnapshot, CredentialState, EndpointSnapshot, RecentFailure,
        RecentWake, RefreshAttempt, SessionInfo, Snapshot, VERSION,
    },
    telemetry::total,
};

/// Sessions considered for the list.
const CONSIDERED: usize = 2000;
/// Sessions shown.
const SHOWN: usize = 50;
/// Failures shown.
const FAILURES: usize = 10;
/// Wakes and refreshes shown.
const EVENTS: usize = 8;

/// The page for a snapshot.
pub(super) fn render(snapshot: &Snapshot) -> Result<String, askama::Error> {
    Page::new(snapshot, Timestamp::now()).render()
}

#[derive(Template)]
#[template(path = "page.html", config = "src/admin/status/askama.toml")]
struct Page<'a> {
    version: &'static str,
    now: Timestamp,
    state: State,
    figures: Vec<Figure>,
    endpoints: Vec<EndpointView<'a>>,
    failures: Vec<RecentFailure>,
    sessions: Vec<SessionInfo>,
    more: usize,
    wakes: Vec<RecentWake>,
    refreshes: Vec<(&'a str, &'a RefreshAttempt)>,
    listeners: Vec<Figure>,
    started: String,
}

struct State {
    severity: Severity,
    word: &'static str,
    sentence: &'static str,
    reasons: Vec<String>,
}

struct EndpointView<'a> {
    name: &'a str,
    path: String,
    credential: CredentialView<'a>,
    pools: Option<PoolsView<'a>>,
    totals: Vec<Figure>,
}

impl<'a> Page<'a> {
    fn new(snapshot: &'a Snapshot, now: Timestamp) -> Self {
        let registry = &snapshot.registry;
        let all = registry.counts();
        let mut sessions = registry.list(CONSIDERED);
        // Within a class the longest first: a session that is stuck stays visible.
        sessions.sort_by_key(|session| (urgency(session.activity), Reverse(session.lasting)));
        sessions.truncate(SHOWN);
        let mut failures = registry.recent().failures();
        failures.truncate(FAILURES);
        let mut wakes = registry.recent().wakes();
        wakes.truncate(EVENTS);
        let mut refreshes = snapshot.refreshes();
        refreshes.truncate(EVENTS);
        let postgres = snapshot.endpoints.iter().flat_map(|endpoint| {
            let addresses = endpoint.listening.iter();
            addresses.map(|address| Figure::new("Postgres clients", address))
        });
        let http = snapshot.http.iter().map(|listener| {
            let mut purpose = listener.purpose.to_owned();
            purpose.get_mut(..1).map(str::make_ascii_uppercase);
            Figure::new(purpose, listener.address.to_string())
        });
        Self {
            version: VERSION,
            now,
            state: State::new(snapshot),
            figures: figures(snapshot, all),
            endpoints: snapshot
                .endpoints
                .iter()
                .map(|endpoint| EndpointView::new(endpoint, now))
                .collect(),
            failures,
            more: all.all.saturating_sub(sessions.len()),
            sessions,
            wakes,
            refreshes,
            listeners: postgres.chain(http).collect(),
            started: clock(snapshot.started, now),
        }
    }

    fn clock(&self, at: &Timestamp) -> String {
        clock(*at, self.now)
    }

    fn ago(&self, at: &Timestamp) -> String {
        ago(*at, self.now)
    }
}

impl State {
    fn new(snapshot: &Snapshot) -> Self {
        let ready = &snapshot.readiness;
        let reasons = ready.reasons.iter().map(ToString::to_string).collect();
        let (severity, word, sentence) = match snapshot.phase {
            Phase::Draining | Phase::Cutting => (
                Severity::Warn,
                "Shutting down",
                "New clients are refused; work under way may finish.",
            ),
            Phase::Serving if !ready.is_ok() => (
                Severity::Bad,
                "Not ready",
                "Clients wait or are refused until this is fixed:",
            ),
            Phase::Serving
                if snapshot
                    .endpoints
                    .iter()
                    .any(|endpoint| is_degraded(&endpoint.credential)) =>
            {
                (
                    Severity::Warn,
                    "Ready, with a warning",
                    "Clients are served, but not every endpoint has a fresh credential.",
                )
            }
            Phase::Serving => (Severity::Good, "Ready", "Clients are served."),
        };
        Self {
            severity,
            word,
            sentence,
            reasons,
        }
    }
}

fn is_degraded(status: &CredentialSnapshot) -> bool {
    !matches!(status.state, CredentialState::Fresh | CredentialState::Due)
        || status.last_error.is_some()
}

fn figures(snapshot: &Snapshot, all: Counts) -> Vec<Figure> {
    let count = |count: usize| grouped(u64::try_from(count).unwrap_or(u64::MAX));
    let upstream: i64 = snapshot
        .endpoints
        .iter()
        .map(|endpoint| endpoint.metrics.upstream_active.get())
        .sum();
    vec![
        Figure::new("Sessions", count(all.all)),
        Figure::new("Active", count(all.active)),
        Figure::new("In transaction", count(all.in_transaction)),
        Figure::new("Idle", count(all.idle)),
        Figure::new("Waiting", count(all.waiting)),
        Figure::new(
            "To Lakebase",
            grouped(u64::try_from(upstream).unwrap_or_default()),
        ),
        Figure::new("Up for", span(snapshot.uptime)),
    ]
}

impl<'a> EndpointView<'a> {
    fn new(endpoint: &'a EndpointSnapshot, now: Timestamp) -> Self {
        let path = match &endpoint.upstream {
            Some(upstream) => format!(
                "{}:{}, as {}, database {}",
                upstream.host, upstream.port, upstream.user, upstream.database
            ),
            None => "not found yet".to_owned(),
        };
        let metrics = &endpoint.metrics;
        let logins = &metrics.upstream_connects;
        let sessions = u64::try_from(endpoint.sessions.counts().all).unwrap_or(u64::MAX);
        Self {
            name: &endpoint.name,
            path,
            credential: CredentialView::new(&endpoint.credential, now),
            pools: PoolsView::new(endpoint),
            totals: vec![
                Figure::new("Sessions now", grouped(sessions)),
                Figure::new(
                    "Clients since the start",
                    grouped(metrics.clients_opened.get()),
                ),
                Figure::new("Clients refused", grouped(total(&metrics.clients_refused))),
                Figure::new("Logins", grouped(logins.ok.get())),
                Figure::new("Failed login attempts", grouped(total(&logins.failed))),
            ],
        }
    }
}

/// How often clients were refused: `once`, `3 times in 2 min 05 s`.
fn times(failure: &RecentFailure) -> String {
    if failure.count == 1 {
        return "once".to_owned();
    }
    let lasting = between(failure.first, failure.at).max(Duration::from_secs(1));
    format!("{} times in {}", grouped(failure.count), span(lasting))
}

/// The order of sessions: those that may need attention first.
fn urgency(activity: Activity) -> u8 {
    match activity {
        Activity::Waiting => 0,
        Activity::IdleInFailedTransaction => 1,
        Activity::IdleInTransaction => 2,
        Activity::Active => 3,
        Activity::Idle => 4,
    }
}

/// The server's process id.
fn process(session: &SessionInfo) -> String {
    let process = session.server.as_ref().and_then(|server| server.process_id);
    process.map_or_else(|| "–".to_owned(), |process| process.to_string())
}

/// The style and the sign of a session's state.
fn look(activity: Activity) -> (&'static str, &'static str) {
    match activity {
        Activity::Waiting => ("warn", "◷"),
        Activity::Active => ("good", "▶"),
        Activity::IdleInTransaction => ("good", "◐"),
        Activity::IdleInFailedTransaction => ("bad", "▲"),
        Activity::Idle => ("quiet", "○"),
    }
}
