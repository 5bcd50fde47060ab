//! What clients demand of the task that mints: an attempt while they wait, and forced refreshes after rejected logins.
//!
//! Forced refreshes are rate-limited. //! A valid credential that is rejected was either revoked, and a new one helps, or it belongs to an identity that the
//! endpoint or one of its databases does not know, and none helps. The two look alike, so the interval doubles with each
//! new credential that is rejected in turn: a permanent mismatch must not flood the workspace with requests.
//!
//! The interval is kept per cause: a database that refuses every credential does not delay the others, and a login that works
//! in another database does not reset it. Only causes with an accepted login have an interval of their own. All others share
//! one, because a client can name any number of databases.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, RandomState},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// Least time between two forced refreshes.
const FIRST_INTERVAL: Duration = Duration::from_secs(5);
/// Upper limit of the interval.
const LAST_INTERVAL: Duration = Duration::from_mins(5);
/// Causes with an interval of their own; beyond it, the oldest is removed.
const MAX_CAUSES: usize = 64;

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

/// What logins that the same mismatch rejects have in common: role, database, and whether they are for replication, which
/// has rules of its own in `pg_hba.conf`.
///
/// A hash of the three, so that a client cannot choose how much memory it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cause(u64);

impl Cause {
    /// The cause that a login counts under.
    pub fn login(user: &str, database: &str, is_replication: bool) -> Self {
        // Random keys: a client cannot find a database name that has the hash of another cause.
        static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self(HASHER.hash_one((user, database, is_replication)))
    }
}

/// The forced refreshes that are due, and those that are allowed.
#[derive(Debug, Default)]
pub(super) struct Forced {
    /// The latest generation that a login was rejected with; 0: none.
    rejected: u64,
    /// Causes that have had a login accepted, the oldest first.
    proven: VecDeque<(Cause, ForcedInterval)>,
    /// All other causes.
    unproven: ForcedInterval,
    /// A login was rejected because its role belongs to another identity, and none was accepted since.
    mismatched: bool,
}

/// The forced refreshes of one cause.
#[derive(Debug)]
struct ForcedInterval {
    /// The latest generation that was rejected for this cause; 0: none.
    rejected: u64,
    /// The generation to replace; `None`: no refresh is due.
    wanted: Option<u64>,
    /// The latest generation that was minted for this cause.
    minted: u64,
    /// When the latest attempt for this cause began.
    last: Option<Instant>,
    length: Duration,
}

impl Default for ForcedInterval {
    fn default() -> Self {
        Self {
            rejected: 0,
            wanted: None,
            minted: 0,
            last: None,
            length: FIRST_INTERVAL,
        }
    }
}

impl ForcedInterval {
    fn reject(&mut self, generation: u64) {
        // Clients with the same credential are rejected at the same time: the interval doubles once.
        if generation <= self.rejected {
            return;
        }
        self.rejected = generation;
        // A scheduled credential may have been revoked. Only a forced one that is rejected in turn shows a mismatch.
        if generation == self.minted {
            self.length = self.length.saturating_mul(2).min(LAST_INTERVAL);
        }
    }

    fn allowed_at(&self) -> Option<Instant> {
        self.last.map(|last| last + self.length)
    }
}

impl Forced {
    /// Records a rejected login. Any number of rejections of one generation counts once.
    pub(super) fn reject(&mut self, generation: u64, cause: Cause) {
        self.rejected = self.rejected.max(generation);
        self.interval(cause).reject(generation);
    }

    pub(super) fn want(&mut self, generation: u64, cause: Cause) {
        let interval = self.interval(cause);
        interval.wanted = interval.wanted.max(Some(generation));
    }

    pub(super) fn rejected(&self) -> u64 {
        self.rejected
    }

    /// When this cause may force the next refresh; `None`: at once.
    pub(super) fn allowed_at(&mut self, cause: Cause) -> Option<Instant> {
        self.interval(cause).allowed_at()
    }

    /// When the next due refresh may start; `None`: none is due.
    pub(super) fn due_at(&mut self, now: Instant) -> Option<Instant> {
        self.intervals_mut()
            .filter(|interval| interval.wanted.is_some())
            .map(|interval| interval.allowed_at().unwrap_or(now))
            .min()
    }

    /// Records the start of an attempt, whatever its reason; it serves every cause with a refresh due.
    pub(super) fn attempt(&mut self, now: Instant) {
        for interval in self.intervals_mut() {
            if interval.wanted.is_some() {
                // At the start, so that an attempt that fails counts as well.
                interval.last = Some(now);
            }
        }
    }

    /// Records a published generation.
    pub(super) fn minted(&mut self, generation: u64) {
        for interval in self.intervals_mut() {
            let was_wanted = interval.wanted.take_if(|wanted| *wanted < generation);
            if was_wanted.is_some() {
                interval.minted = generation;
            }
        }
    }

    /// See [`CredentialCell::note_mismatch`](super::CredentialCell::note_mismatch).
    pub(super) fn note_mismatch(&mut self) -> bool {
        !std::mem::replace(&mut self.mismatched, true)
    }

    /// Records an accepted login. A generation older than a later rejection leaves the interval as it is.
    pub(super) fn accept(&mut self, generation: u64, cause: Cause) {
        self.mismatched = false;
        if let Some((_, interval)) = self.proven.iter_mut().find(|(known, _)| *known == cause) {
            if generation >= interval.rejected {
                interval.length = FIRST_INTERVAL;
            }
            return;
        }
        // The removed cause shares the common interval until its next accepted login.
        if self.proven.len() >= MAX_CAUSES {
            self.proven.pop_front();
        }
        self.proven.push_back((cause, ForcedInterval::default()));
    }

    fn interval(&mut self, cause: Cause) -> &mut ForcedInterval {
        let proven = self.proven.iter_mut().find(|(known, _)| *known == cause);
        proven.map_or(&mut self.unproven, |(_, interval)| interval)
    }

    fn intervals_mut(&mut self) -> impl Iterator<Item = &mut ForcedInterval> {
        let proven = self.proven.iter_mut().map(|(_, interval)| interval);
        proven.chain([&mut self.unproven])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(database: &str) -> Cause {
        Cause::login("user", database, false)
    }

    /// Forces one refresh and returns how long after it the next would be allowed.
    fn force(forced: &mut Forced, generation: u64, cause: Cause, now: Instant) -> Duration {
        forced.reject(generation, cause);
        forced.want(generation, cause);
        forced.attempt(now);
        forced.minted(generation + 1);
        forced.reject(generation + 1, cause);
        forced.allowed_at(cause).unwrap() - now
    }

    #[tokio::test(start_paused = true)]
    async fn the_interval_doubles_while_forced_credentials_are_rejected() {
        let now = Instant::now();
        for is_proven in [false, true] {
            let (mut forced, cause) = (Forced::default(), cause("a"));
            if is_proven {
                forced.accept(1, cause);
            }
            let intervals: Vec<_> = (1..=8)
                .map(|generation| force(&mut forced, generation, cause, now).as_secs())
                .collect();
            assert_eq!(intervals, [10, 20, 40, 80, 160, 300, 300, 300]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_login_resets_the_interval_of_its_own_cause_only() {
        let now = Instant::now();
        let (mut forced, good, bad) = (Forced::default(), cause("good"), cause("bad"));
        forced.accept(1, good);
        forced.accept(1, bad);
        force(&mut forced, 1, bad, now);
        forced.accept(2, good);
        assert_eq!(forced.allowed_at(good), None, "no forced refresh yet");
        assert_eq!(forced.allowed_at(bad).unwrap() - now, FIRST_INTERVAL * 2);
        forced.accept(1, bad);
        assert_eq!(
            forced.allowed_at(bad).unwrap() - now,
            FIRST_INTERVAL * 2,
            "an older generation proves nothing"
        );
        forced.accept(2, bad);
        assert_eq!(forced.allowed_at(bad).unwrap() - now, FIRST_INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn causes_without_an_accepted_login_share_one_budget() {
        let now = Instant::now();
        let mut forced = Forced::default();
        for number in 1..=5 {
            force(&mut forced, number, cause(&number.to_string()), now);
        }
        assert_eq!(
            forced.allowed_at(cause("yet another")).unwrap() - now,
            FIRST_INTERVAL * 32
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_causes_is_bounded() {
        let mut forced = Forced::default();
        for number in 0..1000 {
            forced.accept(1, cause(&number.to_string()));
        }
        assert_eq!(forced.proven.len(), MAX_CAUSES);
    }

    #[test]
    fn replication_is_a_cause_of_its_own() {
        assert_ne!(Cause::login("u", "d", true), Cause::login("u", "d", false));
    }

    #[tokio::test(start_paused = true)]
    async fn rejections_of_scheduled_credentials_do_not_lengthen_the_interval() {
        let now = Instant::now();
        let (mut forced, cause) = (Forced::default(), cause("a"));
        for generation in 1..10 {
            forced.minted(generation);
            forced.reject(generation, cause);
        }
        forced.want(9, cause);
        forced.attempt(now);
        assert_eq!(forced.allowed_at(cause).unwrap() - now, FIRST_INTERVAL);
    }
}
