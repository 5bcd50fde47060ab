//! Commands of an administrator, with PgBouncer's meanings. Each is for one database, or for all of the endpoint.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
};

use super::{Pool, Pools};
use crate::{shutdown::Shutdown, telemetry::labels::PoolClose};

impl Pools {
    /// Closes idle connections now, and those in use once their clients have left.
    pub(crate) fn reconnect(&self, database: Option<&str>) {
        for pool in self.chosen(database) {
            pool.retire();
        }
    }

    /// Closes the connections of a database, if it has any, as [`reconnect`](Self::reconnect) does.
    pub(crate) fn retire(&self, database: &str) {
        let pool = self.pools().get(database).cloned();
        if let Some(pool) = pool {
            pool.retire();
        }
    }

    /// Grants no connection any more, and closes them as [`reconnect`](Self::reconnect) does.
    pub(crate) fn pause(&self, database: Option<&str>) {
        if database.is_none() {
            self.is_paused.store(true, Ordering::Relaxed);
        }
        for pool in self.chosen(database) {
            pool.lock().is_paused = true;
            pool.retire();
        }
    }

    /// Returns when no connection is left, or the pause is over. Cancel safe.
    pub(crate) async fn paused(&self, database: Option<&str>) {
        for pool in self.chosen(database) {
            pool.paused().await;
        }
    }

    /// Ends a pause.
    pub(crate) fn resume(&self, database: Option<&str>) {
        if database.is_none() {
            self.is_paused.store(false, Ordering::Relaxed);
        }
        for pool in self.chosen(database) {
            pool.lock().is_paused = false;
            pool.changed.notify_waiters();
            pool.serve_again();
        }
    }

    /// Ends the sessions, also those whose connections no pool has.
    pub(crate) fn kill(&self, database: Option<&str>) {
        let mut sessions = self.sessions();
        let ended: Vec<Shutdown> = match database {
            Some(database) => sessions.remove(database).into_iter().collect(),
            None => sessions.drain().map(|(_, shutdown)| shutdown).collect(),
        };
        drop(sessions);
        for shutdown in ended {
            shutdown.cut();
        }
    }

    /// Whether new pools are paused, too.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    /// Ends the sessions of a database when the process does, or by [`kill`](Self::kill).
    pub(crate) fn shutdown_of(&self, database: &str) -> Shutdown {
        let mut sessions = self.sessions();
        if let Some(shutdown) = sessions.get(database) {
            return shutdown.clone();
        }
        let shutdown = self.context.shutdown.child();
        sessions.insert(database.to_owned(), shutdown.clone());
        shutdown
    }

    fn chosen(&self, database: Option<&str>) -> Vec<Arc<Pool>> {
        match database {
            Some(database) => vec![self.pool(database)],
            None => self.all(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, Shutdown>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn retire(self: &Arc<Self>) {
        let mut state = self.lock();
        state.generation += 1;
        let idle = std::mem::take(&mut state.idle);
        for retention in &state.retentions {
            retention.want();
        }
        drop(state);
        for idle in idle {
            self.close(idle.into_server(), PoolClose::Retired);
        }
    }

    async fn paused(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            // Before the look, so that a change after it is not missed.
            changed.as_mut().enable();
            let is_over = {
                let state = self.lock();
                !state.is_paused || state.open() == 0
            };
            if is_over {
                return;
            }
            changed.await;
        }
    }
}
