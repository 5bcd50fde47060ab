//! Clients that wait for the next attempt of a background task.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts the waiting clients and notifies the task that makes the attempts.
#[derive(Default)]
pub(crate) struct Demand {
    waiting: AtomicUsize,
    added: Notify,
}

/// One waiting client, until it is dropped.
pub(crate) struct Waiting<'a>(&'a Demand);

impl Demand {
    pub(crate) fn add(&self) -> Waiting<'_> {
        // Counted first: the notified task reads the count to decide on an attempt.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // Keeps one permit for a task that is in an attempt at the moment, so that no client is missed.
        self.added.notify_one();
        Waiting(self)
    }

    /// Whether any client waits.
    pub(crate) fn exists(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Completes when a client begins to wait. Cancel safe.
    pub(crate) async fn added(&self) {
        self.added.notified().await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Without a notification: fewer clients never bring an attempt forward.
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
