//! What a session goes by. It reads this once, when it begins: a reload is for those who come after.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;

use super::Entrance;
use crate::{config::DatabaseMapping, upstream::Terms};

/// The settings that sessions know.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Who is let in, and how.
    pub entrance: Arc<Entrance>,
    /// What the database names that clients send mean.
    pub database_mapping: DatabaseMapping,
    /// How long a client may take to say what it wants.
    pub client_login_timeout: Duration,
    /// Sessions at a time.
    pub max_connections: usize,
    /// How the endpoint is dealt with.
    pub terms: Terms,
}

/// The policy in force, shared by all endpoints; cheap to clone.
#[derive(Clone, Debug)]
pub struct Policies(Arc<ArcSwap<Policy>>);

impl Policies {
    /// This policy, until another is [set](Self::set).
    pub fn new(policy: Policy) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(policy)))
    }

    /// The one in force; takes no lock.
    pub fn now(&self) -> Arc<Policy> {
        self.0.load_full()
    }

    /// Puts another in force.
    pub fn set(&self, policy: Policy) {
        self.0.store(Arc::new(policy));
    }
}

/// Counts the sessions of the process, so that there are no more than the policy allows; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Seats(Arc<AtomicUsize>);

/// A session's place among them, given back when dropped.
#[derive(Debug)]
pub struct Seat(Seats);

impl Seats {
    /// A place, if fewer than `limit` are taken.
    pub fn take(&self, limit: usize) -> Option<Seat> {
        let one_more = |taken: usize| (taken < limit).then(|| taken.saturating_add(1));
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more)
            .ok()?;
        Some(Seat(self.clone()))
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_limit_takes_no_place_away_and_gives_none() {
        let seats = Seats::default();
        let held: Vec<Seat> = (0..3).map_while(|_| seats.take(3)).collect();
        assert_eq!((held.len(), seats.taken()), (3, 3));
        assert!(seats.take(3).is_none());
        assert!(seats.take(1).is_none(), "fewer than are there");
        drop(held);
        assert_eq!(seats.taken(), 0);
        assert!(seats.take(1).is_some());
        assert!(seats.take(0).is_none());
    }
}
