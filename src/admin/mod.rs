//! Health, metrics and the status page over HTTP; and, at a port of its own, the request to end.
//!
//! Runs on a thread and a runtime of its own: `/liveness` has to answer just when the other runtime does not. Nothing
//! here touches the database unless a probe asks for that in so many words ([`deep`]), so that none keeps an endpoint
//! awake. What health means is in [`crate::status::Health`].

pub mod deep;
mod log_filter;
mod probes;
pub mod quit;
mod status;

use std::{io, sync::Arc, thread};

use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    routing::get,
};
use tokio::{net::TcpListener, sync::oneshot};
use tokio_util::sync::CancellationToken;
use tracing::error;

use self::{probes::Probes, status::Status};
use crate::{
    net::http::{self, Limits},
    overview::Overview,
    status::Health,
    telemetry::{LogHandle, Metrics, metrics},
};

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
        overview: Arc<Overview>,
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
        let app = router(metrics, health, overview, log);
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
fn router(
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    overview: Arc<Overview>,
    log: Option<LogHandle>,
) -> Router {
    let status = Status {
        health: Arc::clone(&health),
        overview: Arc::clone(&overview),
    };
    let probes = Probes {
        health,
        overview,
        deep: Arc::default(),
    };
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    Router::new()
        .merge(status::router(status))
        .merge(probes::router(probes))
        .route("/metrics", metrics)
        .merge(log.map(log_filter::routes).unwrap_or_default())
        .fallback(async || (StatusCode::NOT_FOUND, "not found\n"))
        .method_not_allowed_fallback(async || {
            (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        })
}
