//! The sessions that are logged in: their cancel keys, and the handles by which they are disturbed.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::counts::{Counters, Gauge};

/// A cancel key as the edge gives it out: process id and secret are one random value.
pub(crate) type CancelKey = [u8; 8];

/// What is done to a running session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Disruption {
    /// Nothing: bytes flow (again).
    #[default]
    None,
    /// Bytes stop flowing in both directions, the connection stays.
    Stall,
    /// Packets are lost in both directions; nothing is read, written, acknowledged or closed.
    Blackhole,
    /// Both connections close (FIN) without a message.
    Close,
    /// The client's connection is reset.
    Reset,
}

/// The key by which Postgres itself knows a session.
#[derive(Clone, Debug)]
pub(crate) struct BackendKey {
    pub(crate) process_id: u32,
    pub(crate) secret: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct Sessions {
    table: Arc<Mutex<HashMap<CancelKey, Entry>>>,
    counters: Counters,
}

struct Entry {
    backend: BackendKey,
    disruption: watch::Sender<Disruption>,
}

impl Sessions {
    pub(crate) fn new(counters: Counters) -> Self {
        Self {
            table: Arc::default(),
            counters,
        }
    }

    /// Enters a session; it leaves when the guard goes. `None` if the key is taken.
    pub(crate) fn enter(&self, key: CancelKey, backend: BackendKey) -> Option<Session> {
        let (disruption, disrupted) = watch::channel(Disruption::None);
        let mut table = self.lock();
        if table.contains_key(&key) {
            return None;
        }
        table.insert(
            key,
            Entry {
                backend,
                disruption,
            },
        );
        drop(table);
        let gauge = self.counters.gauge(|counts| &mut counts.sessions);
        Some(Session {
            key,
            sessions: self.clone(),
            disrupted,
            _gauge: gauge,
        })
    }

    pub(crate) fn backend_of(&self, key: CancelKey) -> Option<BackendKey> {
        self.lock().get(&key).map(|entry| entry.backend.clone())
    }

    pub(crate) fn process_ids(&self) -> Vec<i32> {
        self.lock()
            .values()
            .map(|entry| entry.backend.process_id.cast_signed())
            .collect()
    }

    pub(crate) fn disrupt(&self, disruption: Disruption) {
        for entry in self.lock().values() {
            entry.disruption.send_replace(disruption);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<CancelKey, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One session's place in the table.
pub(crate) struct Session {
    key: CancelKey,
    sessions: Sessions,
    pub(crate) disrupted: watch::Receiver<Disruption>,
    _gauge: Gauge,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.sessions.lock().remove(&self.key);
    }
}
