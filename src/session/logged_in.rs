//! A session that is logged in: relayed to its end, and then closed on both sides.

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, timeout},
};

use super::{
    Session,
    cancel::Registration,
    client::{CLOSE_TIMEOUT, Client},
    relay::{Answers, End, Observers, Relay, Side},
};
use crate::{
    net::{message::write_and_flush, socket::Transport},
    protocol::startup::terminate,
    status::SessionEntry,
    telemetry::{GaugeGuard, labels::Direction},
    upstream::Stream,
};

/// A session whose client and server are ready for queries.
pub(super) struct LoggedIn<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) server: Stream,
    /// Sent by the server behind its ReadyForQuery.
    pub(super) leftover: BytesMut,
    pub(super) began: Instant,
    pub(super) entry: SessionEntry,
    #[expect(dead_code, reason = "held, not read")]
    pub(super) active_gauge: GaugeGuard,
    #[expect(dead_code, reason = "held, not read")]
    pub(super) registration: Option<Registration>,
}

impl LoggedIn<'_> {
    /// Relays until either side is done.
    pub(super) async fn relay<S: Transport>(&mut self, client: &mut Client<S>) {
        let endpoint = self.session.endpoint;
        let metrics = &endpoint.metrics;
        let bytes = |direction| metrics.relay_bytes[direction].clone();
        let mut relay = Relay::new(
            Side {
                stream: &mut client.stream,
                received: std::mem::take(&mut client.received),
                bytes: bytes(Direction::FromClient),
            },
            Side {
                stream: &mut self.server,
                received: std::mem::take(&mut self.leftover),
                bytes: bytes(Direction::FromServer),
            },
            &endpoint.process.shutdown,
            Observers {
                activity: Some(self.entry.activity()),
                answers: Some(Answers {
                    queries: metrics.queries.clone(),
                    transactions: metrics.transactions.clone(),
                }),
                loss_timeout: self.session.config.connect.keepalive.loss_timeout(),
            },
        );
        let end = relay.run().await;
        if end == End::Server {
            endpoint.lost_sessions.add(relay.server_error());
        }
        drop(relay);
        let duration = self.began.elapsed();
        metrics.session_seconds[end.label()].observe(duration.as_secs_f64());
        tracing::debug!(session = self.session.id, ?end, ?duration, "session ends");
        // Boxed: the timers here would otherwise enlarge the task of every session.
        match end {
            // The socket towards the server is closed, as that of a direct client would be.
            End::Client => {}
            End::Server => Box::pin(client.linger()).await,
            End::Shutdown { orderly } => {
                let server = &mut self.server;
                let terminating = async {
                    if orderly {
                        write_and_flush(server, &terminate()).await?;
                    }
                    server.shutdown().await
                };
                // At the same time: one after the other both timeouts would add up within a shutdown.
                let both =
                    async { tokio::join!(timeout(CLOSE_TIMEOUT, terminating), client.linger()) };
                let _ = Box::pin(both).await;
            }
        }
    }
}
