//! The values on the status page; the template places and escapes them.

use std::{cmp::Reverse, time::Duration};

use askama::Template;
use jiff::Timestamp;

use super::{
    credential::CredentialView,
    format::{ago, between, bytes, clock, datetime, grouped, short_span, span},
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

/// Severity, shown by a sign and a word besides the color.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Severity {
    Good,
    Warn,
    Bad,
}

impl Severity {
    fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Good => "●",
            Self::Warn => "◆",
            Self::Bad => "▲",
        }
    }
}

#[derive(Template)]
#[template(path = "page.html", config = "src/admin/status/askama.toml")]
struct Page {
    version: &'static str,
    state: State,
    figures: Vec<Figure>,
    endpoints: Vec<EndpointView>,
    failures: Vec<FailureView>,
    sessions: Vec<SessionView>,
    more: usize,
    wakes: Vec<WakeView>,
    refreshes: Vec<RefreshView>,
    listeners: Vec<Figure>,
    started: String,
}

struct State {
    severity: Severity,
    word: &'static str,
    sentence: &'static str,
    reasons: Vec<String>,
}

/// A name with its value.
pub(super) struct Figure {
    name: String,
    value: String,
}

impl Figure {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }
}

struct EndpointView {
    name: String,
    path: String,
    credential: CredentialView,
    totals: Vec<Figure>,
}

struct FailureView {
    message: String,
    when: String,
    datetime: String,
    count: String,
    sqlstate: String,
    reason: String,
    endpoint: String,
    session: u64,
    detail: Option<String>,
    hint: Option<String>,
}

struct SessionView {
    id: u64,
    peer: String,
    application: String,
    database: String,
    state: &'static str,
    class: &'static str,
    sign: &'static str,
    lasting: String,
    sent: String,
    received: String,
    process: String,
}

struct WakeView {
    when: String,
    datetime: String,
    endpoint: String,
    took: String,
    clients: String,
}

struct RefreshView {
    when: String,
    datetime: String,
    endpoint: String,
    severity: Severity,
    outcome: String,
    took: String,
}

impl Page {
    fn new(snapshot: &Snapshot, now: Timestamp) -> Self {
        let registry = &snapshot.registry;
        let all = registry.counts();
        let mut sessions = registry.list(CONSIDERED);
        sessions.sort_by_key(|session| (urgency(session.activity), Reverse(session.lasting)));
        sessions.truncate(SHOWN);
        let recent = registry.recent();
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
            state: State::new(snapshot),
            figures: figures(snapshot, all),
            endpoints: snapshot
                .endpoints
                .iter()
                .map(|endpoint| EndpointView::new(endpoint, now))
                .collect(),
            failures: recent
                .failures()
                .into_iter()
                .take(FAILURES)
                .map(|failure| FailureView::new(failure, now))
                .collect(),
            more: all.all.saturating_sub(sessions.len()),
            sessions: sessions.into_iter().map(SessionView::new).collect(),
            wakes: recent
                .wakes()
                .into_iter()
                .take(EVENTS)
                .map(|wake| WakeView::new(&wake, now))
                .collect(),
            refreshes: snapshot
                .refreshes()
                .into_iter()
                .take(EVENTS)
                .map(|(endpoint, attempt)| RefreshView::new(endpoint, attempt, now))
                .collect(),
            listeners: postgres.chain(http).collect(),
            started: clock(snapshot.started, now),
        }
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

impl EndpointView {
    fn new(endpoint: &EndpointSnapshot, now: Timestamp) -> Self {
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
            name: endpoint.name.clone(),
            path,
            credential: CredentialView::new(&endpoint.credential, now),
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

impl FailureView {
    fn new(failure: RecentFailure, now: Timestamp) -> Self {
        let count = match failure.count {
            1 => "once".to_owned(),
            count => format!(
                "{} times in {}",
                grouped(count),
                span(between(failure.first, failure.at).max(Duration::from_secs(1)))
            ),
        };
        Self {
            message: failure.report.message,
            when: ago(failure.at, now),
            datetime: datetime(failure.at),
            count,
            sqlstate: failure.report.sqlstate,
            reason: failure.reason.as_str().replace('_', " "),
            endpoint: failure.endpoint.name().to_owned(),
            session: failure.session,
            detail: failure.report.detail,
            hint: failure.report.hint,
        }
    }
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

impl SessionView {
    fn new(session: SessionInfo) -> Self {
        let (class, sign) = match session.activity {
            Activity::Waiting => ("warn", "◷"),
            Activity::Active => ("good", "▶"),
            Activity::IdleInTransaction => ("good", "◐"),
            Activity::IdleInFailedTransaction => ("bad", "▲"),
            Activity::Idle => ("quiet", "○"),
        };
        let application = match (session.application.as_str(), session.user.as_str()) {
            ("", user) => format!("({user})"),
            (application, _) => application.to_owned(),
        };
        let server = session.server;
        let database = match (&server, session.database) {
            (Some(server), _) => server.database.to_string(),
            (None, requested) => requested,
        };
        let process = server.and_then(|server| server.process_id);
        Self {
            id: session.id,
            peer: session.peer.to_string(),
            application,
            database,
            state: session.activity.label(),
            class,
            sign,
            lasting: span(session.lasting),
            sent: bytes(session.from_client),
            received: bytes(session.from_server),
            process: process.map_or_else(|| "–".to_owned(), |process| process.to_string()),
        }
    }
}

impl WakeView {
    fn new(wake: &RecentWake, now: Timestamp) -> Self {
        Self {
            when: clock(wake.at, now),
            datetime: datetime(wake.at),
            endpoint: wake.endpoint.name().to_owned(),
            took: short_span(wake.longest),
            clients: grouped(wake.clients),
        }
    }
}

impl RefreshView {
    fn new(endpoint: &str, attempt: &RefreshAttempt, now: Timestamp) -> Self {
        let (severity, outcome) = match &attempt.outcome {
            Ok(_) => (Severity::Good, "new credential".to_owned()),
            Err(error) => (Severity::Bad, error.kind.as_str().replace('_', " ")),
        };
        Self {
            when: clock(attempt.at, now),
            datetime: datetime(attempt.at),
            endpoint: endpoint.to_owned(),
            severity,
            outcome,
            took: short_span(attempt.took),
        }
    }
}
