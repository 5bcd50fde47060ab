//! The status page: what the proxy knows of itself, for whoever sits at this machine.
//!
//! Written by the server, brought up to date by a small script of our own while somebody looks, and every ten seconds
//! where scripts are off. It shows who is connected and what went wrong, so that it answers this machine alone.

mod escape;
mod life;
mod view;
mod words;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{
        HeaderValue, StatusCode,
        header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, VARY},
    },
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};

use super::probes::accepts;
use crate::{
    net::http::is_from_this_machine, overview::Overview, status::Health, telemetry::chain,
};

/// Script, style, image and the page itself come from us; nothing inline, nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// For whoever does not ask for HTML.
const INDEX: &str = "\
lakebase-proxy

/           status, in a browser
/startup    200 once the listeners are up       also /startupz
/liveness   200 while the process works         also /livez /healthz
/readiness  200 while clients can be served     also /readyz
            POST ?deep=1 logs in once at the endpoint, and wakes it if it sleeps
/metrics    counters, in Prometheus text format
/log-filter what is logged; PUT another one to change it, from this machine

The probes answer in JSON, with reasons, to Accept: application/json or ?format=json.
";

/// What the page is written from.
#[derive(Clone)]
pub(super) struct Status {
    pub(super) health: Arc<Health>,
    pub(super) overview: Arc<Overview>,
}

pub(super) fn router(status: Status) -> Router {
    let file =
        |kind: &'static str, text: &'static str| get(async move || ([(CONTENT_TYPE, kind)], text));
    Router::new()
        .route("/", get(page))
        .route(
            "/status.css",
            file("text/css; charset=utf-8", include_str!("style.css")),
        )
        .route(
            "/status.js",
            file("text/javascript; charset=utf-8", include_str!("script.js")),
        )
        .route("/icon.svg", file("image/svg+xml", include_str!("icon.svg")))
        .layer(middleware::from_fn(only_here))
        .with_state(status)
}

/// Lets nobody through but visitors of this machine.
pub(super) async fn only_here(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if is_from_this_machine(&parts) {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let refused = "this is for visitors of this machine only\n";
    (StatusCode::FORBIDDEN, refused).into_response()
}

async fn page(State(status): State<Status>, request: Request) -> Response {
    if !accepts(request.headers(), "text/html") {
        return ([(VARY, "accept")], INDEX).into_response();
    }
    let mut response = match view::render(&status.overview, &status.health) {
        Ok(page) => ([(VARY, "accept")], Html(page)).into_response(),
        Err(error) => {
            tracing::error!(error = %chain(&error), "the status page could not be written");
            let sorry = "the page could not be written\n";
            (StatusCode::INTERNAL_SERVER_ERROR, sorry).into_response()
        }
    };
    let policy = HeaderValue::from_static(POLICY);
    response
        .headers_mut()
        .insert(CONTENT_SECURITY_POLICY, policy);
    response
}
