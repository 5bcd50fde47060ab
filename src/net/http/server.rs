//! An HTTP/1.1 server whose every wait is bounded.
//!
//! `axum::serve` has no limit on connections and none on the time a head may take; this loop has both.

use std::{collections::VecDeque, io, pin::pin, sync::Arc, time::Duration};

use axum::{Extension, Router, middleware};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use super::guard::{Reach, Visitor, guard};
use crate::net::backoff::Backoff;

/// Between attempts to accept, mostly for lack of descriptors: short, so that one set free is used soon.
const ACCEPT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));

/// Bounds of one server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; for one more the oldest is closed, so that idle connections exclude no probe.
    pub max_connections: usize,
    /// A request's head must be complete within this time, counted from the connection or the answer before.
    pub header_read_timeout: Duration,
    /// After this time a connection is closed at the next answer, whatever it does.
    pub connection_lifetime: Duration,
    /// What an answer under way may still take once we stop, or once a connection's life is over.
    pub drain: Duration,
    /// Largest head of a request.
    pub max_head: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 256,
            header_read_timeout: Duration::from_secs(10),
            connection_lifetime: Duration::from_mins(5),
            drain: Duration::from_secs(5),
            max_head: 16 * 1024,
        }
    }
}

/// Serves `app` behind the guard until `stop`, then lets answers under way finish within `limits.drain`.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    stop: CancellationToken,
) -> io::Result<()> {
    let loopback = listener.local_addr()?.ip().to_canonical().is_loopback();
    let reach = if loopback {
        Reach::Loopback
    } else {
        Reach::Network
    };
    let app = app.layer(middleware::from_fn_with_state(reach, guard));
    let connections = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let mut open = Open::default();
    let mut backoff = ACCEPT_BACKOFF;

    let _stopped = stop
        .run_until_cancelled(async {
            loop {
                match listener.accept().await {
                    Ok((stream, visitor)) => {
                        backoff.reset();
                        if permits.available_permits() == 0 {
                            open.close_oldest();
                        }
                        // The semaphore is never closed.
                        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                            return;
                        };
                        let closed = open.add();
                        let app = app.clone().layer(Extension(Visitor(visitor)));
                        let stop = stop.clone();
                        connections.spawn(async move {
                            let served = connection(stream, app, limits, stop);
                            closed.run_until_cancelled(served).await;
                            // Marks the token for `Open`, which forgets closed connections.
                            closed.cancel();
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        // Once for a run of failures.
                        if backoff.is_fresh() {
                            warn!(%error, "cannot accept http connections, retrying");
                        }
                        sleep(backoff.next()).await;
                    }
                }
            }
        })
        .await;
    // Before the answers finish: a new client is refused at once instead of waiting in the queue.
    drop(listener);
    connections.close();
    connections.wait().await;
    Ok(())
}

/// One connection up to its end, which `limits` bring about if the client does not.
async fn connection(stream: TcpStream, app: Router, limits: Limits, stop: CancellationToken) {
    // Only a latency matter; a stream that cannot take it is about to fail anyway.
    stream.set_nodelay(true).ok();
    let served = http1::Builder::new()
        // Without a timer hyper panics for `header_read_timeout`.
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_read_timeout)
        // hyper panics below 8 kB.
        .max_buf_size(limits.max_head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut served = pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => Some(ended),
        () = stop.cancelled() => None,
        () = sleep(limits.connection_lifetime) => None,
    };
    let ended = if let Some(ended) = ended {
        ended
    } else {
        served.as_mut().graceful_shutdown();
        timeout(limits.drain, served).await.unwrap_or(Ok(()))
    };
    if let Err(error) = ended {
        debug!(%error, "http connection ended early");
    }
}

/// The tokens that close the open connections, the oldest first; some have closed already.
#[derive(Default)]
struct Open(VecDeque<CancellationToken>);

impl Open {
    fn add(&mut self) -> CancellationToken {
        let token = CancellationToken::new();
        // Amortized: only when the queue would grow.
        if self.0.len() == self.0.capacity() {
            self.0.retain(|open| !open.is_cancelled());
        }
        self.0.push_back(token.clone());
        token
    }

    fn close_oldest(&mut self) {
        while let Some(oldest) = self.0.pop_front() {
            if !oldest.is_cancelled() {
                debug!("too many http connections; the oldest is closed");
                return oldest.cancel();
            }
        }
    }
}
