//! Bounds the console's clients without letting idle ones lock out others.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Clients at a time; one more takes the place of the one that has been idle the longest.
pub(super) const CLIENTS: usize = 32;

/// The console's clients; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    places: BTreeMap<u64, (Instant, CancellationToken)>,
}

/// A client's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    clients: Clients,
    number: u64,
    /// Cancelled when another client takes the place.
    pub(super) evicted: CancellationToken,
}

impl Clients {
    /// A place for one more.
    pub(super) fn enter(&self) -> Place {
        let mut state = self.state();
        if state.places.len() >= CLIENTS {
            let idle = state.places.iter().min_by_key(|(_, (seen, _))| *seen);
            let idle = idle.map(|(number, _)| *number);
            if let Some((_, evicted)) = idle.and_then(|number| state.places.remove(&number)) {
                evicted.cancel();
            }
        }
        let number = state.next;
        state.next = number.wrapping_add(1);
        let evicted = CancellationToken::new();
        state
            .places
            .insert(number, (Instant::now(), evicted.clone()));
        Place {
            clients: self.clone(),
            number,
            evicted,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The client has sent something.
    pub(super) fn touch(&self) {
        if let Some((seen, _)) = self.clients.state().places.get_mut(&self.number) {
            *seen = Instant::now();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.state().places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_more_takes_the_place_of_the_one_idle_longest() {
        let clients = Clients::default();
        let mut places = Vec::new();
        for _ in 0..CLIENTS {
            places.push(clients.enter());
            advance(Duration::from_secs(1)).await;
        }
        places[0].touch();
        let one_more = clients.enter();
        let evicted = |place: &Place| place.evicted.is_cancelled();
        assert!(evicted(&places[1]), "the second has been idle the longest");
        assert_eq!(places.iter().filter(|place| evicted(place)).count(), 1);
        drop((places, one_more));
        assert!(clients.state().places.is_empty());
    }
}
