//! Server connections that their clients keep between two transactions, until another client needs them.
//!
//! The client's session goes on relaying, so that a transaction costs what it does without pooling. It parts with the
//! connection if a client waits for one, and once it has been at rest for a while: then it is among the idle ones, where it
//! costs less memory, is watched, and reaches its idle timeout.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

/// A session at rest parts with its connection after this time.
pub(super) const RETENTION: Duration = Duration::from_secs(1);

/// Whether the client of a leased connection, at rest, keeps it.
#[derive(Debug, Default)]
pub(super) struct Retention {
    kept: Mutex<Option<Kept>>,
    /// There is something behind the lock: a client that waits looks at all connections of its pool, and most modes keep none.
    is_kept: AtomicBool,
}

#[derive(Debug)]
struct Kept {
    since: Instant,
    /// When its client parts with it in any case.
    ends_at: Option<Instant>,
    /// Wakes the session.
    waker: Waker,
    /// The client is to part with it, as another one waits.
    is_wanted: bool,
}

impl Retention {
    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(&self, read: impl FnOnce(&mut Kept) -> T) -> Option<T> {
        if !self.is_kept.load(Ordering::SeqCst) {
            return None;
        }
        self.lock().as_mut().map(read)
    }

    /// The client is at rest, and its session parts with the connection when it is woken.
    pub(super) fn begin(&self, since: Instant, ends_at: Option<Instant>, waker: &Waker) {
        let mut kept = self.lock();
        let is_wanted = kept.as_ref().is_some_and(|kept| kept.is_wanted);
        *kept = Some(Kept {
            since,
            ends_at,
            waker: waker.clone(),
            is_wanted,
        });
        self.is_kept.store(true, Ordering::SeqCst);
    }

    /// The client is not at rest any more, or has parted with the connection. Whether another client waits for it.
    pub(super) fn end(&self) -> bool {
        if !self.is_kept.load(Ordering::SeqCst) {
            return false;
        }
        let mut kept = self.lock();
        self.is_kept.store(false, Ordering::SeqCst);
        kept.take().is_some_and(|kept| kept.is_wanted)
    }

    /// Since when the client has been at rest, unless the connection is wanted already.
    pub(super) fn since(&self) -> Option<Instant> {
        self.read(|kept| (!kept.is_wanted).then_some(kept.since))?
    }

    /// When the client parts with the connection, unless it is wanted already.
    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.read(|kept| kept.ends_at.filter(|_| !kept.is_wanted))?
    }

    /// Has the client part with the connection, if it was to do so by now.
    pub(super) fn end_by(&self, now: Instant) {
        if self.ends_at().is_some_and(|at| at <= now) {
            self.want();
        }
    }

    /// Whether the client is to part with the connection.
    pub(super) fn is_wanted(&self) -> bool {
        self.read(|kept| kept.is_wanted).unwrap_or_default()
    }

    /// Has the client part with the connection, if it is at rest.
    pub(super) fn want(&self) {
        self.read(|kept| {
            kept.waker.wake_by_ref();
            kept.is_wanted = true;
        });
    }
}
