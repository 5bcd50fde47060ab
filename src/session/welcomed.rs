//! A session that has been logged in: it is relayed to its end.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, timeout},
};

use super::{
    Dropped, FAREWELL, TERMINATE,
    cancel::Registration,
    linger,
    relay::{Answers, End, Relay},
    write_all,
};
use crate::{
    net::socket::Transport,
    shutdown::Shutdown,
    status::SessionEntry,
    telemetry::{CountOnDrop, GaugeGuard, Metrics, labels::Direction},
    upstream::Stream,
};

/// All that is left of a session once its client has been welcomed, but for the client.
pub(super) struct Welcomed {
    pub(super) id: u64,
    pub(super) began: Instant,
    pub(super) server: Stream,
    /// In a box, as it is gone before the session waits for anything.
    pub(super) said: Box<Said>,
    pub(super) entry: SessionEntry,
    pub(super) metrics: Arc<Metrics>,
    pub(super) shutdown: Shutdown,
    pub(super) dropped: Arc<Dropped>,
    pub(super) loss_timeout: Option<Duration>,
    pub(super) held: Held,
}

/// What there is to be relayed already.
pub(super) struct Said {
    pub(super) by_client: BytesMut,
    /// Behind its greeting.
    pub(super) by_server: BytesMut,
}

/// What a session takes up, given back when this is dropped.
pub(super) struct Held {
    pub(super) _connected: GaugeGuard,
    pub(super) _registration: Option<Registration>,
}

/// A client that is counted as here until this is dropped.
pub(super) struct Counted {
    _active: GaugeGuard,
    _closed: CountOnDrop,
}

impl Counted {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self {
            _active: GaugeGuard::new(&metrics.clients_active),
            _closed: CountOnDrop::new(&metrics.clients_closed),
        }
    }
}

impl Welcomed {
    /// Relays until either side is done.
    #[expect(
        clippy::manual_async_fn,
        reason = "an `async fn` has room for its arguments twice, a block uses what it captures where it is"
    )]
    pub(super) fn relay<S>(mut self, mut client: S, counted: Counted) -> impl Future<Output = ()>
    where
        S: Transport,
    {
        async move {
            // A block captures what it mentions; these are for its end.
            let _until_the_end = (&counted, &self.held);
            let bytes = |direction| self.metrics.relay_bytes[direction].clone();
            let mut relay = Relay::new(
                (
                    &mut client,
                    &self.said.by_client,
                    bytes(Direction::FromClient),
                ),
                (
                    &mut self.server,
                    &self.said.by_server,
                    bytes(Direction::FromServer),
                ),
                &self.shutdown,
            )
            .limited(self.loss_timeout)
            .watched(self.entry.activity())
            .counting(Answers {
                queries: self.metrics.queries.clone(),
                transactions: self.metrics.transactions.clone(),
            });
            // The relay has its own copies of them.
            drop(self.said);
            let end = relay.run().await;
            if end == End::Server {
                self.dropped.add(relay.last_words());
            }
            drop(relay);
            let duration = self.began.elapsed();
            self.metrics.session_seconds[end.label()].observe(duration.as_secs_f64());
            tracing::debug!(session = self.id, ?end, ?duration, "session ends");
            // The ends are boxed: their timers are more than the relay has of its own, and would be in each session's task.
            match end {
                // Gone or broken: the server's side ends as that of a direct client would, by the socket being closed.
                End::Client => {}
                End::Server => Box::pin(linger(&mut client)).await,
                End::Shutdown { orderly } => {
                    let server = &mut self.server;
                    let goodbye = async {
                        if orderly {
                            write_all(server, &TERMINATE).await?;
                        }
                        server.shutdown().await
                    };
                    let both =
                        async { tokio::join!(timeout(FAREWELL, goodbye), linger(&mut client)) };
                    let _ = Box::pin(both).await;
                }
            }
        }
    }
}
