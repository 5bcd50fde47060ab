//! Where the clients of one endpoint are until they have said what they want: only so many at a time.
//!
//! When all places are taken and another client comes, whoever has been here longest is asked to leave, once that is long
//! for a client that means to say anything. So clients that say nothing, however many, hold others up for a moment only.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// Clients in it.
const PLACES: usize = 256;
/// What nobody is asked to leave before.
const WELCOME: Duration = Duration::from_secs(2);
/// What passes before somebody is asked to leave at least: after a standstill of the machine all have been here long, and
/// only wait to be heard.
const CHANCE: Duration = Duration::from_millis(10);

/// A lobby; cheap to clone.
#[derive(Clone, Debug)]
pub struct Lobby(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    places: Arc<Semaphore>,
    next: AtomicU64,
    /// Those who have not been asked to leave, in the order they came.
    guests: Mutex<BTreeMap<u64, (Instant, CancellationToken)>>,
}

impl Default for Lobby {
    fn default() -> Self {
        Self::with_places(PLACES)
    }
}

impl Lobby {
    fn with_places(places: usize) -> Self {
        Self(Arc::new(Inner {
            places: Arc::new(Semaphore::new(places)),
            next: AtomicU64::new(0),
            guests: Mutex::default(),
        }))
    }

    /// A place for one more. Cancel safe.
    pub async fn enter(&self) -> Guest {
        let place = match Arc::clone(&self.0.places).try_acquire_owned() {
            Ok(place) => Some(place),
            Err(_) => self.make_room().await,
        };
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let leave = CancellationToken::new();
        self.with_guests(|guests| guests.insert(number, (Instant::now(), leave.clone())));
        Guest {
            lobby: self.clone(),
            number,
            leave,
            _place: place,
        }
    }

    /// A place, for which others leave; `None` cannot be, as the places are never closed.
    async fn make_room(&self) -> Option<OwnedSemaphorePermit> {
        loop {
            let longest_here =
                self.with_guests(|guests| guests.first_key_value().map(|(_, (since, _))| *since));
            let place = Arc::clone(&self.0.places).acquire_owned();
            let Some(since) = longest_here else {
                return place.await.ok();
            };
            tokio::select! {
                biased;
                place = place => return place.ok(),
                () = sleep_until((since + WELCOME).max(Instant::now() + CHANCE)) => {
                    if let Some((_, (_, leave))) = self.with_guests(BTreeMap::pop_first) {
                        leave.cancel();
                    }
                }
            }
        }
    }

    fn with_guests<T>(
        &self,
        change: impl FnOnce(&mut BTreeMap<u64, (Instant, CancellationToken)>) -> T,
    ) -> T {
        change(&mut self.0.guests.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A client's place in the lobby, free again when this is dropped.
#[derive(Debug)]
pub struct Guest {
    lobby: Lobby,
    number: u64,
    leave: CancellationToken,
    _place: Option<OwnedSemaphorePermit>,
}

impl Guest {
    /// Returns once others wait for the place. Cancel safe.
    pub(super) async fn asked_to_leave(&self) {
        self.leave.cancelled().await;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.lobby.with_guests(|guests| guests.remove(&self.number));
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_has_been_here_longest_leaves_when_another_comes_and_not_before() {
        let lobby = Lobby::with_places(2);
        let first = lobby.enter().await;
        advance(WELCOME * 10).await;
        let second = lobby.enter().await;
        let began = Instant::now();
        let alone = timeout(WELCOME * 10, first.asked_to_leave()).await;
        assert!(alone.is_err(), "nobody waits");
        let leaving = async {
            first.asked_to_leave().await;
            drop(first);
        };
        let (third, ()) = tokio::join!(lobby.enter(), leaving);
        assert!(began.elapsed() < WELCOME * 10 + CHANCE * 2);
        assert!(timeout(WELCOME, second.asked_to_leave()).await.is_err());
        drop((second, third));
        assert!(lobby.with_guests(|guests| guests.is_empty()));
        assert_eq!(lobby.0.places.available_permits(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_leaves_who_has_just_come() {
        let lobby = Lobby::with_places(1);
        let guest = lobby.enter().await;
        let began = Instant::now();
        tokio::select! {
            _ = lobby.enter() => panic!("the place is taken"),
            () = guest.asked_to_leave() => {}
        }
        assert!(began.elapsed() >= WELCOME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_newcomer_that_gives_up_takes_no_place() {
        let lobby = Lobby::with_places(1);
        let guest = lobby.enter().await;
        assert!(timeout(WELCOME / 2, lobby.enter()).await.is_err());
        drop(guest);
        drop(lobby.enter().await);
        assert_eq!(lobby.0.places.available_permits(), 1);
    }
}
