//! What the status page says, in words and numbers; the template puts them in their places and escapes them.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use askama::Template;
use jiff::Timestamp;

use super::{
    life::CredentialView,
    words::{ago, between, bytes, clock, datetime, grouped, short_span, span},
};
use crate::{
    credential::{CredentialState, CredentialStatus, MintAttempt},
    overview::{Overview, Place, VERSION},
    shutdown::Phase,
    status::{Activity, Counts, Health, RecentFailure, RecentWake, SessionInfo},
    telemetry::total,
};

/// Sessions looked at; the rest is a number.
const LOOKED_AT: usize = 2000;
/// Sessions shown.
const SHOWN: usize = 50;
/// Failures shown.
const FAILURES: usize = 10;
/// Wakes and refreshes shown.
const EVENTS: usize = 8;

/// The page as it is now.
pub(super) fn render(overview: &Overview, health: &Health) -> Result<String, askama::Error> {
    Page::new(overview, health, Timestamp::now()).render()
}

/// How well something is, told by a sign and by a word, the colour being a third.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    Good,
    Warn,
    Bad,
}

impl Mood {
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
    mood: Mood,
    word: &'static str,
    sentence: &'static str,
    reasons: Vec<String>,
}

/// A name and what it amounts to.
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
    mood: Mood,
    outcome: String,
    took: String,
}

impl Page {
    fn new(overview: &Overview, health: &Health, now: Timestamp) -> Self {
        let places = overview.places();
        let all = overview.registry().counts();
        let mut sessions = overview.registry().list(LOOKED_AT);
        sessions.sort_by_key(|seen| (urgency(seen.activity), Reverse(seen.lasting)));
        sessions.truncate(SHOWN);
        let recent = overview.registry().recent();
        let listeners = places
            .iter()
            .flat_map(|place| {
                place
                    .listening
                    .iter()
                    .map(|address| Figure::new("Postgres clients", address))
            })
            .chain(
                overview
                    .also_listening()
                    .into_iter()
                    .map(|(purpose, address)| {
                        let mut purpose = purpose.to_owned();
                        purpose.get_mut(..1).map(str::make_ascii_uppercase);
                        Figure::new(purpose, address.to_string())
                    }),
            )
            .collect();
        Self {
            version: VERSION,
            state: State::new(overview, health),
            figures: figures(overview, &places, all),
            endpoints: places
                .iter()
                .map(|place| EndpointView::new(place, now))
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
            refreshes: refreshes(&places, now),
            listeners,
            started: clock(overview.started(), now),
        }
    }
}

impl State {
    fn new(overview: &Overview, health: &Health) -> Self {
        let ready = health.readiness();
        let reasons = ready.reasons.iter().map(ToString::to_string).collect();
        let (mood, word, sentence) = match overview.phase() {
            Phase::Draining | Phase::Cutting => (
                Mood::Warn,
                "Shutting down",
                "New clients are refused; work under way may finish.",
            ),
            Phase::Serving if !ready.is_ok() => (
                Mood::Bad,
                "Not ready",
                "Clients are held or refused until this is mended:",
            ),
            Phase::Serving
                if overview
                    .places()
                    .iter()
                    .any(|place| worries(&place.credentials.status())) =>
            {
                (
                    Mood::Warn,
                    "Ready, with a worry",
                    "Clients are served, but not every endpoint's credential is in order.",
                )
            }
            Phase::Serving => (Mood::Good, "Ready", "Clients are served."),
        };
        Self {
            mood,
            word,
            sentence,
            reasons,
        }
    }
}

fn worries(status: &CredentialStatus) -> bool {
    !matches!(status.state, CredentialState::Fresh | CredentialState::Due)
        || status.last_error.is_some()
}

fn figures(overview: &Overview, places: &[Arc<Place>], all: Counts) -> Vec<Figure> {
    let count = |count: usize| grouped(u64::try_from(count).unwrap_or(u64::MAX));
    let upstream: i64 = places
        .iter()
        .map(|place| place.metrics.upstream_active.get())
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
        Figure::new("Up for", span(overview.uptime())),
    ]
}

impl EndpointView {
    fn new(place: &Place, now: Timestamp) -> Self {
        let path = match place.route.found() {
            Some(upstream) => {
                let endpoint = upstream.endpoint();
                format!(
                    "{}:{}, as {}, database {}",
                    endpoint.host, endpoint.port, endpoint.user, endpoint.database
                )
            }
            None => "not found yet".to_owned(),
        };
        let metrics = &place.metrics;
        let logins = &metrics.upstream_connects;
        let sessions = u64::try_from(place.sessions.counts().all).unwrap_or(u64::MAX);
        Self {
            name: place.name.clone(),
            path,
            credential: CredentialView::new(place, now),
            totals: vec![
                Figure::new("Sessions now", grouped(sessions)),
                Figure::new(
                    "Clients since the start",
                    grouped(metrics.clients_opened.get()),
                ),
                Figure::new("Clients refused", grouped(total(&metrics.clients_refused))),
                Figure::new("Logins", grouped(logins.ok.get())),
                Figure::new("Login attempts that failed", grouped(total(&logins.failed))),
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

/// What somebody who looks for trouble wants to see first.
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
    fn new(seen: SessionInfo) -> Self {
        let (class, sign) = match seen.activity {
            Activity::Waiting => ("warn", "◷"),
            Activity::Active => ("good", "▶"),
            Activity::IdleInTransaction => ("good", "◐"),
            Activity::IdleInFailedTransaction => ("bad", "▲"),
            Activity::Idle => ("quiet", "○"),
        };
        let application = match (seen.application.as_str(), seen.user.as_str()) {
            ("", user) => format!("({user})"),
            (application, _) => application.to_owned(),
        };
        let server = seen.server;
        let database = match (&server, seen.database) {
            (Some(server), _) => server.database.to_string(),
            (None, asked) => asked,
        };
        let process = server.and_then(|server| server.process_id);
        Self {
            id: seen.id,
            peer: seen.peer.to_string(),
            application,
            database,
            state: seen.activity.label(),
            class,
            sign,
            lasting: span(seen.lasting),
            sent: bytes(seen.from_client),
            received: bytes(seen.from_server),
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

fn refreshes(places: &[Arc<Place>], now: Timestamp) -> Vec<RefreshView> {
    let mut attempts: Vec<(&str, MintAttempt)> = places
        .iter()
        .flat_map(|place| {
            let attempts = place.credentials.attempts();
            attempts
                .into_iter()
                .map(|attempt| (place.name.as_str(), attempt))
        })
        .collect();
    attempts.sort_by_key(|(_, attempt)| Reverse(attempt.at));
    let view = |(name, attempt): (&str, MintAttempt)| {
        let (mood, outcome) = match &attempt.outcome {
            Ok(_) => (Mood::Good, "new credential".to_owned()),
            Err(error) => (Mood::Bad, error.kind.label().replace('_', " ")),
        };
        RefreshView {
            when: clock(attempt.at, now),
            datetime: datetime(attempt.at),
            endpoint: name.to_owned(),
            mood,
            outcome,
            took: short_span(attempt.took),
        }
    };
    attempts.into_iter().take(EVENTS).map(view).collect()
}
