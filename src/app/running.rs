//! A serving program, up to its shutdown.

use std::{fmt, future::pending, pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Addresses, AppError, Endpoints, Served, outcomes::Outcomes, shared::Shared};
use crate::{
    admin::Admin,
    credential::CredentialCell,
    exec::ProxyAddress,
    listener::{Bound, ClientAddress},
    protocol::error::{Report, sqlstate},
    telemetry::{Metrics, labels::Reason},
    upstream::Refusal,
};

/// Timeout of cut sessions to end, and then of helpers (the health port, the notes page).
const HELPERS_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between attempts of a caller that waits longer than a client.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Timeout of a service manager's wait for the first outcome of discovery.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// A program that serves.
pub struct Running {
    pub(super) addresses: Addresses,
    pub(super) shared: Arc<Shared>,
    /// The endpoint that was the first at the start.
    pub(super) first: Arc<Served>,
    pub(super) http: Option<Admin>,
    pub(super) end_requested: CancellationToken,
    pub(super) outcomes: Outcomes,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Running {
    /// The bound addresses.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The first endpoint's credential.
    pub fn credentials(&self) -> &CredentialCell {
        &self.first.credentials
    }

    /// The metrics of the first endpoint; rendering them includes all endpoints.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// Every endpoint that is served now.
    pub fn endpoints(&self) -> &Endpoints {
        &self.shared.endpoints
    }

    /// The numbers of running tasks: clients, and helpers.
    pub fn tasks(&self) -> (usize, usize) {
        (self.shared.clients.len(), self.shared.helpers.len())
    }

    /// How long active work may continue in a shutdown.
    pub fn grace(&self) -> Duration {
        self.shared.settings().max_sigterm_delay().0
    }

    /// Whether SIGTERM leads to exit code 0.
    pub fn is_zero_on_sigterm(&self) -> bool {
        self.shared.settings().exit_zero_on_sigterm()
    }

    /// The first endpoint, for clients on this machine. Waits for its discovery for `connect_timeout`, also if a client
    /// would be refused earlier. Cancel safe.
    pub async fn proxy_address(&self) -> Result<ProxyAddress, Refusal> {
        let address = self
            .addresses
            .endpoints
            .first()
            .and_then(Bound::client_address);
        let address = address.ok_or_else(no_address)?;
        let budget = self
            .shared
            .process
            .config
            .load_full()
            .connect
            .timeouts
            .connect_timeout;
        let deadline = Instant::now() + budget;
        let upstream = loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.first.context.route.upstream(rest).await {
                Ok(upstream) => break upstream,
                // `upstream` refuses early if the next attempt is far off, since drivers give up; this caller does not.
                Err(refusal) if refusal.reason == Reason::Waking && rest > RETRY_PAUSE => {
                    sleep(RETRY_PAUSE).await;
                }
                Err(refusal) => return Err(refusal),
            }
        };
        let endpoint = upstream.endpoint();
        Ok(ProxyAddress {
            password: match address {
                ClientAddress::Tcp(_) => self.shared.known_password.now(),
                // The kernel reports the user of a Unix socket's client, so that it needs no password.
                ClientAddress::Unix { .. } => None,
            },
            address,
            user: endpoint.user.clone(),
            database: endpoint.database.clone(),
        })
    }

    /// Waits for the first outcome of discovery; fails if no endpoint can be used.
    ///
    /// With `--run-connection-test`: logs in once at every endpoint, waiting for a wake as long as a client does, and
    /// reports startup only then.
    pub async fn ready(&self) -> Result<(), AppError> {
        if !self.shared.settings().run_connection_test() {
            // A workspace that does not respond must not delay the service manager: clients are served.
            if let Ok(known) = timeout(DISCOVERY_TIMEOUT, self.outcomes.known()).await {
                known?;
            }
            self.shared.notifier.ready();
            return Ok(());
        }
        let mut connect = self.shared.process.config.load_full().connect;
        // Unlike a client, the test can wait for the whole time.
        connect.timeouts.credential_timeout = connect.timeouts.connect_timeout;
        let mut logins = JoinSet::new();
        for served in &*self.shared.endpoints.now() {
            let route = served.context.route.clone();
            // Concurrently: each login may wait for its endpoint to wake.
            logins.spawn(async move { route.test_login(&connect).await });
        }
        while let Some(login) = logins.join_next().await {
            // A panic is counted and logged where it happens.
            if let Ok(Err(refusal)) = login {
                let report = refusal.report;
                return Err(AppError::new(
                    format!("connection test failed: {}", report.line()),
                    report.hint,
                ));
            }
        }
        tracing::info!("connection test passed");
        self.shared.health.set_started();
        self.shared.notifier.ready();
        Ok(())
    }

    /// Waits until an endpoint is found; fails if none can be used, which ends the program. Cancel safe.
    pub async fn found(&self) -> Result<(), AppError> {
        self.outcomes.found().await
    }

    /// Completes when a shutdown is requested otherwise than by a signal. Cancel safe.
    pub async fn shutdown_requested(&self) {
        self.end_requested.cancelled().await;
    }

    /// As [`end`](Self::end), after accepting clients for `--min-sigterm-delay`. A second signal during that time ends
    /// all sessions at once.
    pub async fn end_after_delay(self, second_signal: impl Future<Output = ()>) {
        let mut second_signal = pin!(second_signal);
        self.shared.notifier.stopping();
        let delay = self.shared.settings().min_sigterm_delay().0;
        if !delay.is_zero() {
            tracing::info!(?delay, "SIGTERM received; accepting clients for the delay");
            tokio::select! {
                () = sleep(delay) => {}
                () = &mut second_signal => return self.end_within(Duration::ZERO, pending()).await,
            }
        }
        self.end(second_signal).await;
    }

    /// Refuses new clients, lets active work finish within the grace time or until `second_signal`, then ends the rest.
    pub async fn end(self, second_signal: impl Future<Output = ()>) {
        let grace = self.grace();
        self.end_within(grace, second_signal).await;
    }

    /// As [`end`](Self::end), with another grace time.
    pub async fn end_within(self, grace: Duration, second_signal: impl Future<Output = ()>) {
        tracing::info!(
            sessions = self.shared.clients.len(),
            ?grace,
            "shutting down"
        );
        self.shared.notifier.stopping();
        self.shared.health.set_draining();
        self.shared.process.shutdown.drain();
        // The accept loops run until the cut, so that late clients receive the reason.
        self.shared.clients.close();
        tokio::select! {
            () = self.shared.clients.wait() => {}
            () = sleep(grace) => {}
            () = second_signal => {}
        }
        // Sessions still send 57P01 to their clients and Terminate to the server.
        self.shared.process.shutdown.cut();
        let cut = timeout(HELPERS_TIMEOUT, self.shared.clients.wait()).await;
        // Only now, so that probes and metrics are served during the drain.
        self.shared.stop.cancel();
        self.shared.helpers.close();
        let http = async {
            if let Some(http) = self.http {
                http.ended().await;
            }
        };
        let helpers = async { tokio::join!(self.shared.helpers.wait(), http) };
        let _ = timeout(HELPERS_TIMEOUT, helpers).await;
        tracing::info!(complete = cut.is_ok(), "shut down");
    }
}

fn no_address() -> Refusal {
    Refusal {
        report: Report::new(
            sqlstate::CANNOT_CONNECT,
            "the proxy listens on no socket that a client of this machine would find",
        )
        .with_hint("Name the inherited Unix socket .s.PGSQL.<port>."),
        reason: Reason::Other,
    }
}
