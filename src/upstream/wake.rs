//! The wake state of an endpoint: while it wakes, clients attempt a login one at a time, first come, first served, and each
//! failure reaches all waiting clients.
//!
//! A client whose attempt failed goes to the end of the queue: if its own settings make its logins fail, the others lose one
//! attempt, not their whole budget.

use std::{collections::BTreeSet, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{budget::Budget, failure::Failure};
use crate::net::backoff::Backoff;

/// Between attempts at an endpoint that wakes or has no capacity.
pub(super) const RETRY: Backoff =
    Backoff::new(Duration::from_millis(100), Duration::from_secs(2)).with_growth(1.5);
/// After this long without an attempt the waits start over: a new client should not pay for old failures.
const RESET_AFTER: Duration = Duration::from_secs(30);

/// The wake state of one endpoint; waiting clients follow its changes.
#[derive(Default)]
pub(super) struct Wake(watch::Sender<WakeState>);

#[derive(Default)]
struct WakeState {
    /// Present while the endpoint does not respond.
    waking: Option<Waking>,
    /// A client spent its whole budget without success, and no login has succeeded since.
    has_spent_budget: bool,
    /// The clients that wait, by the order of their coming; the next attempt is the first one's.
    queue: BTreeSet<u64>,
    next_place: u64,
}

struct Waking {
    since: Instant,
    last_failure: Failure,
    backoff: Backoff,
    next_attempt: Instant,
}

/// A place in the queue until it is dropped. The first place is the right to make the next attempt.
pub(super) struct Place<'a> {
    wake: &'a Wake,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.wake.0.send_if_modified(|state| {
            // Wakes the others only if one of them may go next.
            let was_first = state.queue.first() == Some(&self.number);
            state.queue.remove(&self.number);
            was_first
        });
    }
}

impl Wake {
    pub(super) fn is_waking(&self) -> bool {
        self.0.borrow().waking.is_some()
    }

    /// Whether a client spent its whole budget without success, and no login has succeeded since.
    pub(super) fn has_spent_budget(&self) -> bool {
        self.0.borrow().has_spent_budget
    }

    /// Records that a client spent its whole budget without success.
    pub(super) fn spend_budget(&self) {
        self.0.send_modify(|state| state.has_spent_budget = true);
    }

    /// Waits until the endpoint responds (then `None`) or until the next attempt is this client's.
    ///
    /// Cancel safe: dropping it leaves the queue.
    ///
    /// # Errors
    /// The last failure of any client's attempt, once no further attempt fits into the budget.
    pub(super) async fn turn(&self, budget: &mut Budget) -> Result<Option<Place<'_>>, Failure> {
        if !self.is_waking() {
            return Ok(None);
        }
        let mut state = self.0.subscribe();
        let place = self.enter();
        loop {
            let (is_first, next_attempt) = {
                let state = state.borrow_and_update();
                let Some(waking) = &state.waking else {
                    return Ok(None);
                };
                budget.observe(&waking.last_failure);
                let (now, is_in_time) = (Instant::now(), waking.next_attempt < budget.ends_at());
                if now >= budget.ends_at() || (budget.has_attempted() && !is_in_time) {
                    return Err(waking.last_failure.clone());
                }
                // A budget shorter than the wait still allows one attempt.
                let next_attempt = if is_in_time { waking.next_attempt } else { now };
                (state.queue.first() == Some(&place.number), next_attempt)
            };
            tokio::select! {
                // Cannot fail: the sender lives as long as `self`.
                _ = state.changed() => {}
                () = sleep_until(next_attempt), if is_first => return Ok(Some(place)),
                () = sleep_until(budget.ends_at()) => {}
            }
        }
    }

    /// The last place of the queue. No other client's place changes, so none is notified.
    fn enter(&self) -> Place<'_> {
        let mut number = 0;
        self.0.send_if_modified(|state| {
            number = state.next_place;
            state.next_place += 1;
            state.queue.insert(number);
            false
        });
        Place { wake: self, number }
    }

    /// Records an attempt that found the endpoint waking. Attempts already in progress when the first one failed have no
    /// place, and do not lengthen the wait.
    pub(super) fn failed(&self, failure: &Failure, is_leading: bool) {
        let now = Instant::now();
        self.0.send_modify(|state| {
            let Some(waking) = &mut state.waking else {
                let mut backoff = RETRY;
                state.waking = Some(Waking {
                    since: now,
                    last_failure: failure.clone(),
                    next_attempt: now + backoff.next(),
                    backoff,
                });
                return;
            };
            waking.last_failure = failure.clone();
            if is_leading {
                if now > waking.next_attempt + RESET_AFTER {
                    waking.backoff.reset();
                }
                waking.next_attempt = now + waking.backoff.next();
            }
        });
    }

    /// Records that the endpoint responds; returns how long it was waking, if it was.
    pub(super) fn answered(&self) -> Option<Duration> {
        let mut since = None;
        self.0.send_if_modified(|state| {
            since = state.waking.take().map(|waking| waking.since);
            since.is_some()
        });
        since.map(|since| since.elapsed())
    }

    /// Records a successful login; returns how long the endpoint was waking, if it was.
    pub(super) fn logged_in(&self) -> Option<Duration> {
        // Checked first: `send_modify` wakes every waiting client.
        if self.has_spent_budget() {
            self.0.send_modify(|state| state.has_spent_budget = false);
        }
        self.answered()
    }
}

#[cfg(test)]
mod tests {
    use std::{io, pin::pin};

    use tokio::{task::yield_now, time::timeout};

    use super::*;

    const LONG: Duration = Duration::from_mins(1);

    fn refused() -> Failure {
        Failure::dial(&io::ErrorKind::ConnectionRefused.into())
    }

    fn unresolved() -> Failure {
        Failure::resolve("db.example", &io::Error::other("no such name"))
    }

    fn budget() -> Budget {
        Budget::new(LONG)
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_attempt_passes_the_lead_to_the_next_client() {
        let wake = Wake::default();
        wake.failed(&refused(), false);
        let (mut first, mut second) = (budget(), budget());
        let lead = wake.turn(&mut first).await.unwrap().expect("leads");
        let mut waiting = pin!(wake.turn(&mut second));
        assert!(timeout(Duration::from_secs(1), &mut waiting).await.is_err());
        wake.failed(&refused(), true);
        drop(lead);
        assert!(waiting.await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_releases_all_waiting_clients() {
        let wake = Wake::default();
        wake.failed(&refused(), false);
        let (mut first, mut second) = (budget(), budget());
        let release = async {
            yield_now().await;
            assert!(wake.answered().is_some());
        };
        let (first, second, ()) =
            tokio::join!(wake.turn(&mut first), wake.turn(&mut second), release);
        assert!(first.unwrap().is_none() && second.unwrap().is_none());
        assert!(wake.answered().is_none(), "no longer waking");
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_does_not_resolve_fails_waiting_clients_within_its_own_budget() {
        let wake = Wake::default();
        wake.failed(&unresolved(), false);
        let began = Instant::now();
        let (mut first, mut second) = (budget(), budget());
        let _lead = wake.turn(&mut first).await.unwrap();
        // The leader's lookup never ends; the others do not wait for it.
        let failure = wake.turn(&mut second).await.err().expect("out of time");
        assert!(failure.is_dns && began.elapsed() <= Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_spent_budget_is_remembered_until_a_login_succeeds() {
        let wake = Wake::default();
        wake.failed(&refused(), false);
        wake.spend_budget();
        wake.answered();
        assert!(wake.has_spent_budget());
        wake.logged_in();
        assert!(!wake.has_spent_budget());
    }

    #[tokio::test(start_paused = true)]
    async fn waits_start_over_after_a_long_time_without_an_attempt() {
        let wake = Wake::default();
        let wait = || {
            wake.failed(&refused(), true);
            let state = wake.0.borrow();
            state.waking.as_ref().unwrap().next_attempt - Instant::now()
        };
        let last = (0..20).map(|_| wait()).fold(Duration::ZERO, |_, wait| wait);
        assert!(last >= Duration::from_secs(1), "{last:?}");
        tokio::time::advance(RESET_AFTER + 2 * last).await;
        assert!(wait() <= Duration::from_millis(100));
    }
}
