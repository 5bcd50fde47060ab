//! Leases: the right of a session to use a server connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::time::{Instant, sleep_until};

use super::{
    Pool, Pools, Used,
    open::{NotOpened, Opened, Opening},
    server::{Record, ServerConnection},
    waiting::{Grant, Waiting},
};
use crate::{
    config::{PoolMode, PoolSettings},
    protocol::{
        error::{Report, sqlstate},
        lexer::is_ascii_safe,
        options::LoginParameters,
        reported::Reported,
        startup::CancelKey,
    },
    telemetry::{
        GaugeGuard,
        labels::{PinReason, PoolClose, PoolLease, PoolReset, PoolServer, Reason},
    },
    upstream::{self, ConnectSettings, Refusal, Stream, Upstream},
};

/// A client that has waited this long shares the failure of another's whole budget, as one that comes now would.
const SHARED_FAILURE: Duration = Duration::from_secs(10);
/// How often the time of a wait is looked at again while the endpoint wakes.
const WAKE_CHECK: Duration = Duration::from_secs(1);

/// What a client needs.
pub(crate) struct LeaseRequest<'a> {
    /// Opens connections.
    pub(super) upstream: &'a Arc<Upstream>,
    /// The client's login.
    pub(super) login: Arc<LoginParameters>,
    /// Timeouts of opening one.
    pub(super) connect: &'a ConnectSettings,
    /// The client's first request prepares the unnamed statement, or drops it.
    pub(super) replaces_unnamed: bool,
}

impl<'a> LeaseRequest<'a> {
    pub(crate) fn new(
        upstream: &'a Arc<Upstream>,
        mut login: LoginParameters,
        connect: &'a ConnectSettings,
    ) -> Self {
        upstream.settle_database(&mut login);
        Self {
            upstream,
            login: Arc::new(login),
            connect,
            replaces_unnamed: false,
        }
    }

    /// For a client that has had a connection with `login`.
    pub(crate) fn again(
        upstream: &'a Arc<Upstream>,
        login: &Arc<LoginParameters>,
        connect: &'a ConnectSettings,
        replaces_unnamed: bool,
    ) -> Self {
        Self {
            upstream,
            login: Arc::clone(login),
            connect,
            replaces_unnamed,
        }
    }
}

/// A lease with what the client is sent in its welcome.
pub(crate) struct Leased {
    pub(crate) lease: Lease,
    /// The number of a pool's connection, from the same series as those of sessions.
    pub(crate) id: Option<u64>,
    /// ParameterStatus messages.
    pub(crate) parameter_status: BytesMut,
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
    /// The client's login, with which it [leases again](Pools::lease); present in a mode that parts a client from its connection
    /// between two transactions.
    pub(crate) shared: Option<Arc<LoginParameters>>,
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
            parameter_status,
            notices,
            key,
            address: connection.address,
            leftover,
            database,
            woke_after,
            shared: None,
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
        let mut server = ServerConnection {
            stream: self.stream,
            record,
        };
        if used.is_clean() && !server.record.is_encoding_set {
            return server.put_back();
        }
        let pool = Arc::clone(server.record.slot.pool());
        if !used.is_resettable {
            return pool.close(server, PoolClose::Unresettable);
        }
        server.record.slot.enter(PoolServer::Resetting);
        let tasks = pool.context.tasks.clone();
        tasks.spawn(async move {
            let resets = &pool.context.metrics.pool_resets;
            match server.reset(used).await {
                Ok(()) => {
                    resets[PoolReset::Done].inc();
                    server.put_back();
                }
                Err(reason) => {
                    resets[PoolReset::Failed].inc();
                    pool.close(server, reason);
                }
            }
        });
    }

    /// Returns the connection to its pool at rest, as the client leaves nothing on it, but an unnamed statement perhaps.
    pub(crate) fn part(self, leaves_unnamed: bool) {
        if let Owner::Pool(mut record) = self.owner {
            record.has_unnamed |= leaves_unnamed;
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
        let mode = if request.login.replication {
            PoolMode::None
        } else {
            self.mode()
        };
        let spares = self.settings().spares(mode);
        if mode == PoolMode::None && (spares == 0 || request.login.replication) {
            return request.log_in().await;
        }
        let pool = self.pool(&request.login.database);
        let leased = match mode {
            // A box, as a client that waits for a pool needs no room for it.
            PoolMode::None => Box::pin(pool.spare_or_login(request)).await,
            PoolMode::Session => pool.lease_timed(request).await,
            PoolMode::Transaction => {
                let leased = pool.lease_timed(request).await;
                leased.map(|leased| Leased {
                    shared: pool.shared(request, &leased),
                    ..leased
                })
            }
        }?;
        pool.open_spares(spares, request);
        Ok(leased)
    }

    /// A server connection for the next transaction of a client, whatever the mode is now. Cancel safe like
    /// [`connect`](Self::connect).
    pub(crate) async fn lease(&self, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        self.pool(&request.login.database)
            .lease_timed(request)
            .await
    }
}

impl LeaseRequest<'_> {
    /// A connection that is the session's own.
    async fn log_in(&self) -> Result<Leased, Refusal> {
        // A box, as a client that waits for a pool needs no room for it.
        let connected = Box::pin(self.upstream.connect(&self.login, self.connect)).await?;
        Ok(connected.into())
    }
}

impl Pool {
    async fn spare_or_login(
        self: &Arc<Self>,
        request: &LeaseRequest<'_>,
    ) -> Result<Leased, Refusal> {
        match self.take_spare(&request.login).await {
            Some(spare) => Ok(spare),
            None => request.log_in().await,
        }
    }

    /// A connection that no client has had, as the session's own; it is what a login of this client would have opened.
    async fn take_spare(self: &Arc<Self>, client: &LoginParameters) -> Option<Leased> {
        loop {
            let server = {
                let mut state = self.lock();
                let at = state.idle.iter().rposition(|idle| {
                    let record = &idle.server.record;
                    !record.is_used && record.suits(client) && record.resets_to(client)
                })?;
                state.take_idle(at)
            };
            if let Some(server) = server.prepare(client, true).await {
                let mut leased = self.leased(server, PoolLease::Idle);
                leased.lease.leave_pool();
                return Some(leased);
            }
        }
    }

    /// The login of a client that may part with its connection, `leased`.
    fn shared(&self, request: &LeaseRequest<'_>, leased: &Leased) -> Option<Arc<LoginParameters>> {
        // Not that of its login, which may set none, while its role does.
        let reported = Reported::parse(leased.parameter_status.clone());
        let encoding = reported.value("client_encoding").unwrap_or_default();
        if !is_ascii_safe(&String::from_utf8_lossy(encoding)) {
            self.context.metrics.pool_pins[PinReason::Encoding].inc();
            return None;
        }
        let mut login = Arc::clone(&request.login);
        if login.database != leased.database {
            // The one requested does not exist: connections of this pool return to another's.
            let login = Arc::make_mut(&mut login);
            login.database.clone_from(&leased.database);
            login.fallback_database = None;
        }
        Some(login)
    }

    async fn lease_timed(self: &Arc<Self>, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        let began = Instant::now();
        let leased = self.lease(request).await;
        let waited = began.elapsed().as_secs_f64();
        self.context.metrics.pool_wait_seconds.observe(waited);
        leased
    }

    async fn lease(self: &Arc<Self>, request: &LeaseRequest<'_>) -> Result<Leased, Refusal> {
        let login = &request.login;
        let waiting = self.enter(login);
        let at_once = if waiting.is_granted() {
            PoolLease::Idle
        } else {
            PoolLease::Returned
        };
        // The login for this client, while there is one.
        let mut opening: Option<Opening> = None;
        loop {
            let grant = tokio::select! {
                biased;
                opened = result(&mut opening) => match opened {
                    Ok(Opened { server, notices, woke_after }) => {
                        return Ok(Leased {
                            notices,
                            woke_after,
                            ..self.leased(server, PoolLease::Opened)
                        });
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
                    // One that has ended is dropped, and the client still has its place in the queue.
                    // A box, as it has not begun while the client waits.
                    if let Some(server) =
                        Box::pin(server.prepare(login, request.replaces_unnamed)).await
                    {
                        if let Some(opening) = opening {
                            opening.leave();
                        }
                        return Ok(self.leased(server, at_once));
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
        Leased {
            id: Some(record.id),
            parameter_status: record.reported.frames(),
            notices: BytesMut::new(),
            key: record.key,
            address: record.address,
            leftover: std::mem::take(&mut record.unread),
            database: record.login.database.clone(),
            woke_after: None,
            shared: None,
            lease: Lease {
                stream,
                owner: Owner::Pool(record),
            },
        }
    }
}

impl ServerConnection {
    /// Makes an idle connection what a new login of this client would be; `None` if it has ended.
    pub(super) async fn prepare(
        self,
        client: &LoginParameters,
        replaces_unnamed: bool,
    ) -> Option<Self> {
        let mut server = self.move_here().ok()?;
        server.record.slot.close = PoolClose::Server;
        let adopted = async {
            // The watch may not have had its turn.
            server.take_input().await?;
            server.adopt(client, replaces_unnamed).await
        };
        if let Err(error) = adopted.await {
            server.record.slot.pool().lost(&error);
            return None;
        }
        server.record.slot.close = PoolClose::Session;
        Some(server)
    }
}

/// The result of a login, if there is one. Cancel safe.
async fn result(opening: &mut Option<Opening>) -> Result<Opened, NotOpened> {
    match opening {
        Some(opening) => opening.result().await,
        None => std::future::pending().await,
    }
}
