//! The notes page: a small web app that reads and adds its rows through the proxy's own listener, like any app.
//!
//! It has an address and knows nothing of credentials, endpoints or TLS: it shows that an app needs no more. It never
//! refreshes itself and closes idle connections, so that an open page keeps no database awake.

mod database;
mod page;
mod problem;

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Form, Router,
    extract::{State, rejection::FormRejection},
    http::{
        StatusCode,
        header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, RETRY_AFTER},
        request::Parts,
    },
    response::{Html, IntoResponse, Redirect, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    listener::ClientAddress,
    net::http::{self, Limits},
    session::KnownPassword,
    telemetry::chain,
};

use self::{
    database::{Database, Failure, NOTE_CHARS},
    problem::Problem,
};

/// The guard's policy with the page's own form.
const FORM_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; \
                           frame-ancestors 'none'";

/// The page's upstream, limits and timeouts.
#[derive(Clone, Debug)]
pub struct NotesOptions {
    /// Our own Postgres listener.
    pub upstream: ClientAddress,
    /// The database; `None` leaves the choice to the proxy.
    pub database: Option<String>,
    /// The user; the proxy replaces it.
    pub user: Option<String>,
    /// The proxy's local password, if it has one.
    pub password: KnownPassword,
    /// Maximum number of connections.
    pub pool_size: usize,
    /// Maximum time to answer a reader, in any state of the database.
    pub request_timeout: Duration,
    /// An idle connection is closed before it reaches this age, so that the endpoint may sleep.
    pub idle_timeout: Duration,
}

impl NotesOptions {
    /// The defaults, reading through the listener `upstream`.
    pub fn new(upstream: impl Into<ClientAddress>) -> Self {
        Self {
            upstream: upstream.into(),
            database: None,
            user: None,
            password: KnownPassword::default(),
            pool_size: 4,
            request_timeout: Duration::from_secs(14),
            idle_timeout: Duration::from_secs(30),
        }
    }
}

/// Serves the page on `listener` until `stop`, then finishes answers under way.
pub async fn serve(
    listener: TcpListener,
    options: NotesOptions,
    stop: CancellationToken,
) -> io::Result<()> {
    let site = Arc::new(Site {
        database: Database::new(&options).map_err(io::Error::other)?,
        request_timeout: options.request_timeout,
        last: Mutex::new(None),
    });
    let app = router(Arc::clone(&site));
    let served = tokio::select! {
        served = http::serve(listener, app, Limits::default(), stop) => served,
        never = site.database.tend() => match never {},
    };
    site.database.close().await;
    served
}

/// What the routes share.
struct Site {
    database: Database,
    request_timeout: Duration,
    /// The last problem: only a change is logged.
    last: Mutex<Option<Problem>>,
}

impl Site {
    async fn notes(&self) -> Result<Vec<database::Note>, Problem> {
        let deadline = Instant::now() + self.request_timeout;
        let outcome = match timeout_at(deadline, self.database.newest()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Slow),
        };
        let problem = outcome.as_ref().err().map(Problem::from);
        // Locked after the read, so that no request waits for another's.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match (&outcome, problem, *last) {
            (Err(failure), Some(now), before) if before != Some(now) => {
                warn!(problem = ?now, error = %chain(failure), "the notes page cannot show its notes");
            }
            (Ok(_), None, Some(_)) => info!("the notes page shows its notes again"),
            _ => {}
        }
        *last = problem;
        outcome.map_err(|failure| Problem::from(&failure))
    }
}

fn router(site: Arc<Site>) -> Router {
    Router::new()
        .route("/", get(index).post(add))
        // Reads nothing, so that probes do not wake the endpoint.
        .route("/healthz", get(async || "ok\n"))
        .route(
            "/style.css",
            get(async || {
                (
                    [(CONTENT_TYPE, "text/css; charset=utf-8")],
                    include_str!("style.css"),
                )
            }),
        )
        .route(
            "/icon.svg",
            get(async || ([(CONTENT_TYPE, "image/svg+xml")], include_str!("icon.svg"))),
        )
        .fallback(async || {
            html(
                StatusCode::NOT_FOUND,
                page::message(
                    "Nothing here",
                    "This address does not exist. The notes are on the first page.",
                ),
            )
        })
        .method_not_allowed_fallback(async || {
            html(
                StatusCode::METHOD_NOT_ALLOWED,
                page::message("Not possible", "The notes can be read and added here."),
            )
        })
        .with_state(site)
}

async fn index(State(site): State<Arc<Site>>, request: Parts) -> Response {
    // Reading the notes wakes an endpoint that sleeps, which is not for other sites' pages to cause.
    if http::is_led_from_another_site(&request) {
        return html(
            StatusCode::FORBIDDEN,
            page::message(
                "Not by a link",
                "Another site led here. Open the address of this page yourself.",
            ),
        );
    }
    match site.notes().await {
        Ok(notes) if http::is_on_loopback(&request) => (
            [
                (CONTENT_SECURITY_POLICY, FORM_POLICY),
                // With `no-referrer` browsers send a form without its origin.
                (REFERRER_POLICY, "same-origin"),
            ],
            html(StatusCode::OK, page::notes(&notes, true)),
        )
            .into_response(),
        Ok(notes) => html(StatusCode::OK, page::notes(&notes, false)),
        Err(problem) => unavailable(problem),
    }
}

/// The form of the page.
#[derive(Deserialize)]
struct NewNote {
    content: String,
}

/// Adds a note, on loopback only: elsewhere every visitor of the page could. The guard has refused foreign origins; that of a name
/// that its owner has led here is refused as well.
async fn add(
    State(site): State<Arc<Site>>,
    request: Parts,
    form: Result<Form<NewNote>, FormRejection>,
) -> Response {
    if !http::is_on_loopback(&request) {
        let text = "On this address the notes can only be read.";
        return html(StatusCode::FORBIDDEN, page::message("Not possible", text));
    }
    if let Err(refused) = http::check_intent(&request) {
        return refused;
    }
    let content = form.ok().map(|Form(note)| note.content.trim().to_owned());
    let is_note = |text: &String| !text.is_empty() && text.chars().count() <= NOTE_CHARS;
    // PostgreSQL's text holds no NUL.
    let Some(content) = content.filter(|text| is_note(text) && !text.contains('\0')) else {
        let text = "A note is a text of up to 2,000 characters.";
        return html(
            StatusCode::UNPROCESSABLE_ENTITY,
            page::message("No note", text),
        );
    };
    let added = timeout(site.request_timeout, site.database.add(&content)).await;
    match added.unwrap_or(Err(Failure::Slow)) {
        // A reload then repeats the read, not the note.
        Ok(()) => Redirect::to("/").into_response(),
        Err(failure) => {
            warn!(error = %chain(&failure), "the notes page cannot add a note");
            unavailable(Problem::from(&failure))
        }
    }
}

fn unavailable(problem: Problem) -> Response {
    (
        [(RETRY_AFTER, problem.retry_after().to_string())],
        html(StatusCode::SERVICE_UNAVAILABLE, page::problem(problem)),
    )
        .into_response()
}

fn html(status: StatusCode, page: Result<String, askama::Error>) -> Response {
    match page {
        Ok(page) => (status, Html(page)).into_response(),
        Err(error) => {
            warn!(error = %chain(&error), "a page could not be written");
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the page could not be written\n",
            )
                .into_response()
        }
    }
}
