//! Health, metrics and the status page over HTTP; and, at a port of its own, the request to end.
//!
//! Runs on a thread and a runtime of its own: `/liveness` has to answer when the other runtimes do not. Nothing here
//! connects to the database except a [`deep`] check, so that probes keep no endpoint awake. What health means is in [`crate::status::Health`].

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

use self::{deep::LoginTargets, probes::Probes};
use crate::{
    net::http::{self, Limits},
    status::{Health, TakeSnapshot},
    telemetry::{LogHandle, Metrics, metrics},
};

/// What the admin server serves.
pub struct AdminState {
    /// The metrics of the first endpoint, which render those of all.
    pub metrics: Arc<Metrics>,
    /// The probes.
    pub health: Arc<Health>,
    /// For the status page.
    pub snapshot: TakeSnapshot,
    /// For deep checks.
    pub logins: LoginTargets,
    /// The log filter, if it can change.
    pub log: Option<LogHandle>,
}

/// The admin server, running until its token is cancelled.
#[derive(Debug)]
pub struct Admin {
    ended: oneshot::Receiver<()>,
}

impl Admin {
    /// Serves `state` on `listener`, on a thread of its own, until `stop`.
    pub fn spawn(
        listener: TcpListener,
        state: AdminState,
        stop: CancellationToken,
    ) -> Result<Self, AdminError> {
        // A socket belongs to the runtime that it was registered with.
        let listener = listener.into_std()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (done, ended) = oneshot::channel();
        let app = router(state);
        thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || {
                let served = runtime.block_on(async {
                    let listener = TcpListener::from_std(listener)?;
                    http::serve(listener, app, Limits::default(), stop).await
                });
                if let Err(error) = served {
                    error!(%error, "the HTTP server for health and metrics ended");
                }
                // The shutdown may have stopped waiting.
                done.send(()).ok();
            })?;
        Ok(Self { ended })
    }

    /// Returns when the server has ended, a few seconds after the token is cancelled at most.
    pub async fn ended(self) {
        self.ended.await.ok();
    }
}

/// The admin server could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread for health and metrics")]
pub struct AdminError(#[from] io::Error);

/// The admin server's routes, without the guard that [`http::serve`] puts before them.
fn router(state: AdminState) -> Router {
    let AdminState {
        metrics,
        health,
        snapshot,
        logins,
        log,
    } = state;
    let probes = Probes {
        health,
        logins,
        deep: Arc::default(),
    };
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    Router::new()
        .merge(status::router(snapshot))
        .merge(probes::router(probes))
        .route("/metrics", metrics)
        .merge(log.map(log_filter::routes).unwrap_or_default())
        .fallback(async || (StatusCode::NOT_FOUND, "not found\n"))
        .method_not_allowed_fallback(async || {
            (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
        })
}
