//! One client from accept to close: [`serve`] shows the whole of it.
//!
//! ```text
//! accept ─▶ Handshake ─┬─▶ CancelRequest ─▶ close
//!   (maybe TLS)        ├─▶ Probe (pg_isready) ─▶ close
//!                      └─▶ SessionRequest ─▶ Access ─┬─▶ ConsoleSession ─▶ close
//!                                                    └─▶ Admitted ─▶ Connected ─▶ LoggedIn: relay ─▶ close
//! ```
//!
//! With a pool in `transaction` mode, the relay is one for each transaction, and the client is at rest between them.
//!
//! Each phase is a type that consumes the last, and may end in a `Closing` instead. No notice is sent to the client before
//! AuthenticationOk: libpq takes one there for an error.
//!
//! Streams are generic, so that tests use `tokio::io::duplex`. A session runs as one task on the thread that the listener
//! has chosen.

mod access;
mod cancel;
mod client;
mod close;
mod connect;
mod console;
mod context;
mod database;
mod handshake;
mod handshake_limit;
mod listener_certificate;
mod local_password;
mod logged_in;
mod lost_sessions;
mod next_request;
mod relay;

use std::sync::Arc;

use tokio::time::Instant;

pub use self::{
    access::AccessPolicy,
    context::{SessionConfig, SharedConfig},
    listener_certificate::ClientTlsError,
    local_password::KnownPassword,
};
pub(crate) use self::{
    cancel::CancelKeys,
    console::{Console, ConsoleRequest},
    context::{EndpointContext, ProcessContext},
    handshake_limit::{HandshakeLimiter, HandshakePermit},
    listener_certificate::ListenerCertificate,
    local_password::LocalPassword,
    lost_sessions::LostSessions,
};
use self::{
    client::Client,
    handshake::{Handshake, Request},
};
use crate::{
    net::socket::Transport,
    status::Peer,
    telemetry::{CountOnDrop, GaugeGuard},
};

/// A client that has just been accepted.
pub(crate) struct Accepted<S> {
    /// The session id, which refusals and the log show.
    pub(crate) id: u64,
    /// The client's address or process.
    pub(crate) peer: Peer,
    /// Its connection.
    pub(crate) stream: S,
    /// The permit of its handshake.
    pub(crate) permit: HandshakePermit,
}

/// What the phases of one session have in common.
struct Session<'a> {
    endpoint: &'a EndpointContext,
    /// A snapshot: a reload affects new sessions only.
    config: Arc<SessionConfig>,
    id: u64,
    peer: Peer,
    accepted_at: Instant,
}

/// Serves one client from accept to close.
pub(crate) async fn serve<S: Transport>(
    endpoint: Arc<EndpointContext>,
    accepted: Box<Accepted<S>>,
) {
    // A task keeps its arguments to its end, so this one is a box and is freed here.
    let Accepted {
        id,
        peer,
        stream,
        permit,
    } = {
        let accepted = accepted;
        *accepted
    };
    // Guards, so that a session that panics or is dropped counts as ended too.
    let _active = GaugeGuard::new(&endpoint.metrics.clients_active);
    let _closed = CountOnDrop::new(&endpoint.metrics.clients_closed);
    let session = Session {
        endpoint: &endpoint,
        // An Arc of its own: the guards of ArcSwap are for short use and must not be held for a session.
        config: endpoint.process.config.load_full(),
        id,
        peer,
        accepted_at: Instant::now(),
    };
    tracing::trace!(peer = %session.peer, "client accepted");
    let mut client = Client::new(stream);
    // `Err` is the end of a session without a relay, also of one that has all that it requested. Boxes, as the
    // task lives as long as the relay, and should keep the memory of no other phase.
    let logged_in = Box::pin(async {
        let handshake = Handshake::new(&session, permit);
        let request = match Box::pin(handshake.receive(&mut client)).await? {
            Request::Cancel(cancel) => return Err(Box::pin(cancel.forward(&mut client)).await),
            Request::Probe(probe) => return Err(Box::pin(probe.answer(&mut client)).await),
            Request::Session(request) => request,
        };
        let access = match Box::pin(request.check(&mut client)).await?.for_console() {
            Ok(console) => return Err(Box::pin(console.serve(&mut client)).await),
            Err(access) => access,
        };
        let connected = Box::pin(access.admit()?.connect(&mut client)).await?;
        Box::pin(connected.welcome(&mut client)).await
    });
    let mut logged_in = match logged_in.await {
        Ok(logged_in) => logged_in,
        Err(closing) => return Box::pin(session.close(&mut client, closing)).await,
    };
    let ended = logged_in.relay(&mut client).await;
    Box::pin(logged_in.close(ended, &mut client)).await;
}

#[cfg(test)]
mod tests;
