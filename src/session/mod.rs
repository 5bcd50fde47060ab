//! One client from accept to close.
//!
//! # Life cycle
//!
//! ```text
//! accept ─▶ handshake ─┬─▶ cancel ─▶ close
//!   (maybe TLS)        └─▶ password? ─▶ permit ─▶ login ─▶ welcome ─▶ relay ─▶ close
//!                              └──────────┴────────┴─▶ refuse ─▶ close
//! ```
//!
//! All of it is one task, on the runtime that the client was placed on.
//!
//! Until the welcome nothing is sent to the client but the answers to its requests for encryption: libpq takes a
//! notice before AuthenticationOk for an error.

mod arrival;
mod cancel;
mod dropped;
mod encryption;
mod entrance;
mod handshake;
mod local_auth;
mod policy;
mod relay;
mod rewind;
mod unfinished;
mod welcomed;

use std::{io, sync::Arc, time::Duration};

use bytes::{BufMut, BytesMut};
use jiff::Timestamp;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, sleep, timeout},
};

pub use self::{
    cancel::Cancels,
    dropped::Dropped,
    encryption::{ClientTlsError, Encryption},
    entrance::{Entrance, Told},
    local_auth::{KnownPassword, LocalPassword},
    policy::{Policies, Policy},
    unfinished::{HandshakePermit, Unfinished},
};
use self::{
    cancel::Target,
    welcomed::{Held, Said, Welcomed},
};
use crate::{
    console::{self, Console},
    net::socket::{HangUp, Transport},
    protocol::{
        backend::{negotiation, welcome},
        error::{Report, sqlstate},
        options::SessionSettings,
        startup::StartupMessage,
    },
    shutdown::{Phase, Shutdown},
    status::{ClientInfo, Encrypted, EndpointSessions, Peer, Rejected, Server, SessionEntry},
    telemetry::{
        Metrics,
        labels::{CancelOutcome, Reason},
    },
    upstream::{Connected, Connection, Refusal, Route, Terms},
};

/// A wait worth telling the client about.
const LONG_WAIT: Duration = Duration::from_secs(1);
/// How long a client may take to read its refusal, and to close after we have.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes that are read of a client before it is welcomed.
const EARLY_LIMIT: usize = 16 * 1024;
/// How often a client that has sent more is looked at: its end is behind bytes that are not read.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Terminate: the orderly end of a session towards the server.
pub(crate) const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// What the sessions of one listener share.
pub struct Sessions {
    /// Where they lead.
    pub route: Route,
    /// What they go by.
    pub policies: Policies,
    /// The endpoint's part of the registry of sessions.
    pub registry: EndpointSessions,
    /// Keys given out.
    pub cancels: Arc<Cancels>,
    /// When to end.
    pub shutdown: Shutdown,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Logs the sessions that the endpoint ends.
    pub dropped: Arc<Dropped>,
    /// What is answered to those who look from psql.
    pub console: Option<Arc<Console>>,
}

impl Sessions {
    /// A number for the next session, which the client is told in a refusal and the log shows.
    pub fn next_id(&self) -> u64 {
        self.registry.registry().next_id()
    }

    /// A session up to its welcome, if it comes to that; an error is a refusal that the client is still to be told.
    async fn run<S>(
        &self,
        (id, peer, encryption): (u64, Peer, Encrypted),
        policy: &Policy,
        client: &mut S,
        mut buffer: BytesMut,
        startup: StartupMessage,
    ) -> Result<Option<Welcomed>, Refusal>
    where
        S: Transport,
    {
        let began = Instant::now();
        let entry = self.admit(id, ClientInfo::new(peer, encryption, &startup), policy)?;
        let draining = self.shutdown.draining().clone();
        // A box, so that a session's task is not the size of a login for ever.
        let connect = Box::pin(async {
            let limits = policy.terms.limits;
            let patience = limits.connect_timeout.min(limits.credential_timeout);
            let upstream = self.route.upstream(patience).await?;
            let (database, fallback) = policy.database_mapping.choose(
                startup.parameter("user"),
                startup.parameter("database"),
                &upstream.endpoint().database,
            );
            let mut settings = SessionSettings::new(&startup, database);
            settings.fallback_database = fallback;
            upstream.connect(&settings, &policy.terms).await
        });
        let connected = tokio::select! {
            connected = connect => connected,
            () = hang_up(client, &mut buffer) => {
                tracing::debug!(session = id, "client left while it was being logged in");
                return Ok(None);
            }
            () = draining.cancelled() => Err(shutting_down()),
        };
        let held = began.elapsed();
        self.metrics.hold_seconds.observe(held.as_secs_f64());
        let Connected {
            connection,
            database,
            woke_after,
        } = connected.map_err(|refusal| about_console(refusal, &startup))?;
        let began = Instant::now();
        let Connection {
            stream,
            leftover,
            mut greeting,
            address,
            gauge,
        } = connection;
        tracing::debug!(session = id, after = ?held, "session begins");
        entry.connected(Server {
            address,
            process_id: greeting.key.map(|key| key.process_id),
            database: database.into(),
            waited: held,
        });
        if let Some(held) = woke_after {
            let recent = self.registry.registry().recent();
            recent.woke(self.route.label(), held, Timestamp::now());
        }
        let registration = greeting
            .key
            .map(|key| self.cancels.register(Target { address, key }));
        let key = registration
            .as_ref()
            .map_or_else(Cancels::meaningless_key, cancel::Registration::key);
        if let Some(wait) = woke_after.filter(|wait| *wait >= LONG_WAIT) {
            let notice = format!(
                "Lakebase endpoint {} woke after {:.1} s",
                self.route.label(),
                wait.as_secs_f64()
            );
            greeting
                .notices
                .extend_from_slice(&Report::new("00000", notice).encode_notice());
        }
        let mut hello = match policy.entrance.password(peer) {
            Some(_) => BytesMut::new(), // said before the password was asked for
            None => negotiation(&startup),
        };
        let status = &greeting.parameter_status;
        hello.extend_from_slice(&welcome(status, key, &greeting.notices));
        drop(greeting);
        let said = timeout(policy.client_login_timeout, write_all(client, &hello)).await;
        if !matches!(said, Ok(Ok(()))) {
            tracing::debug!(session = id, "client did not take its welcome");
            return Ok(None);
        }
        Ok(Some(Welcomed {
            id,
            began,
            server: stream,
            said: Box::new(Said {
                by_client: buffer,
                by_server: leftover,
            }),
            entry,
            dropped: Arc::clone(&self.dropped),
            loss_timeout: policy.terms.keepalive.loss_timeout(),
            metrics: Arc::clone(&self.metrics),
            shutdown: self.shutdown.clone(),
            held: Held {
                _connected: gauge,
                _registration: registration,
            },
        }))
    }

    /// Registers the session, unless the proxy or the endpoint is shutting down or the limit is reached.
    fn admit(&self, id: u64, client: ClientInfo, policy: &Policy) -> Result<SessionEntry, Refusal> {
        if self.shutdown.phase() != Phase::Serving {
            return Err(shutting_down());
        }
        let limit = policy.max_connections;
        let rejected = match self.registry.enter(id, client, limit) {
            Ok(entry) => return Ok(entry),
            Err(rejected) => rejected,
        };
        Err(match rejected {
            Rejected::Draining => Refusal {
                report: Report::new(
                    sqlstate::CANNOT_CONNECT_NOW,
                    format!(
                        "Lakebase endpoint {} is no longer among the settings of lakebase-proxy",
                        self.route.label()
                    ),
                )
                .with_hint("Connect to another endpoint, or put it back and reload."),
                reason: Reason::ShuttingDown,
            },
            Rejected::Limit => Refusal {
                report: Report::new(
                    sqlstate::TOO_MANY_CONNECTIONS,
                    format!("sorry, too many clients already: lakebase-proxy takes {limit}"),
                )
                .with_hint("Close connections that are not used, or raise --max-connections."),
                reason: Reason::MaxConnections,
            },
        })
    }

    /// Passes a cancel request on.
    async fn cancel(&self, Target { address, key }: Target, terms: &Terms) {
        let Some(upstream) = self.route.found() else {
            return self.count_cancel(CancelOutcome::Unknown);
        };
        self.count_cancel(
            match upstream.cancel(address, key, &terms.keepalive).await {
                Ok(()) => CancelOutcome::Forwarded,
                Err(error) => {
                    tracing::warn!(error = %error, "cancel request could not be passed on");
                    CancelOutcome::Failed
                }
            },
        );
    }

    fn count_cancel(&self, outcome: CancelOutcome) {
        self.metrics.cancels[outcome].inc();
    }

    /// Tells the client why it gets no session, and whoever reads the log.
    async fn refuse<S>(&self, id: u64, client: &mut S, refusal: Refusal)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Refusal { mut report, reason } = refusal;
        let recent = self.registry.registry().recent();
        recent.refused(id, self.route.label(), reason, &report, Timestamp::now());
        self.metrics.clients_refused[reason].inc();
        tracing::warn!(
            session = id,
            reason = reason.as_str(),
            sqlstate = report.sqlstate,
            detail = report.detail,
            hint = report.hint,
            "client refused: {}",
            report.message
        );
        let mut detail = report.detail.take().unwrap_or_default();
        if !detail.is_empty() {
            detail.push(' ');
        }
        report.detail = Some(format!("{detail}(lakebase-proxy session {id})"));
        let last_words = report.encode_fatal();
        let goodbye = async {
            write_all(client, &last_words).await?;
            client.shutdown().await
        };
        if let Ok(Ok(())) = timeout(FAREWELL, goodbye).await {
            linger(client).await;
        }
    }
}

/// Somebody may have meant the console, and been taken for a client of the endpoint.
fn about_console(mut refusal: Refusal, startup: &StartupMessage) -> Refusal {
    if refusal.report.sqlstate == sqlstate::UNDEFINED_DATABASE
        && console::is_name(startup.parameter("database"))
    {
        refusal.report.hint = Some(
            "If the proxy's own console is meant: it answers on the Unix socket (--unix-socket), and on TCP with --admin-console."
                .to_owned(),
        );
    }
    refusal
}

fn shutting_down() -> Refusal {
    Refusal {
        report: Report::new(
            sqlstate::CANNOT_CONNECT_NOW,
            "lakebase-proxy is shutting down",
        )
        .with_hint("Connect again once it has restarted, or to another host."),
        reason: Reason::ShuttingDown,
    }
}

/// Returns when the client hangs up; keeps what it sends meanwhile. Cancel safe.
async fn hang_up<S: Transport>(client: &mut S, buffer: &mut BytesMut) {
    while buffer.len() < EARLY_LIMIT {
        let room = EARLY_LIMIT - buffer.len();
        if let Ok(0) | Err(_) = client.read_buf(&mut (&mut *buffer).limit(room)).await {
            return;
        }
    }
    while client.hang_up() == HangUp::None {
        sleep(LOOK_EVERY).await;
    }
}

/// Reads on until the client closes too: closing with bytes unread resets the connection, and the reset may overtake
/// the last words.
async fn linger<S: AsyncRead + Unpin>(client: &mut S) {
    // On the heap, as every session's task has room for all that it may come to.
    let mut ignored = vec![0; 512];
    let closed = async { while let Ok(1..) = client.read(&mut ignored).await {} };
    let _ = timeout(FAREWELL, closed).await;
}

async fn write_all<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests;
