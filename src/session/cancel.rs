//! Which client key stands for which upstream key.
//!
//! A client is given the process id its server gave and a random secret of ours, so that nobody can cancel anything
//! without having been told that pair, and a key says nothing about the server's.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::protocol::startup::CancelKey;

/// Unknown keys answered without delay in any second.
const UNKNOWN_PER_SECOND: u32 = 10;
/// What a guess costs beyond that.
const UNKNOWN_DELAY: Duration = Duration::from_secs(1);

/// Where a cancel request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The address that the session is connected to.
    pub(super) address: SocketAddr,
    /// The server's own key.
    pub(super) key: CancelKey,
}

/// The keys of all running sessions.
#[derive(Debug)]
pub struct Cancels {
    by_process_id: Mutex<HashMap<u32, Vec<(u32, Target)>>>,
    guesses: Mutex<(Instant, u32)>,
}

impl Default for Cancels {
    fn default() -> Self {
        Self {
            by_process_id: Mutex::default(),
            guesses: Mutex::new((Instant::now(), 0)),
        }
    }
}

impl Cancels {
    /// Gives out a key for a session, good until the registration is dropped.
    pub(super) fn register(self: &Arc<Self>, target: Target) -> Registration {
        let key = CancelKey {
            process_id: target.key.process_id,
            secret: rand::random(),
        };
        self.keys()
            .entry(key.process_id)
            .or_default()
            .push((key.secret, target));
        Registration {
            cancels: Arc::clone(self),
            key,
        }
    }

    /// A key that stands for no session: for a server that gave none.
    pub(super) fn meaningless_key() -> CancelKey {
        CancelKey {
            process_id: rand::random(),
            secret: rand::random(),
        }
    }

    /// The session that `key` stands for.
    pub(super) fn find(&self, key: CancelKey) -> Option<Target> {
        let keys = self.keys();
        // Secrets are single words: comparing them takes one instruction whatever they hold.
        let (_, target) = keys
            .get(&key.process_id)?
            .iter()
            .find(|(secret, _)| *secret == key.secret)?;
        Some(*target)
    }

    /// Takes its time over a key that is not known, once there have been too many. The caller holds its handshake permit
    /// meanwhile, which bounds how many wait.
    pub(super) async fn delay_guess(&self) {
        let over = {
            let mut guesses = self.guesses.lock().unwrap_or_else(PoisonError::into_inner);
            if guesses.0.elapsed() >= Duration::from_secs(1) {
                *guesses = (Instant::now(), 0);
            }
            guesses.1 = guesses.1.saturating_add(1);
            guesses.1 > UNKNOWN_PER_SECOND
        };
        if over {
            sleep(UNKNOWN_DELAY).await;
        }
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<u32, Vec<(u32, Target)>>> {
        self.by_process_id
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key given out; dropping it makes the key unknown, so that a late cancel reaches nobody.
#[derive(Debug)]
pub(super) struct Registration {
    cancels: Arc<Cancels>,
    key: CancelKey,
}

impl Registration {
    /// What the client is given.
    pub(super) fn key(&self) -> CancelKey {
        self.key
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut keys = self.cancels.keys();
        if let Some(entries) = keys.get_mut(&self.key.process_id) {
            entries.retain(|(secret, _)| *secret != self.key.secret);
            if entries.is_empty() {
                keys.remove(&self.key.process_id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(process_id: u32, port: u16) -> Target {
        Target {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            key: CancelKey {
                process_id,
                secret: 1,
            },
        }
    }

    #[tokio::test]
    async fn only_the_whole_pair_finds_its_session_and_only_while_it_lives() {
        let cancels = Arc::new(Cancels::default());
        let one = cancels.register(target(7, 1));
        let two = cancels.register(target(7, 2));
        assert_eq!(
            one.key().process_id,
            7,
            "clients compare it with pg_backend_pid()"
        );
        assert_eq!(cancels.find(one.key()), Some(target(7, 1)));
        assert_eq!(cancels.find(two.key()), Some(target(7, 2)));
        let given = [one.key().secret, two.key().secret];
        let wrong = (0..3).find(|secret| !given.contains(secret)).unwrap();
        assert_eq!(
            cancels.find(CancelKey {
                process_id: 7,
                secret: wrong
            }),
            None
        );
        assert_eq!(
            cancels.find(CancelKey {
                process_id: 8,
                ..one.key()
            }),
            None
        );
        let key = one.key();
        drop(one);
        assert_eq!(cancels.find(key), None);
        assert_eq!(cancels.find(two.key()), Some(target(7, 2)));
        drop(two);
        assert!(cancels.keys().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn guessing_is_slowed_down() {
        let cancels = Cancels::default();
        let began = Instant::now();
        for _ in 0..UNKNOWN_PER_SECOND {
            cancels.delay_guess().await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        cancels.delay_guess().await;
        assert_eq!(began.elapsed(), UNKNOWN_DELAY);
    }

    /// Guesses beyond the 64th were answered at once, so that a flood was faster than a trickle.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_guesses_is_slowed_down_whatever_its_size() {
        let cancels = Arc::new(Cancels::default());
        let known = cancels.register(target(7, 1));
        let began = Instant::now();
        let mut guesses = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let cancels = Arc::clone(&cancels);
            guesses.spawn(async move {
                cancels.delay_guess().await;
                began.elapsed()
            });
        }
        tokio::task::yield_now().await;
        assert!(cancels.find(known.key()).is_some(), "at once");
        let took = guesses.join_all().await;
        let prompt = took.iter().filter(|took| **took < UNKNOWN_DELAY).count();
        assert_eq!(prompt, usize::try_from(UNKNOWN_PER_SECOND).unwrap());
    }
}
