//! Whether an endpoint takes new sessions. One that the settings no longer name takes none; its listeners stay for the
//! cancel requests of those it has, until the last has gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{Presence, Present};

/// The way in to one endpoint; cheap to clone.
#[derive(Clone, Debug)]
pub struct Door {
    is_leaving: Arc<AtomicBool>,
    shut: CancellationToken,
    sessions: Presence,
}

impl Door {
    /// An open door, which is shut for good when `shut` is cancelled.
    pub fn new(shut: CancellationToken) -> Self {
        Self {
            is_leaving: Arc::default(),
            shut,
            sessions: Presence::default(),
        }
    }

    /// Takes no new session from now on.
    pub fn leave(&self) {
        self.is_leaving.store(true, Ordering::Release);
    }

    /// Takes sessions again, unless it has been shut.
    pub fn stay(&self) -> bool {
        let is_open = !self.shut.is_cancelled();
        if is_open {
            self.is_leaving.store(false, Ordering::Release);
        }
        is_open
    }

    /// Whether new sessions are turned away.
    pub fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Acquire)
    }

    /// Closes the listeners.
    pub fn shut(&self) {
        self.shut.cancel();
    }

    /// Cancelled when the listeners are to close.
    pub fn is_shut(&self) -> &CancellationToken {
        &self.shut
    }

    /// A session begins, which lasts until what is returned is dropped.
    pub(super) fn enter(&self) -> Present {
        self.sessions.enter()
    }

    /// Returns when there is no session. Cancel safe.
    pub async fn until_empty(&self) {
        self.sessions.gone_for(Duration::ZERO).await;
    }
}
