//! Leases: the right of a session to use a server connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, sleep_until};

use super::{
    Pool, Pools, Used,
    client::ClientState,
    open::{NotOpened, Opened, Opening},
    request::{LeaseRequest, Wanted},
    server::{Record, ServerConnection, Unusable},
    settings::Settings,
    shared::SharedStream,
    waiting::{Grant, Waiting},
};
use crate::{
    config::{PoolMode, PoolSettings},
    protocol::{
        error::{Report, sqlstate},
        lexer::is_ascii_safe,
        reported::Reported,
        startup::CancelKey,
    },
    telemetry::{
        GaugeGuard,
        labels::{PinReason, PoolClose, PoolLease, PoolServer, Reason},
    },
    upstream::{self, Refusal, Stream, Upstream},
};

/// A client that has waited this long shares the failure of another's whole budget, as one that comes now would.
const SHARED_FAILURE: Duration = Duration::from_secs(10);
/// How often the time of a wait is looked at again while the endpoint wakes.
const WAKE_CHECK: Duration = Duration::from_secs(1);

/// A lease with what the client is sent in its welcome.
pub(crate) struct Leased {
    pub(crate) lease: Lease,
    /// The number of a pool's connection, from the same series as those of sessions.
    pub(crate) id: Option<u64>,
    /// ParameterStatus messages.
    pub(crate) parameter_status: Bytes,
    /// NoticeResponse messages.
    pub(crate) notices: BytesMut,
    /// The server's own cancel key.
    pub(crate) key: Option<CancelKey>,
    /// The server's address, where a CancelRequest must go.
    pub(crate) address: SocketAddr,
    /// Received behind the server's ReadyForQuery.
    pub(crate) leftover: BytesMut,
    /// The database that was opened.
    pub(crate) database: String,
    /// How long the whole connect took, if the endpoint was waking in it.
    pub(crate) woke_after: Option<Duration>,
    /// With which the client [leases again](Pools::lease); present in a mode that parts it from its connection between two
    /// transactions.
    pub(crate) client: Option<Box<ClientState>>,
}

/// The right to use a server connection. Dropped, it closes the connection.
pub(crate) struct Lease {
    /// The byte stream.
    pub(crate) stream: Stream,
    owner: Owner,
}

enum Owner {
    /// The connection is the session's own.
    Session(#[expect(dead_code, reason = "held, not read")] GaugeGuard),
    Pool(Box<Record>),
}

/// What a verification has shown.
pub(crate) enum Verified {
    /// The client can part with the connection.
    Clean(Lease),
    /// It cannot, and goes on.
    InUse {
        lease: Lease,
        /// ParameterStatus messages that it lacks.
        changed: BytesMut,
    },
}

impl From<upstream::Connected> for Leased {
    /// A connection that no pool has.
    fn from(connected: upstream::Connected) -> Self {
        let upstream::Connected {
            connection,
            database,
            woke_after,
        } = connected;
        let upstream::Greeting {
            parameter_status,
            notices,
            key,
            leftover,
            ..
        } = connection.greeting;
        Self {
            lease: Lease {
                stream: connection.stream,
                owner: Owner::Session(connection.gauge),
            },
            id: None,
            parameter_status: parameter_status.freeze(),
            notices,
            key,
            address: connection.address,
            leftover,
            database,
            woke_after,
            client: None,
        }
    }
}

impl Lease {
    /// Whether the connection returns to a pool.
    pub(crate) fn is_pooled(&self) -> bool {
        matches!(self.owner, Owner::Pool(_))
    }

    /// Makes the connection the session's own.
    fn leave_pool(&mut self) {
        if let Owner::Pool(record) = &mut self.owner {
            record.slot.close = PoolClose::Taken;
            // Not the record's own, which is dropped with it.
            self.owner = Owner::Session(record.gauge.clone());
        }
    }

    /// Returns the connection to its pool, between two messages and with nothing outstanding.
    pub(crate) fn give_back(self, used: Used) {
        let Owner::Pool(record) = self.owner else {
            return;
        };
        ServerConnection {
            stream: self.stream,
            record,
        }
        .give_back(used);
    }

    /// Looks whether a [suspect](ClientState::is_suspect) client can part with the connection. Not cancel safe.
    ///
    /// # Errors
    /// The connection is lost, and with it what the client may have had there.
    pub(crate) async fn verify(self, client: &mut ClientState) -> Result<Verified, Refusal> {
        let Self { stream, owner } = self;
        let record = match owner {
            Owner::Pool(record) => record,
            owner @ Owner::Session(_) => {
                return Ok(Verified::InUse {
                    lease: Self { stream, owner },
                    changed: BytesMut::new(),
                });
            }
        };
        let mut server = ServerConnection { stream, record };
        let is_clean = server.verify(client).await.map_err(Unusable::refusal)?;
        let ServerConnection { stream, record } = server;
        let changed = client.report(record.reported.frames());
        let owner = Owner::Pool(record);
        let lease = Self { stream, owner };
        Ok(if is_clean {
            Verified::Clean(lease)
        } else {
            Verified::InUse { lease, changed }
        })
    }

    /// The stream as a client sees it that shares the connection with others; `None` if the connection is the session's own.
    pub(crate) fn share<'a>(&'a mut self, client: &'a mut ClientState) -> Option<SharedStream<'a>> {
        match &mut self.owner {
            Owner::Pool(record) => Some(SharedStream::new(&mut self.stream, record, client)),
            Owner::Session(_) => None,
        }
    }

    /// Returns the connection to its pool at rest, as the client leaves nothing on it but what is followed.
    pub(crate) fn part(self, mut client: Option<&mut ClientState>) {
        if let Owner::Pool(mut record) = self.owner {
            if let Some(client) = &mut client {
                if !client.statements.is_at_rest() {
                    debug_assert!(false, "a request is in flight");
                    // Its answer would be another client's.
                    return;
                }
                client.statements.end(&mut record.statements);
                if client.has_left_something() {
                    record.left_by = Some(client.number);
                }
            }
            if record.has_ended {
                record.slot.close = PoolClose::Server;
                return;
            }
            record.owner = client.and_then(|client| client.owner());
            let stream = self.stream;
            ServerConnection { stream, record }.put_back();
        }
    }

    /// Closes the connection for a reason of its own.
    pub(crate) fn close(mut self, reason: PoolClose) {
        if let Owner::Pool(record) = &mut self.owner {
            record.slot.close = reason;
        }
    }
}

impl Pools {
    /// A server connection for a client, or a refusal once it has waited as long as it may.
    ///
    /// Cancel safe: dropping it gives up the place in the queue, and the login that was started for it.
    pub(crate) async fn connect(&self, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        // A replication stream has a state that no reset undoes.
        let login = &request.wanted.login;
        let mode = if login.replication {
            PoolMode::None
        } else {
            self.mode()
        };
        let spares = self.settings().spares(mode);
        if mode == PoolMode::None && (spares == 0 || login.replication) {
            return log_in(request).await;
        }
        let pool = self.pool(&login.database);
        let leased = match mode {
            // A box, as a client that waits for a pool needs no room for it.
            PoolMode::None => Box::pin(pool.spare_or_login(request)).await,
            PoolMode::Session => pool.lease_timed(request).await,
            PoolMode::Transaction | PoolMode::Auto => {
                let leased = pool.lease_timed(request).await;
                leased.map(|leased| Leased {
                    client: pool.client(request, &leased, mode),
                    ..leased
                })
            }
        }?;
        pool.open_spares(spares, request);
        Ok(leased)
    }

    /// Takes back the connection that a client has kept, which has left for good.
    pub(crate) fn release(&self, client: &ClientState) {
        let Some(owner) = client.owner() else { return };
        let pool = self.pool(&client.login.database);
        let server = {
            let mut state = pool.lock();
            let mut idle = state.idle.iter();
            let at = idle.position(|idle| idle.server.record.owner == Some(owner));
            at.map(|at| state.take_idle(at))
        };
        if let Some(server) = server {
            server.give_back(client.used());
        }
    }

    /// A server connection for the next transaction of a client, whatever the mode is now. Cancel safe like
    /// [`connect`](Self::connect).
    pub(crate) async fn lease(&self, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        self.pool(&request.wanted.login.database)
            .lease_timed(request)
            .await
    }
}

/// A connection that is the session's own.
async fn log_in(request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
    let LeaseRequest {
        upstream,
        wanted,
        connect,
    } = request;
    // A box, as a client that waits for a pool needs no room for it.
    let connected = Box::pin(upstream.connect(&wanted.login, connect)).await?;
    Ok(connected.into())
}

impl Pool {
    async fn spare_or_login(
        self: &Arc<Self>,
        request: &LeaseRequest<'_>,
    ) -> Result<Leased, Refusal> {
        match self.take_spare(&request.wanted).await {
            Some(spare) => Ok(spare),
            None => log_in(request).await,
        }
    }

    /// A connection that no client has had, as the session's own; it is what a login of this client would have opened.
    async fn take_spare(self: &Arc<Self>, wanted: &Wanted) -> Option<Leased> {
        let client = &wanted.login;
        loop {
            let server = {
                let mut state = self.lock();
                let at = state.idle.iter().rposition(|idle| {
                    let record = &idle.server.record;
                    !record.is_used && record.suits(client) && record.resets_to(client)
                })?;
                state.take_idle(at)
            };
            if let Ok(server) = server.prepare(wanted).await {
                let mut leased = self.leased(server, PoolLease::Idle);
                leased.lease.leave_pool();
                return Some(leased);
            }
        }
    }

    /// The state of a client that may part with its connection, `leased`.
    fn client(
        &self,
        request: &LeaseRequest<'_>,
        leased: &Leased,
        mode: PoolMode,
    ) -> Option<Box<ClientState>> {
        // Not that of its login, which may set none, while its role does.
        let reported = Reported::parse(&leased.parameter_status);
        let encoding = reported.value("client_encoding").unwrap_or_default();
        if !is_ascii_safe(&String::from_utf8_lossy(encoding)) {
            self.context.pinned(PinReason::Encoding);
            return None;
        }
        let mut login = Arc::clone(&request.wanted.login);
        if login.database != leased.database {
            // The one requested does not exist: connections of this pool return to another's.
            let login = Arc::make_mut(&mut login);
            login.database.clone_from(&leased.database);
            login.fallback_database = None;
        }
        if let Owner::Pool(record) = &leased.lease.owner
            && record.login == login
        {
            // Equal ones take the memory of one.
            login = Arc::clone(&record.login);
        }
        let reported = leased.parameter_status.clone();
        let pin_sessions = self.context.settings.load().pin_sessions;
        Some(Box::new(ClientState::new(
            login,
            reported,
            &self.texts,
            mode,
            pin_sessions,
        )))
    }

    async fn lease_timed(self: &Arc<Self>, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        let began = Instant::now();
        let leased = self.lease(request).await;
        let waited = began.elapsed().as_secs_f64();
        self.context.metrics.pool_wait_seconds.observe(waited);
        leased
    }

    async fn lease(self: &Arc<Self>, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        let wanted = &request.wanted;
        let waiting = self.enter(wanted);
        let at_once = if waiting.is_granted() {
            PoolLease::Idle
        } else {
            PoolLease::Returned
        };
        // The login for this client, while there is one.
        let mut opening: Option<Opening> = None;
        let mut has_lost_opened = false;
        loop {
            let grant = tokio::select! {
                biased;
                opened = result(&mut opening) => match opened {
                    Ok(Opened { server, notices, woke_after }) => {
                        // A login sets what a new client has.
                        let prepared = if wanted.settings == Settings::default() {
                            Ok(server)
                        } else {
                            Box::pin(server.prepare(wanted)).await
                        };
                        match prepared {
                            Ok(server) => return Ok(Leased {
                                notices,
                                woke_after,
                                ..self.leased(server, PoolLease::Opened)
                            }),
                            Err(error) if error.is_of_statement() || has_lost_opened => {
                                return Err(error.refusal());
                            }
                            // As with an idle one, but once: an endpoint may lose every connection after its login.
                            Err(_) => {
                                has_lost_opened = true;
                                opening = None;
                                waiting.stops_opening();
                                continue;
                            }
                        }
                    }
                    Err(NotOpened { is_full: true, .. }) => {
                        opening = None;
                        waiting.stops_opening();
                        continue;
                    }
                    Err(NotOpened { refusal, .. }) => {
                        if refusal.reason == Reason::Waking
                            && let Some(before) = Instant::now().checked_sub(SHARED_FAILURE)
                        {
                            self.refuse_waiting(before, &refusal);
                        }
                        return Err(refusal);
                    }
                },
                // A login has limits of its own.
                grant = waiting.granted(), if opening.is_some() => grant,
                grant = self.granted_in_time(&waiting, request.upstream), if opening.is_none() => grant?,
            };
            match grant {
                Grant::Server(server) => {
                    // A box, as it has not begun while the client waits.
                    match Box::pin(server.prepare(wanted)).await {
                        Ok(server) => {
                            if let Some(opening) = opening {
                                opening.leave();
                            }
                            return Ok(self.leased(server, at_once));
                        }
                        // A new connection would refuse it, too.
                        Err(error) if error.is_of_statement() => return Err(error.refusal()),
                        // One that has ended is dropped, and the client still has its place in the queue.
                        Err(_) => {}
                    }
                }
                Grant::Open(slot) => opening = Some(Opening::start(slot, request)),
                Grant::Refused(refusal) => return Err(refusal),
            }
        }
    }

    /// The next grant, or the refusal of a client that has waited as long as it may. Cancel safe.
    async fn granted_in_time(
        self: &Arc<Self>,
        waiting: &Waiting,
        upstream: &Upstream,
    ) -> Result<Grant, Refusal> {
        let PoolSettings {
            query_wait_timeout,
            reserve_pool_timeout,
            ..
        } = **self.context.settings.load();
        let mut give_up_at = waiting.since + query_wait_timeout;
        loop {
            let now = Instant::now();
            // What the pool may open changes with time.
            let (next, is_granted) = {
                let state = self.lock();
                // Without an open connection it waits for the endpoint, and not for other clients.
                let is_served = !upstream.is_waking() && state.has_others() && !state.is_paused;
                if !is_served {
                    // Not only until the endpoint responds: the clients before it are served first.
                    give_up_at = give_up_at.max(now + query_wait_timeout);
                }
                let check_at = (!is_served).then_some(now + WAKE_CHECK);
                let reserve_at = waiting.since + reserve_pool_timeout;
                let changes = [Some(reserve_at), state.limit.raise_at(), check_at];
                let changes = changes.into_iter().flatten().filter(|at| *at > now);
                let next = changes.fold(give_up_at, Instant::min);
                (next, state.is_granted(waiting.number))
            };
            if give_up_at <= now && !is_granted {
                return Err(self.wait_timed_out(query_wait_timeout));
            }
            tokio::select! {
                biased;
                grant = waiting.granted() => return Ok(grant),
                () = sleep_until(next) => self.serve_again(),
            }
        }
    }

    fn wait_timed_out(&self, timeout: Duration) -> Refusal {
        self.context.metrics.pool_wait_timeouts.inc();
        let snapshot = self.snapshot();
        let servers = snapshot.servers;
        Refusal {
            report: Report::new(
                sqlstate::TOO_MANY_CONNECTIONS,
                format!(
                    "query_wait_timeout: no server connection became free within {} s",
                    timeout.as_secs_f64()
                ),
            )
            .with_hint("Close connections that are not used, or raise --default-pool-size.")
            .with_detail(format!(
                "The pool of database {} has {} server connections of {} in use, {} being opened; {} clients wait.",
                self.database,
                servers[PoolServer::Leased] + servers[PoolServer::Resetting],
                snapshot.learned_limit.unwrap_or(snapshot.limit),
                servers[PoolServer::Opening],
                snapshot.waiting
            )),
            reason: Reason::PoolTimeout,
        }
    }

    pub(super) fn leased(&self, server: ServerConnection, how: PoolLease) -> Leased {
        self.context.metrics.pool_leases[how].inc();
        let ServerConnection { stream, mut record } = server;
        record.is_used = true;
        record.owner = None;
        Leased {
            id: Some(record.id),
            parameter_status: record.reported.frames(),
            notices: BytesMut::new(),
            key: record.key,
            address: record.address,
            leftover: std::mem::take(&mut record.unread),
            database: record.login.database.clone(),
            woke_after: None,
            client: None,
            lease: Lease {
                stream,
                owner: Owner::Pool(record),
            },
        }
    }
}

impl ServerConnection {
    /// Keeps the connection for another client, once it is reset.
    fn give_back(mut self, used: Used) {
        self.record.owner = None;
        if used.is_clean() && !self.record.is_encoding_set {
            self.record.statements.forget_client();
            return self.put_back();
        }
        let pool = Arc::clone(self.record.slot.pool());
        if !used.is_resettable {
            return pool.close(self, PoolClose::Unresettable);
        }
        self.record.slot.enter(PoolServer::Resetting);
        let tasks = pool.context.tasks.clone();
        tasks.spawn(async move {
            match self.reset(used).await {
                Ok(()) => self.put_back(),
                Err(reason) => pool.close(self, reason),
            }
        });
    }

    /// Makes an idle connection what the client expects.
    ///
    /// # Errors
    /// It has ended, or refuses that.
    pub(super) async fn prepare(self, wanted: &Wanted) -> Result<Self, Unusable> {
        let mut server = self.move_here()?;
        server.record.slot.close = PoolClose::Server;
        let adopted = async {
            // The watch may not have had its turn.
            server.take_input().await?;
            server.reset_for(wanted.client).await?;
            let adopted = server.adopt(wanted).await;
            match adopted {
                // Perhaps for what another client has set, such as a `statement_timeout`, or cannot undo.
                Err(error) if error.is_of_statement() && server.record.left_by.is_some() => {
                    server.reset_after_others().await?;
                    server.adopt(wanted).await
                }
                adopted => adopted,
            }
        };
        if let Err(error) = adopted.await {
            if error.is_of_statement() {
                // All of it is undone, as it was one transaction.
                server.record.slot.close = PoolClose::Session;
                server.put_back();
            } else if let Unusable::NotReset(reason) = error {
                server.record.slot.close = reason;
            } else {
                server.record.slot.pool().lost(&error);
            }
            return Err(error);
        }
        server.record.slot.close = PoolClose::Session;
        Ok(server)
    }
}

/// The result of a login, if there is one. Cancel safe.
async fn result(opening: &mut Option<Opening>) -> Result<Opened, NotOpened> {
    match opening {
        Some(opening) => opening.result().await,
        None => std::future::pending().await,
    }
}
