//! Cancel requests, and the keys that sessions give out.
//!
//! A client is given the process id that the server sent and a random secret of ours. So only a client that has received
//! the pair can cancel, and a key reveals nothing about the server's.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::{client::Client, close::Closing, handshake::Handshake};
use crate::{
    net::socket::Transport, protocol::startup::CancelKey, telemetry::labels::CancelOutcome,
};

/// Unknown keys per second that are answered without delay.
const UNKNOWN_PER_SECOND: u32 = 10;
/// The delay of unknown keys beyond that.
const UNKNOWN_DELAY: Duration = Duration::from_secs(1);

/// A client that sent a CancelRequest.
pub(super) struct CancelRequest<'a> {
    pub(super) handshake: Handshake<'a>,
    pub(super) key: CancelKey,
}

impl CancelRequest<'_> {
    /// Forwards the request to the server of the session that the key belongs to. The client's socket closes when that is
    /// done; an unknown key is closed silently, as PostgreSQL does.
    pub(super) async fn forward<S: Transport>(self, client: &mut Client<S>) -> Closing {
        let session = self.handshake.session;
        let endpoint = session.endpoint;
        // No password: a CancelRequest carries none, and its key is the proof ("Canceling Requests in Progress").
        if session.config.access.check_uid(session.peer).is_ok() {
            let outcome = match endpoint.cancel_keys.find(self.key) {
                Found::AtRest => CancelOutcome::AtRest,
                Found::Target(target) => {
                    // Forwarding may take seconds, in which the permit serves another handshake.
                    drop(self.handshake);
                    match endpoint.route.found() {
                        Some(upstream) => {
                            let keepalive = &session.config.connect.keepalive;
                            match upstream.cancel(target.address, target.key, keepalive).await {
                                Ok(()) => CancelOutcome::Forwarded,
                                Err(error) => {
                                    tracing::warn!(%error, "cancel request could not be passed on");
                                    CancelOutcome::Failed
                                }
                            }
                        }
                        None => CancelOutcome::Unknown,
                    }
                }
                Found::Nothing => {
                    let delay = async {
                        endpoint.cancel_keys.delay_guess().await;
                        Ok(())
                    };
                    let _ = self.handshake.in_time(delay).await;
                    CancelOutcome::Unknown
                }
            };
            endpoint.metrics.cancels[outcome].inc();
        }
        client.finish(b"").await;
        Closing::Silent
    }
}

/// The destination of a cancel request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CancelTarget {
    /// The server's address.
    pub(super) address: SocketAddr,
    /// The server's own key.
    pub(super) key: CancelKey,
}

/// The cancel keys of an endpoint's sessions.
#[derive(Debug)]
pub(crate) struct CancelKeys {
    // A list for each process id, as two servers behind one name may give out the same.
    by_process_id: Mutex<HashMap<u32, Vec<Entry>>>,
    guesses: Mutex<(Instant, u32)>,
}

#[derive(Debug)]
struct Entry {
    /// Our secret.
    secret: u32,
    /// `None` while the session has no server connection.
    target: Option<CancelTarget>,
    /// A request was forwarded to the target, and may arrive there at any time. Nothing proves that it has: the edge closes
    /// the connection of a cancel request before it signals the server, and PostgreSQL up to 17 signals twice (`signal_child`
    /// in postmaster.c), so that the second signal may follow the error of the canceled request.
    is_forwarded: bool,
    /// Notified of a request without a target.
    queued: Arc<Notify>,
}

/// What a key belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No session.
    Nothing,
    /// A session without a server connection. If it waits for one, it is notified.
    AtRest,
    /// A session whose server is there.
    Target(CancelTarget),
}

impl Default for CancelKeys {
    fn default() -> Self {
        Self {
            by_process_id: Mutex::default(),
            guesses: Mutex::new((Instant::now(), 0)),
        }
    }
}

impl CancelKeys {
    /// Creates a key for a session, valid until the registration is dropped.
    pub(super) fn register(
        self: &Arc<Self>,
        target: CancelTarget,
        is_shared: bool,
    ) -> Registration {
        let key = CancelKey {
            process_id: if is_shared {
                // Above those of any system, as the server changes.
                rand::random_range(1 << 30..1 << 31)
            } else {
                // The server's own, as clients compare it with pg_backend_pid().
                target.key.process_id
            },
            secret: rand::random(),
        };
        let queued = Arc::new(Notify::new());
        self.keys().entry(key.process_id).or_default().push(Entry {
            secret: key.secret,
            target: Some(target),
            is_forwarded: false,
            queued: Arc::clone(&queued),
        });
        Registration {
            cancels: Arc::clone(self),
            key,
            target: Some(target),
            queued,
        }
    }

    /// A key that cancels nothing, for a server that sent none.
    pub(super) fn unused_key() -> CancelKey {
        CancelKey {
            process_id: rand::random(),
            secret: rand::random(),
        }
    }

    /// The destination of a request with `key`, which counts as forwarded from now on.
    pub(super) fn find(&self, key: CancelKey) -> Found {
        self.with_entry(key, |entry| match entry.target {
            Some(target) => {
                entry.is_forwarded = true;
                Found::Target(target)
            }
            None => {
                entry.queued.notify_waiters();
                Found::AtRest
            }
        })
        .unwrap_or(Found::Nothing)
    }

    fn with_entry<T>(&self, key: CancelKey, act: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let mut keys = self.keys();
        // Secrets are single words, so that comparing them takes constant time.
        let entry = keys
            .get_mut(&key.process_id)?
            .iter_mut()
            .find(|entry| entry.secret == key.secret)?;
        Some(act(entry))
    }

    /// Delays the answer to an unknown key once there have been too many. The caller holds its handshake permit meanwhile,
    /// which bounds how many wait.
    pub(super) async fn delay_guess(&self) {
        // A block, so that the lock is released before the wait.
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

    /// Makes a key unknown; whether a request with it may still arrive at the target.
    fn remove(&self, key: CancelKey) -> bool {
        let mut keys = self.keys();
        let Some(entries) = keys.get_mut(&key.process_id) else {
            return false;
        };
        let at = entries.iter().position(|entry| entry.secret == key.secret);
        let may_arrive = at.is_some_and(|at| entries.swap_remove(at).is_forwarded);
        if entries.is_empty() {
            keys.remove(&key.process_id);
        }
        may_arrive
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<u32, Vec<Entry>>> {
        self.by_process_id
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A key in use; dropping it makes the key unknown, so that a late cancel reaches no other session.
#[derive(Debug)]
pub(super) struct Registration {
    cancels: Arc<CancelKeys>,
    key: CancelKey,
    target: Option<CancelTarget>,
    queued: Arc<Notify>,
}

impl Registration {
    /// The key for the client.
    pub(super) fn key(&self) -> CancelKey {
        self.key
    }

    /// The destination of its requests; `None` while the session has no server connection.
    pub(super) fn target(&self) -> Option<CancelTarget> {
        self.target
    }

    /// Takes the destination away; whether a request may still arrive there.
    pub(super) fn part(&mut self) -> bool {
        self.target = None;
        let parted = self.cancels.with_entry(self.key, |entry| {
            entry.target = None;
            std::mem::take(&mut entry.is_forwarded)
        });
        parted.unwrap_or(false)
    }

    /// Gives it another destination.
    pub(super) fn lead_to(&mut self, target: CancelTarget) {
        self.target = Some(target);
        self.cancels
            .with_entry(self.key, |entry| entry.target = Some(target));
    }

    /// Returns when a request comes while there is no destination. Cancel safe.
    pub(super) async fn cancelled(&self) {
        self.queued.notified().await;
    }

    /// Makes the key unknown; whether a request with it may still arrive at the destination.
    pub(super) fn end(self) -> bool {
        self.cancels.remove(self.key)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.cancels.remove(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(process_id: u32, port: u16) -> CancelTarget {
        CancelTarget {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            key: CancelKey {
                process_id,
                secret: 1,
            },
        }
    }

    #[tokio::test]
    async fn a_key_finds_its_session_only_as_a_whole_and_only_while_registered() {
        let cancels = Arc::new(CancelKeys::default());
        let one = cancels.register(target(7, 1), false);
        let two = cancels.register(target(7, 2), false);
        assert_eq!(
            one.key().process_id,
            7,
            "clients compare it with pg_backend_pid()"
        );
        assert_eq!(cancels.find(one.key()), Found::Target(target(7, 1)));
        assert_eq!(cancels.find(two.key()), Found::Target(target(7, 2)));
        let secrets = [one.key().secret, two.key().secret];
        let wrong = (0..3).find(|secret| !secrets.contains(secret)).unwrap();
        assert_eq!(
            cancels.find(CancelKey {
                process_id: 7,
                secret: wrong
            }),
            Found::Nothing
        );
        assert_eq!(
            cancels.find(CancelKey {
                process_id: 8,
                ..one.key()
            }),
            Found::Nothing
        );
        let key = one.key();
        drop(one);
        assert_eq!(cancels.find(key), Found::Nothing);
        assert_eq!(cancels.find(two.key()), Found::Target(target(7, 2)));
        drop(two);
        assert!(cancels.keys().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn guesses_beyond_the_rate_are_delayed() {
        let cancels = CancelKeys::default();
        let began = Instant::now();
        for _ in 0..UNKNOWN_PER_SECOND {
            cancels.delay_guess().await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        cancels.delay_guess().await;
        assert_eq!(began.elapsed(), UNKNOWN_DELAY);
    }

    /// Once guesses beyond the 64th were answered at once, so that a flood was faster than a trickle.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_guesses_is_delayed_whatever_its_size() {
        let cancels = Arc::new(CancelKeys::default());
        let known = cancels.register(target(7, 1), false);
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
        assert_ne!(cancels.find(known.key()), Found::Nothing, "at once");
        let took = guesses.join_all().await;
        let prompt = took.iter().filter(|took| **took < UNKNOWN_DELAY).count();
        assert_eq!(prompt, usize::try_from(UNKNOWN_PER_SECOND).unwrap());
    }
}
