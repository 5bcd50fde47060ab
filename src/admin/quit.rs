//! /quitquitquit: ends the program on request, for jobs whose main container cannot signal its neighbour.
//!
//! Bound to loopback always. Knows nothing of how the program ends, only whom to tell.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::any,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::net::http::{self, Limits};

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

async fn quit(State(asked): State<CancellationToken>, request: Parts) -> Response {
    if let Err(refused) = http::check_intent(&request) {
        return refused;
    }
    tracing::info!("asked to end by /quitquitquit");
    asked.cancel();
    "shutting down\n".into_response()
}
