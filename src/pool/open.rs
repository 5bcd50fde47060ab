//! Opening server connections: for a client that waits, and spares for the next one.
//!
//! Each is opened by a task of its own: a client that is given another connection meanwhile leaves its login to end, for
//! the next client. A client that leaves ends its login.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use super::{Pool, request::LeaseRequest, server::ServerConnection, slot::Slot};
use crate::{
    protocol::error::{Report, sqlstate},
    telemetry::labels::{PoolServer, Reason},
    upstream::{Connected, Refusal},
};

/// A connection that has just been opened for a client.
pub(super) struct Opened {
    pub(super) server: ServerConnection,
    /// The server's notices at login.
    pub(super) notices: bytes::BytesMut,
    pub(super) woke_after: Option<std::time::Duration>,
}

/// Why no connection was opened.
pub(super) struct NotOpened {
    pub(super) refusal: Refusal,
    /// The server has no connection left, but others of the pool will become free.
    pub(super) is_full: bool,
}

/// A login under way. Dropped, it is ended.
pub(super) struct Opening {
    result: oneshot::Receiver<Result<Opened, NotOpened>>,
    task: AbortOnDropHandle<()>,
}

impl Opening {
    /// Starts the login of `slot`.
    pub(super) fn start(slot: Slot, request: &LeaseRequest<'_>) -> Self {
        let (sender, result) = oneshot::channel();
        let pool = Arc::clone(slot.pool());
        let opening = open(slot, request);
        let tasks = pool.context.tasks.clone();
        let task = tasks.spawn(async move {
            match sender.send(opening.await) {
                Ok(()) => {}
                // The client has another connection by now.
                Err(Ok(opened)) => opened.server.put_back(),
                Err(Err(NotOpened { refusal, .. })) => tracing::debug!(
                    endpoint = %pool.context.registry.label(),
                    error = refusal.report.message,
                    "server connection not opened"
                ),
            }
        });
        Self {
            result,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// The result. Cancel safe.
    pub(super) async fn result(&mut self) -> Result<Opened, NotOpened> {
        match (&mut self.result).await {
            Ok(result) => result,
            // The task has panicked, or the runtime is shutting down.
            Err(_) => Err(NotOpened {
                refusal: Refusal {
                    report: Report::new(
                        sqlstate::CANNOT_CONNECT,
                        "the login at the Lakebase endpoint ended without a result",
                    )
                    .with_hint("Connect again. If it happens again, the log of lakebase-proxy has the cause."),
                    reason: Reason::Other,
                },
                is_full: false,
            }),
        }
    }

    /// Lets the login end for the next client.
    pub(super) fn leave(self) {
        self.task.detach();
    }
}

/// Logs in; without the client's parameters at hand, so that it may outlive the client.
fn open(
    mut slot: Slot,
    request: &LeaseRequest<'_>,
) -> impl Future<Output = Result<Opened, NotOpened>> + Send + use<> {
    let upstream = Arc::clone(request.upstream);
    let login = Arc::clone(&request.wanted.login);
    let mut connect = *request.connect;
    async move {
        let pool = Arc::clone(slot.pool());
        let settings = **pool.context.settings.load();
        if pool.lock().has_others() {
            // A client of a pool need not wait for the server: connections of the pool become free.
            connect.timeouts.capacity_timeout = std::time::Duration::ZERO;
        }
        match upstream.connect(&login, &connect).await {
            Ok(mut connected) => {
                pool.accepted();
                slot.enter(PoolServer::Leased);
                let Connected { connection, .. } = &mut connected;
                let notices = std::mem::take(&mut connection.greeting.notices);
                let woke_after = connected.woke_after;
                Ok(Opened {
                    notices,
                    woke_after,
                    server: ServerConnection::new(connected, login, slot, settings.server_lifetime),
                })
            }
            Err(refusal) => {
                let is_full = refusal.reason == Reason::Capacity && pool.refused();
                Err(NotOpened { refusal, is_full })
            }
        }
    }
}

impl Pool {
    /// Opens connections ahead of need, as a client has just taken one.
    pub(super) fn open_spares(self: &Arc<Self>, wanted: usize, request: &LeaseRequest<'_>) {
        loop {
            let slot = {
                let mut state = self.lock();
                let suiting = state
                    .idle
                    .iter()
                    .map(|idle| &idle.server.record)
                    .filter(|record| record.owner.is_none() && record.suits(&request.wanted.login));
                let spare = suiting.count()
                    + state.servers[PoolServer::Opening]
                    + state.servers[PoolServer::Resetting];
                if spare >= wanted || !state.waiting.is_empty() {
                    return;
                }
                state.open_slot(self, std::time::Duration::ZERO)
            };
            let Some(slot) = slot else { return };
            Opening::start(slot, request).leave();
        }
    }

    fn accepted(&self) {
        let settings = self.context.settings.load();
        let mut state = self.lock();
        let open = state.open();
        state.limit.accepted(open, &settings);
        state.limit.show(&settings, &self.context.metrics);
    }

    /// Learns that the server accepts no connection besides the others; `false` if there are none.
    fn refused(&self) -> bool {
        let mut state = self.lock();
        // Without the one that was refused, which is still counted.
        let others = state.open().saturating_sub(1);
        state.limit.refused(others);
        let settings = self.context.settings.load();
        state.limit.show(&settings, &self.context.metrics);
        let has_others = state.has_others();
        if has_others {
            tracing::info!(
                endpoint = %self.context.registry.label(),
                database = self.database,
                connections = others,
                "the endpoint accepts no further connection of this pool; hint: lower --default-pool-size, or raise the compute's max_connections"
            );
        }
        has_others
    }
}
