//! Recent refusals and wakes, bounded: a summary for the status page and the console, not a log.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};

use super::Label;
use crate::{protocol::error::Report, telemetry::labels::Reason};

/// Distinct failures kept.
const FAILURES: usize = 50;
/// Wakes kept.
const WAKES: usize = 50;

/// Why clients were refused; one entry for all refusals with the same message.
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
    /// The endpoint.
    pub endpoint: Label,
    /// The metric label.
    pub reason: Reason,
    /// The error sent to the client.
    pub report: Report,
}

/// One wake of an endpoint that clients waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecentWake {
    /// When it answered.
    pub at: Timestamp,
    /// The endpoint.
    pub endpoint: Label,
    /// The longest wait of a client.
    pub longest: Duration,
    /// Clients that waited and were served.
    pub clients: u64,
}

/// Recent refusals and wakes, the latest first.
#[derive(Debug, Default)]
pub struct Recent {
    failures: Mutex<VecDeque<RecentFailure>>,
    wakes: Mutex<VecDeque<RecentWake>>,
}

impl Recent {
    /// Records the refusal of a client.
    pub fn refused(
        &self,
        session: u64,
        endpoint: &Label,
        reason: Reason,
        report: &Report,
        now: Timestamp,
    ) {
        let mut failures = lock(&self.failures);
        let known = failures.iter().position(|failure| {
            // The detail is the server's own and may differ each time.
            failure.endpoint == *endpoint
                && failure.reason == reason
                && failure.report.sqlstate == report.sqlstate
                && failure.report.message == report.message
        });
        let (first, count) = known
            .and_then(|known| failures.remove(known))
            .map_or((now, 0), |failure| (failure.first, failure.count));
        // To the front, so that the failure that has not occurred for longest is removed first.
        failures.push_front(RecentFailure {
            at: now,
            first,
            count: count.saturating_add(1),
            session,
            endpoint: endpoint.clone(),
            reason,
            report: report.clone(),
        });
        failures.truncate(FAILURES);
    }

    /// Records a client served after it had waited for the endpoint to wake. Clients that waited at the same time make
    /// one wake.
    pub fn woke(&self, endpoint: &Label, waited: Duration, now: Timestamp) {
        let began = SignedDuration::try_from(waited)
            .ok()
            .and_then(|waited| now.checked_sub(waited).ok())
            .unwrap_or(now);
        let mut wakes = lock(&self.wakes);
        let same = wakes
            .iter_mut()
            // Served after this client began to wait: both waited at the same time.
            .find(|wake| wake.endpoint == *endpoint && wake.at >= began);
        if let Some(wake) = same {
            wake.longest = wake.longest.max(waited);
            wake.clients = wake.clients.saturating_add(1);
            return;
        }
        wakes.push_front(RecentWake {
            at: now,
            endpoint: endpoint.clone(),
            longest: waited,
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

    fn refuse(recent: &Recent, session: u64, message: &str, detail: &str, now: Timestamp) {
        let report = Report::new("28P01", message).with_detail(detail);
        recent.refused(session, &Label::new("e"), Reason::Identity, &report, now);
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn repeated_refusals_are_counted_and_the_latest_come_first() {
        let recent = Recent::default();
        refuse(&recent, 1, "no", "first", at(10));
        refuse(&recent, 2, "never", "", at(11));
        refuse(&recent, 3, "no", "second", at(12));
        let failures = recent.failures();
        let shown: Vec<_> = failures
            .iter()
            .map(|failure| (failure.report.message.as_str(), failure.count))
            .collect();
        assert_eq!(shown, [("no", 2), ("never", 1)]);
        assert_eq!(
            (failures[0].first, failures[0].at, failures[0].session),
            (at(10), at(12), 3)
        );
        assert_eq!(failures[0].report.detail.as_deref(), Some("second"));
    }

    #[test]
    fn lists_are_bounded() {
        let recent = Recent::default();
        let label = Label::new("e");
        for second in 0..200 {
            refuse(&recent, 1, &second.to_string(), "", at(second * 100));
            recent.woke(&label, Duration::from_secs(1), at(second * 100));
        }
        assert_eq!(
            (recent.failures().len(), recent.wakes().len()),
            (FAILURES, WAKES)
        );
        assert_eq!(recent.failures()[0].report.message, "199");
    }

    #[test]
    fn clients_that_waited_together_make_one_wake() {
        let recent = Recent::default();
        let (a, b) = (Label::new("a"), Label::new("b"));
        recent.woke(&a, Duration::from_secs(3), at(100));
        recent.woke(&b, Duration::from_secs(1), at(100));
        recent.woke(&a, Duration::from_secs(4), at(101));
        recent.woke(&a, Duration::from_secs(2), at(500));
        let wakes = recent.wakes();
        let shown: Vec<_> = wakes
            .iter()
            .map(|wake| (wake.endpoint.name(), wake.clients, wake.longest.as_secs()))
            .collect();
        assert_eq!(shown, [("a", 1, 2), ("b", 1, 1), ("a", 2, 4)]);
    }
}
