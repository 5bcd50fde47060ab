//! A session that is logged in: relayed to its end, and then closed on both sides.

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, timeout},
};

use super::{
    Session,
    cancel::{CancelTarget, Registration},
    client::{CLOSE_TIMEOUT, Client},
    relay::{End, Observers, Relay, Side},
};
use crate::{
    net::{message::write_and_flush, socket::Transport},
    pool::{Lease, Used},
    protocol::startup::terminate,
    shutdown::Shutdown,
    status::SessionEntry,
    telemetry::labels::{Direction, PoolClose},
};

/// A session whose client and server are ready for queries.
pub(super) struct LoggedIn<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) lease: Lease,
    /// Sent by the server behind its ReadyForQuery.
    pub(super) leftover: BytesMut,
    pub(super) began: Instant,
    pub(super) entry: SessionEntry,
    pub(super) shutdown: Shutdown,
    pub(super) registration: Option<Registration>,
}

/// How a relay has ended.
pub(super) struct Ended {
    end: End,
    /// Present if the server connection can go to another client.
    used: Option<Used>,
    /// Whether the server was at work for the client.
    is_owed: bool,
    /// Whether the client had left before the server closed.
    is_left: bool,
}

impl LoggedIn<'_> {
    /// Relays until either side is done. [`close`](Self::close) must follow.
    pub(super) async fn relay<S: Transport>(&mut self, client: &mut Client<S>) -> Ended {
        let endpoint = self.session.endpoint;
        let metrics = &endpoint.metrics;
        let bytes = |direction| metrics.relay_bytes[direction].clone();
        let keeps_server = self.lease.is_pooled();
        let mut relay = Relay::new(
            Side {
                stream: &mut client.stream,
                received: std::mem::take(&mut client.received),
                bytes: bytes(Direction::FromClient),
            },
            Side {
                stream: &mut self.lease.stream,
                received: std::mem::take(&mut self.leftover),
                bytes: bytes(Direction::FromServer),
            },
            &self.shutdown,
            Observers {
                activity: self.entry.activity(),
                metrics,
                loss_timeout: self.session.config.connect.keepalive.loss_timeout(),
                keeps_server,
            },
        );
        let end = relay.run().await;
        if end == End::Server {
            endpoint.lost_sessions.add(relay.server_error());
        }
        Ended {
            end,
            used: relay.used(),
            is_owed: relay.is_owed(),
            is_left: relay.is_left(),
        }
    }

    /// Closes the client, and closes the server connection or returns it to its pool.
    pub(super) async fn close<S: Transport>(self: Box<Self>, ended: Ended, client: &mut Client<S>) {
        let Ended {
            end,
            used,
            is_owed,
            is_left,
        } = ended;
        let Self {
            session,
            mut lease,
            began,
            entry,
            shutdown,
            registration,
            ..
        } = *self;
        let duration = began.elapsed();
        session.endpoint.metrics.session_seconds[end.label()].observe(duration.as_secs_f64());
        tracing::debug!(session = session.id, ?end, ?duration, "session ends");
        let target = registration.as_ref().map(Registration::target);
        // From here on no cancel request finds the server connection; one that was forwarded may still be on its way.
        let may_be_cancelled = registration.is_some_and(Registration::end);
        match (end, used) {
            (End::Client, Some(used)) if !may_be_cancelled => lease.give_back(used),
            (End::Client, Some(_)) => lease.close(PoolClose::Cancelled),
            (End::Client, None) if lease.is_pooled() => {
                session.abandon(lease, target.filter(|_| is_owed));
            }
            // The socket towards the server is closed, as that of a direct client would be.
            (End::Client, None) => {}
            (End::Server, _) => {
                lease.close(if is_left {
                    PoolClose::Abandoned
                } else {
                    PoolClose::Server
                });
                client.linger().await;
            }
            // By KILL: without the cancel, the request would hold its locks until it has an answer to send.
            (End::Shutdown { .. }, _) if shutdown.is_alone() && is_owed => {
                session.abandon(lease, target);
                client.linger().await;
            }
            (End::Shutdown { orderly }, _) => {
                let server = &mut lease.stream;
                let terminating = async {
                    if orderly {
                        write_and_flush(server, &terminate()).await?;
                    }
                    server.shutdown().await
                };
                // At the same time: one after the other both timeouts would add up within a shutdown.
                tokio::join!(timeout(CLOSE_TIMEOUT, terminating), client.linger())
                    .0
                    .ok();
                lease.close(if shutdown.is_alone() {
                    PoolClose::Retired
                } else {
                    PoolClose::Shutdown
                });
            }
        }
        drop(entry);
    }
}

impl Session<'_> {
    /// Closes the connection of a client that has left or was ended in the middle of a request; the request is cancelled first, if there is
    /// a `target`, as it would go on and hold its locks until it sends something.
    fn abandon(&self, lease: Lease, target: Option<CancelTarget>) {
        let (Some(target), Some(upstream)) = (target, self.endpoint.route.found()) else {
            return lease.close(PoolClose::Abandoned);
        };
        let keepalive = self.config.connect.keepalive;
        self.endpoint.pools.spawn(async move {
            let cancelled = upstream
                .cancel(target.address, target.key, &keepalive)
                .await;
            if let Err(error) = cancelled {
                tracing::debug!(%error, "abandoned request could not be cancelled");
            }
            // The connection counts until then: the server is busy with it.
            lease.close(PoolClose::Abandoned);
        });
    }
}
