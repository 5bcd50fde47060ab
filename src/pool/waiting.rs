//! The queue of clients that wait for a server connection.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Poll, Waker},
};

use tokio::{
    runtime::{self, Handle},
    time::Instant,
};

use super::{Pool, request::Wanted, server::ServerConnection, slot::Slot};
use crate::{telemetry::GaugeGuard, upstream::Refusal};

/// What a waiting client is given.
pub(super) enum Grant {
    /// A connection that is its own from now on.
    Server(ServerConnection),
    /// The right to open one; it keeps its place in the queue meanwhile.
    Open(Slot),
    /// What another client's attempt to open one has shown.
    Refused(Refusal),
}

/// A client in the queue.
pub(super) struct Waiter {
    pub(super) wanted: Wanted,
    pub(super) runtime: runtime::Id,
    pub(super) since: Instant,
    /// It is opening a connection, and takes another one if that is there earlier.
    pub(super) is_opening: bool,
    /// Given, but not taken yet.
    pub(super) grant: Option<Grant>,
    waker: Option<Waker>,
}

impl Waiter {
    pub(super) fn give(&mut self, grant: Grant) {
        self.grant = Some(grant);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A client's place in the queue until it is dropped.
pub(super) struct Waiting {
    pool: Arc<Pool>,
    pub(super) number: u64,
    pub(super) since: Instant,
    #[expect(dead_code, reason = "held, not read")]
    gauge: GaugeGuard,
}

impl Pool {
    /// Enters the queue.
    pub(super) fn enter(self: &Arc<Self>, wanted: &Wanted) -> Waiting {
        let mut state = self.lock();
        let number = state.next_number();
        let since = Instant::now();
        let waiter = Waiter {
            wanted: wanted.clone(),
            runtime: Handle::current().id(),
            since,
            is_opening: false,
            grant: None,
            waker: None,
        };
        state.waiting.insert(number, waiter);
        let evicted = state.serve(self);
        // Dropped without the lock, which the drop takes.
        drop(state);
        drop(evicted);
        Waiting {
            pool: Arc::clone(self),
            number,
            since,
            gauge: GaugeGuard::new(&self.context.metrics.pool_clients_waiting),
        }
    }

    /// Serves the queue again, because time has changed what is allowed.
    pub(super) fn serve_again(self: &Arc<Self>) {
        let evicted = self.lock().serve(self);
        drop(evicted);
    }

    /// Refuses the clients that have waited since `before`: an attempt of a whole budget has failed.
    pub(super) fn refuse_waiting(&self, before: Instant, refusal: &Refusal) {
        for waiter in self.lock().waiting.values_mut() {
            if waiter.grant.is_none() && !waiter.is_opening && waiter.since <= before {
                waiter.give(Grant::Refused(refusal.clone()));
            }
        }
    }
}

impl Waiting {
    /// The next grant. Cancel safe.
    pub(super) async fn granted(&self) -> Grant {
        poll_fn(|cx| {
            let mut state = self.pool.lock();
            // Present as long as `self`.
            let Some(waiter) = state.waiting.get_mut(&self.number) else {
                return Poll::Pending;
            };
            match waiter.grant.take() {
                Some(grant) => Poll::Ready(grant),
                None => {
                    waiter.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Whether a grant has been given, but not taken.
    pub(super) fn is_granted(&self) -> bool {
        self.pool.lock().is_granted(self.number)
    }

    /// Waits like the others again, in the same place: the server has no connection left, or the new one was lost.
    pub(super) fn stops_opening(&self) {
        if let Some(waiter) = self.pool.lock().waiting.get_mut(&self.number) {
            waiter.is_opening = false;
        }
        self.pool.serve_again();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let left = self.pool.lock().waiting.remove(&self.number);
        match left.and_then(|waiter| waiter.grant) {
            // The client has left before it could use the connection.
            Some(Grant::Server(server)) => server.put_back(),
            // Its drop serves the next client.
            Some(Grant::Open(_) | Grant::Refused(_)) | None => {}
        }
    }
}
