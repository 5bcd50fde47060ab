//! The admin console as sessions see it, and `pg_isready`, which the proxy answers itself.

use std::{io, pin::Pin};

use bytes::BytesMut;
use tokio_util::sync::CancellationToken;

use super::{
    access::Access,
    client::Client,
    close::Closing,
    handshake::{Handshake, HandshakeError},
};
use crate::{
    net::{
        message::{ReadError, read_message},
        socket::Transport,
    },
    protocol::{
        backend::negotiation,
        error::{Report, sqlstate},
        frame::tag,
        startup::StartupMessage,
    },
    shutdown::Phase,
    status::Peer,
};

/// The longest message that is read of `pg_isready`, which sends Terminate.
const PROBE_MESSAGE_LIMIT: usize = 1024;

/// A server of `SHOW` commands.
pub(crate) trait Console: Send + Sync {
    /// Whether a client that sent `startup` connects to the console.
    fn accepts(&self, peer: Peer, startup: &StartupMessage) -> bool;

    /// Whether `startup` names the console, which may not accept it all the same.
    fn is_named(&self, startup: &StartupMessage) -> bool;

    /// Whether the proxy is ready; else why not.
    fn readiness(&self) -> Result<(), String>;

    /// AuthenticationOk to ReadyForQuery.
    fn greeting(&self, startup: &StartupMessage) -> BytesMut;

    /// Serves a client to its end.
    fn serve<'a>(
        &'a self,
        request: ConsoleRequest<'a>,
    ) -> Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>>;
}

/// A client of the console.
pub(crate) struct ConsoleRequest<'a> {
    /// Its connection.
    pub(crate) client: &'a mut dyn Transport,
    /// Received behind the startup message.
    pub(crate) received: BytesMut,
    /// A NegotiateProtocolVersion to send before the greeting, or nothing.
    pub(crate) negotiation: BytesMut,
    /// Its startup message.
    pub(crate) startup: &'a StartupMessage,
    /// Cancelled when the proxy shuts down.
    pub(crate) draining: &'a CancellationToken,
}

/// A client of the console that has passed the access checks.
pub(super) struct ConsoleSession<'a> {
    access: Access<'a>,
    console: &'a dyn Console,
}

impl<'a> Access<'a> {
    /// The console, where the client connects to that.
    pub(super) fn for_console(self) -> Result<ConsoleSession<'a>, Self> {
        match self.session.endpoint.process.console.as_deref() {
            Some(console) if console.accepts(self.session.peer, &self.startup) => {
                Ok(ConsoleSession {
                    access: self,
                    console,
                })
            }
            _ => Err(self),
        }
    }
}

impl ConsoleSession<'_> {
    pub(super) async fn serve<S: Transport>(self, client: &mut Client<S>) -> Closing {
        let request = ConsoleRequest {
            client: &mut client.stream,
            received: std::mem::take(&mut client.received),
            negotiation: self.access.negotiation,
            startup: &self.access.startup,
            draining: self.access.session.endpoint.process.shutdown.draining(),
        };
        let served = self.console.serve(request).await;
        tracing::debug!(session = self.access.session.id, ?served, "console closed");
        client.linger().await;
        Closing::Silent
    }
}

/// A handshake of libpq's `pg_isready`, which sends no query.
pub(super) struct Probe<'a> {
    pub(super) handshake: Handshake<'a>,
    pub(super) startup: StartupMessage,
}

impl Probe<'_> {
    pub(super) fn is_sent_by(startup: &StartupMessage) -> bool {
        // Its fallback_application_name: with PGAPPNAME set pg_isready is a client like any other.
        startup.parameter("application_name") == Some("pg_isready")
            && startup.parameter("replication").is_none()
    }

    /// Answers with the proxy's readiness, before any password: the exit code of `pg_isready` distinguishes acceptance
    /// from 57P03, and counts every other error as acceptance. Nothing is sent upstream, so that a health check wakes
    /// no endpoint.
    pub(super) async fn answer<S: Transport>(self, client: &mut Client<S>) -> Closing {
        let session = self.handshake.session;
        let process = &session.endpoint.process;
        let readiness = match &process.console {
            _ if process.shutdown.phase() != Phase::Serving => {
                Err("proxy is shutting down".to_owned())
            }
            Some(console) => console.readiness(),
            None => Ok(()),
        };
        tracing::debug!(session = session.id, ?readiness, "answers pg_isready");
        let answering = async {
            // 57P03 makes pg_isready exit with 1, "rejecting connections".
            let answer = match readiness {
                Err(reasons) => Some(not_ready(reasons)),
                Ok(()) => self.greet(client).await?,
            };
            if let Some(report) = answer {
                client.send(&report.encode_fatal()).await?;
            }
            Ok(tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await?)
        };
        let _ = self.handshake.in_time(answering).await;
        client.linger().await;
        Closing::Silent
    }

    /// The error to answer a client with that does not terminate as `pg_isready` does.
    async fn greet<S: Transport>(
        &self,
        client: &mut Client<S>,
    ) -> Result<Option<Report>, HandshakeError> {
        let mut greeting = negotiation(&self.startup);
        if let Some(console) = &self.handshake.session.endpoint.process.console {
            greeting.extend_from_slice(&console.greeting(&self.startup));
        }
        client.send(&greeting).await?;
        let next = read_message(
            &mut client.stream,
            &mut client.received,
            PROBE_MESSAGE_LIMIT,
        )
        .await;
        match next {
            // libpq's PQping closes with Terminate once it is logged in.
            Ok(message) if message.tag == tag::TERMINATE => Ok(None),
            Err(ReadError::Io(_)) => Ok(None),
            Ok(_) | Err(ReadError::Frame(_)) => Ok(Some(
                Report::new(
                    sqlstate::FEATURE_NOT_SUPPORTED,
                    "lakebase-proxy answers a client with the application name `pg_isready` itself",
                )
                .with_hint("Connect with another application_name to send queries."),
            )),
        }
    }
}

fn not_ready(reasons: String) -> Report {
    Report::new(sqlstate::CANNOT_CONNECT_NOW, "lakebase-proxy is not ready").with_detail(reasons)
}
