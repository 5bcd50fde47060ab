//! Server connections that clients share one after the other.
//!
//! An endpoint has one [`Pool`] for each database. A client of it enters the queue and is granted an idle connection, or
//! the right to open one, or the connection that another client returns:
//!
//! ```text
//!             ┌──────────────── idle ◀───────────────┐
//!             ▼                                      │ clean
//!  client ─▶ Waiting ─▶ Lease ─▶ (the session) ─▶ give back ─▶ reset
//!             │            ▲                         │
//!             └▶ opening ──┘                         └▶ closed: whatever is in doubt
//! ```
//!
//! A connection is a value that moves from state to state, and its [`Slot`] counts it in the state that it is in: wherever
//! one is dropped, the connection is closed, the slot is free, and the next client is served. Nothing is ever sent on an
//! idle connection, so that the compute can suspend; one that the server closes is not replaced until a client needs it.
//!
//! Knows nothing of sessions. The terms are PgBouncer's where they mean the same.

mod client;
mod control;
#[cfg(fuzzing)]
pub mod fuzzing;
mod idle;
mod lease;
mod limit;
mod local;
mod open;
mod refusal;
mod request;
mod reset;
mod retention;
mod server;
pub mod settings;
mod shared;
mod slot;
pub mod statements;
#[cfg(test)]
mod tests;
mod upkeep;
mod verify;
mod waiting;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use enum_map::EnumMap;
use tokio::{
    runtime::{self, Handle},
    sync::Notify,
    time::Instant,
};
use tokio_util::task::TaskTracker;

pub(crate) use self::{
    client::ClientState,
    lease::{Lease, Leased, Verified},
    request::LeaseRequest,
    reset::Used,
    shared::SharedStream,
};
use self::{
    idle::Idle,
    limit::Limit,
    request::Wanted,
    retention::Retention,
    server::ServerConnection,
    settings::SettingsTable,
    slot::Slot,
    statements::Texts,
    upkeep::Upkeep,
    waiting::{Grant, Waiter},
};
use crate::{
    config::{PoolMode, PoolSettings},
    shutdown::{Phase, Shutdown},
    status::{EndpointSessions, PoolSnapshot, StatementsSnapshot},
    telemetry::{
        Metrics,
        labels::{PinReason, PoolClose, PoolServer},
    },
};

/// Logins of one pool at the same time: more of them delay each other, and the compute's other work.
const CONCURRENT_LOGINS: usize = 8;

/// Clients that have come within this time of each other have come at once: the one that is on a connection's runtime gets it.
const AT_ONCE: Duration = Duration::from_millis(1);
/// So many of the clients behind the first one are looked at for that.
const MAX_LOOKED_AT: usize = 16;

/// How often pins for the same reason are reported.
const PIN_REPORT_INTERVAL: Duration = Duration::from_hours(1);

/// The pools of an endpoint.
pub(crate) struct Pools {
    mode: ArcSwap<PoolMode>,
    context: Arc<PoolContext>,
    texts: Arc<Texts>,
    settings_table: Arc<SettingsTable>,
    by_database: Mutex<HashMap<String, Arc<Pool>>>,
    /// New pools are paused.
    is_paused: AtomicBool,
    /// End the sessions of each database.
    sessions: Mutex<HashMap<String, Shutdown>>,
}

/// What the pools of an endpoint have in common.
pub(crate) struct PoolContext {
    /// The endpoint's name and end, and the numbers of connections.
    pub(crate) registry: EndpointSessions,
    /// The settings in force.
    pub(crate) settings: ArcSwap<PoolSettings>,
    /// The endpoint's metrics.
    pub(crate) metrics: Arc<Metrics>,
    /// Ends idle connections.
    pub(crate) shutdown: Shutdown,
    /// The tasks that the end of the process waits for.
    pub(crate) tasks: TaskTracker,
    /// Not one of those that run sessions.
    pub(crate) main_runtime: Handle,
    /// When a pin for this reason was reported last.
    pub(crate) reported_pins: Mutex<EnumMap<PinReason, Option<Instant>>>,
}

impl PoolContext {
    /// Counts a client that cannot part with its connection, and reports it once an hour.
    fn pinned(&self, reason: PinReason) {
        self.metrics.pool_pins[reason].inc();
        let now = Instant::now();
        let mut reported = self
            .reported_pins
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let last = &mut reported[reason];
        if last.is_none_or(|last| now.duration_since(last) >= PIN_REPORT_INTERVAL) {
            *last = Some(now);
            tracing::warn!(
                endpoint = %self.registry.label(),
                reason = reason.as_str(),
                hint = reason.advice(),
                "a client keeps its server connection of the pool until it leaves; reported once an hour, SHOW PINS lists all"
            );
        }
    }

    fn is_over(&self) -> bool {
        self.registry.closed().is_cancelled() || self.shutdown.phase() != Phase::Serving
    }

    /// Returns when the endpoint or the process serves no more. Cancel safe.
    async fn over(&self) {
        tokio::select! {
            () = self.registry.closed().cancelled() => {}
            () = self.shutdown.draining().cancelled() => {}
        }
    }
}

/// The pool of one database.
struct Pool {
    database: String,
    context: Arc<PoolContext>,
    state: Mutex<State>,
    upkeep: Upkeep,
    /// Notified of changes during a pause.
    changed: Notify,
    /// A client waits for a connection that others have.
    is_short: AtomicBool,
    /// What clients have prepared.
    texts: Arc<Texts>,
    /// What clients have set.
    settings_table: Arc<SettingsTable>,
    /// Raised by definitions: what is prepared from then on may be something else than the same text before.
    epoch: AtomicU64,
}

/// What the lock of a pool protects; it is never held across an await.
#[derive(Default)]
struct State {
    servers: EnumMap<PoolServer, usize>,
    /// One for each of them.
    retentions: Vec<Arc<Retention>>,
    /// The one returned last is at the end, and taken first: the others reach their idle timeout.
    idle: Vec<Idle>,
    /// By the order of their coming.
    waiting: BTreeMap<u64, Waiter>,
    limit: Limit,
    /// Nothing is granted.
    is_paused: bool,
    /// Connections of an earlier one are closed instead of kept.
    generation: u64,
    next_number: u64,
}

impl Pools {
    pub(crate) fn new(mode: PoolMode, context: PoolContext) -> Self {
        Self {
            mode: ArcSwap::from_pointee(mode),
            texts: Texts::new(context.settings.load().prepared_statement_memory),
            settings_table: Arc::default(),
            context: Arc::new(context),
            by_database: Mutex::default(),
            is_paused: AtomicBool::new(false),
            sessions: Mutex::default(),
        }
    }

    /// How new clients get their server connections.
    pub(crate) fn mode(&self) -> PoolMode {
        **self.mode.load()
    }

    /// The settings in force.
    pub(crate) fn settings(&self) -> PoolSettings {
        **self.context.settings.load()
    }

    /// Applies other settings to new clients; idle connections beyond the new size are closed.
    pub(crate) fn apply(&self, mode: PoolMode, settings: PoolSettings) {
        let before = self.mode.swap(Arc::new(mode));
        self.context.settings.store(Arc::new(settings));
        self.texts.set_limit(settings.prepared_statement_memory);
        if *before != mode {
            // What clients leave on a connection in one mode, such as statements, is not followed in another.
            self.reconnect(None);
        }
        for pool in self.all() {
            pool.shrink();
        }
    }

    /// Runs a task that the end of the process waits for.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.context.tasks.spawn(task);
    }

    /// Every pool in use, by database.
    pub(crate) fn snapshot(&self) -> Vec<PoolSnapshot> {
        let mut pools = self.all();
        pools.sort_by(|one, other| one.database.cmp(&other.database));
        pools.iter().map(|pool| pool.snapshot()).collect()
    }

    /// What clients have prepared.
    pub(crate) fn statements(&self) -> StatementsSnapshot {
        self.texts.snapshot()
    }

    fn all(&self) -> Vec<Arc<Pool>> {
        self.pools().values().cloned().collect()
    }

    /// The pool of `database`.
    fn pool(&self, database: &str) -> Arc<Pool> {
        let mut pools = self.pools();
        if let Some(pool) = pools.get(database) {
            return Arc::clone(pool);
        }
        // Clients choose the names: those that lead to no connection must not stay.
        pools.retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.lock().is_unused());
        let pool = Arc::new(Pool {
            database: database.to_owned(),
            context: Arc::clone(&self.context),
            state: Mutex::new(State {
                is_paused: self.is_paused.load(Ordering::Relaxed),
                ..State::default()
            }),
            upkeep: Upkeep::new(),
            changed: Notify::new(),
            is_short: AtomicBool::new(false),
            texts: Arc::clone(&self.texts),
            settings_table: Arc::clone(&self.settings_table),
            epoch: AtomicU64::new(0),
        });
        let settings = self.context.settings.load();
        pool.lock().limit.show(&settings, &self.context.metrics);
        pools.insert(database.to_owned(), Arc::clone(&pool));
        pool
    }

    fn pools(&self) -> MutexGuard<'_, HashMap<String, Arc<Pool>>> {
        self.by_database
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes idle connections beyond the size of the pool, the longest idle first.
    fn shrink(self: &Arc<Self>) {
        let settings = self.context.settings.load();
        let mut state = self.lock();
        state.limit.show(&settings, &self.context.metrics);
        let size = Limit::configured(&settings, Duration::ZERO);
        let surplus = state.staying().saturating_sub(size).min(state.idle.len());
        let mut surplus: Vec<Idle> = state.idle.drain(..surplus).collect();
        for idle in &mut surplus {
            // Under the same lock: one that returns now must not count them.
            let slot = &mut idle.server.record.slot;
            state.count(slot, PoolServer::Closing);
        }
        drop(state);
        for idle in surplus {
            self.close(idle.into_server(), PoolClose::Surplus);
        }
    }

    /// Closes a connection in an orderly way, without waiting for it.
    fn close(&self, mut server: ServerConnection, reason: PoolClose) {
        server.record.slot.close = reason;
        server.record.slot.enter(PoolServer::Closing);
        self.context.tasks.spawn(server.terminate());
    }

    fn snapshot(&self) -> PoolSnapshot {
        let settings = self.context.settings.load();
        let state = self.lock();
        let waiting = || {
            let waiters = state.waiting.values();
            waiters.filter(|waiter| waiter.grant.is_none())
        };
        PoolSnapshot {
            database: self.database.clone(),
            servers: state.servers,
            retained: state
                .retentions
                .iter()
                .filter(|it| it.since().is_some())
                .count(),
            idle: state.idle.iter().map(Idle::snapshot).collect(),
            waiting: waiting().count(),
            max_wait: waiting()
                .next()
                .map(|waiter| waiter.since.elapsed())
                .unwrap_or_default(),
            limit: Limit::configured(&settings, Duration::ZERO),
            learned_limit: state.limit.learned.map(|learned| learned.servers),
            is_paused: state.is_paused,
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.limit.hide(&self.context.metrics);
    }
}

impl State {
    /// Server connections in whatever state.
    fn open(&self) -> usize {
        self.servers.values().sum()
    }

    /// Whether there are connections besides those being opened.
    fn has_others(&self) -> bool {
        self.open() > self.servers[PoolServer::Opening]
    }

    /// Those that are not being closed.
    fn staying(&self) -> usize {
        self.open() - self.servers[PoolServer::Closing]
    }

    /// Whether the client with this number in the queue has been given something that it has not taken.
    fn is_granted(&self, number: u64) -> bool {
        let waiter = self.waiting.get(&number);
        waiter.is_some_and(|waiter| waiter.grant.is_some())
    }

    fn is_unused(&self) -> bool {
        self.open() == 0 && self.waiting.is_empty() && !self.is_paused
    }

    fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Counts a connection in another state.
    fn count(&mut self, slot: &mut Slot, new: PoolServer) {
        slot.retention.end();
        let old = std::mem::replace(&mut slot.state, new);
        self.servers[old] = self.servers[old].saturating_sub(1);
        self.servers[new] += 1;
        if self.is_paused {
            slot.pool().changed.notify_waiters();
        }
        let metrics = &slot.pool().context.metrics;
        metrics.pool_servers[old].dec();
        metrics.pool_servers[new].inc();
    }

    /// A slot for a new connection, if a client that has `waited` may open one.
    fn open_slot(&mut self, pool: &Arc<Pool>, waited: Duration) -> Option<Slot> {
        let settings = pool.context.settings.load();
        let open = self.open();
        if self.is_paused
            || self.servers[PoolServer::Opening] >= CONCURRENT_LOGINS
            || !self.limit.admits(open, &settings, waited)
        {
            return None;
        }
        self.limit.show(&settings, &pool.context.metrics);
        self.servers[PoolServer::Opening] += 1;
        pool.context.metrics.pool_servers[PoolServer::Opening].inc();
        let retention = Arc::<Retention>::default();
        self.retentions.push(Arc::clone(&retention));
        Some(Slot::counted(pool, self.generation, retention))
    }

    /// Grants what there is to the clients that wait, the first one first: but for those that have come at once and are
    /// [nearer](Self::nearer), none is served before an earlier one that needs the same. Returns connections to drop once the
    /// lock is released.
    #[must_use]
    fn serve(&mut self, pool: &Arc<Pool>) -> Vec<ServerConnection> {
        let mut evicted = Vec::new();
        if self.is_paused {
            return evicted;
        }
        let mut returning = self.servers[PoolServer::Resetting];
        let mut reclaimed = None;
        let mut is_short = false;
        let mut next = 0;
        while let Some((number, waiter)) = self.first_waiting(next) {
            next = number + 1;
            let (since, is_opening) = (waiter.since, waiter.is_opening);
            let suiting = self.suiting(&waiter.wanted, waiter.runtime);
            let mut given_to = number;
            let grant = if let Some(at) = suiting {
                if let Some(nearer) = self.nearer(at, number) {
                    // It is looked at again.
                    (given_to, next) = (nearer, number);
                }
                Grant::Server(self.take_idle(at))
            } else if is_opening {
                continue;
            } else if returning > 0 {
                // One that is being reset is there sooner than a login would end.
                returning -= 1;
                continue;
            } else if let Some(slot) = self.open_slot(pool, since.elapsed()) {
                Grant::Open(slot)
            } else if let Some(at) = self.kept_by_another(number) {
                Grant::Server(self.take_idle(at))
            } else if self.servers[PoolServer::Opening] < CONCURRENT_LOGINS && !self.idle.is_empty()
            {
                // Connections with other startup parameters are of no use to the client, and take the place of its own. Once
                // dropped, they free their slots for it.
                evicted.push(self.idle.remove(0).into_server());
                break;
            } else {
                // Before the look at those that are kept: a session looks at this once it keeps its own.
                is_short = true;
                pool.is_short.store(true, Ordering::SeqCst);
                if self.reclaim(&mut reclaimed) {
                    continue;
                }
                break;
            };
            if let Some(waiter) = self.waiting.get_mut(&given_to) {
                waiter.is_opening |= matches!(grant, Grant::Open(_));
                waiter.give(grant);
            }
        }
        if !is_short && pool.is_short.load(Ordering::Relaxed) {
            pool.is_short.store(false, Ordering::SeqCst);
        }
        for server in &mut evicted {
            server.record.slot.close = PoolClose::Surplus;
        }
        evicted
    }

    /// The first client from this number on that waits and has been given nothing.
    fn first_waiting(&self, from: u64) -> Option<(u64, &Waiter)> {
        let mut waiting = self.waiting.range(from..);
        let (number, waiter) = waiting.find(|(_, waiter)| waiter.grant.is_none())?;
        Some((*number, waiter))
    }

    /// The client that gets the idle connection at this position instead of the first one, whose turn it is: the next of those
    /// that came [at once](AT_ONCE) with it, on the connection's runtime. A connection that moves to another runtime costs four
    /// system calls and a wakeup, a fifth of the whole transaction.
    fn nearer(&self, at: usize, first: u64) -> Option<u64> {
        let record = &self.idle.get(at)?.server.record;
        let mut waiting = self.waiting.range(first..);
        let (_, first) = waiting.next()?;
        if first.runtime == record.runtime || record.owner.is_some() {
            return None;
        }
        let at_once = waiting
            .take(MAX_LOOKED_AT)
            .take_while(|(_, waiter)| waiter.since.duration_since(first.since) <= AT_ONCE);
        let mut nearer = at_once.filter(|(_, waiter)| {
            waiter.runtime == record.runtime
                && waiter.grant.is_none()
                && !waiter.is_opening
                && record.suits(&waiter.wanted.login)
                && record.resets_to(&waiter.wanted.login)
                && record.settings == waiter.wanted.settings
        });
        nearer.next().map(|(number, _)| *number)
    }

    /// Has the client that has been at rest for the longest time part with its connection; `false` if there is none. Not one
    /// more than clients wait: `reclaimed` are those that are on their way, if they have been counted.
    fn reclaim(&self, reclaimed: &mut Option<usize>) -> bool {
        let wanted = || self.retentions.iter().filter(|it| it.is_wanted()).count();
        let reclaimed = reclaimed.get_or_insert_with(wanted);
        if let Some(others) = reclaimed.checked_sub(1) {
            *reclaimed = others;
            return true;
        }
        let kept = self.retentions.iter();
        let kept = kept.filter_map(|retention| Some((retention.since()?, retention)));
        let longest = kept.min_by_key(|(since, _)| *since);
        if let Some((_, retention)) = longest {
            retention.want();
        }
        longest.is_some()
    }

    /// Takes the idle connection at this position for a client.
    fn take_idle(&mut self, at: usize) -> ServerConnection {
        let mut server = self.idle.remove(at).into_server();
        self.count(&mut server.record.slot, PoolServer::Leased);
        server
    }

    /// The position of the idle connection that suits a client best.
    fn suiting(&self, wanted: &Wanted, runtime: runtime::Id) -> Option<usize> {
        let Wanted {
            login,
            settings,
            owner,
            ..
        } = wanted;
        let suiting = self.idle.iter().enumerate().filter(|(_, idle)| {
            let record = &idle.server.record;
            (record.owner.is_none() || record.owner == *owner) && record.suits(login)
        });
        // The last one of several that are equally good: the one returned last.
        suiting
            .max_by_key(|(_, idle)| {
                let record = &idle.server.record;
                // A statement more costs a round trip, another runtime two system calls.
                (
                    record.owner.is_some(),
                    record.settings == *settings,
                    record.resets_to(login),
                    record.runtime == runtime,
                )
            })
            .map(|(at, _)| at)
    }

    /// The position of the idle connection that another client than this one keeps, and has not used for the longest time.
    fn kept_by_another(&self, number: u64) -> Option<usize> {
        let login = &self.waiting.get(&number)?.wanted.login;
        let mut idle = self.idle.iter();
        idle.position(|idle| idle.server.record.suits(login))
    }
}
