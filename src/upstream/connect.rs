//! Connects to the upstream, retrying until `connect_timeout` while the endpoint wakes.
//!
//! While the endpoint wakes one client's attempt leads, and the others wait for its result. Once a login has worked (or
//! failed for a reason of its own) all proceed, a bounded number at a time. So a thousand clients at a sleeping endpoint
//! make one client's dials, and those that were under way already.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Mutex, MutexGuard, Notify, Semaphore, SemaphorePermit},
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    dial,
    endpoint::{Endpoint, Keepalive, Label},
    failure::{Class, Failure},
    login::{Connection, log_in},
    phases::record_waits,
};
use crate::{
    credential::{Cause, Credential, CredentialCell, CredentialError},
    protocol::{
        error::{Report, sqlstate},
        options::SessionSettings,
        startup::CancelKey,
    },
    telemetry::{
        Metrics,
        names::{class, outcome, phase, reason},
    },
};

/// Logins under way at a time.
const CONCURRENT_LOGINS: usize = 32;
/// Cancels under way at a time.
const CONCURRENT_CANCELS: usize = 32;
/// How long a cancel may take, as PgBouncer's `cancel_wait_timeout`.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long things may take; each a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the client's request to its session or refusal.
    pub connect_timeout: Duration,
    /// One attempt at the server.
    pub server_connect_timeout: Duration,
    /// Waiting for room at an endpoint that has none.
    pub capacity_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_mins(1),
            server_connect_timeout: Duration::from_secs(15),
            capacity_timeout: Duration::from_secs(10),
        }
    }
}

/// What the settings say about dealing with an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// How long things may take.
    pub limits: Limits,
    /// How dead peers are noticed.
    pub keepalive: Keepalive,
}

/// Budgets that are no settings.
#[derive(Clone, Copy, Debug)]
struct Budgets {
    /// How long a name that does not resolve is tried: a typing error should not cost a minute.
    dns: Duration,
    /// What a client gets after a whole budget has failed, until a login works again.
    while_failing: Duration,
}

impl Default for Budgets {
    fn default() -> Self {
        Self {
            dns: Duration::from_secs(10),
            while_failing: Duration::from_secs(10),
        }
    }
}

/// Why a client gets no session.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// What it is told.
    pub report: Report,
    /// The metric label.
    pub reason: &'static str,
}

/// The way to one endpoint, shared by all of its clients.
pub struct Upstream {
    label: Label,
    endpoint: ArcSwap<Endpoint>,
    credentials: CredentialCell,
    metrics: Arc<Metrics>,
    budgets: Budgets,
    logins: Semaphore,
    cancels: Semaphore,
    /// Held by the client that leads while the endpoint wakes.
    lead: Mutex<Backoff>,
    waking: AtomicBool,
    /// When it was found asleep, while it is.
    asleep_since: std::sync::Mutex<Option<Instant>>,
    /// Told when `waking` ends.
    woken: Notify,
    failing: AtomicBool,
    last_failure: ArcSwapOption<Failure>,
}

impl Upstream {
    /// The way to `endpoint` with the credentials of `credentials`.
    pub fn new(endpoint: Endpoint, credentials: CredentialCell, metrics: Arc<Metrics>) -> Self {
        Self {
            label: endpoint.label.clone(),
            endpoint: ArcSwap::from_pointee(endpoint),
            credentials,
            metrics,
            budgets: Budgets::default(),
            logins: Semaphore::new(CONCURRENT_LOGINS),
            cancels: Semaphore::new(CONCURRENT_CANCELS),
            lead: Mutex::default(),
            waking: AtomicBool::new(false),
            asleep_since: std::sync::Mutex::default(),
            woken: Notify::new(),
            failing: AtomicBool::new(false),
            last_failure: ArcSwapOption::empty(),
        }
    }

    /// What is connected to.
    pub fn endpoint(&self) -> Arc<Endpoint> {
        self.endpoint.load_full()
    }

    /// Dials this from now on, which is the same endpoint, maybe by other roots.
    pub fn redirect(&self, endpoint: Endpoint) {
        self.endpoint.store(Arc::new(endpoint));
    }

    /// A logged-in connection, or the reason why there is none, after one budget at most; with it how long the client
    /// was held because the endpoint was waking.
    ///
    /// Cancel safe: dropping it gives up the lead, the attempt and the wait.
    pub async fn connect(
        &self,
        settings: &SessionSettings,
        terms: &Terms,
    ) -> Result<(Connection, Option<Duration>), Refusal> {
        let limits = &terms.limits;
        let budget = if self.failing.load(Ordering::Relaxed) {
            limits.connect_timeout.min(self.budgets.while_failing)
        } else {
            limits.connect_timeout
        };
        let mut deadline = Deadline::new(budget);
        let cause = Cause::login(
            &self.endpoint().user,
            &settings.database,
            settings.replication,
        );
        let mut backoff = Backoff::default();
        let mut lead: Option<MutexGuard<'_, Backoff>> = None;
        let (mut held, mut renewed, mut crowded) = (false, false, false);
        let mut previous: Option<Failure> = None;
        let (mut queued, mut credited) = (Duration::ZERO, Duration::ZERO);
        loop {
            let began = Instant::now();
            if lead.is_none() && self.waking.load(Ordering::Acquire) {
                held = true;
                lead = self.wait_for_lead(deadline.at).await?;
            }
            let asked = Instant::now();
            let credential = self
                .credentials
                .get(deadline.at)
                .await
                .map_err(|error| self.no_credential(&error))?;
            credited += dial::observe(&self.metrics, phase::CREDENTIAL, asked);
            let ready = Instant::now();
            let turn = self.wait_for_turn(deadline.at).await?;
            self.metrics
                .upstream_connect_seconds
                .with_label_values(&[phase::QUEUE])
                .observe((asked - began + ready.elapsed()).as_secs_f64());
            queued += asked - began + ready.elapsed();
            // Those ahead may have found the endpoint asleep.
            if lead.is_none() && self.waking.load(Ordering::Acquire) {
                continue;
            }
            if let Some(previous) = &previous {
                self.metrics
                    .upstream_retries
                    .with_label_values(&[previous.class.label()])
                    .inc();
            }
            // There may have been a new one meanwhile.
            let credential = self.credentials.current().unwrap_or(credential);
            let attempt = self.attempt(
                turn,
                &credential,
                (settings, terms),
                deadline.at,
                previous.as_ref(),
            );
            let failure = match attempt.await {
                Ok(connection) => {
                    record_waits(queued, credited);
                    self.credentials.accepted(credential.generation, cause);
                    self.failing.store(false, Ordering::Relaxed);
                    self.wake(lead.as_deref_mut());
                    return Ok((connection, held.then(|| deadline.began.elapsed())));
                }
                Err(failure) => failure,
            };
            match failure.class {
                Class::Waking => {
                    held = true;
                    self.fell_asleep();
                    self.last_failure.store(Some(Arc::new(failure.clone())));
                    if failure.is_dns {
                        deadline.shorten(self.budgets.dns);
                    }
                    if lead.is_none() && !deadline.is_over() {
                        lead = self.wait_for_lead(deadline.at).await?;
                        // Somebody else got through meanwhile: no reason to wait.
                        if lead.is_none() {
                            previous = Some(failure);
                            continue;
                        }
                    }
                    let retry_at = lead.as_deref_mut().unwrap_or(&mut backoff).next();
                    if retry_at >= deadline.at {
                        if deadline.is_whole {
                            self.failing.store(true, Ordering::Relaxed);
                        }
                        return Err(self.refusal(&failure));
                    }
                    let _ = timeout_at(retry_at, self.woken.notified()).await;
                }
                Class::Identity if !renewed => {
                    self.wake(lead.as_deref_mut());
                    lead = None;
                    renewed = true;
                    let fresh = self
                        .credentials
                        .replace(credential.generation, cause, deadline.at)
                        .await;
                    // The server's own words explain more than why there is no other credential to try.
                    fresh.map_err(|error| self.not_renewed(&failure, &error))?;
                }
                Class::Capacity => {
                    self.wake(lead.as_deref_mut());
                    lead = None;
                    if !crowded {
                        crowded = true;
                        let waited = deadline.began.elapsed();
                        deadline.shorten(waited + limits.capacity_timeout);
                    }
                    let retry_at = backoff.next();
                    if retry_at >= deadline.at {
                        return Err(self.refusal(&failure));
                    }
                    sleep_until(retry_at).await;
                }
                _ => {
                    self.wake(lead.as_deref_mut());
                    return Err(self.refusal(&failure));
                }
            }
            previous = Some(failure);
        }
    }

    /// Sends the server's own cancel key to the address that gave it, over a fresh connection.
    ///
    /// Returns when the server has closed that connection, which is when the signal has been sent.
    pub async fn cancel(
        &self,
        address: SocketAddr,
        key: CancelKey,
        keepalive: &Keepalive,
    ) -> Result<(), Failure> {
        let endpoint = self.endpoint();
        let exchange = async {
            // Never closed, so never an error.
            let _turn = self.cancels.acquire().await;
            let mut stream = dial::redial(address, &endpoint, keepalive, &self.metrics).await?;
            let sent = async {
                stream.write_all(&key.request()).await?;
                stream.flush().await
            };
            sent.await.map_err(|error| Failure::broken(&error))?;
            // The server answers by closing, cleanly or not.
            let mut nothing = [0; 64];
            while let Ok(1..) = stream.read(&mut nothing).await {}
            Ok(())
        };
        timeout(CANCEL_TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| Err(Failure::timed_out("cancel")))
    }

    /// Waits until this client leads, or until somebody has got through (then `None`). Cancel safe.
    async fn wait_for_lead(
        &self,
        deadline: Instant,
    ) -> Result<Option<MutexGuard<'_, Backoff>>, Refusal> {
        let mut woken = pin!(self.woken.notified());
        woken.as_mut().enable();
        if !self.waking.load(Ordering::Acquire) {
            return Ok(None);
        }
        tokio::select! {
            () = woken => Ok(None),
            lead = self.lead.lock() => Ok(self.waking.load(Ordering::Acquire).then_some(lead)),
            () = sleep_until(deadline) => {
                let failure = self.last_failure.load_full();
                Err(self.refusal(
                    &failure.map_or_else(|| Failure::timed_out("waking"), Arc::unwrap_or_clone),
                ))
            }
        }
    }

    /// Waits until few enough others are being logged in. Cancel safe.
    async fn wait_for_turn(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Refusal> {
        match timeout_at(deadline, self.logins.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            Ok(Err(_)) | Err(_) => Err(self.refusal(&Failure::crowded())),
        }
    }

    /// The endpoint does not answer: everybody waits for one client's attempts.
    fn fell_asleep(&self) {
        if !self.waking.swap(true, Ordering::AcqRel) {
            *self.asleep_since() = Some(Instant::now());
        }
    }

    fn asleep_since(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.asleep_since
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The endpoint has answered: nobody need wait for a leader.
    fn wake(&self, lead: Option<&mut Backoff>) {
        if self.waking.swap(false, Ordering::AcqRel) {
            self.woken.notify_waiters();
            if let Some(since) = self.asleep_since().take() {
                self.metrics
                    .wake_seconds
                    .observe(since.elapsed().as_secs_f64());
            }
        }
        if let Some(backoff) = lead {
            *backoff = Backoff::default();
        }
    }

    /// One login. One that the deadline cuts short says nothing new: then it is what was wrong with the one before.
    async fn attempt(
        &self,
        _turn: SemaphorePermit<'_>,
        credential: &Credential,
        (settings, terms): (&SessionSettings, &Terms),
        deadline: Instant,
        previous: Option<&Failure>,
    ) -> Result<Connection, Failure> {
        let endpoint = self.endpoint();
        let login = log_in(
            &endpoint,
            credential,
            settings,
            &terms.keepalive,
            &self.metrics,
        );
        let limit = deadline.min(Instant::now() + terms.limits.server_connect_timeout);
        let result = timeout_at(limit, login).await.unwrap_or_else(|_| {
            let cut_short = previous.filter(|_| limit == deadline);
            Err(cut_short
                .cloned()
                .unwrap_or_else(|| Failure::timed_out("login")))
        });
        let labels = match &result {
            Ok(_) => [outcome::OK, class::NONE],
            Err(failure) => [outcome::FAILED, failure.class.label()],
        };
        self.metrics
            .upstream_connects
            .with_label_values(&labels)
            .inc();
        if let Err(failure) = &result {
            tracing::debug!(endpoint = %self.label, class = failure.class.label(), error = %failure, "upstream login failed");
        }
        result
    }

    fn refusal(&self, failure: &Failure) -> Refusal {
        Refusal {
            report: failure.report(&self.label),
            reason: failure.class.label(),
        }
    }

    fn not_renewed(&self, failure: &Failure, error: &CredentialError) -> Refusal {
        let mut refusal = self.refusal(failure);
        let said = refusal.report.detail.take().unwrap_or_default();
        refusal.report.detail = Some(format!(
            "{said} No other credential could be tried: {}.",
            error.message()
        ));
        refusal
    }

    fn no_credential(&self, error: &CredentialError) -> Refusal {
        let mut report = Report::new(
            sqlstate::INVALID_AUTHORIZATION,
            format!(
                "no credential for Lakebase endpoint {}: {}",
                self.label,
                error.message()
            ),
        );
        report.detail = error.detail();
        report.hint = error.hint();
        Refusal {
            report,
            reason: reason::CREDENTIAL,
        }
    }
}

/// When a client's patience ends.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    began: Instant,
    /// It has not been shortened.
    is_whole: bool,
}

impl Deadline {
    fn new(budget: Duration) -> Self {
        let began = Instant::now();
        Self {
            at: began + budget,
            began,
            is_whole: true,
        }
    }

    /// Allows `budget` from the beginning, where that is less.
    fn shorten(&mut self, budget: Duration) {
        let at = self.began + budget;
        if at < self.at {
            self.at = at;
            self.is_whole = false;
        }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.at
    }
}

/// Growing pauses, a random half of each: 50..100 ms at first, 1..2 s at last.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    pause: Duration,
    used: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            pause: Self::FIRST,
            used: None,
        }
    }
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LAST: Duration = Duration::from_secs(2);
    /// When nobody has tried for this long, a new client begins anew.
    const STALE: Duration = Duration::from_secs(30);

    fn next(&mut self) -> Instant {
        let now = Instant::now();
        if self.used.is_some_and(|used| now - used > Self::STALE) {
            self.pause = Self::FIRST;
        }
        self.used = Some(now);
        let pause = self.pause.mul_f64(rand::random_range(0.5..1.0));
        self.pause = self.pause.mul_f64(1.5).min(Self::LAST);
        now + pause
    }
}

#[cfg(test)]
mod tests;
