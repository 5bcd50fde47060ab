//! Who is here now: one small entry a session, for whoever looks at the proxy.
//!
//! The list is locked when a session begins, when it ends and when somebody looks, never for a message. What changes
//! meanwhile is a handful of atomics that the relay stores into and that nobody waits for. It knows nothing of how it
//! is shown.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::{Encrypted, peer::Peer, recent::Recent};
use crate::{
    protocol::{progress::Progress, startup::StartupMessage},
    upstream::Label,
};

/// As much of each name as is kept, in bytes; Postgres keeps 63.
const NAME_LIMIT: usize = 128;

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Activity {
    /// Not logged in yet: the credential or the endpoint is waited for.
    Waiting,
    /// The server owes an answer.
    Active,
    /// Nobody owes anything.
    Idle,
    /// The client owes the end of a transaction.
    IdleInTransaction,
    /// The same, and the transaction has failed.
    IdleInFailedTransaction,
}

impl Activity {
    /// Every activity, the most telling first.
    pub const ALL: [Self; 5] = [
        Self::Waiting,
        Self::Active,
        Self::IdleInTransaction,
        Self::IdleInFailedTransaction,
        Self::Idle,
    ];

    /// In words, as `pg_stat_activity` has them.
    pub fn label(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::IdleInTransaction => "idle in transaction",
            Self::IdleInFailedTransaction => "idle in transaction (aborted)",
        }
    }

    fn code(self) -> u64 {
        match self {
            Self::Waiting => 0,
            Self::Active => 1,
            Self::Idle => 2,
            Self::IdleInTransaction => 3,
            Self::IdleInFailedTransaction => 4,
        }
    }

    fn from_code(code: u64) -> Self {
        match code {
            0 => Self::Waiting,
            1 => Self::Active,
            3 => Self::IdleInTransaction,
            4 => Self::IdleInFailedTransaction,
            _ => Self::Idle,
        }
    }
}

impl From<&Progress> for Activity {
    #[inline]
    fn from(progress: &Progress) -> Self {
        use crate::protocol::progress::TransactionStatus;
        if progress.is_owed() {
            return Self::Active;
        }
        match progress.status() {
            TransactionStatus::Idle => Self::Idle,
            TransactionStatus::InTransaction => Self::IdleInTransaction,
            TransactionStatus::Failed => Self::IdleInFailedTransaction,
        }
    }
}

/// What the relay of a session keeps up to date.
#[derive(Debug)]
pub struct Watch {
    /// When the roster began: times below count from here.
    origin: Instant,
    /// The activity in the lowest [`ACTIVITY_BITS`], above them since when, in milliseconds.
    activity: AtomicU64,
    from_client: AtomicU64,
    from_server: AtomicU64,
}

const ACTIVITY_BITS: u32 = 3;

impl Watch {
    fn new(origin: Instant) -> Self {
        Self {
            origin,
            activity: AtomicU64::new(millis(origin.elapsed()) << ACTIVITY_BITS),
            from_client: AtomicU64::new(0),
            from_server: AtomicU64::new(0),
        }
    }

    /// Takes note of where a session stands. Costs three stores, and a look at the clock where the activity changes.
    ///
    /// Called by one task, so that what is read here is what was stored last.
    #[inline]
    pub fn see(&self, activity: Activity, from_client: u64, from_server: u64) {
        self.from_client.store(from_client, Ordering::Relaxed);
        self.from_server.store(from_server, Ordering::Relaxed);
        if self.activity.load(Ordering::Relaxed) & ((1 << ACTIVITY_BITS) - 1) != activity.code() {
            let since = millis(self.origin.elapsed()) << ACTIVITY_BITS;
            self.activity
                .store(since | activity.code(), Ordering::Relaxed);
        }
    }
}

/// One session.
#[derive(Debug)]
struct Entry {
    peer: Peer,
    encryption: Encrypted,
    endpoint: Label,
    /// User, database and application name as the client gave them, a zero byte between them.
    names: Box<str>,
    began: Duration,
    watch: Watch,
    server: OnceLock<Box<Server>>,
}

/// What a session is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The address that answered.
    pub address: SocketAddr,
    /// The process there, where it said so.
    pub process_id: Option<u32>,
    /// The database opened.
    pub database: Box<str>,
    /// How long the client had waited.
    pub waited: Duration,
}

/// One session as it was at a look.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its number, which the log has too.
    pub id: u64,
    /// Who it is.
    pub peer: Peer,
    /// Whether others could listen in between it and us.
    pub encryption: Encrypted,
    /// Where it leads.
    pub endpoint: Label,
    /// The user that the client named, which counts for nothing.
    pub user: String,
    /// The database that the client named.
    pub database: String,
    /// What the client calls itself.
    pub application: String,
    /// What it does.
    pub activity: Activity,
    /// Since when.
    pub since: Timestamp,
    /// For how long.
    pub lasting: Duration,
    /// When it began.
    pub began: Timestamp,
    /// How long ago.
    pub age: Duration,
    /// Bytes that its client has sent.
    pub from_client: u64,
    /// Bytes that its server has sent.
    pub from_server: u64,
    /// What it is connected to; none while it waits.
    pub server: Option<Server>,
}

/// Every session of this process.
#[derive(Debug)]
pub struct Roster {
    origin: Instant,
    began: Timestamp,
    sessions: Mutex<BTreeMap<u64, Arc<Entry>>>,
    recent: Recent,
}

impl Default for Roster {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            began: Timestamp::now(),
            sessions: Mutex::default(),
            recent: Recent::default(),
        }
    }
}

impl Roster {
    /// What went wrong lately, and what was waited for.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }

    /// Lists a session until what is returned is dropped.
    pub fn enter(
        self: &Arc<Self>,
        id: u64,
        (peer, encryption): (Peer, Encrypted),
        endpoint: &Label,
        startup: &StartupMessage,
    ) -> Listed {
        let names = ["user", "database", "application_name"].map(|name| {
            let name = startup.parameter(name).unwrap_or_default();
            &name[..name.floor_char_boundary(NAME_LIMIT)]
        });
        let entry = Arc::new(Entry {
            peer,
            encryption,
            endpoint: endpoint.clone(),
            names: names.join("\0").into(),
            began: self.origin.elapsed(),
            watch: Watch::new(self.origin),
            server: OnceLock::new(),
        });
        self.sessions().insert(id, Arc::clone(&entry));
        Listed {
            roster: Arc::clone(self),
            id,
            entry,
        }
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What every session does, the oldest first, without a word of who they are.
    pub fn activities(&self) -> Vec<(Label, Activity)> {
        let sessions = self.sessions();
        let activity = |entry: &Arc<Entry>| {
            let code = entry.watch.activity.load(Ordering::Relaxed) & ((1 << ACTIVITY_BITS) - 1);
            (entry.endpoint.clone(), Activity::from_code(code))
        };
        sessions.values().map(activity).collect()
    }

    /// Sessions as they are now, the oldest first, `limit` of them at most.
    pub fn look(&self, limit: usize) -> Vec<Seen> {
        let entries: Vec<(u64, Arc<Entry>)> = {
            let sessions = self.sessions();
            let listed = sessions.iter().take(limit);
            listed.map(|(id, entry)| (*id, Arc::clone(entry))).collect()
        };
        let now = self.origin.elapsed();
        entries
            .into_iter()
            .map(|(id, entry)| self.seen(id, &entry, now))
            .collect()
    }

    fn seen(&self, id: u64, entry: &Entry, now: Duration) -> Seen {
        let activity = entry.watch.activity.load(Ordering::Relaxed);
        let since = Duration::from_millis(activity >> ACTIVITY_BITS);
        let mut names = entry.names.split('\0').map(str::to_owned);
        let mut name = || names.next().unwrap_or_default();
        Seen {
            id,
            peer: entry.peer,
            encryption: entry.encryption,
            endpoint: entry.endpoint.clone(),
            user: name(),
            database: name(),
            application: name(),
            activity: Activity::from_code(activity & ((1 << ACTIVITY_BITS) - 1)),
            since: self.wall(since),
            lasting: now.saturating_sub(since),
            began: self.wall(entry.began),
            age: now.saturating_sub(entry.began),
            from_client: entry.watch.from_client.load(Ordering::Relaxed),
            from_server: entry.watch.from_server.load(Ordering::Relaxed),
            server: entry.server.get().map(|server| Server::clone(server)),
        }
    }

    fn wall(&self, since_origin: Duration) -> Timestamp {
        SignedDuration::try_from(since_origin)
            .ok()
            .and_then(|since| self.began.checked_add(since).ok())
            .unwrap_or(self.began)
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Entry>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that is on the roster until this is dropped.
#[derive(Debug)]
pub struct Listed {
    roster: Arc<Roster>,
    id: u64,
    entry: Arc<Entry>,
}

impl Listed {
    /// It has been logged in.
    pub fn connected(&self, server: Server) {
        self.entry.server.set(Box::new(server)).ok();
        self.entry.watch.see(Activity::Idle, 0, 0);
    }

    /// For its relay.
    pub fn watch(&self) -> &Watch {
        &self.entry.watch
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.roster.sessions().remove(&self.id);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> ACTIVITY_BITS)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::protocol::frame::Seen as Frame;

    fn startup(parameters: &[(&str, &str)]) -> StartupMessage {
        let owned = |&(name, value): &(&str, &str)| (name.to_owned(), value.to_owned());
        StartupMessage {
            minor: 0,
            parameters: parameters.iter().map(owned).collect(),
            protocol_options: Vec::new(),
        }
    }

    fn peer() -> Peer {
        Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 4711)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_listed_with_what_it_does_and_since_when_until_it_ends() {
        let roster = Arc::new(Roster::default());
        let message = startup(&[("user", "me"), ("application_name", "app")]);
        let listed = roster.enter(7, (peer(), Encrypted::No), &Label::new("e"), &message);
        advance(Duration::from_secs(3)).await;
        let seen = &roster.look(10)[0];
        assert_eq!(
            (seen.id, seen.user.as_str(), seen.database.as_str()),
            (7, "me", "")
        );
        assert_eq!(
            (seen.activity, seen.lasting),
            (Activity::Waiting, Duration::from_secs(3))
        );
        assert_eq!(seen.application, "app");
        assert_eq!(seen.server, None);

        let server = Server {
            address: SocketAddr::from(([10, 0, 0, 1], 5432)),
            process_id: Some(42),
            database: "d".into(),
            waited: Duration::from_secs(3),
        };
        listed.connected(server.clone());
        advance(Duration::from_secs(2)).await;
        listed.watch().see(Activity::Active, 10, 0);
        advance(Duration::from_secs(1)).await;
        // The same again: since when stays as it was.
        listed.watch().see(Activity::Active, 10, 4000);
        advance(Duration::from_secs(1)).await;
        let seen = &roster.look(10)[0];
        assert_eq!(
            (seen.activity, seen.lasting, seen.age),
            (
                Activity::Active,
                Duration::from_secs(2),
                Duration::from_secs(7)
            )
        );
        assert_eq!((seen.from_client, seen.from_server), (10, 4000));
        assert_eq!(seen.server, Some(server));
        assert_eq!(
            seen.since.duration_since(seen.began),
            SignedDuration::from_secs(5)
        );

        drop(listed);
        assert!(roster.is_empty());
    }

    #[tokio::test]
    async fn the_oldest_come_first_and_no_more_than_asked_for() {
        let roster = Arc::new(Roster::default());
        let listed: Vec<Listed> = (0..5)
            .map(|id| roster.enter(id, (peer(), Encrypted::No), &Label::new("e"), &startup(&[])))
            .collect();
        let ids: Vec<u64> = roster.look(3).iter().map(|seen| seen.id).collect();
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!(roster.activities().len(), 5);
        drop(listed);
    }

    #[tokio::test]
    async fn a_long_name_is_cut_between_characters() {
        let roster = Arc::new(Roster::default());
        let long = "ä".repeat(NAME_LIMIT);
        let message = startup(&[("user", &long), ("database", "d")]);
        let _listed = roster.enter(1, (peer(), Encrypted::No), &Label::new("e"), &message);
        let seen = &roster.look(1)[0];
        assert_eq!(seen.user, "ä".repeat(NAME_LIMIT / 2));
        assert_eq!(seen.database, "d");
    }

    #[test]
    fn activity_follows_from_who_owes_what() {
        let mut progress = Progress::new();
        assert_eq!(Activity::from(&progress), Activity::Idle);
        progress.from_client(Frame::Message { tag: b'P' });
        assert_eq!(Activity::from(&progress), Activity::Active);
        progress.from_client(Frame::Message { tag: b'S' });
        for (status, activity) in [
            (b'T', Activity::IdleInTransaction),
            (b'E', Activity::IdleInFailedTransaction),
            (b'I', Activity::Idle),
        ] {
            progress.from_server(Frame::Status(status));
            assert_eq!(Activity::from(&progress), activity);
        }
    }

    #[test]
    fn an_entry_is_small() {
        // An idle session has 12 kB in all.
        assert!(
            size_of::<Entry>() <= 192,
            "{} bytes an entry",
            size_of::<Entry>()
        );
    }
}
