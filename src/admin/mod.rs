//! Health and metrics over HTTP, for probes and for Prometheus; and, at a port of its own, the request to end.
//!
//! Runs on a thread and a runtime of its own: `/liveness` has to answer just when the other runtime does not. Nothing
//! here touches the database, so that no probe keeps an endpoint awake. What health means is in [`health`].

pub mod client;
pub mod health;
mod log_filter;
pub mod quit;

use std::{io, sync::Arc, thread};

use axum::{
    Json, Router,
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::oneshot};
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::{
    http::{self, Limits},
    telemetry::{LogHandle, Metrics, metrics},
};

pub use health::{Health, Verdict};

const INDEX: &str = "\
lakebase-proxy

/startup    200 once the listeners are up       also /startupz
/liveness   200 while the process works         also /livez /healthz
/readiness  200 while clients can be served     also /readyz
/metrics    counters, in Prometheus text format
/log-filter what is logged; PUT another one to change it, from this machine

The first three answer in JSON, with reasons, to Accept: application/json.
";

/// The admin server, running until its token is cancelled.
#[derive(Debug)]
pub struct Admin {
    ended: oneshot::Receiver<()>,
}

impl Admin {
    /// Starts serving on `listener`, on a thread of its own, until `stop`.
    pub fn spawn(
        listener: TcpListener,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
        log: Option<LogHandle>,
        stop: CancellationToken,
    ) -> Result<Self, AdminError> {
        // A socket belongs to the runtime that it was registered with.
        let listener = listener
            .into_std()
            .map_err(|source| AdminError::Socket { source })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| AdminError::Runtime { source })?;
        let (done, ended) = oneshot::channel();
        let app = router(metrics, health, log);
        thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || {
                let served = runtime.block_on(async {
                    let listener = TcpListener::from_std(listener)?;
                    http::serve(listener, app, Limits::default(), stop).await
                });
                if let Err(error) = served {
                    error!(%error, "the http server for health and metrics ended");
                }
                done.send(()).ok();
            })
            .map_err(|source| AdminError::Runtime { source })?;
        Ok(Self { ended })
    }

    /// Waits until the server has ended, which takes a few seconds at most after the token was cancelled.
    pub async fn ended(self) {
        self.ended.await.ok();
    }
}

/// Why the admin server could not start.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The socket could not be moved to the server's own runtime.
    #[error("cannot use the listener for health and metrics")]
    Socket {
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// No thread, or no event loop for it.
    #[error("cannot start the thread for health and metrics")]
    Runtime {
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// The admin server's routes, without the guard that [`http::serve`] puts before them.
fn router(metrics: Arc<Metrics>, health: Arc<Health>, log: Option<LogHandle>) -> Router {
    let startup = get(
        |State(health): State<Arc<Health>>, headers: HeaderMap| async move {
            answer(&headers, &health.startup())
        },
    );
    let liveness = get(
        |State(health): State<Arc<Health>>, headers: HeaderMap| async move {
            answer(&headers, &health.liveness())
        },
    );
    let readiness = get(
        |State(health): State<Arc<Health>>, headers: HeaderMap| async move {
            answer(&headers, &health.readiness())
        },
    );
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    Router::new()
        .route("/", get(async || INDEX))
        .route("/startup", startup.clone())
        .route("/startupz", startup)
        .route("/liveness", liveness.clone())
        .route("/livez", liveness.clone())
        .route("/healthz", liveness)
        .route("/readiness", readiness.clone())
        .route("/readyz", readiness)
        .route("/metrics", metrics)
        .merge(log.map(log_filter::routes).unwrap_or_default())
        .fallback(async || (StatusCode::NOT_FOUND, "not found\n"))
        .method_not_allowed_fallback(async || {
            (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        })
        .with_state(health)
}

fn answer(headers: &HeaderMap, verdict: &Verdict) -> Response {
    let (status, word) = if verdict.is_ok() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "error")
    };
    if wants_json(headers) {
        let body = serde_json::json!({ "status": word, "reasons": verdict.reasons });
        return (status, [(VARY, "accept")], Json(body)).into_response();
    }
    let mut text = format!("{word}\n");
    for reason in &verdict.reasons {
        text.push_str(reason);
        text.push('\n');
    }
    (status, [(VARY, "accept")], text).into_response()
}

fn wants_json(headers: &HeaderMap) -> bool {
    headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| {
            value.split(',').any(|kind| {
                kind.split(';')
                    .next()
                    .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
            })
        })
}
