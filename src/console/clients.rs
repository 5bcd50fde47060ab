//! Limits the console's clients; idle ones give way.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Maximum number of clients; one more evicts the one that has been idle longest.
pub(super) const CLIENTS: usize = 32;

/// The console's clients; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    permits: BTreeMap<u64, (Instant, CancellationToken)>,
}

/// A client's permit, returned when dropped.
#[derive(Debug)]
pub(super) struct ClientPermit {
    clients: Clients,
    number: u64,
    /// Cancelled when another client evicts this one.
    pub(super) evicted: CancellationToken,
}

impl Clients {
    /// A permit for one more client.
    pub(super) fn enter(&self) -> ClientPermit {
        let mut state = self.state();
        if state.permits.len() >= CLIENTS {
            let idle = state.permits.iter().min_by_key(|(_, (seen, _))| *seen);
            let idle = idle.map(|(number, _)| *number);
            if let Some((_, evicted)) = idle.and_then(|number| state.permits.remove(&number)) {
                evicted.cancel();
            }
        }
        let number = state.next;
        state.next = number.wrapping_add(1);
        let evicted = CancellationToken::new();
        state
            .permits
            .insert(number, (Instant::now(), evicted.clone()));
        ClientPermit {
            clients: self.clone(),
            number,
            evicted,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientPermit {
    /// Records a message of the client.
    pub(super) fn touch(&self) {
        if let Some((seen, _)) = self.clients.state().permits.get_mut(&self.number) {
            *seen = Instant::now();
        }
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        // An evicted client's number is absent already, and is not used again.
        self.clients.state().permits.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_more_client_evicts_the_one_idle_longest() {
        let clients = Clients::default();
        let mut permits = Vec::new();
        for _ in 0..CLIENTS {
            permits.push(clients.enter());
            advance(Duration::from_secs(1)).await;
        }
        permits[0].touch();
        let one_more = clients.enter();
        let evicted = |place: &ClientPermit| place.evicted.is_cancelled();
        assert!(evicted(&permits[1]), "the second has been idle the longest");
        assert_eq!(permits.iter().filter(|place| evicted(place)).count(), 1);
        drop((permits, one_more));
        assert!(clients.state().permits.is_empty());
    }
}
