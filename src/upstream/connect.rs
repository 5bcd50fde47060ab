//! Connects to the upstream, retrying until `connect_timeout` while the endpoint wakes.
//!
//! While the endpoint wakes clients make one attempt at a time ([`Wake`]). Once it answers all proceed, a bounded number
//! at a time. So a thousand clients at a sleeping endpoint cause the dials of one, and those that were under way already.

use std::{
    borrow::Cow,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    io::AsyncReadExt,
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    budget::Budget,
    databases::MissingDatabases,
    dial,
    endpoint::Endpoint,
    failure::{Class, Failure},
    login::{Connection, log_in},
    phases::{Progress, record_waits},
    propagation::{Probe, Propagation},
    wake::{Lead, RETRY, Wake},
};
use crate::{
    config::{Keepalive, Timeouts},
    credential::{Cause, Credential, CredentialCell, CredentialError},
    net::{backoff::Backoff, message::write_and_flush},
    protocol::{
        error::{Report, sqlstate},
        options::SessionSettings,
        startup::CancelKey,
    },
    status::Label,
    telemetry::{
        Metrics,
        labels::{LoginPhase, Reason},
    },
};

/// Logins under way at a time.
const CONCURRENT_LOGINS: usize = 32;
/// A login that takes longer than this after the server asked for the password gives its place to the next: settings of
/// the client, such as `post_auth_delay`, can make it arbitrarily slow.
const SLOW_LOGIN: Duration = Duration::from_secs(1);
/// The budget of a client while an earlier one has spent its whole budget in vain.
const FAILING_BUDGET: Duration = Duration::from_secs(10);
/// Cancels under way at a time.
const CONCURRENT_CANCELS: usize = 32;
/// How long a cancel may take, as PgBouncer's `cancel_wait_timeout`.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// What the settings say about dealing with an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// How long things may take.
    pub limits: Timeouts,
    /// How dead peers are noticed.
    pub keepalive: Keepalive,
}

/// Why a client gets no session.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// What it is told.
    pub report: Report,
    /// The metric label.
    pub reason: Reason,
}

/// A logged-in connection for one client.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub connection: Connection,
    /// The database that it has open.
    pub database: String,
    /// How long the client was held because the endpoint was waking.
    pub woke_after: Option<Duration>,
}

/// The way to one endpoint, shared by all of its clients.
pub struct Upstream {
    label: Label,
    endpoint: ArcSwap<Endpoint>,
    credentials: CredentialCell,
    metrics: Arc<Metrics>,
    missing_databases: MissingDatabases,
    propagation: Propagation,
    failing_budget: Duration,
    logins: Semaphore,
    cancels: Semaphore,
    wake: Wake,
    /// A credential has been replaced because the role belongs to another identity, and no login accepted since.
    mismatched: AtomicBool,
}

impl Upstream {
    /// The way to `endpoint` with the credentials of `credentials`.
    pub fn new(endpoint: Endpoint, credentials: CredentialCell, metrics: Arc<Metrics>) -> Self {
        Self {
            label: endpoint.label.clone(),
            endpoint: ArcSwap::from_pointee(endpoint),
            credentials,
            metrics,
            missing_databases: MissingDatabases::default(),
            propagation: Propagation::default(),
            failing_budget: FAILING_BUDGET,
            logins: Semaphore::new(CONCURRENT_LOGINS),
            cancels: Semaphore::new(CONCURRENT_CANCELS),
            wake: Wake::new(),
            mismatched: AtomicBool::new(false),
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

    /// Database names that clients sent by default and that do not exist: these clients get the configured database.
    pub fn missing_databases(&self) -> Vec<String> {
        self.missing_databases.names()
    }

    /// A logged-in connection, or the reason why there is none, after one budget at most.
    ///
    /// Cancel safe: dropping it gives up the lead, the attempt and the wait.
    pub async fn connect(
        &self,
        settings: &SessionSettings,
        terms: &Terms,
    ) -> Result<Connected, Refusal> {
        let limits = &terms.limits;
        // Nothing is dialed for it, so that it says nothing of the endpoint either.
        let endpoint = self.endpoint();
        let startup = settings.startup(&endpoint.user, |name| endpoint.dropped.contains(name));
        startup.map_err(|too_long| self.refusal(&too_long.into()))?;
        let budget = if self.wake.has_spent_budget() {
            limits.connect_timeout.min(self.failing_budget)
        } else {
            limits.connect_timeout
        };
        let connect = Connect {
            upstream: self,
            terms,
            settings: Cow::Borrowed(settings),
            budget: Budget::new(budget),
            backoff: RETRY,
            previous: None,
            was_held: false,
            was_full: false,
            was_renewed: false,
            queued: Duration::ZERO,
            credited: Duration::ZERO,
            probe: None,
        };
        connect.run().await
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
            write_and_flush(&mut stream, &key.request())
                .await
                .map_err(|error| Failure::broken(&error))?;
            // The server answers by closing, cleanly or not.
            let mut nothing = [0; 64];
            while let Ok(1..) = stream.read(&mut nothing).await {}
            Ok(())
        };
        timeout(CANCEL_TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| Err(Failure::timed_out("cancel")))
    }

    /// Records that the endpoint answers.
    fn answered(&self, woke_after: Option<Duration>) {
        if let Some(waking) = woke_after {
            self.metrics.wake_seconds.observe(waking.as_secs_f64());
        }
    }

    /// Whether another credential may help. A new one belongs to the same identity as the one before, so that for the
    /// wrong identity one is tried until a login is accepted.
    fn may_renew(&self, class: Class) -> bool {
        class != Class::WrongIdentity || !self.mismatched.swap(true, Ordering::Relaxed)
    }

    fn refusal(&self, failure: &Failure) -> Refusal {
        Refusal {
            report: failure.report(&self.label),
            reason: failure.class.into(),
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
            reason: Reason::Credential,
        }
    }
}

/// One client's way to a connection: its budget, and what its attempts have met so far.
struct Connect<'a> {
    upstream: &'a Upstream,
    terms: &'a Terms,
    settings: Cow<'a, SessionSettings>,
    budget: Budget,
    /// Pauses between attempts of this client alone.
    backoff: Backoff,
    /// Why the last attempt failed.
    previous: Option<Failure>,
    was_held: bool,
    was_full: bool,
    was_renewed: bool,
    queued: Duration,
    credited: Duration,
    /// Held while a credential is tried that was refused before.
    probe: Option<Probe<'a>>,
}

/// What an attempt needs.
struct Admission<'a> {
    /// Present while the endpoint wakes.
    lead: Option<Lead<'a>>,
    credential: Arc<Credential>,
    slot: SemaphorePermit<'a>,
}

impl<'a> Connect<'a> {
    async fn run(mut self) -> Result<Connected, Refusal> {
        loop {
            let admission = self.admission().await?;
            let generation = admission.credential.generation;
            match self.attempt(admission).await {
                Ok(connection) => {
                    record_waits(self.queued, self.credited);
                    self.upstream.credentials.accepted(generation, self.cause());
                    self.upstream.propagation.accepted(generation);
                    self.upstream.mismatched.store(false, Ordering::Relaxed);
                    return Ok(Connected {
                        connection,
                        woke_after: self.was_held.then(|| self.budget.spent()),
                        database: self.settings.into_owned().database,
                    });
                }
                Err(failure) => self.recover(failure, generation).await?,
            }
        }
    }

    /// Waits for the right to make an attempt, and for a credential to make it with.
    async fn admission(&mut self) -> Result<Admission<'a>, Refusal> {
        let upstream = self.upstream;
        loop {
            let began = Instant::now();
            self.was_held |= upstream.wake.is_waking();
            let lead = match upstream.wake.turn(&mut self.budget).await {
                Ok(lead) => lead,
                Err(failure) => {
                    if self.budget.is_whole() {
                        upstream.wake.spend_budget();
                    }
                    return Err(upstream.refusal(&failure));
                }
            };
            // Another client got through since this one's attempt failed: without a pause, a client whose logins alone
            // look like those of a waking endpoint would retry without end.
            if lead.is_none() && self.has_met_waking() {
                self.pause().await?;
            }
            let asked = Instant::now();
            let credential = upstream
                .credentials
                .get(self.credential_by())
                .await
                .map_err(|error| upstream.no_credential(&error))?;
            self.credited += dial::observe(&upstream.metrics, LoginPhase::Credential, asked);
            let ready = Instant::now();
            let slot = self.login_slot().await?;
            let queued = (asked - began) + ready.elapsed();
            upstream.metrics.upstream_connect_seconds[LoginPhase::Queue]
                .observe(queued.as_secs_f64());
            self.queued += queued;
            // Those ahead may have found the endpoint waking.
            if lead.is_none() && upstream.wake.is_waking() {
                continue;
            }
            return Ok(Admission {
                lead,
                // There may be a newer one by now.
                credential: upstream.credentials.current().unwrap_or(credential),
                slot,
            });
        }
    }

    /// Until when a client without a credential is held.
    fn credential_by(&self) -> Instant {
        let patience = self.terms.limits.credential_timeout;
        self.budget.ends_at().min(Instant::now() + patience)
    }

    /// What a refusal of the credential is counted under.
    fn cause(&self) -> Cause {
        let user = &self.upstream.endpoint().user;
        Cause::login(user, &self.settings.database, self.settings.replication)
    }

    fn has_met_waking(&self) -> bool {
        self.previous
            .as_ref()
            .is_some_and(|failure| failure.class == Class::Waking)
    }

    async fn login_slot(&self) -> Result<SemaphorePermit<'a>, Refusal> {
        match timeout_at(self.budget.ends_at(), self.upstream.logins.acquire()).await {
            Ok(Ok(slot)) => Ok(slot),
            Ok(Err(_)) | Err(_) => Err(self.upstream.refusal(&Failure::crowded())),
        }
    }

    /// One login, and what its result says about the endpoint.
    async fn attempt(&mut self, admission: Admission<'a>) -> Result<Connection, Failure> {
        let upstream = self.upstream;
        self.budget.attempt();
        if self.settings.fallback_database.is_some()
            && upstream.missing_databases.contains(&self.settings.database)
        {
            self.open_fallback_database();
        }
        if let Some(previous) = &self.previous {
            upstream.metrics.upstream_retries[previous.class].inc();
        }
        let Admission {
            lead,
            credential,
            slot,
        } = admission;
        let mut held = Some((lead, slot));
        let endpoint = upstream.endpoint();
        let progress = Progress::default();
        let login = log_in(
            &endpoint,
            &credential,
            &self.settings,
            &self.terms.keepalive,
            &upstream.metrics,
            &progress,
        );
        let whole = Instant::now() + self.terms.limits.server_connect_timeout;
        let ends_at = self.budget.ends_at().min(whole);
        let mut login = pin!(timeout_at(ends_at, login));
        let slow = async {
            progress.asked_for_password.wait().await;
            sleep(SLOW_LOGIN).await;
        };
        let result = tokio::select! {
            result = &mut login => result,
            () = slow => {
                held = None;
                login.await
            }
        };
        // An attempt that the budget cuts short says nothing new.
        let cut_short = self.previous.as_ref().filter(|_| ends_at < whole);
        let result = result.unwrap_or_else(|_| {
            Err(match cut_short {
                Some(previous) => previous.clone(),
                None if progress.asked_for_password.initialized() => Failure::slow_login(),
                None => Failure::timed_out_in(progress.phase(), &endpoint),
            })
        });
        match &result {
            Ok(_) => upstream.answered(upstream.wake.logged_in()),
            Err(failure) if failure.is_inconclusive => {}
            Err(failure) if failure.class == Class::Waking => {
                let is_leading = held.as_ref().is_some_and(|(lead, _)| lead.is_some());
                upstream.wake.failed(failure, is_leading);
            }
            Err(_) => upstream.answered(upstream.wake.answered()),
        }
        let logins = &upstream.metrics.upstream_connects;
        match &result {
            Ok(_) => logins.ok.inc(),
            Err(failure) => logins.failed[failure.class].inc(),
        }
        if let Err(failure) = &result {
            tracing::debug!(endpoint = %upstream.label, class = failure.class.as_str(), error = %failure, "upstream login failed");
        }
        result
    }

    /// Does what may make the next attempt succeed, or refuses the client.
    async fn recover(&mut self, failure: Failure, generation: u64) -> Result<(), Refusal> {
        let upstream = self.upstream;
        match failure.class {
            Class::Waking => self.was_held = true,
            Class::Identity if !self.was_renewed && self.may_have_arrived(generation).await => {}
            Class::Identity | Class::WrongIdentity
                if !self.was_renewed && upstream.may_renew(failure.class) =>
            {
                self.was_renewed = true;
                let fresh = upstream
                    .credentials
                    .replace(generation, self.cause(), self.credential_by())
                    .await;
                // The server's own words explain more than why there is no other credential to try.
                fresh.map_err(|error| upstream.not_renewed(&failure, &error))?;
            }
            Class::Capacity => {
                if !self.was_full {
                    self.was_full = true;
                    let capacity_timeout = self.terms.limits.capacity_timeout;
                    self.budget.shorten(self.budget.spent() + capacity_timeout);
                }
                self.previous = Some(failure);
                return self.pause().await;
            }
            _ if failure.is_missing_database() && self.settings.fallback_database.is_some() => {
                let name = &self.settings.database;
                if upstream.missing_databases.insert(name) {
                    tracing::info!(
                        endpoint = %upstream.label,
                        database = %name,
                        fallback = self.settings.fallback_database,
                        "clients that name a database like their user get the configured one, since theirs does not exist; hint: name the database in the connection string, or set database_mapping to exact"
                    );
                }
                self.open_fallback_database();
            }
            _ => return Err(upstream.refusal(&failure)),
        }
        self.previous = Some(failure);
        Ok(())
    }

    /// Waits until a credential that may not have reached the endpoint yet is worth another attempt; returns whether it is.
    async fn may_have_arrived(&mut self, generation: u64) -> bool {
        let upstream = self.upstream;
        // One probe at a time: that of the attempt that was refused has ended.
        self.probe = None;
        if let Some(age) = upstream.credentials.age(generation) {
            let probe = upstream
                .propagation
                .probe(generation, age, self.budget.ends_at());
            self.probe = probe.await;
        }
        self.probe.is_some()
    }

    /// Waits before the next attempt of this client alone; refuses it if none fits into the budget.
    async fn pause(&mut self) -> Result<(), Refusal> {
        let retry_at = Instant::now() + self.backoff.next();
        if retry_at < self.budget.ends_at() {
            sleep_until(retry_at).await;
            return Ok(());
        }
        let failure = self.previous.clone();
        let failure = failure.unwrap_or_else(|| Failure::timed_out("waking"));
        Err(self.upstream.refusal(&failure))
    }

    fn open_fallback_database(&mut self) {
        if let Some(fallback) = self.settings.fallback_database.clone() {
            let settings = self.settings.to_mut();
            settings.database = fallback;
            settings.fallback_database = None;
        }
    }
}

#[cfg(test)]
mod tests;
