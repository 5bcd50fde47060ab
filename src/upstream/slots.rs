//! How many logins run at the same time.
//!
//! Usually 32. An endpoint that has just woken up is slow, and all of the clients that waited for it want to log in at once: after
//! the one that leads two follow, then four, then eight, as in TCP's slow start.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The most logins at the same time.
pub(super) const CONCURRENT_LOGINS: usize = 32;

/// The slots for logins at one endpoint.
pub(super) struct LoginSlots(Mutex<State>);

struct State {
    semaphore: Arc<Semaphore>,
    /// The number of slots: those in the semaphore, and those taken from it.
    slots: usize,
}

impl State {
    fn with(slots: usize) -> Self {
        Self {
            semaphore: Arc::new(Semaphore::new(slots)),
            slots,
        }
    }
}

impl Default for LoginSlots {
    fn default() -> Self {
        Self(Mutex::new(State::with(CONCURRENT_LOGINS)))
    }
}

impl LoginSlots {
    /// Takes a slot until it is dropped. Cancel safe.
    pub(super) async fn take(&self) -> OwnedSemaphorePermit {
        loop {
            let semaphore = Arc::clone(&self.lock().semaphore);
            // Closed if the endpoint has stopped responding meanwhile.
            if let Ok(slot) = semaphore.acquire_owned().await {
                return slot;
            }
        }
    }

    /// Records that the endpoint does not respond: there is one slot until it does. Logins that have begun before do not take it,
    /// as they may hang.
    pub(super) fn start_over(&self) {
        let before = std::mem::replace(&mut *self.lock(), State::with(1));
        before.semaphore.close();
    }

    /// Records that the endpoint responds: each time there is one more slot, up to the maximum.
    pub(super) fn grow(&self) {
        let mut state = self.lock();
        if state.slots < CONCURRENT_LOGINS {
            state.slots += 1;
            state.semaphore.add_permits(1);
        }
    }

    /// Those that no login has taken.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.lock().semaphore.available_permits()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn after_an_outage_each_answer_adds_a_slot() {
        let slots = LoginSlots::default();
        let hanging = slots.take().await;
        assert_eq!(slots.free(), CONCURRENT_LOGINS - 1);
        slots.start_over();
        assert_eq!(slots.free(), 1, "the one that hangs does not count");
        let mut expected = 1;
        for round in [2, 4, 8, 16, 32, 32] {
            let taken: Vec<_> = (0..expected)
                .map(|_| slots.take().now_or_never().expect("a slot"))
                .collect();
            assert!(slots.take().now_or_never().is_none());
            for slot in taken {
                slots.grow();
                drop(slot);
            }
            assert_eq!(slots.free(), round);
            expected = round;
        }
        drop(hanging);
        assert_eq!(slots.free(), CONCURRENT_LOGINS);
    }

    #[tokio::test]
    async fn a_wait_for_a_slot_goes_on_after_an_outage_begins() {
        let slots = LoginSlots::default();
        let mut taken = Vec::new();
        while let Some(slot) = slots.take().now_or_never() {
            taken.push(slot);
        }
        let mut waiting = pin!(slots.take());
        assert!(waiting.as_mut().now_or_never().is_none());
        slots.start_over();
        assert!(waiting.now_or_never().is_some());
    }
}
