//! Connections without a client: watched for what the server sends or for its end, and closed when they are no longer
//! needed.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use tokio::{
    runtime::Handle,
    task::AbortHandle,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Pool,
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
    watch: Option<AbortHandle>,
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

    /// Ends the watch.
    pub(super) fn into_server(self) -> ServerConnection {
        if let Some(watch) = self.watch {
            watch.abort();
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
        state.idle.push(Idle {
            number,
            server,
            since: Instant::now(),
            runtime: Handle::current(),
            watch: None,
        });
        let evicted = state.serve(self);
        let is_due = state.watches.as_ref().is_none_or(AbortHandle::is_finished);
        if is_due && !state.idle.is_empty() {
            let watches = self.context.tasks.spawn(Arc::clone(self).watch_all());
            state.watches = Some(watches.abort_handle());
        }
        drop(state);
        drop(evicted);
    }

    /// Watches the connections that stay idle; ends once all of them are watched.
    async fn watch_all(self: Arc<Self>) {
        loop {
            sleep(WATCH_DELAY).await;
            let settings = self.context.settings.load();
            let mut state = self.lock();
            let mut is_done = true;
            for idle in state.idle.iter_mut().filter(|idle| idle.watch.is_none()) {
                if idle.since.elapsed() < WATCH_DELAY {
                    is_done = false;
                    continue;
                }
                // Earlier than the timeout, so that a pool does not log in anew all at once.
                let timeout = settings
                    .server_idle_timeout
                    .mul_f64(rand::random_range(0.8..=1.0));
                let retire_at = idle.server.record.retire_at;
                let (until, reason) = match idle.since + timeout {
                    idle if idle < retire_at => (idle, PoolClose::IdleTimeout),
                    _ => (retire_at, PoolClose::Lifetime),
                };
                let watch = Arc::clone(&self).watch(idle.number, until, reason);
                let watch = self.context.tasks.track_future(watch);
                idle.watch = Some(idle.runtime.spawn(watch).abort_handle());
            }
            if is_done {
                // With the lock held, under which others begin.
                state.watches = None;
                return;
            }
        }
    }

    /// Closes an idle connection when the server does, or at `until`.
    async fn watch(self: Arc<Self>, number: u64, until: Instant, at_end: PoolClose) {
        let reason = tokio::select! {
            unusable = self.until_unusable(number) => {
                self.lost(&unusable);
                PoolClose::Server
            }
            () = self.context.over() => PoolClose::Shutdown,
            () = sleep_until(until) => at_end,
        };
        let Some(mut server) = self.end_watch(number) else {
            return;
        };
        if reason == PoolClose::Server {
            server.record.slot.close = reason;
        } else {
            self.close(server, reason);
        }
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

    /// Takes the connection from the idle ones, for its watch to close.
    fn end_watch(&self, number: u64) -> Option<ServerConnection> {
        let mut state = self.lock();
        let at = state.idle.iter().position(|idle| idle.number == number)?;
        // Not aborted: the caller is the watch.
        Some(state.idle.remove(at).server)
    }
}
