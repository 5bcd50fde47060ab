//! The slot of a server connection in its pool, from before it is opened until it is closed.

use std::sync::Arc;

use super::{Pool, retention::Retention};
use crate::telemetry::labels::{PoolClose, PoolServer};

/// Counts one server connection in its pool, in the state that it is in. Dropped, it frees the slot for the next client.
pub(super) struct Slot {
    pool: Arc<Pool>,
    pub(super) state: PoolServer,
    /// That of the pool when the connection was opened.
    pub(super) generation: u64,
    /// Why the connection is closed, should this be dropped now.
    pub(super) close: PoolClose,
    pub(super) retention: Arc<Retention>,
}

impl Slot {
    /// For [`Pool`], which has counted it.
    pub(super) fn counted(pool: &Arc<Pool>, generation: u64, retention: Arc<Retention>) -> Self {
        Self {
            pool: Arc::clone(pool),
            state: PoolServer::Opening,
            generation,
            close: PoolClose::Session,
            retention,
        }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Counts the connection in another state.
    pub(super) fn enter(&mut self, new: PoolServer) {
        let pool = Arc::clone(&self.pool);
        let mut state = pool.lock();
        let is_opened = self.state == PoolServer::Opening;
        state.count(self, new);
        // The next login may begin.
        let evicted = is_opened.then(|| state.serve(&pool));
        // Dropped without the lock, which the drop takes.
        drop(state);
        drop(evicted);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let metrics = &self.pool.context.metrics;
        // One that was never opened is not closed either.
        if self.state != PoolServer::Opening {
            metrics.pool_closes[self.close].inc();
        }
        metrics.pool_servers[self.state].dec();
        let mut state = self.pool.lock();
        state.servers[self.state] = state.servers[self.state].saturating_sub(1);
        let own = &self.retention;
        state.retentions.retain(|other| !Arc::ptr_eq(other, own));
        if state.is_paused {
            self.pool.changed.notify_waiters();
        }
        let evicted = state.serve(&self.pool);
        // Dropped without the lock, which the drop takes.
        drop(state);
        drop(evicted);
    }
}
