//! `/quitquitquit`: shuts the proxy down on request, for jobs whose main container cannot send signals to its sidecar.
//!
//! Always bound to loopback.

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

/// Serves until `stop`; a request cancels `requested`.
pub async fn serve(listener: TcpListener, requested: CancellationToken, stop: CancellationToken) {
    let app = Router::new()
        .route("/quitquitquit", any(quit))
        .fallback(async || (StatusCode::NOT_FOUND, "not found\n"))
        .with_state(requested);
    if let Err(error) = http::serve(listener, app, Limits::default(), stop).await {
        tracing::error!(%error, "the server of the admin port failed");
    }
}

async fn quit(State(requested): State<CancellationToken>, request: Parts) -> Response {
    // Browsers reach loopback, too: a page of another site must not end the proxy.
    if let Err(refused) = http::check_intent(&request) {
        return refused;
    }
    tracing::info!("shutdown requested by /quitquitquit");
    requested.cancel();
    "shutting down\n".into_response()
}
