//! The cell that holds the current credential: read without a lock, waited for without polling.
//!
//! The refresher is its only writer. Clients read it and report the results of their logins; they wait on the published
//! status, and the refresher waits on their demand.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    CallError, Cause, CredentialError, CredentialState, Demand, HOLD, Minted, Probe,
    demand::Forced,
    propagation::Propagation,
    schedule::{CredentialStatus, Lifetime},
};
use crate::{clock::Clock, workspace::claim};

/// Attempts kept for the status page and the console.
const MAX_ATTEMPTS: usize = 30;

/// A database credential, which the endpoint accepts as a password.
///
/// The secret does not print and is zeroed on drop.
#[derive(Clone)]
pub struct Credential {
    /// The token.
    pub secret: SecretString,
    /// When the server stops accepting it at logins, by the wall clock; `None`: never (a static password).
    pub expires_at: Option<Timestamp>,
    /// When it was minted, by the local clock.
    pub minted_at: Timestamp,
    /// Counts published credentials from 1.
    pub generation: u64,
}

impl Credential {
    /// Whether a server accepts it at a login at this time.
    pub fn is_valid_at(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|expires_at| now < expires_at)
    }

    /// The identity that the token names, if it does. Not verified: for messages only.
    pub fn identity(&self) -> Option<String> {
        let token = self.secret.expose_secret();
        // Users and service principals alike by `sub`, else by `client_id`.
        let identity = claim(token, "sub").or_else(|| claim(token, "client_id"))?;
        // Messages show it in backticks, on one line.
        let is_a_name = (1..=256).contains(&identity.len())
            && !identity
                .chars()
                .any(|character| character.is_control() || character == '`');
        is_a_name.then_some(identity)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential")
            .field("expires_at", &self.expires_at)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// The current database credential of one endpoint and identity; cheap to clone.
#[derive(Clone)]
pub struct CredentialCell(Arc<Inner>);

struct Inner {
    clock: Clock,
    // Beside its copy in `status`, so that a login with a valid credential takes no lock.
    is_lazy: bool,
    current: ArcSwapOption<Credential>,
    status: watch::Sender<CredentialStatus>,
    forced: Mutex<Forced>,
    /// Newest first.
    history: Mutex<VecDeque<MintAttempt>>,
    propagation: Propagation,
    demand: Demand,
}

/// One attempt to mint.
#[derive(Clone, Debug)]
pub struct MintAttempt {
    /// When it ended.
    pub at: Timestamp,
    /// How long it took.
    pub took: Duration,
    /// The expiry of the new credential (`None`: never), or the error.
    pub outcome: Result<Option<Timestamp>, Arc<CallError>>,
}

impl CredentialCell {
    /// An empty cell, which a refresher keeps filled.
    pub fn new(clock: Clock) -> Self {
        Self::with(clock, false)
    }

    /// An empty cell, which a refresher refills on demand only: for platforms that freeze the CPU between requests.
    pub fn lazy(clock: Clock) -> Self {
        Self::with(clock, true)
    }

    fn with(clock: Clock, is_lazy: bool) -> Self {
        // No receiver is kept: `send_modify` changes the value without one, too.
        let (status, _) = watch::channel(CredentialStatus {
            generation: 0,
            minted_at: None,
            expires_at: None,
            state: CredentialState::None,
            is_lazy,
            last_error: None,
            next_attempt: None,
            lifetime: None,
            settled: 0,
            in_flight: false,
            opens_at: Instant::now(),
        });
        Self(Arc::new(Inner {
            clock,
            is_lazy,
            current: ArcSwapOption::empty(),
            status,
            forced: Mutex::default(),
            history: Mutex::default(),
            propagation: Propagation::default(),
            demand: Demand::default(),
        }))
    }

    /// The credential, if it is valid by the wall clock now. Takes no lock and never waits.
    pub fn current(&self) -> Option<Arc<Credential>> {
        // An `Arc`, not arc-swap's guard: a login keeps it across awaits, and each thread has only a few guards.
        let credential = self.0.current.load_full()?;
        credential
            .is_valid_at(self.0.clock.now())
            .then_some(credential)
    }

    /// A valid credential; waits for one until the deadline. Cancel safe.
    ///
    /// Transient failures are waited out. A failure that waiting does not fix is returned as soon as an attempt during the
    /// wait meets it, or at once if the next attempt is more than [`HOLD`] away.
    pub async fn get(&self, deadline: Instant) -> Result<Arc<Credential>, CredentialError> {
        if let Some(credential) = self.current() {
            let is_due = |status: &CredentialStatus| status.is_lazy_due_at(self.0.clock.now());
            if !self.0.is_lazy || !is_due(&self.0.status.borrow()) {
                return Ok(credential);
            }
            if let Some(credential) = self.renewed(credential, deadline).await {
                return Ok(credential);
            }
        }
        // There is no valid credential, or it has expired while `renewed` waited.
        let status = self.0.status.subscribe();
        status.borrow().refuse_if_hopeless(deadline)?;
        self.wait(status, 0, deadline).await
    }

    /// Waits for one attempt to replace a credential that is about to expire; falls back on it while it is valid.
    async fn renewed(&self, old: Arc<Credential>, deadline: Instant) -> Option<Arc<Credential>> {
        let mut status = self.0.status.subscribe();
        // The current credential still works, so that a slow workspace delays the login by no more than this.
        let deadline = deadline.min(Instant::now() + HOLD);
        let settled = {
            let status = status.borrow_and_update();
            // The pace allows no attempt in that time: waiting would only delay the login.
            if !status.is_open_by(deadline) {
                return self.current();
            }
            status.settled
        };
        // The demand makes the refresher attempt now; without it a lazy one does nothing.
        let _waiting = self.0.demand.add();
        let attempted = status.wait_for(|status| status.settled > settled);
        let _ = timeout_at(deadline, attempted).await;
        self.newer(old.generation).or_else(|| self.current())
    }

    /// A credential newer than the one that the endpoint has just rejected; waits for it until the deadline. Cancel safe.
    ///
    /// All clients with the same rejected generation share one mint. Forced mints are rate-limited per cause, and the
    /// interval doubles while their credentials are rejected too, until [`accepted`](Self::accepted) is called for the cause.
    pub async fn wait_for_newer(
        &self,
        rejected_generation: u64,
        cause: Cause,
        deadline: Instant,
    ) -> Result<Arc<Credential>, CredentialError> {
        let status = self.0.status.subscribe();
        if let Some(credential) = self.newer(rejected_generation) {
            return Ok(credential);
        }
        // The borrow ends with this block: it is a read lock, and the refresher's next publication would wait for it.
        let (opens_at, in_flight) = {
            let status = status.borrow();
            status.refuse_if_hopeless(deadline)?;
            (status.opens_at, status.in_flight)
        };
        {
            let now = Instant::now();
            let mut forced = self.forced();
            // Recorded even if this client is refused below: a rejected credential is replaced by any later one.
            forced.reject(rejected_generation, cause);
            // The pace of all attempts applies to forced ones too.
            let allowed_at = forced
                .allowed_at(cause)
                .map_or(opens_at, |at| at.max(opens_at));
            // An attempt in progress serves this client whatever the rate limit allows next.
            if !in_flight && allowed_at > deadline.min(now + HOLD) {
                return Err(CredentialError::RateLimited {
                    retry_in: allowed_at.saturating_duration_since(now),
                });
            }
            forced.want(rejected_generation, cause);
        }
        self.wait(status, rejected_generation, deadline).await
    }

    /// Waits until a credential that was rejected soon after its mint is worth another attempt, since it may not have
    /// reached the endpoint; `None` if it is not, or not before the deadline. Cancel safe.
    pub(crate) async fn retry_young(
        &self,
        generation: u64,
        deadline: Instant,
    ) -> Option<Probe<'_>> {
        let latest = self.latest()?;
        if latest.generation != generation {
            return None;
        }
        let age = self.0.clock.now().duration_since(latest.minted_at);
        // Zero if the wall clock was set back in between.
        let age = Duration::try_from(age).unwrap_or_default();
        self.0.propagation.probe(generation, age, deadline).await
    }

    /// Records a login that worked: a later rejection of the same cause is worth a prompt new mint.
    pub fn accepted(&self, generation: u64, cause: Cause) {
        self.forced().accept(generation, cause);
        self.0.propagation.accepted(generation);
    }

    /// Records that the role belongs to another identity than the credential. Returns whether a new credential is worth
    /// trying: one is, until a login is accepted, because each belongs to the same identity.
    pub(crate) fn note_mismatch(&self) -> bool {
        self.forced().note_mismatch()
    }

    /// The status by the wall clock now.
    pub fn status(&self) -> CredentialStatus {
        let mut status = self.0.status.borrow().clone();
        status.state = status.state_at(self.0.clock.now());
        status
    }

    /// Follows changes of generation, state, last error and plan.
    pub fn subscribe(&self) -> watch::Receiver<CredentialStatus> {
        self.0.status.subscribe()
    }

    /// Publishes a credential. Only the refresher calls it, and tests. `jitter` in -1..=1 moves the time of the refresh.
    pub fn publish(&self, minted: Minted, jitter: f64) -> Arc<Credential> {
        let now = self.0.clock.now();
        // Read and stored without compare-and-swap: the refresher is the only writer.
        let generation = self
            .0
            .current
            .load()
            .as_ref()
            .map_or(1, |credential| credential.generation + 1);
        let credential = Arc::new(Credential {
            secret: minted.secret,
            expires_at: minted.expires_at,
            minted_at: now,
            generation,
        });
        let lifetime = credential
            .expires_at
            .map(|expires_at| Lifetime::new(now, expires_at, jitter));
        // Before the first login with it: a rejection that finds no record would not double the interval.
        self.forced().minted(generation);
        // Before the status changes: the change wakes clients, which read the credential then.
        self.0.current.store(Some(Arc::clone(&credential)));
        self.0.status.send_modify(|status| {
            status.generation = generation;
            status.minted_at = Some(now);
            status.expires_at = credential.expires_at;
            status.lifetime = lifetime;
            status.last_error = None;
            status.state = status.state_at(now);
        });
        credential
    }

    /// The latest attempts to mint, newest first.
    pub fn attempts(&self) -> Vec<MintAttempt> {
        self.history().iter().cloned().collect()
    }

    fn history(&self) -> MutexGuard<'_, VecDeque<MintAttempt>> {
        self.0
            .history
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// The latest credential, valid or not.
    pub(super) fn latest(&self) -> Option<Arc<Credential>> {
        self.0.current.load_full()
    }

    /// Records the start of an attempt.
    pub(super) fn attempt_begins(&self, now: Instant) {
        self.forced().attempt(now);
        self.0.status.send_modify(|status| {
            status.in_flight = true;
            status.next_attempt = None;
        });
    }

    /// Publishes the outcome of an attempt. `opens_at`: the earliest attempt that a waiting client can cause.
    pub(super) fn attempt_ended(&self, attempt: MintAttempt, opens_at: Instant) {
        let error = attempt.outcome.clone().err();
        {
            let mut history = self.history();
            history.push_front(attempt);
            history.truncate(MAX_ATTEMPTS);
        }
        self.0.status.send_modify(|status| {
            status.in_flight = false;
            status.settled += 1;
            status.opens_at = opens_at;
            status.last_error = error;
        });
    }

    /// Publishes state and plan, if either changed.
    pub(super) fn plan(&self, next_attempt: Option<Timestamp>) {
        let now = self.0.clock.now();
        // The refresher plans at least every 30 s; an unchanged plan must not wake waiting clients and subscribers.
        self.0.status.send_if_modified(|status| {
            let state = status.state_at(now);
            let changed = state != status.state || next_attempt != status.next_attempt;
            status.state = state;
            status.next_attempt = next_attempt;
            changed
        });
    }

    pub(super) fn demand(&self) -> &Demand {
        &self.0.demand
    }

    pub(super) fn forced(&self) -> MutexGuard<'_, Forced> {
        self.0.forced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn newer(&self, than: u64) -> Option<Arc<Credential>> {
        self.current()
            .filter(|credential| credential.generation > than)
    }

    async fn wait(
        &self,
        mut status: watch::Receiver<CredentialStatus>,
        newer_than: u64,
        deadline: Instant,
    ) -> Result<Arc<Credential>, CredentialError> {
        // Cancel safe: a client that goes away drops its demand, and causes no more attempts.
        let _waiting = self.0.demand.add();
        // A failure before the wait does not refuse this client, which may cause a new attempt.
        let settled = status.borrow().settled;
        loop {
            let (attempted, refusal) = {
                let status = status.borrow_and_update();
                (status.settled > settled, status.refusal().cloned())
            };
            // Read after the status is marked as seen, so that no publication is missed between the two.
            if let Some(credential) = self.newer(newer_than) {
                return Ok(credential);
            }
            if let Some(error) = refusal
                && attempted
            {
                return Err(CredentialError::Failed(error));
            }
            match timeout_at(deadline, status.changed()).await {
                Ok(Ok(())) => {}
                // Only the time can run out: `self` keeps the sender.
                Ok(Err(_)) | Err(_) => return Err(self.timed_out(newer_than)),
            }
        }
    }

    fn timed_out(&self, newer_than: u64) -> CredentialError {
        let status = self.0.status.borrow();
        match &status.last_error {
            Some(error) => CredentialError::Failed(Arc::clone(error)),
            None if status.generation == 0 => CredentialError::Missing,
            None if newer_than == 0 => CredentialError::Expired,
            None => CredentialError::TimedOut,
        }
    }
}

impl fmt::Debug for CredentialCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialCell")
            .field("current", &self.0.current.load())
            .finish_non_exhaustive()
    }
}
