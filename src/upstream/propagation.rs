//! Whether a credential that was refused may not have reached the endpoint yet.
//!
//! A credential that the workspace has just issued is at times refused for a few seconds. Replacing it at once would start
//! that time anew, so it is tried again first: by one client at a time, until the endpoint has accepted it once, and for a
//! short time.

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
/// For this long after its first refusal a young credential is tried again.
const GRACE: Duration = Duration::from_secs(3);
/// The longest pause before an attempt; a random half of it is left out.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known about the latest credential of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Propagation {
    /// The latest generation that the endpoint accepted; 0: none.
    accepted: AtomicU64,
    first_refusal: Mutex<Option<Refusal>>,
    /// Held by the client that tries again.
    probe: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug)]
struct Refusal {
    generation: u64,
    at: Instant,
}

/// A reason to try the refused credential again; held until that attempt has ended.
#[derive(Debug)]
pub(super) struct Probe<'a>(
    #[expect(dead_code, reason = "held, not read")] Option<MutexGuard<'a, ()>>,
);

impl Propagation {
    /// A login with this generation succeeded.
    pub(super) fn accepted(&self, generation: u64) {
        self.accepted.fetch_max(generation, Ordering::Relaxed);
    }

    /// Waits until this generation, refused at the age `age`, is worth another attempt; `None` if it is not, or not before
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
        let ends_at = (self.first_refusal(generation)? + GRACE).min(deadline);
        let probe = async {
            let guard = self.probe.lock().await;
            // Another client's attempt may have shown that it has arrived: then all go.
            if self.is_accepted(generation) {
                return Probe(None);
            }
            sleep(PAUSE.mul_f64(rand::random_range(0.5..1.0))).await;
            Probe(Some(guard))
        };
        timeout_at(ends_at, probe).await.ok()
    }

    fn is_accepted(&self, generation: u64) -> bool {
        generation <= self.accepted.load(Ordering::Relaxed)
    }

    /// When this generation was first refused; `None` if a later one was refused since.
    fn first_refusal(&self, generation: u64) -> Option<Instant> {
        let mut first = self
            .first_refusal
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = first.filter(|refusal| refusal.generation >= generation);
        let at = Instant::now();
        let refusal = *first.insert(known.unwrap_or(Refusal { generation, at }));
        (refusal.generation == generation).then_some(refusal.at)
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
    async fn once_it_is_accepted_all_that_wait_go() {
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
    async fn an_old_credential_and_one_that_was_accepted_are_not_tried_again() {
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
