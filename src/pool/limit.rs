//! How many server connections a pool may have.

use std::time::Duration;

use tokio::time::Instant;

use crate::{config::PoolSettings, telemetry::Metrics};

/// After this time without a refusal the learned limit is tried one higher.
const RAISE_AFTER: Duration = Duration::from_mins(1);
/// The longest such time, which doubles with each refusal.
const MAX_RAISE_AFTER: Duration = Duration::from_mins(15);

/// The limit that the server's refusals have shown (SQLSTATE 53300). Other proxies and applications share the server's
/// limit, so that it is tried again, as long as a client waits.
#[derive(Clone, Copy, Debug)]
pub(super) struct LearnedLimit {
    pub(super) servers: usize,
    raise_at: Instant,
    interval: Duration,
}

/// The limits of a pool.
#[derive(Debug, Default)]
pub(super) struct Limit {
    pub(super) learned: Option<LearnedLimit>,
    /// The configured and the learned one, as the gauges count them.
    shown: [i64; 2],
}

impl Limit {
    /// The configured number of server connections; for a client that has waited long the reserve is included.
    pub(super) fn configured(settings: &PoolSettings, waited: Duration) -> usize {
        let max = settings.max_size();
        if waited >= settings.reserve_pool_timeout {
            max
        } else {
            max.min(settings.default_pool_size)
        }
    }

    /// Whether one more may be opened for a client that has `waited`, beside `open` ones.
    pub(super) fn admits(
        &mut self,
        open: usize,
        settings: &PoolSettings,
        waited: Duration,
    ) -> bool {
        if open >= Self::configured(settings, waited) {
            return false;
        }
        let Some(learned) = &mut self.learned else {
            return true;
        };
        let now = Instant::now();
        if open >= learned.servers && now >= learned.raise_at {
            learned.servers = open.saturating_add(1);
            learned.raise_at = now + learned.interval;
        }
        open < learned.servers
    }

    /// Counts the limits in the gauges; after each change.
    pub(super) fn show(&mut self, settings: &PoolSettings, metrics: &Metrics) {
        let configured = Self::configured(settings, Duration::ZERO);
        let learned = self.learned.map_or(configured, |learned| learned.servers);
        let number = |limit: usize| i64::try_from(limit).unwrap_or(i64::MAX);
        self.shown_as(
            [number(configured), number(learned.min(configured))],
            metrics,
        );
    }

    /// Takes the limits of a pool that goes out of the gauges.
    pub(super) fn hide(&mut self, metrics: &Metrics) {
        self.shown_as([0, 0], metrics);
    }

    fn shown_as(&mut self, new: [i64; 2], metrics: &Metrics) {
        let [configured, learned] = std::mem::replace(&mut self.shown, new);
        metrics.pool_limit.add(new[0].saturating_sub(configured));
        metrics
            .pool_limit_learned
            .add(new[1].saturating_sub(learned));
    }

    /// The time from which the learned limit may be raised.
    pub(super) fn raise_at(&self) -> Option<Instant> {
        self.learned.map(|learned| learned.raise_at)
    }

    /// Records that the server refused a connection beside `open` others.
    pub(super) fn refused(&mut self, open: usize) {
        let interval = self.learned.map_or(RAISE_AFTER, |learned| {
            learned.interval.saturating_mul(2).min(MAX_RAISE_AFTER)
        });
        self.learned = (open > 0).then(|| LearnedLimit {
            servers: open,
            raise_at: Instant::now() + interval,
            interval,
        });
    }

    /// Records that the server accepted a connection, now one of `open`.
    pub(super) fn accepted(&mut self, open: usize, settings: &PoolSettings) {
        if let Some(learned) = &mut self.learned
            && open >= learned.servers
        {
            learned.interval = RAISE_AFTER;
            if open >= Self::configured(settings, Duration::MAX) {
                self.learned = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn settings(size: usize) -> PoolSettings {
        PoolSettings {
            default_pool_size: size,
            ..PoolSettings::default()
        }
    }

    #[test]
    fn the_reserve_is_for_clients_that_have_waited() {
        let settings = PoolSettings {
            reserve_pool_size: 3,
            reserve_pool_timeout: Duration::from_secs(5),
            ..settings(20)
        };
        let configured = |seconds| Limit::configured(&settings, Duration::from_secs(seconds));
        assert_eq!((configured(0), configured(4), configured(5)), (20, 20, 23));
        let capped = PoolSettings {
            max_db_connections: 21,
            ..settings
        };
        assert_eq!(Limit::configured(&capped, Duration::from_secs(5)), 21);
    }

    #[test]
    fn the_gauges_have_the_sums_of_all_pools() {
        let metrics = Metrics::new().unwrap();
        let shown = || (metrics.pool_limit.get(), metrics.pool_limit_learned.get());
        let (mut one, mut other) = (Limit::default(), Limit::default());
        one.show(&settings(20), &metrics);
        other.show(&settings(20), &metrics);
        assert_eq!(shown(), (40, 40));
        one.refused(7);
        one.show(&settings(20), &metrics);
        assert_eq!(shown(), (40, 27));
        one.show(&settings(5), &metrics);
        assert_eq!(shown(), (25, 25), "learned above the size");
        one.hide(&metrics);
        other.hide(&metrics);
        assert_eq!(shown(), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_lowers_the_limit_and_time_raises_it_by_one() {
        let (settings, mut limit) = (settings(20), Limit::default());
        let admits = |limit: &mut Limit, open| limit.admits(open, &settings, Duration::ZERO);
        assert!(admits(&mut limit, 7) && !admits(&mut limit, 20));
        limit.refused(7);
        assert!(admits(&mut limit, 6) && !admits(&mut limit, 7));
        advance(RAISE_AFTER).await;
        assert!(admits(&mut limit, 7), "one attempt");
        assert!(!admits(&mut limit, 8));
        limit.refused(7);
        advance(RAISE_AFTER).await;
        assert!(!admits(&mut limit, 7), "the interval has doubled");
        advance(RAISE_AFTER).await;
        assert!(admits(&mut limit, 7));
        limit.accepted(8, &settings);
        advance(RAISE_AFTER).await;
        advance(RAISE_AFTER).await;
        assert!(admits(&mut limit, 8));
        limit.accepted(20, &settings);
        assert!(limit.learned.is_none(), "nothing is left to learn");
    }
}
