//! The registry of sessions: one entry per session from admission to its end. It enforces the connection
//! limit, and serves counts, lists, the drain of an endpoint and the idle exit.
//!
//! Its lock is taken when a session starts, when it ends and for lists, never for a message: what the relay
//! updates are the atomics of [`ActivityRecord`].

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{Activity, ActivityRecord, Encrypted, EndpointSessions, Peer, Recent, Rejected};
use crate::{protocol::startup::StartupMessage, telemetry::labels::PinReason};

/// Bytes kept of each name; Postgres keeps 63.
const NAME_LIMIT: usize = 128;

/// Every session of the process; cheap to clone.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    origin: Instant,
    started: Timestamp,
    last_id: AtomicU64,
    // By id, so that lists are oldest first without sorting.
    sessions: Mutex<BTreeMap<u64, Arc<Entry>>>,
    // Beside the map, since the idle exit waits for its changes.
    is_empty: watch::Sender<bool>,
    recent: Recent,
}

#[derive(Debug)]
struct Entry {
    endpoint: EndpointSessions,
    client: ClientInfo,
    began: Duration,
    activity: ActivityRecord,
    // Boxed, since it would enlarge the entries of waiting sessions, too.
    server: OnceLock<Box<Server>>,
    /// The number of the connection that the session has now; 0 for none.
    link: AtomicU64,
    /// Its process id; 0 for none.
    process_id: AtomicU32,
}

/// The client of a session.
#[derive(Debug)]
pub struct ClientInfo {
    peer: Peer,
    encryption: Encrypted,
    /// User, database and application name as the client sent them, separated by zero bytes: one allocation.
    names: Box<str>,
}

/// The server connection of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The number of a pool's connection; the session's without a pool.
    pub id: u64,
    /// The address that answered.
    pub address: SocketAddr,
    /// The server's process id, if it sent one.
    pub process_id: Option<u32>,
    /// The database opened.
    pub database: Box<str>,
    /// How long the client waited for the connection.
    pub waited: Duration,
}

/// A snapshot of one session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// The session id, as in the log.
    pub id: u64,
    /// The client's address or process.
    pub peer: Peer,
    /// The encryption between client and proxy.
    pub encryption: Encrypted,
    /// The endpoint.
    pub endpoint: EndpointSessions,
    /// The user that the client named, which has no effect.
    pub user: String,
    /// The database that the client named.
    pub database: String,
    /// The client's `application_name`.
    pub application: String,
    /// What it is doing.
    pub activity: Activity,
    /// When the activity began.
    pub since: Timestamp,
    /// The duration of the activity.
    pub lasting: Duration,
    /// When the session began.
    pub began: Timestamp,
    /// The age of the session.
    pub age: Duration,
    /// Why it keeps its server connection although others wait, and for how long already.
    pub pin: Option<Pin>,
    /// Bytes received from the client.
    pub from_client: u64,
    /// Bytes received from the server.
    pub from_server: u64,
    /// The server connection; `None` while the client waits for one, or needs none.
    pub server: Option<Server>,
}

/// A session that cannot part with its server connection.
#[derive(Clone, Copy, Debug)]
pub struct Pin {
    /// The first of its reasons.
    pub reason: PinReason,
    /// Since it was first at rest with it.
    pub lasting: Duration,
}

/// Numbers of sessions by activity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All sessions.
    pub all: usize,
    /// Not logged in yet.
    pub waiting: usize,
    /// The server owes an answer.
    pub active: usize,
    /// In a transaction, waiting for the client.
    pub in_transaction: usize,
    /// Between transactions.
    pub idle: usize,
    /// The longest time that one of those not logged in has waited.
    pub max_wait: Duration,
}

impl Default for Registry {
    fn default() -> Self {
        Self(Arc::new(Inner {
            origin: Instant::now(),
            started: Timestamp::now(),
            last_id: AtomicU64::new(0),
            sessions: Mutex::default(),
            is_empty: watch::Sender::new(true),
            recent: Recent::default(),
        }))
    }
}

impl Registry {
    /// An id for the next session, which refusals and the log show.
    pub fn next_id(&self) -> u64 {
        let last = self.0.last_id.fetch_add(1, Ordering::Relaxed);
        last.saturating_add(1)
    }

    /// Recent refusals and wakes.
    pub fn recent(&self) -> &Recent {
        &self.0.recent
    }

    /// Sessions by activity.
    pub fn counts(&self) -> Counts {
        self.count(|_| true)
    }

    /// Snapshots of the sessions, the oldest first, `limit` of them at most.
    pub fn list(&self, limit: usize) -> Vec<SessionInfo> {
        // Names are copied after the lock is released.
        let entries: Vec<(u64, Arc<Entry>)> = {
            let sessions = self.sessions();
            let listed = sessions.iter().take(limit);
            listed.map(|(id, entry)| (*id, Arc::clone(entry))).collect()
        };
        let now = self.0.origin.elapsed();
        entries
            .into_iter()
            .map(|(id, entry)| self.info(id, &entry, now))
            .collect()
    }

    /// Returns when the process has had no session for `time`, counted from this call at the earliest. Cancel safe.
    pub async fn idle_for(&self, time: Duration) {
        let mut is_empty = self.0.is_empty.subscribe();
        // The sender lives as long as `self`, so neither wait can fail.
        while is_empty.wait_for(|is_empty| *is_empty).await.is_ok() {
            tokio::select! {
                () = sleep(time) => return,
                // Also for a session that has ended by the time of the check.
                _ = is_empty.changed() => {}
            }
        }
    }

    pub(super) fn enter(
        &self,
        endpoint: &EndpointSessions,
        id: u64,
        client: ClientInfo,
        limit: usize,
    ) -> Result<SessionEntry, Rejected> {
        // Allocated before the lock is taken, which all sessions share.
        let entry = Arc::new(Entry {
            endpoint: endpoint.clone(),
            client,
            began: self.0.origin.elapsed(),
            activity: ActivityRecord::new(self.0.origin),
            server: OnceLock::new(),
            link: AtomicU64::new(0),
            process_id: AtomicU32::new(0),
        });
        // One lock for check and insertion: two sessions must not both take the last slot.
        let mut sessions = self.sessions();
        if sessions.len() >= limit {
            return Err(Rejected::Limit);
        }
        // After the check of the limit, since it counts the session. Locks: first the registry's, then the endpoint's.
        endpoint.add_session()?;
        sessions.insert(id, Arc::clone(&entry));
        self.0.publish(&sessions);
        Ok(SessionEntry { id, entry })
    }

    pub(super) fn count(&self, is_counted: impl Fn(&EndpointSessions) -> bool) -> Counts {
        let now = self.0.origin.elapsed();
        let mut counts = Counts::default();
        for entry in self.sessions().values() {
            if is_counted(&entry.endpoint) {
                // Only numbers are read under the lock: a session that starts or ends waits for it.
                let (activity, _) = entry.activity.activity();
                counts.add(activity);
                if activity == Activity::Waiting {
                    counts.max_wait = counts.max_wait.max(now.saturating_sub(entry.began));
                }
            }
        }
        counts
    }

    fn info(&self, id: u64, entry: &Entry, now: Duration) -> SessionInfo {
        let (activity, since) = entry.activity.activity();
        let [from_client, from_server] = entry.activity.bytes();
        // No name holds a NUL, which ends each string of a StartupMessage.
        let mut names = entry.client.names.split('\0').map(str::to_owned);
        let mut name = || names.next().unwrap_or_default();
        SessionInfo {
            id,
            peer: entry.client.peer,
            encryption: entry.client.encryption,
            endpoint: entry.endpoint.clone(),
            user: name(),
            database: name(),
            application: name(),
            activity,
            since: self.timestamp(since),
            lasting: now.saturating_sub(since),
            began: self.timestamp(entry.began),
            age: now.saturating_sub(entry.began),
            pin: entry.activity.pinned().map(|(reason, since)| Pin {
                reason,
                lasting: now.saturating_sub(since),
            }),
            from_client,
            from_server,
            server: entry.server(),
        }
    }

    fn timestamp(&self, since_origin: Duration) -> Timestamp {
        // From the monotonic clock, so that a wall clock that is set moves no start.
        SignedDuration::try_from(since_origin)
            .ok()
            .and_then(|since| self.0.started.checked_add(since).ok())
            .unwrap_or(self.0.started)
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Entry>>> {
        let sessions = self.0.sessions.lock();
        sessions.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn server(&self) -> Option<Server> {
        let id = self.link.load(Ordering::Relaxed);
        let process_id = self.process_id.load(Ordering::Relaxed);
        let server = self.server.get().filter(|_| id != 0)?;
        Some(Server {
            id,
            process_id: (process_id != 0).then_some(process_id),
            ..Server::clone(server)
        })
    }
}

impl Inner {
    /// Publishes whether there are sessions; with the lock held, so that it is published in the order of the changes.
    fn publish(&self, sessions: &BTreeMap<u64, Arc<Entry>>) {
        let now = sessions.is_empty();
        self.is_empty
            .send_if_modified(|is_empty| std::mem::replace(is_empty, now) != now);
    }
}

impl ClientInfo {
    /// The client that sent `startup`.
    pub fn new(peer: Peer, encryption: Encrypted, startup: &StartupMessage) -> Self {
        let names = ["user", "database", "application_name"].map(|name| {
            let name = startup.parameter(name).unwrap_or_default();
            &name[..name.floor_char_boundary(NAME_LIMIT)]
        });
        Self {
            peer,
            encryption,
            names: names.join("\0").into(),
        }
    }
}

impl Counts {
    fn add(&mut self, activity: Activity) {
        let number = match activity {
            Activity::Waiting => &mut self.waiting,
            Activity::Active => &mut self.active,
            Activity::Idle => &mut self.idle,
            Activity::IdleInTransaction | Activity::IdleInFailedTransaction => {
                &mut self.in_transaction
            }
        };
        *number = number.saturating_add(1);
        self.all = self.all.saturating_add(1);
    }
}

/// A session that is registered until this is dropped.
#[derive(Debug)]
pub struct SessionEntry {
    id: u64,
    entry: Arc<Entry>,
}

impl SessionEntry {
    /// Records the server connection: the session waits no longer.
    pub fn connected(&self, server: Server) {
        self.link_to(server.id, server.process_id);
        // Once: a second call must not lower the gauge of waiting sessions again.
        if self.entry.server.set(Box::new(server)).is_ok() {
            let activity = &self.entry.activity;
            activity.record(Activity::Idle, 0, 0, || activity.now());
            self.entry.endpoint.session_connected();
        }
    }

    /// Records that the session has another server connection.
    pub fn link_to(&self, id: u64, process_id: Option<u32>) {
        let entry = &self.entry;
        entry.link.store(id, Ordering::Relaxed);
        let process_id = process_id.unwrap_or_default();
        entry.process_id.store(process_id, Ordering::Relaxed);
    }

    /// Records that the session, at rest, has no server connection.
    pub fn unlink(&self) {
        self.link_to(0, None);
    }

    /// The record for the relay to update.
    pub fn activity(&self) -> &ActivityRecord {
        &self.entry.activity
    }
}

impl Drop for SessionEntry {
    fn drop(&mut self) {
        let Entry {
            endpoint, server, ..
        } = &*self.entry;
        let registry = endpoint.registry();
        let mut sessions = registry.sessions();
        sessions.remove(&self.id);
        // Under the registry's lock, so that its count and the endpoint's change together.
        endpoint.remove_session(server.get().is_some());
        registry.0.publish(&sessions);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::time::advance;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{status::Label, telemetry::Metrics};

    fn client_with(parameters: &[(&str, &str)]) -> ClientInfo {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        let startup = StartupMessage {
            minor: 0,
            parameters: parameters.iter().map(owned).collect(),
            protocol_options: Vec::new(),
        };
        let peer = Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 4711)));
        ClientInfo::new(peer, Encrypted::No, &startup)
    }

    pub(in crate::status) fn client() -> ClientInfo {
        client_with(&[])
    }

    pub(in crate::status) fn endpoint(registry: &Registry) -> EndpointSessions {
        let metrics = Metrics::new().unwrap();
        let closed = CancellationToken::new();
        EndpointSessions::new(registry, Label::new("e"), &metrics, closed)
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_listed_with_its_activity_until_it_ends() {
        let registry = Registry::default();
        let client = client_with(&[("user", "me"), ("application_name", "app")]);
        let entry = endpoint(&registry).enter(7, client, 9).unwrap();
        advance(Duration::from_secs(3)).await;
        let info = &registry.list(10)[0];
        assert_eq!(
            (info.id, info.user.as_str(), info.database.as_str()),
            (7, "me", "")
        );
        assert_eq!(
            (info.activity, info.lasting),
            (Activity::Waiting, Duration::from_secs(3))
        );
        assert_eq!(info.application, "app");
        assert_eq!(info.server, None);

        let server = Server {
            id: 7,
            address: SocketAddr::from(([10, 0, 0, 1], 5432)),
            process_id: Some(42),
            database: "d".into(),
            waited: Duration::from_secs(3),
        };
        entry.connected(server.clone());
        advance(Duration::from_secs(2)).await;
        let activity = entry.activity();
        activity.record(Activity::Active, 10, 0, || activity.now());
        advance(Duration::from_secs(1)).await;
        // The start of an activity that continues stays.
        activity.record(Activity::Active, 10, 4000, || activity.now());
        advance(Duration::from_secs(1)).await;
        let info = &registry.list(10)[0];
        assert_eq!(
            (info.activity, info.lasting, info.age),
            (
                Activity::Active,
                Duration::from_secs(2),
                Duration::from_secs(7)
            )
        );
        assert_eq!((info.from_client, info.from_server), (10, 4000));
        assert_eq!(info.server, Some(server));
        assert_eq!(
            info.since.duration_since(info.began),
            SignedDuration::from_secs(5)
        );

        drop(entry);
        assert_eq!(registry.counts(), Counts::default());
    }

    #[tokio::test]
    async fn lists_are_oldest_first_and_limited() {
        let registry = Registry::default();
        let endpoint = endpoint(&registry);
        let entries: Vec<SessionEntry> = (0..5)
            .map_while(|id| endpoint.enter(id, client(), 9).ok())
            .collect();
        let ids: Vec<u64> = registry.list(3).iter().map(|info| info.id).collect();
        assert_eq!(ids, [0, 1, 2]);
        drop(entries);
    }

    #[tokio::test(start_paused = true)]
    async fn counts_are_by_endpoint_and_by_activity() {
        let registry = Registry::default();
        // Of the same name.
        let (one, other) = (endpoint(&registry), endpoint(&registry));
        let first = one.enter(1, client(), 9).unwrap();
        let _second = one.enter(2, client(), 9).unwrap();
        advance(Duration::from_secs(2)).await;
        let _third = other.enter(3, client(), 9).unwrap();
        let activity = first.activity();
        activity.record(Activity::IdleInFailedTransaction, 0, 0, || activity.now());
        let counts = |all, waiting, in_transaction, seconds| Counts {
            all,
            waiting,
            in_transaction,
            max_wait: Duration::from_secs(seconds),
            ..Counts::default()
        };
        assert_eq!(registry.counts(), counts(3, 2, 1, 2));
        assert_eq!(one.counts(), counts(2, 1, 1, 2));
        assert_eq!(other.counts(), counts(1, 1, 0, 0));
    }

    #[tokio::test]
    async fn a_lower_limit_ends_no_session_and_admits_none() {
        let registry = Registry::default();
        let endpoint = endpoint(&registry);
        let enter = |id, limit| endpoint.enter(id, client(), limit);
        let entries: Vec<SessionEntry> = (0..3).map_while(|id| enter(id, 3).ok()).collect();
        assert_eq!((entries.len(), endpoint.counts().all), (3, 3));
        assert_eq!(enter(4, 3).unwrap_err(), Rejected::Limit);
        assert_eq!(enter(4, 1).unwrap_err(), Rejected::Limit);
        drop(entries);
        assert!(enter(4, 1).is_ok());
        assert!(enter(4, 0).is_err());
    }

    #[tokio::test]
    async fn the_waiting_gauge_counts_sessions_without_a_server_connection() {
        let metrics = Metrics::new().unwrap();
        let registry = Registry::default();
        let endpoint = EndpointSessions::new(
            &registry,
            Label::new("e"),
            &metrics,
            CancellationToken::new(),
        );
        let gauge = &metrics.clients_waiting;
        let (first, second) = (
            endpoint.enter(1, client(), 9).unwrap(),
            endpoint.enter(2, client(), 9).unwrap(),
        );
        assert_eq!(gauge.get(), 2);
        first.connected(Server {
            id: 1,
            address: SocketAddr::from(([10, 0, 0, 1], 5432)),
            process_id: None,
            database: "d".into(),
            waited: Duration::ZERO,
        });
        assert_eq!(gauge.get(), 1);
        drop(first);
        assert_eq!(gauge.get(), 1);
        drop(second);
        assert_eq!(gauge.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn each_session_restarts_the_idle_time() {
        let registry = Registry::default();
        let endpoint = endpoint(&registry);
        let start = Instant::now();
        let first = endpoint.enter(1, client(), 9).unwrap();
        let sessions = async {
            sleep(Duration::from_secs(100)).await;
            drop(first);
            sleep(Duration::from_secs(9)).await;
            // Starts and ends between two checks.
            drop(endpoint.enter(2, client(), 9));
        };
        let ((), ()) = tokio::join!(sessions, registry.idle_for(Duration::from_secs(10)));
        assert_eq!(start.elapsed().as_secs(), 119);

        advance(Duration::from_secs(1)).await;
        registry.idle_for(Duration::from_secs(5)).await;
        assert_eq!(start.elapsed().as_secs(), 125, "without any session");
    }

    #[tokio::test]
    async fn a_long_name_is_cut_between_characters() {
        let registry = Registry::default();
        let long = "ä".repeat(NAME_LIMIT);
        let client = client_with(&[("user", &long), ("database", "d")]);
        let _entry = endpoint(&registry).enter(1, client, 9).unwrap();
        let info = &registry.list(1)[0];
        assert_eq!(info.user, "ä".repeat(NAME_LIMIT / 2));
        assert_eq!(info.database, "d");
    }

    #[test]
    fn an_entry_is_small() {
        // An idle session has 12 kB in all.
        let size = size_of::<Entry>();
        assert!(size <= 192, "{size} bytes");
    }
}
