//! A session that is logged in: relayed to its end, and then closed on both sides.

use std::time::Duration;

use bytes::BytesMut;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, timeout},
};

use super::{
    Session,
    cancel::{CancelTarget, Registration},
    client::{CLOSE_TIMEOUT, Client},
    close::shut_down,
    next_request::{Discarded, Discarding, Next, next_request},
    relay::{End, Observers, Relay, ServerStream, Side},
};
use crate::{
    net::{message::write_and_flush, socket::Transport},
    pool::{ClientState, Lease, Leased, Used, Verified},
    protocol::{
        backend::ready_for_query,
        error::{Report, sqlstate},
        requests::TransactionStatus,
        startup::terminate,
        traces::Traces,
    },
    shutdown::Shutdown,
    status::{ActivityRecord, SessionEntry},
    telemetry::labels::{Direction, PoolClose},
    upstream::Refusal,
};

/// From this time on a verification is given up if the client leaves, and not sooner: a client that has closed its half gets the
/// answer to its last request from a server that is not slow.
const SLOW_VERIFICATION: Duration = Duration::from_secs(5);

/// A session whose client is ready for queries.
pub(super) struct LoggedIn<'a> {
    pub(super) session: &'a Session<'a>,
    /// `None` while the client is [at rest](Self::rest).
    pub(super) lease: Option<Lease>,
    /// Present if the client shares its server connections with others.
    pub(super) state: Option<Box<ClientState>>,
    /// What it has done on a connection that others may get, if it has that until it leaves.
    pub(super) traces: Option<Box<Traces>>,
    /// Bytes that are counted, but still to be sent to a server.
    pub(super) unsent: usize,
    /// Present while the client sends what is ignored.
    pub(super) discarding: Option<Discarding>,
    /// It parts with them whenever it is at rest.
    pub(super) shares: bool,
    /// Sent by the server behind its ReadyForQuery.
    pub(super) leftover: BytesMut,
    pub(super) began: Instant,
    pub(super) entry: SessionEntry,
    pub(super) shutdown: Shutdown,
    pub(super) registration: Option<Registration>,
}

/// How a session has ended.
pub(super) struct Ended {
    end: End,
    /// Present if the server connection can go to another client.
    used: Option<Used>,
    /// Whether the server was at work for the client.
    is_owed: bool,
    /// Whether the client had left before the server closed.
    is_left: bool,
}

impl Ended {
    /// Without a server connection.
    fn at_rest(end: End) -> Self {
        Self {
            end,
            used: None,
            is_owed: false,
            is_left: false,
        }
    }
}

impl LoggedIn<'_> {
    /// Relays until either side is done. [`close`](Self::close) must follow.
    pub(super) async fn relay<S: Transport>(&mut self, client: &mut Client<S>) -> Ended {
        // The first connection was for the welcome. Whether it is needed for longer is known only once there is a request.
        let is_parting = self.state.as_ref().is_some_and(|it| !it.is_retaining());
        if self.shares
            && is_parting
            && self.leftover.is_empty()
            && let Err(ended) = Box::pin(self.rest(client)).await
        {
            return ended;
        }
        while self.lease.is_some() {
            // Boxes, as either is over before the other begins.
            let ended = Box::pin(self.relay_lease(client)).await;
            if ended.end != End::Rest {
                return ended;
            }
            self.unsent = client.received.len();
            if let Err(ended) = Box::pin(self.rest(client)).await {
                return ended;
            }
        }
        Ended::at_rest(End::Client)
    }

    /// Relays for as long as the client has its server connection.
    async fn relay_lease<S: Transport>(&mut self, client: &mut Client<S>) -> Ended {
        let Some(lease) = &mut self.lease else {
            return Ended::at_rest(End::Client);
        };
        let leftover = std::mem::take(&mut self.leftover);
        let relaying = Relaying {
            session: self.session,
            activity: self.entry.activity(),
            shutdown: &self.shutdown,
            keeps_server: lease.is_pooled(),
            traces: self.traces.as_deref_mut(),
            unsent: std::mem::take(&mut self.unsent),
            ends_at_rest: self.shares,
        };
        if let Some(state) = &mut self.state
            && let Some(mut shared) = lease.share(state)
        {
            // A box, as most sessions share nothing.
            Box::pin(relaying.run(client, &mut shared, leftover)).await
        } else {
            relaying.run(client, &mut lease.stream, leftover).await
        }
    }

    /// Parts with the server connection, and takes another one once the client sends a request.
    async fn rest<S: Transport>(&mut self, client: &mut Client<S>) -> Result<(), Ended> {
        // Boxes, as a client that waits for nothing needs no room for them.
        if let Some(lease) = self.lease.take()
            && !Box::pin(self.part(lease, client)).await?
        {
            return Ok(());
        }
        loop {
            let next = next_request(client, &self.shutdown, &mut self.discarding).await;
            if Box::pin(self.serve_next(next, client)).await? {
                return Ok(());
            }
        }
    }

    /// Serves the next request, or takes a connection for it: then `true`.
    async fn serve_next<S: Transport>(
        &mut self,
        next: Next,
        client: &mut Client<S>,
    ) -> Result<bool, Ended> {
        match next {
            Next::Request if self.answer_here(client).await? => return Ok(false),
            Next::Request => {}
            Next::Left => return Err(Ended::at_rest(End::Client)),
            Next::Shutdown => return Err(self.end_at_rest(client).await),
        }
        let Some(state) = &self.state else {
            return Ok(true);
        };
        let refusal = tokio::select! {
            // First: what a client sends before it leaves is executed, as on a direct connection, if it need not wait.
            biased;
            leased = self.lease_again(state) => match leased {
                Ok(leased) => {
                    let changed = self.take(leased);
                    // A box, as most connections are like the last one.
                    if !changed.is_empty() && Box::pin(self.answer(client, &changed)).await.is_err() {
                        return Err(self.left_before_use());
                    }
                    return Ok(true);
                }
                Err(refusal) => refusal.report,
            },
            () = client.wait_for_hang_up() => return Err(Ended::at_rest(End::Client)),
            () = self.shutdown.draining().cancelled() => {
                return Err(self.end_at_rest(client).await);
            }
            () = cancelled(self.registration.as_ref()) => Report::new(
                sqlstate::QUERY_CANCELED,
                "canceling statement due to user request",
            ),
        };
        let before = client.received.len();
        if !self.refuse(client, &refusal).await {
            return Err(Ended::at_rest(End::Server));
        }
        self.taken(before - client.received.len());
        Ok(false)
    }

    /// Parts with the server connection, unless a verification shows that the client needs it; whether it has parted.
    async fn part<S: Transport>(
        &mut self,
        mut lease: Lease,
        client: &mut Client<S>,
    ) -> Result<bool, Ended> {
        if let Some(state) = self.state.as_mut().filter(|state| state.is_suspect()) {
            // A box, as most clients are not suspect.
            let mut verifying = Box::pin(lease.verify(state));
            let verified = if let Ok(verified) = timeout(SLOW_VERIFICATION, &mut verifying).await {
                verified
            } else {
                tokio::select! {
                    biased;
                    verified = &mut verifying => verified,
                    () = client.wait_for_hang_up() => return Err(Ended::at_rest(End::Client)),
                    () = self.shutdown.draining().cancelled() => {
                        drop(verifying);
                        return Err(self.end_at_rest(client).await);
                    }
                }
            };
            drop(verifying);
            lease = match verified {
                Ok(Verified::Clean(lease)) => lease,
                Ok(Verified::InUse { lease, changed }) => {
                    (self.lease, self.leftover) = (Some(lease), changed);
                    return Ok(false);
                }
                Err(refusal) => {
                    client.finish(&refusal.report.encode_fatal()).await;
                    return Err(Ended::at_rest(End::Server));
                }
            };
        }
        self.entry.unlink();
        self.entry.activity().pin(None);
        if self.registration.as_mut().is_some_and(Registration::part) {
            // A cancel that is still on its way must not reach another client's request, nor the next one of this client.
            lease.close(PoolClose::Cancelled);
        } else {
            lease.part(self.state.as_deref_mut());
        }
        Ok(true)
    }

    /// Answers the next request if no server is needed for it.
    async fn answer_here<S: Transport>(&mut self, client: &mut Client<S>) -> Result<bool, Ended> {
        let before = client.received.len();
        let answer = self.state.as_mut();
        let answer = answer.and_then(|state| state.answer(&mut client.received));
        let Some(answer) = answer else {
            return Ok(false);
        };
        self.taken(before - client.received.len());
        self.session.endpoint.metrics.pool_local_answers.inc();
        self.answer(client, &answer).await?;
        Ok(true)
    }

    /// So many bytes at the front of what the client has sent need no server any more.
    fn taken(&mut self, length: usize) {
        self.unsent = self.unsent.saturating_sub(length);
    }

    async fn lease_again(&self, state: &ClientState) -> Result<Leased, Refusal> {
        let Session {
            endpoint, config, ..
        } = self.session;
        let upstream = self.session.upstream().await?;
        let request = state.request(&upstream, &config.connect);
        endpoint.pools.lease(&request).await
    }

    /// Takes the next server connection; returns what the client is to be sent, as it differs from the last one.
    fn take(&mut self, leased: Leased) -> BytesMut {
        let Leased {
            lease,
            id,
            parameter_status,
            key,
            address,
            leftover,
            ..
        } = leased;
        if let Some(id) = id {
            self.entry.link_to(id, key.map(|key| key.process_id));
        }
        if let (Some(registration), Some(key)) = (&mut self.registration, key) {
            registration.lead_to(CancelTarget { address, key });
        }
        self.lease = Some(lease);
        self.leftover = leftover;
        let state = self.state.as_mut();
        state.map_or_else(BytesMut::new, |state| state.report(parameter_status))
    }

    /// The end of a session whose client has left before it could use the server connection.
    pub(super) fn left_before_use(&self) -> Ended {
        let used = self.state.as_ref().map_or(Used::NOT, |state| state.used());
        Ended {
            // A part of a message must not reach another client.
            used: self.leftover.is_empty().then_some(used),
            ..Ended::at_rest(End::Client)
        }
    }

    /// Refuses the request at the front of what the client has sent; `false` if that ends the session.
    async fn refuse<S: Transport>(&mut self, client: &mut Client<S>, report: &Report) -> bool {
        let (session, sqlstate) = (self.session.id, &report.sqlstate);
        if ["22", "42"].iter().any(|class| sqlstate.starts_with(class)) {
            // The server's, of a setting of the client's that is not set again; it may quote the value.
            tracing::warn!(session, sqlstate, "request refused");
        } else {
            let (detail, hint) = (report.detail.as_deref(), report.hint.as_deref());
            let message = &report.message;
            tracing::warn!(
                session,
                sqlstate,
                detail,
                hint,
                "request refused: {message}"
            );
        }
        let Some(mut discarding) = Discarding::request(&client.received) else {
            // What follows could be anything.
            client.finish(&report.encode_fatal()).await;
            return false;
        };
        let mut answer = report.encode_error();
        if discarding.discard(&mut client.received) == Discarded::Request {
            ready_for_query(&mut answer, TransactionStatus::Idle);
        } else {
            // The error is not due at the end only: a client may wait for it before it sends its Sync.
            self.discarding = Some(discarding);
        }
        self.answer(client, &answer).await.is_ok()
    }

    /// Sends an answer of the proxy's own.
    async fn answer<S: Transport>(
        &self,
        client: &mut Client<S>,
        answer: &[u8],
    ) -> Result<(), Ended> {
        let limit = self.session.config.client_login_timeout;
        match timeout(limit, client.send(answer)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Ended::at_rest(End::Client)),
        }
    }

    /// Ends a session that has no server connection, as the relay ends one at rest.
    async fn end_at_rest<S: Transport>(&self, client: &mut Client<S>) -> Ended {
        let report = shut_down(&self.shutdown).encode_fatal();
        // The client is not waited for.
        let _ = timeout(CLOSE_TIMEOUT, client.send(&report)).await;
        Ended::at_rest(End::Shutdown { orderly: false })
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
            lease,
            state,
            began,
            entry,
            shutdown,
            registration,
            ..
        } = *self;
        let duration = began.elapsed();
        session.endpoint.metrics.session_seconds[end.label()].observe(duration.as_secs_f64());
        tracing::debug!(session = session.id, ?end, ?duration, "session ends");
        let target = registration.as_ref().and_then(Registration::target);
        // From here on no cancel request finds the server connection; one that was forwarded may still be on its way.
        let may_be_cancelled = registration.is_some_and(Registration::end);
        let Some(mut lease) = lease else {
            if let Some(state) = &state {
                session.endpoint.pools.release(state);
            }
            if end != End::Client {
                client.linger().await;
            }
            return;
        };
        match (end, used) {
            (End::Client, Some(used)) if !may_be_cancelled => lease.give_back(used),
            (End::Client, Some(_)) => lease.close(PoolClose::Cancelled),
            (End::Client, None) if lease.is_pooled() => {
                session.abandon(lease, target.filter(|_| is_owed));
            }
            // The socket towards the server is closed, as that of a direct client would be.
            (End::Client, None) | (End::Rest, _) => {}
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

/// One relay of a session.
struct Relaying<'a> {
    session: &'a Session<'a>,
    activity: &'a ActivityRecord,
    shutdown: &'a Shutdown,
    keeps_server: bool,
    traces: Option<&'a mut Traces>,
    unsent: usize,
    ends_at_rest: bool,
}

impl Relaying<'_> {
    /// Relays between the client and a server connection, which has sent the `leftover`.
    async fn run<S: Transport, U: ServerStream>(
        self,
        client: &mut Client<S>,
        server: &mut U,
        leftover: BytesMut,
    ) -> Ended {
        let endpoint = self.session.endpoint;
        let metrics = &endpoint.metrics;
        let bytes = |direction| metrics.relay_bytes[direction].clone();
        let mut relay = Relay::new(
            Side {
                stream: &mut client.stream,
                received: std::mem::take(&mut client.received),
                counted: self.unsent,
                bytes: bytes(Direction::FromClient),
            },
            Side {
                stream: server,
                received: leftover,
                counted: 0,
                bytes: bytes(Direction::FromServer),
            },
            self.shutdown,
            Observers {
                activity: self.activity,
                metrics,
                loss_timeout: self.session.config.connect.keepalive.loss_timeout(),
                keeps_server: self.keeps_server,
                traces: self.traces,
                ends_at_rest: self.ends_at_rest,
                pools: Some(&endpoint.pools),
            },
        );
        let end = relay.run().await;
        if end == End::Server {
            endpoint.lost_sessions.add(relay.server_error());
        }
        let ended = Ended {
            end,
            used: relay.used(),
            is_owed: relay.is_owed(),
            is_left: relay.is_left(),
        };
        let unsent = relay.take_unsent();
        if end == End::Rest {
            // Requests that give way to those of other clients.
            client.received = unsent;
        }
        ended
    }
}

/// Returns when a client without a server connection cancels. Cancel safe.
async fn cancelled(registration: Option<&Registration>) {
    match registration {
        Some(registration) => registration.cancelled().await,
        None => std::future::pending().await,
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
