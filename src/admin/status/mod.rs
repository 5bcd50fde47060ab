//! The status page.
//!
//! Rendered by the server; a small script refreshes it while it is visible, and without scripts it reloads every ten
//! seconds. It shows clients and errors, so that only this machine may request it.

mod credential;
mod escape;
mod format;
mod pools;
mod view;

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
use crate::{net::http::is_from_this_machine, status::TakeSnapshot, telemetry::chain};

/// Allows our own script, style, image and page; nothing inline and no other origin.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// For clients that do not accept HTML.
const INDEX: &str = "\
lakebase-proxy

/           status, in a browser
/startup    200 once the listeners are up       also /startupz
/liveness   200 while the process works         also /livez /healthz
/readiness  200 while clients can be served     also /readyz
            POST ?deep=1 logs in once at the endpoint, and wakes it if it sleeps
/metrics    counters, in Prometheus text format
/log-filter the log filter; PUT another one to change it, from this machine

The probes answer in JSON, with reasons, to Accept: application/json or ?format=json.
";

pub(super) fn router(snapshot: TakeSnapshot) -> Router {
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
        .with_state(snapshot)
}

/// Refuses requests from other machines.
pub(super) async fn only_here(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    // Checks the name as well: a page whose name was rebound to this machine connects from loopback, too.
    if is_from_this_machine(&parts) {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let refused = "only this machine may request this\n";
    (StatusCode::FORBIDDEN, refused).into_response()
}

async fn page(State(snapshot): State<TakeSnapshot>, request: Request) -> Response {
    if !accepts(request.headers(), "text/html") {
        return ([(VARY, "accept")], INDEX).into_response();
    }
    let mut response = match view::render(&snapshot()) {
        Ok(page) => ([(VARY, "accept")], Html(page)).into_response(),
        Err(error) => {
            tracing::error!(error = %chain(&error), "cannot render the status page");
            let message = "cannot render the page\n";
            (StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
        }
    };
    // Clients and servers choose names on the page: a second defense behind the escaping.
    let policy = HeaderValue::from_static(POLICY);
    response
        .headers_mut()
        .insert(CONTENT_SECURITY_POLICY, policy);
    response
}
