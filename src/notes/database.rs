//! Reads the rows through a small pool that closes idle connections early.

use std::{
    convert::Infallible,
    future::{Future, pending},
    pin::{Pin, pin},
    time::Duration,
};

use deadpool_postgres::{
    BuildError, Connect, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
    TimeoutType,
};
use jiff::{SignedDuration, Timestamp};
use secrecy::ExposeSecret;
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{interval, timeout},
};
use tokio_postgres::{Client, Config, NoTls, config::SslMode, error::SqlState, types::Type};
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::NotesOptions;
use crate::session::KnownPassword;

/// Longest note that is shown whole; a longer one is cut by the server, so that a page stays a page.
pub(super) const NOTE_CHARS: usize = 2_000;
/// Time for the Terminate message of a closed connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Required by the pool; checking a pooled connection sends nothing.
const RECYCLE_TIMEOUT: Duration = Duration::from_secs(1);

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Note {
    /// Its text, of any content.
    pub(super) content: String,
    /// When it was made, where that is known and makes sense.
    pub(super) created_at: Option<Timestamp>,
}

impl Note {
    /// For machines.
    pub(super) fn datetime(&self) -> Option<String> {
        self.created_at
            .map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
    }

    /// For people.
    pub(super) fn when(&self) -> String {
        self.created_at
            .map(|at| at.strftime("%-d %B %Y, %H:%M UTC").to_string())
            .unwrap_or_default()
    }
}

/// Why there are no rows to show.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No connection within its time.
    #[error("no connection to the database in time")]
    NoConnection,
    /// All connections are in use.
    #[error("every connection of the page is in use")]
    Busy,
    /// An answer took too long.
    #[error("the database did not answer in time")]
    Slow,
    /// The proxy or the server refused or closed the connection.
    #[error("the database could not be read")]
    Database(#[source] tokio_postgres::Error),
    /// The pool is closed: we are stopping.
    #[error("the page is shutting down")]
    Closed,
}

/// The connections to the database of the notes.
pub(super) struct Database {
    pool: Pool,
    query: String,
    idle_timeout: Duration,
    connections: TaskTracker,
}

impl Database {
    /// Connects to nothing yet.
    pub(super) fn new(options: &NotesOptions) -> Result<Self, BuildError> {
        // Shares of the request timeout, which leave time to report the phase that was slow.
        let whole = options.request_timeout;
        let (wait, create, statement) = (whole / 4, whole * 6 / 10, whole * 9 / 10);
        let mut config = Config::new();
        // An absolute path is taken for the directory of a Unix socket.
        config
            .host(options.upstream.host())
            .port(options.upstream.port())
            .user(options.user.as_deref().unwrap_or("notes"))
            .application_name("lakebase-proxy notes")
            .options(format!("-c statement_timeout={}", statement.as_millis()))
            // The listener is one of this process: no network lies between.
            .ssl_mode(SslMode::Disable);
        if let Some(database) = &options.database {
            config.dbname(database);
        }
        let connections = TaskTracker::new();
        let manager = Manager::from_connect(
            config,
            Connector {
                connections: connections.clone(),
                password: options.password.clone(),
            },
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(options.pool_size.max(1))
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(wait))
            .create_timeout(Some(create))
            .recycle_timeout(Some(RECYCLE_TIMEOUT))
            .build()?;
        Ok(Self {
            pool,
            query: format!(
                "SELECT left(content::text, {}), extract(epoch FROM created_at::timestamptz)::float8 \
                 FROM notes ORDER BY created_at DESC NULLS LAST, id DESC LIMIT 5",
                // One more shows that the note is longer.
                NOTE_CHARS + 1
            ),
            idle_timeout: options.idle_timeout,
            connections,
        })
    }

    /// The five newest notes. Cancel safe: a connection with an answer outstanding is closed, not kept.
    pub(super) async fn newest(&self) -> Result<Vec<Note>, Failure> {
        // Servers end idle connections too; those are no reason for a log line.
        self.pool.retain(|client, _| !client.is_closed());
        let (reused, outcome) = self.read().await?;
        match outcome {
            // A dead idle connection does not mean that the database is down: one retry on a new one.
            Err(error) if reused && is_loss(&error) => {
                self.pool.retain(|_, _| false);
                self.read().await?.1
            }
            outcome => outcome,
        }
        .map_err(Failure::Database)
    }

    /// Adds a note. Not repeated after a loss, as the row may be there. Cancel safe like [`newest`](Self::newest).
    pub(super) async fn add(&self, content: &str) -> Result<(), Failure> {
        self.pool.retain(|client, _| !client.is_closed());
        let mut lease = self.lease().await?;
        let statement = "INSERT INTO notes (content) VALUES ($1)";
        let added = lease
            .client()?
            .query_typed(statement, &[(&content, Type::TEXT)])
            .await;
        lease.give_back();
        added.map(drop).map_err(Failure::Database)
    }

    /// Closes what has been idle for too long; never returns.
    pub(super) async fn tend(&self) -> Infallible {
        let mut ticks = interval((self.idle_timeout / 6).max(Duration::from_millis(10)));
        loop {
            ticks.tick().await;
            // Checked every sixth, so that no connection is idle for the whole timeout.
            let limit = self.idle_timeout * 4 / 6;
            self.pool
                .retain(|client, metrics| metrics.last_used() < limit && !client.is_closed());
        }
    }

    /// Closes every connection.
    pub(super) async fn close(&self) {
        self.pool.close();
        self.connections.close();
        timeout(CLOSE_TIMEOUT, self.connections.wait()).await.ok();
    }

    /// One attempt, and whether it was made on a connection used before.
    async fn read(&self) -> Result<(bool, Result<Vec<Note>, tokio_postgres::Error>), Failure> {
        let mut lease = self.lease().await?;
        let client = lease.client()?;
        let reused = Object::metrics(client).recycle_count > 0;
        // In one round trip: `query` would prepare a statement first.
        let rows = client.query_typed(&self.query, &[]).await;
        lease.give_back();
        let notes = rows.and_then(|rows| {
            rows.iter()
                .map(|row| Ok(note(row.try_get(0)?, row.try_get(1)?)))
                .collect()
        });
        Ok((reused, notes))
    }

    async fn lease(&self) -> Result<Lease, Failure> {
        let leased = self.pool.get().await;
        let client = leased.map_err(|error| match error {
            PoolError::Timeout(TimeoutType::Wait) => Failure::Busy,
            PoolError::Timeout(_) => Failure::NoConnection,
            PoolError::Backend(error) => Failure::Database(error),
            PoolError::Closed | PoolError::NoRuntimeSpecified | PoolError::PostCreateHook(_) => {
                Failure::Closed
            }
        })?;
        Ok(Lease(Some(client)))
    }
}

/// A pooled connection that is closed unless given back: after a cancelled query an answer is still outstanding.
struct Lease(Option<Object>);

impl Lease {
    fn client(&self) -> Result<&Object, Failure> {
        self.0.as_ref().ok_or(Failure::Closed)
    }

    fn give_back(&mut self) {
        self.0 = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(object) = self.0.take() {
            drop(Object::take(object));
        }
    }
}

/// Opens connections whose tasks can be awaited, so that the server receives Terminate.
struct Connector {
    connections: TaskTracker,
    /// Read for each connection, as a reload may change it.
    password: KnownPassword,
}

type Connecting<'a> = Pin<
    Box<dyn Future<Output = Result<(Client, JoinHandle<()>), tokio_postgres::Error>> + Send + 'a>,
>;

impl Connect for Connector {
    fn connect(&self, config: &Config) -> Connecting<'_> {
        let mut config = config.clone();
        if let Some(password) = self.password.now() {
            config.password(password.expose_secret());
        }
        Box::pin(async move {
            let (client, connection) = config.connect(NoTls).await?;
            // The pool aborts the task it is given when it drops a client. Given the connection itself, that would cut
            // off the Terminate message; so it gets a stand-in, whose end gives the connection a moment.
            let (held, released) = oneshot::channel::<()>();
            self.connections.spawn(async move {
                let mut connection = pin!(connection);
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    _ = released => timeout(CLOSE_TIMEOUT, connection).await.unwrap_or(Ok(())),
                };
                if let Err(error) = ended {
                    debug!(%error, "a connection of the notes page ended");
                }
            });
            let stand_in = self.connections.spawn(async move {
                let _held = held;
                pending::<()>().await;
            });
            Ok((client, stand_in))
        })
    }
}

fn is_loss(error: &tokio_postgres::Error) -> bool {
    let gone = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::IDLE_SESSION_TIMEOUT,
    ];
    error.is_closed()
        || match error.code() {
            Some(code) => gone.contains(code) || code.code().starts_with("08"),
            None => std::error::Error::source(error)
                .is_some_and(<dyn std::error::Error>::is::<std::io::Error>),
        }
}

fn note(content: Option<String>, epoch: Option<f64>) -> Note {
    let mut content = content.unwrap_or_default();
    if let Some((end, _)) = content.char_indices().nth(NOTE_CHARS) {
        content.truncate(end);
        content.push('…');
    }
    // `infinity`, and years that no calendar of ours has, are shown as no time at all.
    let created_at = epoch
        .and_then(|epoch| SignedDuration::try_from_secs_f64(epoch).ok())
        .and_then(|since| Timestamp::from_duration(since).ok());
    Note {
        content,
        created_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_cut_at_a_character() {
        let whole = "ü".repeat(NOTE_CHARS);
        assert_eq!(note(Some(whole.clone()), None).content, whole);
        assert_eq!(
            note(Some(format!("{whole}ü")), None).content,
            format!("{whole}…")
        );
    }

    #[test]
    fn times_beyond_any_calendar_are_no_times() {
        for epoch in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e15] {
            assert_eq!(note(None, Some(epoch)).created_at, None, "{epoch}");
        }
        assert_eq!(
            note(None, Some(0.0)).created_at,
            Some(Timestamp::UNIX_EPOCH)
        );
    }
}
