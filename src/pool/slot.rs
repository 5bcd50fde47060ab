//! The slot of a server connection in its pool, from before it is opened until it is closed.

use std::sync::Arc;

use super::Pool;
use crate::telemetry::labels::{PoolClose, PoolServer};

/// Counts one server connection in its pool, in the state that it is in. Dropped, it frees the slot for the next client.
pub(super) struct Slot {
    pool: Arc<Pool>,
    pub(super) state: PoolServer,
    /// That of the pool when the connection was opened.
    pub(super) generation: u64,
    /// Why the connection is closed, should this be dropped now.
    pub(super) close: PoolClose,
}

impl Slot {
    /// For [`Pool`], which has counted it.
    pub(super) fn counted(pool: &Arc<Pool>, generation: u64) -> Self {
        Self {
            pool: Arc::clone(pool),
            state: PoolServer::Opening,
            generation,
            close: PoolClose::Session,
        }
    }

    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Counts the connection in another state.
    pub(super) fn enter(&mut self, state: PoolServer) {
        let pool = Arc::clone(&self.pool);
        pool.lock().count(self, state, &pool.context.metrics);
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
        if state.is_paused {
            self.pool.changed.notify_waiters();
        }
        let evicted = state.serve(&self.pool);
        // Dropped without the lock, which the drop takes.
        drop(state);
        drop(evicted);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        time::Duration,
    };

    use arc_swap::ArcSwap;
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::{
        config::{PoolMode, PoolSettings},
        pool::{PoolContext, Pools, waiting::Grant},
        protocol::options::LoginParameters,
        shutdown::Shutdown,
        status::Label,
        telemetry::Metrics,
    };

    #[tokio::test]
    async fn a_panic_with_a_connection_frees_its_slot_for_the_client_that_waits() {
        let settings = PoolSettings {
            default_pool_size: 1,
            ..PoolSettings::default()
        };
        let context = PoolContext {
            endpoint: Label::new("e"),
            settings: ArcSwap::from_pointee(settings),
            metrics: Metrics::new().unwrap(),
            shutdown: Shutdown::default(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let pools = Pools::new(PoolMode::Session, context);
        let pool = pools.pool("db");
        let slot = pool.lock().open_slot(&pool, Duration::ZERO);
        let mut slot = slot.expect("the first");
        slot.enter(PoolServer::Leased);
        let waiting = pool.enter(&Arc::new(LoginParameters::default()));
        assert!(!waiting.is_granted());
        let panicked = catch_unwind(AssertUnwindSafe(move || {
            let _slot = slot;
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert!(matches!(waiting.granted().await, Grant::Open(_)));
        let metrics = &pool.context.metrics;
        assert_eq!(metrics.pool_servers[PoolServer::Leased].get(), 0);
        assert_eq!(metrics.pool_closes[PoolClose::Session].get(), 1);
    }
}
