//! The rate limit of refreshes that clients force because a login was rejected.
//!
//! A credential that is rejected although it is valid was either revoked (a new one helps) or belongs to an identity that
//! the endpoint does not know (none ever will). The two look alike, so each new one that is rejected in turn makes the next
//! come later: a permanent mismatch must not hammer the workspace.

use std::time::Duration;

use tokio::time::Instant;

/// Least time between two forced refreshes.
const FIRST_INTERVAL: Duration = Duration::from_secs(5);
/// Where the doubling of the interval ends.
const LAST_INTERVAL: Duration = Duration::from_mins(5);

#[derive(Debug)]
pub(super) struct Forced {
    /// The latest generation that a login was rejected with; 0: none.
    rejected: u64,
    /// The generation that is to be replaced; `None`: nothing is owed.
    wanted: Option<u64>,
    /// The latest generation that was minted on demand.
    minted: u64,
    /// When the latest attempt made on demand began.
    last: Option<Instant>,
    interval: Duration,
}

impl Default for Forced {
    fn default() -> Self {
        Self {
            rejected: 0,
            wanted: None,
            minted: 0,
            last: None,
            interval: FIRST_INTERVAL,
        }
    }
}

impl Forced {
    /// A login was rejected with this generation. Said once or a hundred times, it counts once.
    pub(super) fn reject(&mut self, generation: u64) {
        if generation <= self.rejected {
            return;
        }
        self.rejected = generation;
        if generation == self.minted {
            self.interval = self.interval.saturating_mul(2).min(LAST_INTERVAL);
        }
    }

    pub(super) fn want(&mut self, generation: u64) {
        self.wanted = self.wanted.max(Some(generation));
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.is_some()
    }

    pub(super) fn rejected(&self) -> u64 {
        self.rejected
    }

    /// When the next forced refresh may begin; `None`: at once.
    pub(super) fn allowed_at(&self) -> Option<Instant> {
        self.last.map(|last| last + self.interval)
    }

    /// An attempt to mint begins, for whatever reason; if a refresh is owed, this is it.
    pub(super) fn attempt(&mut self, now: Instant) {
        if self.is_wanted() {
            self.last = Some(now);
        }
    }

    /// A generation was published.
    pub(super) fn minted(&mut self, generation: u64) {
        if self.wanted.take_if(|wanted| *wanted < generation).is_some() {
            self.minted = generation;
        }
    }

    /// A login worked with this generation. One that is older than a later rejection proves nothing.
    pub(super) fn accept(&mut self, generation: u64) {
        if generation >= self.rejected {
            self.interval = FIRST_INTERVAL;
        }
    }

    /// Whether a success would change anything.
    pub(super) fn is_strained(&self) -> bool {
        self.interval > FIRST_INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forces one refresh and says how long after the previous one the next would be allowed.
    fn force(forced: &mut Forced, generation: u64, now: Instant) -> Duration {
        forced.reject(generation);
        forced.want(generation);
        forced.attempt(now);
        forced.minted(generation + 1);
        forced.reject(generation + 1);
        forced.allowed_at().unwrap() - now
    }

    #[tokio::test(start_paused = true)]
    async fn the_interval_doubles_while_what_was_minted_on_demand_is_rejected() {
        let now = Instant::now();
        let mut forced = Forced::default();
        let intervals: Vec<_> = (1..=8)
            .map(|generation| force(&mut forced, generation, now).as_secs())
            .collect();
        assert_eq!(intervals, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_that_works_resets_the_interval() {
        let now = Instant::now();
        let mut forced = Forced::default();
        force(&mut forced, 1, now);
        assert!(forced.is_strained());
        forced.accept(1);
        assert!(forced.is_strained(), "an older generation proves nothing");
        forced.accept(2);
        assert!(!forced.is_strained());
        assert_eq!(forced.allowed_at().unwrap() - now, FIRST_INTERVAL);
    }

    #[tokio::test(start_paused = true)]
    async fn rejections_of_scheduled_credentials_do_not_lengthen_the_interval() {
        let now = Instant::now();
        let mut forced = Forced::default();
        for generation in 1..10 {
            forced.minted(generation);
            forced.reject(generation);
        }
        forced.want(9);
        forced.attempt(now);
        assert_eq!(forced.allowed_at().unwrap() - now, FIRST_INTERVAL);
    }
}
