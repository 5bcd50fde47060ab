//! The console: answers SHOW commands over the Postgres protocol, for psql, drivers and PgBouncer's exporter, and takes
//! PgBouncer's commands for the connections of a database.
//!
//! `psql lakebase_proxy`, or `pgbouncer` for scripts written for that. Settings are not changed here: they belong in the
//! configuration. SHOW reads the process's own state and sends nothing, so that it works while the endpoint sleeps and
//! while no credential can be minted.
//!
//! | client | access |
//! |---|---|
//! | Unix socket, of our own user or root | always |
//! | TCP from this machine | with `--admin-console` |
//! | any other | none; the name is then a database of the endpoint |
//!
//! Its clients have a limit of their own, since it must answer when all connections are used; they are in no list and do
//! not count as activity for the idle exit.

mod clients;
mod control;
mod dialogue;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod pools;
mod statement;
mod table;
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
use tokio::{io::AsyncWrite, time::timeout};

pub(crate) use self::control::ListEndpoints;
use self::{
    clients::{CLIENTS, Clients},
    control::Command,
    dialogue::{Backend, Dialogue},
    table::{Rows, Table},
};
use crate::{
    net::{
        message::{ReadError, read_message, write_and_flush},
        unix::effective_uid,
    },
    protocol::{
        backend::{parameter_status, welcome},
        error::{Report, sqlstate},
        frame::{FrameError, tag},
        startup::{CancelKey, StartupMessage},
    },
    session::{self, ConsoleRequest},
    status::{Health, Peer, TakeSnapshot, VERSION},
};

/// The databases that mean the console.
const NAMES: [&str; 2] = ["lakebase_proxy", "pgbouncer"];
/// Maximum length of a message, header included.
const MESSAGE_LIMIT: usize = 64 * 1024;
/// Timeout of one write to a client that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The console of one process.
pub struct Console {
    snapshot: TakeSnapshot,
    endpoints: ListEndpoints,
    health: Arc<Health>,
    clients: Clients,
    over_tcp: AtomicBool,
}

impl Console {
    /// A console for clients of the Unix socket.
    pub(crate) fn new(
        snapshot: TakeSnapshot,
        endpoints: ListEndpoints,
        health: Arc<Health>,
    ) -> Self {
        Self {
            snapshot,
            endpoints,
            health,
            clients: Clients::default(),
            over_tcp: AtomicBool::new(false),
        }
    }

    /// Enables or disables new TCP clients from this machine.
    pub fn set_over_tcp(&self, open: bool) {
        // Relaxed: no other data depends on it.
        self.over_tcp.store(open, Ordering::Relaxed);
    }

    fn is_open_to(&self, peer: Peer) -> bool {
        match peer {
            // Root and the proxy's own user could read its files and memory anyway.
            Peer::Unix { uid, .. } => uid == 0 || uid == effective_uid(),
            Peer::Tcp(address) => {
                self.over_tcp.load(Ordering::Relaxed) && address.ip().to_canonical().is_loopback()
            }
        }
    }

    /// Not cancel safe: part of a response may have been written.
    async fn respond(&self, request: ConsoleRequest<'_>) -> io::Result<()> {
        let ConsoleRequest {
            mut client,
            mut received,
            negotiation,
            startup,
            draining,
        } = request;
        let permit = self.clients.enter();
        let mut out = negotiation;
        // NegotiateProtocolVersion, if needed, precedes the authentication (protocol docs, "Start-up").
        out.unsplit(greeting(startup));
        write(&mut client, &out).await?;
        let mut dialogue = Dialogue::new(self);
        let report = loop {
            out.clear();
            let turn = async {
                let message = read_message(&mut client, &mut received, MESSAGE_LIMIT).await?;
                permit.touch();
                if message.tag == tag::TERMINATE {
                    return Ok(false);
                }
                // PAUSE waits here.
                dialogue.handle(&message, &mut out).await;
                Ok(true)
            };
            let turn = tokio::select! {
                turn = turn => turn,
                () = permit.evicted.cancelled() => {
                    break Report::new(
                        sqlstate::IDLE_SESSION_TIMEOUT,
                        format!("terminating the console connection that has been idle longest of {CLIENTS}"),
                    );
                }
                () = draining.cancelled() => {
                    break Report::new(
                        sqlstate::ADMIN_SHUTDOWN,
                        "terminating connection because lakebase-proxy is shutting down",
                    );
                }
            };
            match turn {
                Ok(false) => return Ok(()),
                Ok(true) => write(&mut client, &out).await?,
                Err(ReadError::Io(error)) => return Err(error),
                Err(ReadError::Frame(error)) => break unreadable(&error),
            }
        };
        write(&mut client, &report.encode_fatal()).await
    }
}

impl Backend for &Console {
    fn rows(&self, table: &Table) -> Rows {
        table.rows(&(self.snapshot)())
    }

    async fn control(&self, command: &Command) -> Result<(), Report> {
        command.run(&(self.snapshot)(), (self.endpoints)()).await
    }
}

/// AuthenticationOk to ReadyForQuery.
fn greeting(startup: &StartupMessage) -> BytesMut {
    let mut status = BytesMut::new();
    // Those that Postgres reports at login (protocol docs, "Asynchronous Operations"): drivers read them.
    for (name, value) in [
        // Every psql accepts a server this old without a warning.
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
    // Random: there is nothing to cancel.
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
                "the console of lakebase-proxy accepts statements of up to {} kB",
                MESSAGE_LIMIT / 1024
            ),
        ),
        FrameError::InvalidLength { .. } => {
            Report::new(sqlstate::PROTOCOL_VIOLATION, error.to_string())
        }
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    timeout(WRITE_TIMEOUT, write_and_flush(stream, bytes))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

impl session::Console for Console {
    /// libpq sends the user as database when none is given, which does not select the console.
    fn accepts(&self, peer: Peer, startup: &StartupMessage) -> bool {
        let database = startup.parameter("database");
        self.is_named(startup) && database != startup.parameter("user") && self.is_open_to(peer)
    }

    fn is_named(&self, startup: &StartupMessage) -> bool {
        let database = startup.parameter("database");
        database.is_some_and(|database| NAMES.contains(&database))
    }

    fn readiness(&self) -> Result<(), String> {
        let verdict = self.health.readiness();
        if verdict.is_ok() {
            return Ok(());
        }
        Err(verdict.reasons.join("; "))
    }

    fn greeting(&self, startup: &StartupMessage) -> BytesMut {
        greeting(startup)
    }

    fn serve<'a>(
        &'a self,
        request: ConsoleRequest<'a>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>> {
        // A trait with an async function cannot be a trait object.
        Box::pin(self.respond(request))
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
    fn access_is_for_our_user_and_root_and_for_local_tcp_if_enabled() {
        let health = Arc::new(Health::new(|| Ok(())));
        let console = Console::new(
            Arc::new(|| unreachable!()),
            Arc::new(|| unreachable!()),
            health,
        );
        let unix = |uid| Peer::Unix { uid, pid: None };
        let ours = effective_uid();
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
