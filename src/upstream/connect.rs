//! Connects to the upstream, retrying until `connect_timeout` while the endpoint wakes.
//!
//! A client has a `Budget`. After a failed attempt, the class of the failure decides the `Reaction`. While the endpoint
//! wakes, clients make one attempt at a time (`Wake`); once it responds, all proceed, more and more at a time (`LoginSlots`).
//! So a thousand clients at a sleeping endpoint cause the dials of one.

use std::{borrow::Cow, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use tokio::{
    io::AsyncReadExt,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    budget::Budget,
    dial,
    endpoint::Endpoint,
    failure::{Class, Failure, Reaction, consequence},
    login::{Connection, Login},
    names::RecentNames,
    phases::Phases,
    slots::LoginSlots,
    wake::{Place, RETRY, Wake},
};
use crate::{
    config::{Keepalive, Timeouts},
    credential::{Cause, Credential, CredentialCell, CredentialError, Probe},
    net::{backoff::Backoff, message::write_and_flush},
    protocol::{
        error::{Report, sqlstate},
        options::LoginParameters,
        startup::CancelKey,
    },
    status::Label,
    telemetry::{
        Metrics,
        labels::{LoginPhase, Reason},
    },
};

/// A login that takes longer than this after the server requested the password releases its slot: settings of the client,
/// such as `post_auth_delay`, can make it arbitrarily slow.
const SLOW_LOGIN: Duration = Duration::from_secs(1);
/// The budget of a client after an earlier one has spent its whole budget without success.
const FAILING_BUDGET: Duration = Duration::from_secs(10);
/// More than the users of one machine's clients.
const MISSING_DATABASES: usize = 64;
/// How long a missing database is remembered: one that is created later is found after this time.
const MISSING_DATABASE_LIFETIME: Duration = Duration::from_mins(1);
/// Concurrent cancels.
const CONCURRENT_CANCELS: usize = 32;
/// Limit of one cancel, as PgBouncer's `cancel_wait_timeout`.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(10);

/// The settings of connecting to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectSettings {
    /// Time limits.
    pub timeouts: Timeouts,
    /// Detection of dead peers.
    pub keepalive: Keepalive,
}

/// The refusal of a client.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The error for the client.
    pub report: Report,
    /// The metric label.
    pub reason: Reason,
}

/// A logged-in connection for one client.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub connection: Connection,
    /// Its database.
    pub database: String,
    /// How long the whole connect took, if the endpoint was waking in it.
    pub woke_after: Option<Duration>,
}

/// One endpoint, shared by all of its clients.
pub struct Upstream {
    label: Label,
    endpoint: ArcSwap<Endpoint>,
    credentials: CredentialCell,
    metrics: Arc<Metrics>,
    /// Database names that clients send by default and that do not exist.
    missing_databases: RecentNames,
    failing_budget: Duration,
    logins: LoginSlots,
    cancels: Semaphore,
    wake: Wake,
}

impl Upstream {
    /// An endpoint to connect to, with the credentials of `credentials`.
    pub fn new(endpoint: Endpoint, credentials: CredentialCell, metrics: Arc<Metrics>) -> Self {
        Self {
            label: endpoint.label.clone(),
            endpoint: ArcSwap::from_pointee(endpoint),
            credentials,
            metrics,
            missing_databases: RecentNames::new(MISSING_DATABASES, MISSING_DATABASE_LIFETIME),
            failing_budget: FAILING_BUDGET,
            logins: LoginSlots::default(),
            cancels: Semaphore::new(CONCURRENT_CANCELS),
            wake: Wake::default(),
        }
    }

    /// The endpoint.
    pub(crate) fn endpoint(&self) -> Arc<Endpoint> {
        self.endpoint.load_full()
    }

    /// Replaces the endpoint, for example by one with other roots.
    pub(crate) fn redirect(&self, endpoint: Endpoint) {
        self.endpoint.store(Arc::new(endpoint));
    }

    /// Database names that clients send by default and that do not exist; these clients get the configured database.
    pub(crate) fn missing_databases(&self) -> Vec<String> {
        self.missing_databases.list()
    }

    /// Whether the endpoint does not respond at present.
    pub(crate) fn is_waking(&self) -> bool {
        self.wake.is_waking()
    }

    /// Names the database that a login would open, where an earlier login has shown that the one named does not exist.
    pub(crate) fn settle_database(&self, parameters: &mut LoginParameters) {
        if self.missing_databases.contains(&parameters.database)
            && let Some(fallback) = parameters.fallback_database.take()
        {
            parameters.database = fallback;
        }
    }

    /// A logged-in connection, or a refusal after one budget at most.
    ///
    /// Cancel safe: dropping it releases the lead, the attempt and the place in the queue.
    pub async fn connect(
        &self,
        parameters: &LoginParameters,
        connect: &ConnectSettings,
    ) -> Result<Connected, Refusal> {
        let timeouts = &connect.timeouts;
        // Encoded once, before any wait: a message that is too long is refused at once.
        let endpoint = self.endpoint();
        let startup = parameters.startup(&endpoint.user, |name| endpoint.dropped.contains(name));
        let startup = startup.map_err(|too_long| self.refusal(&too_long.into()))?;
        // An endpoint that did not wake within a whole budget is likely down: later clients fail sooner.
        let budget = if self.wake.has_spent_budget() {
            timeouts.connect_timeout.min(self.failing_budget)
        } else {
            timeouts.connect_timeout
        };
        let attempts = Attempts {
            upstream: self,
            connect,
            parameters: Cow::Borrowed(parameters),
            startup: Some(startup),
            budget: Budget::new(budget),
            backoff: RETRY,
            previous: None,
            was_held: false,
            was_full: false,
            was_renewed: false,
            phases: Phases::new(&self.metrics),
            probe: None,
        };
        attempts.run().await
    }

    /// Sends the server's own cancel key to the address that gave it, over a fresh connection.
    ///
    /// Returns when the server has closed that connection, which it does after sending the signal.
    pub(crate) async fn cancel(
        &self,
        address: SocketAddr,
        key: CancelKey,
        keepalive: &Keepalive,
    ) -> Result<(), Failure> {
        let endpoint = self.endpoint();
        let exchange = async {
            // The semaphore is never closed.
            // Within the time limit: requests that wait for a permit are bounded as well.
            let _permit = self.cancels.acquire().await;
            // No look-up: another server behind the same name does not know the key.
            let mut stream = dial::redial(address, &endpoint, keepalive, &self.metrics).await?;
            write_and_flush(&mut stream, &key.request())
                .await
                .map_err(|error| Failure::broken(&error))?;
            // The server responds by closing, cleanly or not.
            let mut ignored = [0; 64];
            while let Ok(1..) = stream.read(&mut ignored).await {}
            Ok(())
        };
        timeout(CANCEL_TIMEOUT, exchange)
            .await
            .unwrap_or_else(|_| Err(Failure::timed_out("cancel")))
    }

    fn refusal(&self, failure: &Failure) -> Refusal {
        Refusal {
            report: failure.report(&self.label),
            reason: failure.class.into(),
        }
    }

    fn not_renewed(&self, failure: &Failure, error: &CredentialError) -> Refusal {
        let mut refusal = self.refusal(failure);
        let detail = refusal.report.detail.take().unwrap_or_default();
        refusal.report.detail = Some(format!(
            "{detail} No other credential could be tried: {}.",
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

/// One client's attempts: its budget, and their results so far.
struct Attempts<'a> {
    upstream: &'a Upstream,
    connect: &'a ConnectSettings,
    parameters: Cow<'a, LoginParameters>,
    /// The startup message for the first attempt.
    startup: Option<BytesMut>,
    budget: Budget,
    /// Waits between attempts of this client alone.
    backoff: Backoff,
    /// The failure of the last attempt.
    previous: Option<Failure>,
    was_held: bool,
    was_full: bool,
    was_renewed: bool,
    phases: Phases<'a>,
    /// Held while a rejected credential is tried again.
    probe: Option<Probe<'a>>,
}

/// The prerequisites of an attempt.
struct Prerequisites<'a> {
    /// Present while the endpoint wakes.
    lead: Option<Place<'a>>,
    credential: Arc<Credential>,
    /// Absent with the lead, of which there is one.
    slot: Option<OwnedSemaphorePermit>,
}

impl<'a> Attempts<'a> {
    async fn run(mut self) -> Result<Connected, Refusal> {
        loop {
            let prerequisites = self.prerequisites().await?;
            let generation = prerequisites.credential.generation;
            match self.attempt(prerequisites).await {
                Ok(connection) => {
                    self.phases.record();
                    self.upstream.credentials.accepted(generation, self.cause());
                    return Ok(Connected {
                        connection,
                        woke_after: self.was_held.then(|| self.budget.spent()),
                        database: self.parameters.into_owned().database,
                    });
                }
                Err(failure) => self.recover(failure, generation).await?,
            }
        }
    }

    /// Waits for this client's turn, a credential and a login slot.
    async fn prerequisites(&mut self) -> Result<Prerequisites<'a>, Refusal> {
        let upstream = self.upstream;
        loop {
            let began = Instant::now();
            self.was_held |= upstream.wake.is_waking();
            // The turn, then the credential, then the slot: a client that waits for those holds no slot.
            let lead = match upstream.wake.turn(&mut self.budget).await {
                Ok(lead) => lead,
                Err(failure) => {
                    // A budget that a name or capacity has shortened does not show that the endpoint is down.
                    if self.budget.is_whole() {
                        upstream.wake.spend_budget();
                    }
                    return Err(upstream.refusal(&failure));
                }
            };
            // Another client succeeded since this one's attempt failed. Without a wait, a client whose own logins look like
            // those of a waking endpoint would retry in a loop.
            if lead.is_none() && self.was_waking() {
                self.pause().await?;
            }
            let requested = Instant::now();
            let credential = upstream
                .credentials
                .get(self.credential_by())
                .await
                .map_err(|error| upstream.no_credential(&error))?;
            let ready = Instant::now();
            self.phases
                .observe(LoginPhase::Credential, ready - requested);
            let slot = if lead.is_some() {
                None
            } else {
                Some(self.login_slot().await?)
            };
            let queued = (requested - began) + ready.elapsed();
            self.phases.observe(LoginPhase::Queue, queued);
            // Clients ahead of this one may have found the endpoint waking.
            if lead.is_none() && upstream.wake.is_waking() {
                continue;
            }
            return Ok(Prerequisites {
                lead,
                // A newer one may have been minted during the wait for the slot.
                credential: upstream.credentials.current().unwrap_or(credential),
                slot,
            });
        }
    }

    /// The deadline of the wait for a credential.
    fn credential_by(&self) -> Instant {
        let timeout = self.connect.timeouts.credential_timeout;
        self.budget.ends_at().min(Instant::now() + timeout)
    }

    /// The cause that a rejection of the credential counts under.
    fn cause(&self) -> Cause {
        let user = &self.upstream.endpoint().user;
        Cause::login(user, &self.parameters.database, self.parameters.replication)
    }

    fn was_waking(&self) -> bool {
        self.previous
            .as_ref()
            .is_some_and(|failure| failure.class == Class::Waking)
    }

    async fn login_slot(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        timeout_at(self.budget.ends_at(), self.upstream.logins.take())
            .await
            .map_err(|_| self.upstream.refusal(&Failure::crowded()))
    }

    /// One login; its result updates the wake state.
    async fn attempt(&mut self, prerequisites: Prerequisites<'a>) -> Result<Connection, Failure> {
        let upstream = self.upstream;
        self.budget.attempt();
        if self.parameters.fallback_database.is_some()
            && upstream
                .missing_databases
                .contains(&self.parameters.database)
        {
            self.open_fallback_database();
        }
        // Counted here, so that a client that gives up before another attempt adds no retry.
        if let Some(previous) = &self.previous {
            upstream.metrics.upstream_retries[previous.class].inc();
        }
        let Prerequisites {
            lead,
            credential,
            slot,
        } = prerequisites;
        // The lead and the slot are held through the attempt, so that the next client starts with its result.
        let mut held = Some((lead, slot));
        let endpoint = upstream.endpoint();
        // For the first attempt only: dropped parameters may change the next message.
        let startup = self.startup.take();
        let login = Login::new(&endpoint.user, &credential, &self.parameters);
        let attempt = login.run(&endpoint, startup, &self.connect.keepalive, &self.phases);
        // One attempt is bounded as well: a load balancer may accept a connection and not pass it on.
        let whole = Instant::now() + self.connect.timeouts.server_connect_timeout;
        let ends_at = self.budget.ends_at().min(whole);
        let mut attempt = pin!(timeout_at(ends_at, attempt));
        let slow = async {
            login.password_requested.wait().await;
            sleep(SLOW_LOGIN).await;
        };
        let result = tokio::select! {
            result = &mut attempt => result,
            () = slow => {
                // The next client starts without this result; the login goes on until its own limit.
                held = None;
                attempt.await
            }
        };
        // An attempt that the budget cuts short has no result of its own.
        let cut_short = self.previous.as_ref().filter(|_| ends_at < whole);
        let result = result.unwrap_or_else(|_| {
            Err(match cut_short {
                Some(previous) => previous.clone(),
                None if login.password_requested.initialized() => Failure::slow_login(),
                None => Failure::timed_out_in(self.phases.current(), &endpoint),
            })
        });
        let responds = |woke_after: Option<Duration>| {
            upstream.logins.grow();
            if let Some(waking) = woke_after {
                upstream.metrics.wake_seconds.observe(waking.as_secs_f64());
            }
        };
        let logins = &upstream.metrics.upstream_connects;
        let Err(failure) = &result else {
            logins.ok.inc();
            responds(upstream.wake.logged_in());
            return result;
        };
        logins.failed[failure.class].inc();
        tracing::debug!(endpoint = %upstream.label, class = failure.class.as_str(), error = %failure, "upstream login failed");
        if failure.is_inconclusive {
            // A client's own settings must not make the endpoint count as waking for all.
        } else if failure.class == Class::Waking {
            let is_leading = held.as_ref().is_some_and(|(lead, _)| lead.is_some());
            upstream.wake.failed(failure, is_leading);
            upstream.logins.start_over();
        } else {
            responds(upstream.wake.answered());
        }
        result
    }

    /// Does what the failure's class requires before the next attempt, or refuses the client.
    async fn recover(&mut self, failure: Failure, generation: u64) -> Result<(), Refusal> {
        match consequence(failure.class).reaction {
            // The next turn waits, and counts the failure against the budget.
            Reaction::WaitForWake => self.was_held = true,
            Reaction::Renew => self.renew(&failure, generation).await?,
            Reaction::WaitForCapacity => {
                // Once: the first refusal for capacity starts the time limit.
                if !self.was_full {
                    self.was_full = true;
                    let capacity_timeout = self.connect.timeouts.capacity_timeout;
                    self.budget.shorten(self.budget.spent() + capacity_timeout);
                }
                self.previous = Some(failure);
                // The endpoint responds: only this client waits, outside the queue of `Wake`.
                return self.pause().await;
            }
            Reaction::Refuse
                if failure.is_missing_database() && self.parameters.fallback_database.is_some() =>
            {
                let name = &self.parameters.database;
                if self.upstream.missing_databases.insert(name) {
                    tracing::info!(
                        endpoint = %self.upstream.label,
                        database = %name,
                        fallback = self.parameters.fallback_database,
                        "database does not exist and is the client's default; the configured one is used; hint: name the database in the connection string, or set database_mapping to exact"
                    );
                }
                self.open_fallback_database();
            }
            Reaction::Refuse => return Err(self.upstream.refusal(&failure)),
        }
        self.previous = Some(failure);
        Ok(())
    }

    /// Makes another attempt worthwhile after a rejected credential: with the same one, if it is young, or with a new
    /// one, once.
    async fn renew(&mut self, failure: &Failure, generation: u64) -> Result<(), Refusal> {
        let upstream = self.upstream;
        if self.was_renewed {
            return Err(upstream.refusal(failure));
        }
        if failure.class == Class::Identity {
            // One probe at a time: that of the rejected attempt has ended.
            self.probe = None;
            let deadline = self.budget.ends_at();
            self.probe = upstream.credentials.retry_young(generation, deadline).await;
            if self.probe.is_some() {
                return Ok(());
            }
        } else if !upstream.credentials.note_mismatch() {
            // Tried once per accepted login: each new credential belongs to the same identity.
            return Err(upstream.refusal(failure));
        }
        // Once: a client whose second credential is rejected too has another problem.
        self.was_renewed = true;
        let fresh = upstream
            .credentials
            .wait_for_newer(generation, self.cause(), self.credential_by())
            .await;
        match fresh {
            Ok(_) => Ok(()),
            // The server's error explains more than the lack of another credential.
            Err(error) => Err(upstream.not_renewed(failure, &error)),
        }
    }

    /// Waits before the next attempt of this client alone; refuses it if no attempt fits into the budget.
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
        if let Some(fallback) = self.parameters.fallback_database.clone() {
            let parameters = self.parameters.to_mut();
            parameters.database = fallback;
            parameters.fallback_database = None;
            // It names the other database.
            self.startup = None;
        }
    }
}

#[cfg(test)]
mod tests;
