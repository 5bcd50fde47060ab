//! What went wrong lately, and how long the endpoint took to wake: a few lines for whoever looks, not a log.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};

use crate::{
    protocol::error::Report,
    upstream::{Label, Refusal},
};

/// Kinds of failure remembered.
const FAILURES: usize = 50;
/// Wakes remembered.
const WAKES: usize = 50;

/// Why clients were refused; one entry for all that were told the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentFailure {
    /// The last time.
    pub at: Timestamp,
    /// The first time.
    pub first: Timestamp,
    /// How many times.
    pub count: u64,
    /// The session of the last time, as in the log.
    pub session: u64,
    /// Where it was to lead.
    pub endpoint: Label,
    /// The metric label.
    pub reason: &'static str,
    /// What the client was told.
    pub report: Report,
}

/// One time that an endpoint was waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentWake {
    /// When it was up.
    pub at: Timestamp,
    /// Which.
    pub endpoint: Label,
    /// The longest that a client waited.
    pub longest: Duration,
    /// Clients that waited and were served.
    pub clients: u64,
}

/// Both, the latest first.
#[derive(Debug, Default)]
pub struct Recent {
    failures: Mutex<VecDeque<RecentFailure>>,
    wakes: Mutex<VecDeque<RecentWake>>,
}

impl Recent {
    /// A client was refused.
    pub fn refused(&self, session: u64, endpoint: &Label, refusal: &Refusal, now: Timestamp) {
        let mut failures = lock(&self.failures);
        let known = failures.iter().position(|failure| {
            // The detail is the server's own and may differ each time.
            failure.endpoint == *endpoint
                && failure.reason == refusal.reason
                && failure.report.sqlstate == refusal.report.sqlstate
                && failure.report.message == refusal.report.message
        });
        let (first, count) = known
            .and_then(|known| failures.remove(known))
            .map_or((now, 0), |failure| (failure.first, failure.count));
        failures.push_front(RecentFailure {
            at: now,
            first,
            count: count.saturating_add(1),
            session,
            endpoint: endpoint.clone(),
            reason: refusal.reason,
            report: refusal.report.clone(),
        });
        failures.truncate(FAILURES);
    }

    /// A client was served after it had been held for so long. Clients held at the same time make one wake.
    pub fn woke(&self, endpoint: &Label, held: Duration, now: Timestamp) {
        let began = SignedDuration::try_from(held)
            .ok()
            .and_then(|held| now.checked_sub(held).ok())
            .unwrap_or(now);
        let mut wakes = lock(&self.wakes);
        let same = wakes
            .iter_mut()
            .find(|wake| wake.endpoint == *endpoint && wake.at >= began);
        if let Some(wake) = same {
            wake.longest = wake.longest.max(held);
            wake.clients = wake.clients.saturating_add(1);
            return;
        }
        wakes.push_front(RecentWake {
            at: now,
            endpoint: endpoint.clone(),
            longest: held,
            clients: 1,
        });
        wakes.truncate(WAKES);
    }

    /// The failures, the latest first.
    pub fn failures(&self) -> Vec<RecentFailure> {
        lock(&self.failures).iter().cloned().collect()
    }

    /// The wakes, the latest first.
    pub fn wakes(&self) -> Vec<RecentWake> {
        lock(&self.wakes).iter().cloned().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(message: &str, detail: &str) -> Refusal {
        Refusal {
            report: Report::new("28P01", message).with_detail(detail),
            reason: "identity",
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_repeats_is_counted_and_what_is_new_comes_first() {
        let recent = Recent::default();
        let label = Label::new("e");
        recent.refused(1, &label, &refusal("no", "first"), at(10));
        recent.refused(2, &label, &refusal("never", ""), at(11));
        recent.refused(3, &label, &refusal("no", "second"), at(12));
        let failures = recent.failures();
        let told: Vec<_> = failures
            .iter()
            .map(|failure| (failure.report.message.as_str(), failure.count))
            .collect();
        assert_eq!(told, [("no", 2), ("never", 1)]);
        assert_eq!(
            (failures[0].first, failures[0].at, failures[0].session),
            (at(10), at(12), 3)
        );
        assert_eq!(failures[0].report.detail.as_deref(), Some("second"));
    }

    #[test]
    fn no_more_than_so_many_are_kept() {
        let recent = Recent::default();
        let label = Label::new("e");
        for second in 0..200 {
            recent.refused(
                1,
                &label,
                &refusal(&second.to_string(), ""),
                at(second * 100),
            );
            recent.woke(&label, Duration::from_secs(1), at(second * 100));
        }
        assert_eq!(
            (recent.failures().len(), recent.wakes().len()),
            (FAILURES, WAKES)
        );
        assert_eq!(recent.failures()[0].report.message, "199");
    }

    #[test]
    fn clients_that_waited_together_waited_for_one_wake() {
        let recent = Recent::default();
        let (a, b) = (Label::new("a"), Label::new("b"));
        recent.woke(&a, Duration::from_secs(3), at(100));
        recent.woke(&b, Duration::from_secs(1), at(100));
        recent.woke(&a, Duration::from_secs(4), at(101));
        recent.woke(&a, Duration::from_secs(2), at(500));
        let wakes = recent.wakes();
        let told: Vec<_> = wakes
            .iter()
            .map(|wake| (wake.endpoint.name(), wake.clients, wake.longest.as_secs()))
            .collect();
        assert_eq!(told, [("a", 1, 2), ("b", 1, 1), ("a", 2, 4)]);
    }
}
