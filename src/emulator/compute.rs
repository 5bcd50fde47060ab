//! Scale-to-zero: when the compute sleeps, what wakes it, and what it means for sessions.
//!
//! Activity is what the compute's monitor sees of a backend: a login, a query until it has finished, and a transaction
//! until it has ended, idle or not. A silent session, a refused login and a disconnect are none.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    counts::Counters,
    postgres::Database,
    sessions::{Disruption, Sessions},
    settings::{OnSuspend, Settings},
};

/// Interval between checks for running queries.
const BUSY_RECHECK: Duration = Duration::from_millis(200);

/// The compute's state, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Takes connections.
    Active,
    /// Suspended.
    Idle,
    /// Suspended still, but on its way up.
    Waking,
}

/// What all computes of an emulator share.
#[derive(Clone)]
pub(crate) struct Common {
    pub(crate) settings: watch::Sender<Settings>,
    pub(crate) counters: Counters,
    pub(crate) tracker: TaskTracker,
    /// Ends them.
    pub(crate) stop: CancellationToken,
}

/// What the API sets for one compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Zero: never suspend; `None`: [`Settings::suspend_after`].
    pub(crate) suspend_after: Option<Duration>,
    /// No connection is accepted or wakes it.
    pub(crate) is_disabled: bool,
}

/// The compute of one endpoint; cheap to clone.
#[derive(Clone)]
pub(crate) struct Compute(Arc<Inner>);

struct Inner {
    state: watch::Sender<State>,
    started: Instant,
    /// Milliseconds from `started`.
    last_activity: AtomicU64,
    limits: watch::Sender<Limits>,
    sessions: Sessions,
    database: Database,
    common: Common,
}

impl Compute {
    pub(crate) fn start(common: Common, sessions: Sessions, database: Database) -> Self {
        let (tracker, stop) = (common.tracker.clone(), common.stop.clone());
        let compute = Self(Arc::new(Inner {
            state: watch::Sender::new(State::Active),
            started: Instant::now(),
            last_activity: AtomicU64::new(0),
            limits: watch::Sender::default(),
            sessions,
            database,
            common,
        }));
        let watcher = compute.clone();
        tracker.spawn(
            stop.run_until_cancelled_owned(async move { watcher.suspend_when_idle().await }),
        );
        compute
    }

    pub(crate) fn state(&self) -> State {
        *self.0.state.borrow()
    }

    pub(crate) fn limits(&self) -> Limits {
        *self.0.limits.borrow()
    }

    /// Sets its limits; a compute that is disabled now goes to sleep.
    pub(crate) async fn limit(&self, limits: Limits) {
        self.0.limits.send_replace(limits);
        if limits.is_disabled {
            self.suspend().await;
        }
    }

    /// How long it stays up without activity; zero: for ever.
    pub(crate) fn suspend_after(&self) -> Duration {
        let limit = self.limits().suspend_after;
        limit.unwrap_or_else(|| self.0.common.settings.borrow().suspend_after)
    }

    /// Notes activity.
    pub(crate) fn touch(&self) {
        let now = u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.0.last_activity.store(now, Ordering::Relaxed);
    }

    /// When the compute was last active, by the wall clock that reads `now`.
    pub(crate) fn last_active(&self, now: Timestamp) -> Timestamp {
        let quiet = SignedDuration::try_from(self.last_activity().elapsed()).unwrap_or_default();
        now.checked_sub(quiet).unwrap_or(now)
    }

    /// Whether a new connection finds the compute up; one that does not causes it to wake.
    pub(crate) fn admit(&self) -> bool {
        let wake_delay = self.0.common.settings.borrow().wake_delay;
        let mut must_wake = false;
        let mut is_active = false;
        self.0.state.send_if_modified(|state| {
            let before = *state;
            if *state == State::Idle {
                *state = if wake_delay.is_zero() {
                    State::Active
                } else {
                    State::Waking
                };
                must_wake = true;
            }
            is_active = *state == State::Active;
            before != *state
        });
        if must_wake && is_active {
            self.0.common.counters.change(|counts| counts.wakes += 1);
        } else if must_wake {
            let compute = self.clone();
            let common = self.0.common.clone();
            let waking = async move {
                sleep(wake_delay).await;
                compute.touch();
                if compute.become_active() {
                    common.counters.change(|counts| counts.wakes += 1);
                }
            };
            let Common { tracker, stop, .. } = &self.0.common;
            tracker.spawn(stop.clone().run_until_cancelled_owned(waking));
        }
        is_active
    }

    /// Resolves when the compute is up. Cancel safe.
    pub(crate) async fn until_active(&self) {
        let _ = self
            .0
            .state
            .subscribe()
            .wait_for(|state| *state == State::Active)
            .await;
    }

    /// Goes to sleep now: sessions end, connections are refused until one has woken it.
    pub(crate) async fn suspend(&self) {
        if self.0.state.send_replace(State::Idle) == State::Idle {
            return;
        }
        let Common {
            counters, settings, ..
        } = &self.0.common;
        counters.change(|counts| counts.suspensions += 1);
        let on_suspend = settings.borrow().on_suspend;
        match on_suspend {
            OnSuspend::Terminate => {
                self.0
                    .database
                    .terminate(self.0.sessions.process_ids())
                    .await;
            }
            OnSuspend::Reset => self.0.sessions.disrupt(Disruption::Reset),
            OnSuspend::Close => self.0.sessions.disrupt(Disruption::Close),
        }
    }

    fn become_active(&self) -> bool {
        self.0.state.send_if_modified(|state| {
            let is_change = *state == State::Waking;
            if is_change {
                *state = State::Active;
            }
            is_change
        })
    }

    fn last_activity(&self) -> Instant {
        self.0.started + Duration::from_millis(self.0.last_activity.load(Ordering::Relaxed))
    }

    async fn suspend_when_idle(&self) {
        let mut settings = self.0.common.settings.subscribe();
        let mut limits = self.0.limits.subscribe();
        let mut state = self.0.state.subscribe();
        loop {
            settings.mark_unchanged();
            limits.mark_unchanged();
            let suspend_after = self.suspend_after();
            if suspend_after.is_zero() || self.state() != State::Active {
                tokio::select! {
                    changed = settings.changed() => if changed.is_err() { return },
                    changed = limits.changed() => if changed.is_err() { return },
                    changed = state.changed() => if changed.is_err() { return },
                }
                continue;
            }
            let last_activity = self.last_activity();
            let deadline = last_activity + suspend_after;
            if Instant::now() < deadline {
                tokio::select! {
                    () = sleep_until(deadline) => {}
                    changed = settings.changed() => if changed.is_err() { return },
                    changed = limits.changed() => if changed.is_err() { return },
                }
            } else if self.0.database.is_busy(self.0.sessions.process_ids()).await {
                self.touch();
                sleep(BUSY_RECHECK.min(suspend_after)).await;
            } else if self.last_activity() == last_activity {
                // A transaction that ended while it was looked for has shown no busy session, and is activity.
                self.suspend().await;
            }
        }
    }
}
