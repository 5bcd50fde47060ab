//! Server connections that their clients keep between two transactions, until another client needs them.
//!
//! The client's session goes on relaying, so that a transaction costs what it does without pooling. It parts with the
//! connection if a client waits for one, and once it has been at rest for a while: then it is among the idle ones, where it
//! costs less memory, is watched, and reaches its idle timeout.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

/// A session at rest parts with its connection after this time.
pub(super) const RETENTION: Duration = Duration::from_secs(1);

/// Whether the client of a leased connection, at rest, keeps it.
#[derive(Debug, Default)]
pub(super) struct Retention(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    kept: Option<Kept>,
    /// The client is to part with it, as another one waits.
    is_wanted: bool,
}

#[derive(Debug)]
struct Kept {
    since: Instant,
    /// When its client parts with it in any case.
    ends_at: Option<Instant>,
    /// Wakes the session.
    waker: Waker,
}

impl State {
    /// Unless the connection is wanted already.
    fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref().filter(|_| !self.is_wanted)
    }
}

impl Retention {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client is at rest, and its session parts with the connection when it is woken.
    pub(super) fn begin(&self, since: Instant, ends_at: Option<Instant>, waker: &Waker) {
        self.lock().kept = Some(Kept {
            since,
            ends_at,
            waker: waker.clone(),
        });
    }

    /// The client is not at rest any more, or has parted with the connection. Whether another client waits for it.
    pub(super) fn end(&self) -> bool {
        let mut state = self.lock();
        state.kept = None;
        std::mem::take(&mut state.is_wanted)
    }

    /// Since when the client has been at rest, unless the connection is wanted already.
    pub(super) fn since(&self) -> Option<Instant> {
        self.lock().kept().map(|kept| kept.since)
    }

    /// When the client parts with the connection, unless it is wanted already.
    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.lock().kept()?.ends_at
    }

    /// Has the client part with the connection, if it was to do so by now.
    pub(super) fn end_by(&self, now: Instant) {
        if self.ends_at().is_some_and(|at| at <= now) {
            self.want();
        }
    }

    /// Whether the client is to part with the connection.
    pub(super) fn is_wanted(&self) -> bool {
        self.lock().is_wanted
    }

    /// Has the client part with the connection, if it is at rest.
    pub(super) fn want(&self) {
        let mut state = self.lock();
        if let Some(Kept { waker, .. }) = &state.kept {
            waker.wake_by_ref();
            state.is_wanted = true;
        }
    }
}
