//! Connections without a client: watched for what the server sends or for its end, and closed when they are no longer
//! needed.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use tokio::{runtime::Handle, task::AbortHandle, time::Instant};

use super::{
    Pool, State,
    limit::Limit,
    server::{ServerConnection, Unusable},
};
use crate::{
    status::IdleServer,
    telemetry::labels::{PoolClose, PoolServer},
};

/// A connection is watched once it has been idle for this long: most are needed again sooner, and a watch costs as much as
/// the rest of a lease. One that is not watched is looked at when it is taken.
const WATCH_DELAY: Duration = Duration::from_millis(50);

/// A connection that waits for a client.
pub(super) struct Idle {
    number: u64,
    pub(super) server: ServerConnection,
    since: Instant,
    /// The runtime that its socket is registered with.
    runtime: Handle,
    watch: Option<Watch>,
}

/// Of a connection that has been idle for a while.
struct Watch {
    task: AbortHandle,
    /// When the connection is closed, and why.
    ends_at: Instant,
    reason: PoolClose,
}

impl Idle {
    pub(super) fn snapshot(&self) -> IdleServer {
        let record = &self.server.record;
        IdleServer {
            id: record.id,
            address: record.address,
            process_id: record.key.map(|key| key.process_id),
            age: record.opened_at.elapsed(),
            idle: self.since.elapsed(),
        }
    }

    /// When it is watched, or closed.
    pub(super) fn due_at(&self) -> Instant {
        let watch = self.watch.as_ref();
        watch.map_or(self.since + WATCH_DELAY, |watch| watch.ends_at)
    }

    /// Ends the watch.
    pub(super) fn into_server(self) -> ServerConnection {
        if let Some(watch) = self.watch {
            watch.task.abort();
        }
        self.server
    }
}

impl ServerConnection {
    /// Gives the connection, which is like a new one, to the next client, or keeps it for a later one.
    pub(super) fn put_back(self) {
        // Without a runtime the process is ending, and the connection with it.
        if Handle::try_current().is_err() {
            return;
        }
        let pool = Arc::clone(self.record.slot.pool());
        if self.record.retire_at <= Instant::now() {
            return pool.close(self, PoolClose::Lifetime);
        }
        if pool.context.is_over() {
            return pool.close(self, PoolClose::Shutdown);
        }
        if self.record.login.database != pool.database {
            // The one requested does not exist: later clients are known to need another pool.
            return pool.close(self, PoolClose::Surplus);
        }
        match self.move_here() {
            Ok(server) => pool.keep(server),
            Err(error) => tracing::debug!(%error, "server connection could not be kept"),
        }
    }
}

impl Pool {
    fn keep(self: &Arc<Self>, mut server: ServerConnection) {
        let settings = self.context.settings.load();
        let mut state = self.lock();
        if server.record.slot.generation != state.generation {
            drop(state);
            return self.close(server, PoolClose::Retired);
        }
        // A client that has waited has the reserve.
        let waited = state
            .waiting
            .values()
            .find(|waiter| waiter.grant.is_none())
            .map_or(Duration::ZERO, |waiter| waiter.since.elapsed());
        if state.staying() > Limit::configured(&settings, waited) {
            // Under the same lock: another one that returns now must not count this one.
            let slot = &mut server.record.slot;
            state.count(slot, PoolServer::Closing);
            drop(state);
            return self.close(server, PoolClose::Surplus);
        }
        state.count(&mut server.record.slot, PoolServer::Idle);
        let number = state.next_number();
        let since = Instant::now();
        state.idle.push(Idle {
            number,
            server,
            since,
            runtime: Handle::current(),
            watch: None,
        });
        let evicted = state.serve(self);
        drop(state);
        drop(evicted);
        self.attend_by(since + WATCH_DELAY);
    }

    /// Watches connections that have been idle for a while, and takes those whose time is over, for the caller to close.
    pub(super) fn attend_to_idle(
        self: &Arc<Self>,
        state: &mut State,
        now: Instant,
    ) -> Vec<(ServerConnection, PoolClose)> {
        let settings = self.context.settings.load();
        let is_over = self.context.is_over();
        let due = state.idle.extract_if(.., |idle| {
            if is_over || idle.due_at() > now {
                return is_over;
            }
            if idle.watch.is_some() {
                return true;
            }
            // Earlier than the timeout, so that a pool does not log in anew all at once.
            let timeout = settings
                .server_idle_timeout
                .mul_f64(rand::random_range(0.8..=1.0));
            let retire_at = idle.server.record.retire_at;
            let (ends_at, reason) = match idle.since + timeout {
                idle if idle < retire_at => (idle, PoolClose::IdleTimeout),
                _ => (retire_at, PoolClose::Lifetime),
            };
            let task = Arc::clone(self).watch(idle.number);
            let task = self.context.tasks.track_future(task);
            idle.watch = Some(Watch {
                task: idle.runtime.spawn(task).abort_handle(),
                ends_at,
                reason,
            });
            false
        });
        let due: Vec<Idle> = due.collect();
        let ending = due.into_iter().map(|idle| {
            let reason = match &idle.watch {
                Some(watch) if !is_over => watch.reason,
                _ => PoolClose::Shutdown,
            };
            let mut server = idle.into_server();
            // Under the same lock: one that returns now must not count it.
            state.count(&mut server.record.slot, PoolServer::Closing);
            (server, reason)
        });
        ending.collect()
    }

    /// Drops an idle connection once the server has closed it.
    async fn watch(self: Arc<Self>, number: u64) {
        let unusable = self.until_unusable(number).await;
        self.lost(&unusable);
        let mut state = self.lock();
        let Some(at) = state.idle.iter().position(|idle| idle.number == number) else {
            return;
        };
        // Not aborted: its watch is this task.
        let mut server = state.idle.remove(at).server;
        // Dropped without the lock, which the drop takes.
        drop(state);
        server.record.slot.close = PoolClose::Server;
    }

    /// Records that a connection has ended without a client.
    pub(super) fn lost(&self, error: &Unusable) {
        self.context.metrics.pool_hidden_losses.inc();
        tracing::debug!(endpoint = %self.context.registry.label(), %error, "idle server connection ended");
    }

    /// Takes what the server sends to an idle connection, until that is of no use any more. Cancel safe.
    async fn until_unusable(&self, number: u64) -> Unusable {
        loop {
            let taken = poll_fn(|cx| {
                let mut state = self.lock();
                match state.idle.iter_mut().find(|idle| idle.number == number) {
                    Some(idle) => idle.server.poll_input(cx),
                    // Taken; this task is about to be aborted.
                    None => Poll::Pending,
                }
            });
            if let Err(unusable) = taken.await {
                return unusable;
            }
        }
    }
}
