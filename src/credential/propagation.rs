//! Retries with a young credential that may not have reached the endpoint yet.
//!
//! The endpoint at times rejects a credential for a few seconds after its mint. A new one would be rejected for as long, so
//! the same one is tried again first: by one client at a time, until the endpoint has accepted it once, and for a short time.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::MutexGuard,
    time::{Instant, sleep, timeout_at},
};

/// A credential older than this has reached the endpoint.
const YOUNG: Duration = Duration::from_mins(1);
/// A young credential is tried again for this long after its first rejection.
const GRACE: Duration = Duration::from_secs(3);
/// The longest wait before an attempt; its second half is random.
const PAUSE: Duration = Duration::from_secs(1);

/// The acceptance of the latest credential at one endpoint.
#[derive(Debug, Default)]
pub(super) struct Propagation {
    /// The latest generation that the endpoint accepted; 0: none.
    accepted: AtomicU64,
    // A lock of the standard library: never held across an await, unlike `probe`.
    first_rejection: Mutex<Option<Rejection>>,
    /// Held by the client that tries again.
    probe: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Rejection {
    generation: u64,
    at: Instant,
}

/// The right to try a rejected credential again; held until that attempt has ended.
#[derive(Debug)]
pub(crate) struct Probe<'a>(
    #[expect(dead_code, reason = "held, not read")] Option<MutexGuard<'a, ()>>,
);

impl Propagation {
    /// Records an accepted login.
    pub(super) fn accepted(&self, generation: u64) {
        // The maximum: a login with an older generation may be accepted later.
        self.accepted.fetch_max(generation, Ordering::Relaxed);
    }

    /// Waits until this generation, rejected at this age, is worth another attempt; `None` if it is not, or not before
    /// `deadline`. Cancel safe.
    pub(super) async fn probe(
        &self,
        generation: u64,
        age: Duration,
        deadline: Instant,
    ) -> Option<Probe<'_>> {
        if age >= YOUNG || self.is_accepted(generation) {
            return None;
        }
        let ends_at = (self.first_rejection(generation)? + GRACE).min(deadline);
        let probe = async {
            let guard = self.probe.lock().await;
            // If another client's attempt was accepted meanwhile, no client needs to wait.
            if self.is_accepted(generation) {
                return Probe(None);
            }
            // With the lock held: the next client's pause begins only after this attempt has failed.
            sleep(PAUSE.mul_f64(rand::random_range(0.5..1.0))).await;
            Probe(Some(guard))
        };
        // A dropped wait leaves the queue of the lock, or releases it.
        timeout_at(ends_at, probe).await.ok()
    }

    fn is_accepted(&self, generation: u64) -> bool {
        generation <= self.accepted.load(Ordering::Relaxed)
    }

    /// When this generation was first rejected; `None` if a later one was rejected since.
    fn first_rejection(&self, generation: u64) -> Option<Instant> {
        let mut first = self
            .first_rejection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // A later generation stays: a login that began with an older one may be rejected after it.
        let known = first.filter(|rejection| rejection.generation >= generation);
        let at = Instant::now();
        let rejection = *first.insert(known.unwrap_or(Rejection { generation, at }));
        (rejection.generation == generation).then_some(rejection.at)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn later() -> Instant {
        Instant::now() + Duration::from_mins(1)
    }

    #[tokio::test(start_paused = true)]
    async fn a_young_credential_is_tried_again_for_a_short_time_by_one_client_at_a_time() {
        let propagation = Propagation::default();
        let began = Instant::now();
        let client = async || {
            let mut attempts = 0;
            while let Some(_probe) = propagation.probe(1, Duration::from_secs(5), later()).await {
                attempts += 1;
            }
            attempts
        };
        let (first, second) = tokio::join!(client(), client());
        assert!((3..=6).contains(&(first + second)), "{first} and {second}");
        assert!(began.elapsed() <= GRACE);
        advance(GRACE).await;
        assert_eq!(client().await, 0, "one grace for all clients");
        let next = propagation.probe(2, Duration::ZERO, later()).await;
        assert!(next.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_credential_releases_all_waiting_clients() {
        let propagation = Propagation::default();
        let refused = || propagation.probe(1, Duration::ZERO, later());
        let first = refused().await;
        let accept = async {
            propagation.accepted(1);
            drop(first);
        };
        let began = Instant::now();
        let (second, third, ()) = tokio::join!(refused(), refused(), accept);
        assert!(second.is_some() && third.is_some());
        assert!(began.elapsed().is_zero());
    }

    #[tokio::test(start_paused = true)]
    async fn old_and_accepted_credentials_are_not_tried_again() {
        let propagation = Propagation::default();
        assert!(propagation.probe(1, YOUNG, later()).await.is_none());
        propagation.accepted(1);
        assert!(
            propagation
                .probe(1, Duration::ZERO, later())
                .await
                .is_none()
        );
    }
}
