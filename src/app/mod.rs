//! The composition root: [`start`](App::start) binds every port and serves, a [`Reloader`] applies changed settings,
//! [`end`](App::end) drains.

mod discovery;
mod endpoint;
mod error;
mod reload;
mod serving;
mod shared;
mod start;

use std::{fmt, future::pending, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::discovery::locate_first;
use self::shared::Shared;
pub use self::{
    endpoint::{Endpoints, Served},
    error::AppError,
    reload::Reloader,
    start::StartOptions,
};
use crate::{
    admin::Admin,
    credential::CredentialCell,
    exec::ProxyAddress,
    listener::{Bound, ClientAddress},
    protocol::error::{Report, sqlstate},
    telemetry::{Metrics, labels::Reason},
    upstream::{Refusal, Route},
};

/// Timeout of cut sessions to end, and then of helpers (the health port, the notes page).
const HELPERS_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between attempts of a caller that waits longer than a client.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Timeout of a service manager's wait for the first outcome of discovery.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// The addresses of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Postgres: every endpoint, in the order of the settings.
    pub endpoints: Vec<Bound>,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
    /// The notes page.
    pub notes: Option<SocketAddr>,
    /// /quitquitquit.
    pub admin: Option<SocketAddr>,
}

impl Addresses {
    /// Postgres: the first TCP address of the first endpoint.
    pub fn postgres(&self) -> Option<SocketAddr> {
        self.endpoints.first()?.tcp.first().copied()
    }

    /// The first endpoint's, for a client on this machine.
    fn of_first(&self) -> Option<ClientAddress> {
        self.endpoints.first()?.client_address()
    }
}

/// The program while it serves.
pub struct App {
    addresses: Addresses,
    shared: Arc<Shared>,
    /// The endpoint that was the first at the start.
    first: Arc<Served>,
    /// The endpoints that it was started with; it ends if none of them can be used.
    initial: Vec<Arc<Served>>,
    http: Option<Admin>,
    end_requested: CancellationToken,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl App {
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

    /// Whether credentials are minted on demand only.
    pub(crate) fn is_lazy(&self) -> bool {
        self.shared.settings().lazy_refresh()
    }

    /// Whether SIGTERM leads to exit code 0.
    pub fn is_zero_on_sigterm(&self) -> bool {
        self.shared.settings().exit_zero_on_sigterm()
    }

    /// The first endpoint, for clients on this machine. Waits for its discovery for `connect_timeout`, also if a client
    /// would be refused earlier. Cancel safe.
    pub async fn proxy_address(&self) -> Result<ProxyAddress, Refusal> {
        let address = self.addresses.of_first().ok_or_else(no_address)?;
        let deadline = Instant::now() + self.shared.settings().timeouts().connect_timeout;
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
            if let Ok(tried) = timeout(DISCOVERY_TIMEOUT, self.discovered(true)).await {
                tried?;
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
        self.shared.observer.health.set_started();
        self.shared.notifier.ready();
        Ok(())
    }

    /// Waits until an endpoint is found; fails if none can be used, which ends the program. Cancel safe.
    pub async fn found(&self) -> Result<(), AppError> {
        self.discovered(false).await
    }

    /// The same, or with `or_tried` until each endpoint has been tried.
    async fn discovered(&self, or_tried: bool) -> Result<(), AppError> {
        let routes = self.initial.iter().map(|served| &served.context.route);
        let mut changes = self.shared.endpoints.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(result) = discovery_result(routes.clone(), or_tried) {
                return result;
            }
            // Fails only without a sender, and `self` has one.
            changes.changed().await.unwrap_or_default();
        }
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
        let sessions = self.shared.clients.len();
        self.shared.notifier.stopping();
        self.shared.observer.health.set_draining();
        self.shared.process.shutdown.drain();
        // Only now, so that a reader of the log finds readiness and clients refused already.
        tracing::info!(sessions, ?grace, "shutting down");
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

/// Success once an endpoint is found, or with `or_tried` once each has been tried; the first one's error if none can be used.
fn discovery_result<'a>(
    routes: impl Iterator<Item = &'a Route> + Clone,
    or_tried: bool,
) -> Option<Result<(), AppError>> {
    if routes.clone().any(|route| route.found().is_some()) {
        return Some(Ok(()));
    }
    let problems: Vec<Refusal> = routes.map(Route::problem).collect::<Option<_>>()?;
    let may_succeed = problems.iter().any(|it| it.reason == Reason::Waking);
    match problems.into_iter().next() {
        Some(Refusal { report, .. }) if !may_succeed => {
            Some(Err(AppError::new(report.message, report.hint)))
        }
        _ => or_tried.then_some(Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{status::Label, upstream::Problem};

    #[test]
    fn discovery_fails_only_when_every_endpoint_has_failed() {
        let (publishers, routes): (Vec<_>, Vec<_>) = ["a", "b"]
            .map(|name| Route::channel(Label::new(name)))
            .into_iter()
            .unzip();
        let result = |or_tried| discovery_result(routes.iter(), or_tried);
        let fail = |index: usize, message: &str, reason| {
            let report = Report::new(sqlstate::CANNOT_CONNECT, message).with_hint("fix it");
            publishers[index].failed(Problem {
                refusal: Refusal { report, reason },
                is_held_for: false,
                opens_at: Instant::now(),
            });
        };
        fail(1, "the second", Reason::Other);
        assert!(result(true).is_none(), "the first has not been tried");
        fail(0, "the first", Reason::Waking);
        assert!(result(false).is_none(), "a retry may succeed");
        assert!(result(true).unwrap().is_ok());
        fail(0, "the first", Reason::Other);
        let error = result(false).unwrap().unwrap_err();
        assert_eq!(
            (error.to_string().as_str(), error.hint()),
            ("the first", Some("fix it"))
        );
    }
}
