//! The console: the proxy answers `SHOW CLIENTS` and its kin as if it were a database, to psql or any driver.
//!
//! `psql lakebase_proxy`, or `pgbouncer` for those whose scripts say so. It only shows, for ever: whatever can be changed
//! is changed in the configuration or by a signal. It reads what the process knows of itself and asks nobody, so that it
//! works while the endpoint sleeps and while no credential can be had, which is when it is needed.
//!
//! | who | may |
//! |---|---|
//! | a Unix-socket client of our own user, or of root | always |
//! | a TCP client on this machine | with `--admin-console` |
//! | anybody else | not; the name is then a database of the endpoint, like any other |
//!
//! Its clients need no permit (it must answer when all are taken, and is bounded by itself), are in no list, and do not
//! keep the program from ending when idle.

mod clients;
mod dialogue;
#[cfg(fuzzing)]
pub mod fuzzing;
mod pgbouncer;
mod statement;
mod tables;

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    clients::{CLIENTS, Clients},
    dialogue::{Dialogue, Next},
};
use crate::{
    protocol::{
        backend::{parameter_status, welcome},
        error::{Report, sqlstate},
        frame::{FrameError, take_message},
        startup::{CancelKey, StartupMessage},
    },
    session,
    status::{Health, Peer, TakeSnapshot, VERSION},
};

/// The databases that mean the console.
const NAMES: [&str; 2] = ["lakebase_proxy", "pgbouncer"];
/// Longest message, header included; more is nothing that is typed here.
const MESSAGE_LIMIT: usize = 64 * 1024;
/// Answers are written out beyond this, also if more has been asked.
const ANSWER_CHUNK: usize = 64 * 1024;
/// How long a client may leave answers unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The console of one process.
pub struct Console {
    snapshot: TakeSnapshot,
    health: Arc<Health>,
    clients: Clients,
    over_tcp: AtomicBool,
}

impl Console {
    /// A console for clients of the Unix socket.
    pub fn new(snapshot: TakeSnapshot, health: Arc<Health>) -> Self {
        Self {
            snapshot,
            health,
            clients: Clients::default(),
            over_tcp: AtomicBool::new(false),
        }
    }

    /// What keeps the proxy from being ready, if anything does.
    pub fn readiness(&self) -> Result<(), String> {
        let verdict = self.health.readiness();
        if verdict.is_ok() {
            return Ok(());
        }
        Err(verdict.reasons.join("; "))
    }

    /// Opens it to TCP clients on this machine, or closes it to those that come from now on.
    pub fn set_over_tcp(&self, open: bool) {
        self.over_tcp.store(open, Ordering::Relaxed);
    }

    /// Whether that client means the console and may have it. A database that is called like the user is the default of
    /// a client that names none, and means no console.
    pub fn is_for(&self, peer: Peer, startup: &StartupMessage) -> bool {
        let database = startup.parameter("database");
        is_name(database) && database != startup.parameter("user") && self.is_open_to(peer)
    }

    fn is_open_to(&self, peer: Peer) -> bool {
        match peer {
            Peer::Unix { uid, .. } => uid == 0 || uid == rustix::process::geteuid().as_raw(),
            Peer::Tcp(address) => {
                self.over_tcp.load(Ordering::Relaxed) && address.ip().to_canonical().is_loopback()
            }
        }
    }

    /// Answers one client until it leaves or `ending` is cancelled. `received` is what it has sent already, `hello` what
    /// it is told before its welcome.
    ///
    /// Not cancel safe.
    pub async fn serve<S>(
        &self,
        client: &mut S,
        (mut received, mut hello): (BytesMut, BytesMut),
        startup: &StartupMessage,
        ending: &CancellationToken,
    ) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let place = self.clients.enter();
        hello.extend_from_slice(&greeting(startup));
        write(client, &hello).await?;
        drop(hello);
        let mut dialogue = Dialogue::new(|table| table.rows(&(self.snapshot)()));
        let mut out = BytesMut::new();
        loop {
            let message = match take_message(&mut received, MESSAGE_LIMIT) {
                Ok(message) => message,
                Err(error) => {
                    out.extend_from_slice(&unreadable(&error).encode_fatal());
                    return write(client, &out).await;
                }
            };
            if let Some(message) = message {
                place.touch();
                if dialogue.hear(&message, &mut out) == Next::End {
                    return Ok(());
                }
                if out.len() < ANSWER_CHUNK {
                    continue;
                }
            }
            if !out.is_empty() {
                write(client, &out).await?;
                out.clear();
                continue;
            }
            let read = tokio::select! {
                read = client.read_buf(&mut received) => read?,
                () = place.evicted.cancelled() => {
                    let report = Report::new(
                        sqlstate::IDLE_SESSION_TIMEOUT,
                        format!("terminating the console connection that has been idle longest of {CLIENTS}"),
                    );
                    return write(client, &report.encode_fatal()).await;
                }
                () = ending.cancelled() => {
                    let report = Report::new(
                        sqlstate::ADMIN_SHUTDOWN,
                        "terminating connection because lakebase-proxy is shutting down",
                    );
                    return write(client, &report.encode_fatal()).await;
                }
            };
            if read == 0 {
                return Ok(());
            }
        }
    }
}

/// Whether a database of that name would be the console, for whoever may have it.
pub fn is_name(database: Option<&str>) -> bool {
    database.is_some_and(|database| NAMES.contains(&database))
}

/// Everything up to the first question.
pub(crate) fn greeting(startup: &StartupMessage) -> BytesMut {
    let mut status = BytesMut::new();
    for (name, value) in [
        // As old a server as every psql speaks to without a warning about it.
        ("server_version", format!("10.0 (lakebase-proxy {VERSION})")),
        ("server_encoding", "UTF8".to_owned()),
        ("client_encoding", "UTF8".to_owned()),
        (
            "application_name",
            startup
                .parameter("application_name")
                .unwrap_or_default()
                .to_owned(),
        ),
        ("is_superuser", "off".to_owned()),
        (
            "session_authorization",
            startup.parameter("user").unwrap_or_default().to_owned(),
        ),
        ("DateStyle", "ISO, MDY".to_owned()),
        ("IntervalStyle", "postgres".to_owned()),
        ("TimeZone", "UTC".to_owned()),
        ("integer_datetimes", "on".to_owned()),
        ("standard_conforming_strings", "on".to_owned()),
    ] {
        parameter_status(&mut status, name, &value);
    }
    // There is nothing to cancel.
    let key = CancelKey {
        process_id: rand::random(),
        secret: rand::random(),
    };
    welcome(&status, key, b"")
}

fn unreadable(error: &FrameError) -> Report {
    match error {
        FrameError::TooLong { .. } => Report::new(
            sqlstate::PROGRAM_LIMIT,
            format!(
                "the console of lakebase-proxy takes statements of {} kB",
                MESSAGE_LIMIT / 1024
            ),
        ),
        FrameError::InvalidLength { .. } => {
            Report::new(sqlstate::PROTOCOL_VIOLATION, error.to_string())
        }
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    let writing = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    timeout(WRITE_TIMEOUT, writing)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

impl session::Console for Console {
    fn accepts(&self, peer: Peer, startup: &StartupMessage) -> bool {
        self.is_for(peer, startup)
    }

    fn is_named(&self, startup: &StartupMessage) -> bool {
        is_name(startup.parameter("database"))
    }

    fn readiness(&self) -> Result<(), String> {
        self.readiness()
    }

    fn greeting(&self, startup: &StartupMessage) -> BytesMut {
        greeting(startup)
    }

    fn serve<'a>(
        &'a self,
        request: session::ConsoleRequest<'a>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>> {
        let session::ConsoleRequest {
            mut client,
            received,
            negotiation,
            startup,
            draining,
        } = request;
        Box::pin(async move {
            self.serve(&mut client, (received, negotiation), startup, draining)
                .await
        })
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console")
            .field("over_tcp", &self.over_tcp)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    #[test]
    fn it_is_for_our_own_user_and_root_and_by_tcp_for_this_machine_where_that_is_asked_for() {
        let health = Arc::new(Health::new(|| Ok(())));
        let console = Console::new(Arc::new(|| unreachable!()), health);
        let unix = |uid| Peer::Unix { uid, pid: None };
        let ours = rustix::process::geteuid().as_raw();
        assert!(console.is_open_to(unix(0)) && console.is_open_to(unix(ours)));
        for stranger in [70_001, 65_534, u32::MAX]
            .into_iter()
            .filter(|uid| *uid != ours)
        {
            assert!(!console.is_open_to(unix(stranger)), "{stranger}");
        }
        let tcp = |ip: &str| Peer::Tcp(SocketAddr::new(ip.parse().unwrap(), 4711));
        assert!(!console.is_open_to(tcp("127.0.0.1")));
        console.set_over_tcp(true);
        for (ip, may) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.1", false),
            ("::ffff:10.0.0.1", false),
        ] {
            assert_eq!(console.is_open_to(tcp(ip)), may, "{ip}");
        }
        assert!(!console.is_open_to(unix(70_001)), "whatever TCP may");
    }
}
