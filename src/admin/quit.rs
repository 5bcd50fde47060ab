//! /quitquitquit: ends the program on request, for jobs whose main container cannot signal its neighbour.
//!
//! Bound to loopback always. Knows nothing of how the program ends, only whom to tell.

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header::ALLOW},
    response::{IntoResponse, Response},
    routing::any,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::http::{self, Limits};

/// Serves until `stop`; a request cancels `asked`.
pub async fn serve(listener: TcpListener, asked: CancellationToken, stop: CancellationToken) {
    let app = Router::new()
        .route("/quitquitquit", any(quit))
        .fallback(async || (StatusCode::NOT_FOUND, "not found\n"))
        .with_state(asked);
    if let Err(error) = http::serve(listener, app, Limits::default(), stop).await {
        tracing::error!(%error, "the admin port has ended");
    }
}

async fn quit(
    State(asked): State<CancellationToken>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    // GET as well as POST, as Cloud SQL Auth Proxy's users have it in their scripts; HEAD only looks.
    if method != Method::GET && method != Method::POST {
        let only = (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
        return ([(ALLOW, "GET, POST")], only).into_response();
    }
    // The common guard lets links be followed; none may lead here.
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    if !matches!(site, None | Some(b"none" | b"same-origin")) {
        let foreign = "requests from other origins are refused\n";
        return (StatusCode::FORBIDDEN, foreign).into_response();
    }
    tracing::info!("asked to end by /quitquitquit");
    asked.cancel();
    "shutting down\n".into_response()
}
