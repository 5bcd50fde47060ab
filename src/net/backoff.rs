//! Exponential backoff with jitter.

use std::time::Duration;

/// Waits between attempts: the first, then a multiple of the last up to a maximum, each partly random so that many clients
/// do not retry in step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    most: Duration,
    growth: f64,
    failures: u32,
}

impl Backoff {
    /// Each wait is twice the last.
    pub(crate) const fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            growth: 2.0,
            failures: 0,
        }
    }

    /// Each wait is `growth` times the last.
    pub(crate) const fn with_growth(self, growth: f64) -> Self {
        Self { growth, ..self }
    }

    /// The wait before the next attempt: half to all of its length, since a longer one can miss the end of a short budget.
    pub(crate) fn next(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        self.nth(self.failures, -jitter().abs())
    }

    /// The wait after the `n`th failure in a row, counted from 1; `jitter` is in -1..=1.
    pub(crate) fn nth(&self, n: u32, jitter: f64) -> Duration {
        // Bounded, so that the product stays in range; every maximum is reached before.
        let steps = i32::try_from(n.saturating_sub(1).min(16)).unwrap_or(16);
        let wait = self.first.mul_f64(self.growth.powi(steps)).min(self.most);
        spread(wait, jitter)
    }

    /// Starts again with the first wait.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Whether no attempt has failed since the start or the last reset.
    pub(crate) fn is_fresh(&self) -> bool {
        self.failures == 0
    }
}

/// Half to one and a half times `wait`; never zero, so that no loop can spin.
pub(crate) fn spread(wait: Duration, jitter: f64) -> Duration {
    // `clamp` keeps a NaN, and `mul_f64` panics on it.
    let jitter = if jitter.is_finite() { jitter } else { 0.0 };
    wait.mul_f64(1.0 + 0.5 * jitter.clamp(-1.0, 1.0))
}

/// A random number in -1..=1.
pub(crate) fn jitter() -> f64 {
    rand::random_range(-1.0..=1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));

    #[test]
    fn waits_double_up_to_the_maximum() {
        let waits: Vec<_> = (1..=6).map(|n| BACKOFF.nth(n, 0.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(BACKOFF.nth(u32::MAX, 0.0), Duration::from_secs(1));
    }

    #[test]
    fn jitter_spreads_a_wait_over_half_to_one_and_a_half_times() {
        assert_eq!(BACKOFF.nth(1, -1.0), Duration::from_millis(50));
        assert_eq!(BACKOFF.nth(1, 9.0), Duration::from_millis(150));
        assert_eq!(BACKOFF.nth(1, f64::NAN), Duration::from_millis(100));
    }

    #[test]
    fn a_reset_starts_with_the_first_wait_again() {
        let mut backoff = BACKOFF;
        assert!(backoff.is_fresh());
        let last = (0..9).map(|_| backoff.next()).last().unwrap();
        assert!(last >= Duration::from_millis(500) && !backoff.is_fresh());
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }

    #[test]
    fn growth_is_configurable() {
        let backoff = BACKOFF.with_growth(1.5);
        let waits: Vec<_> = (1..=4).map(|n| backoff.nth(n, 0.0).as_micros()).collect();
        assert_eq!(waits, [100_000, 150_000, 225_000, 337_500]);
    }

    #[test]
    fn the_next_wait_is_never_longer_than_its_length() {
        for _ in 0..1000 {
            let wait = { BACKOFF }.next();
            assert!((50..=100).contains(&wait.as_millis()), "{wait:?}");
        }
    }
}
