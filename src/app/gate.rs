//! One endpoint of the process: its listener, its look-up, its credential, its sessions.

use std::{net::SocketAddr, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{
    StartError,
    endpoints::{Endpoints, Served},
    locate::{Access, Target, locate},
    outlook::Reporter,
    shared::Shared,
};
use crate::{
    config::{EndpointConfig, Roots, TlsMode},
    credential::{Pace, Refresher, is_held_for},
    listener::Listener,
    net::{
        backoff::jitter,
        tcp::is_loopback,
        tls::{self, Fingerprint},
    },
    protocol::error::{Report, sqlstate},
    session::{AccessPolicy, SessionConfig},
    systemd::Notifier,
    telemetry::{chain, labels::Reason},
    upstream::{Problem, Refusal, RouteFinder, Upstream},
};

/// What one question of a look-up may cost, retries included: those within an attempt spare a long search its beginning,
/// all others belong to the pace of attempts.
const QUESTION_PATIENCE: Duration = Duration::from_secs(2);

/// An endpoint with its listener bound.
pub(super) struct Gate {
    pub(super) served: Arc<Served>,
    pub(super) access: Access,
    pub(super) listener: Listener,
    pub(super) finder: RouteFinder,
}

impl Gate {
    /// Serves clients, until the endpoint is no longer named and the last of them has gone. What comes of its look-up is
    /// reported where the program's start depends on it.
    pub(super) fn start(
        self,
        shared: &Arc<Shared>,
        notifier: &Notifier,
        reporter: Option<Reporter>,
    ) {
        let served = Arc::clone(&self.served);
        let sessions = &served.sessions;
        announce(&served, &shared.process.config.load_full());
        let Self {
            access,
            listener,
            finder,
            ..
        } = self;
        listener.spawn(
            sessions,
            &shared.runtimes,
            &shared.clients,
            &shared.helpers,
            &shared.absent,
        );
        let keeping = keep(
            Arc::clone(&served),
            access,
            (finder, reporter),
            Arc::clone(shared),
        );
        shared.helpers.spawn(keeping);
        if notifier.is_connected() {
            let telling = tell(
                Arc::clone(&served),
                shared.endpoints.clone(),
                notifier.clone(),
            );
            shared
                .helpers
                .spawn(served.stop.clone().run_until_cancelled_owned(telling));
        }
        let leaving = {
            let shared = Arc::clone(shared);
            async move {
                let left = served.sessions.registry.drained();
                if served.stop.run_until_cancelled(left).await.is_some() {
                    served.stop.cancel();
                    shared.endpoints.remove(&served);
                    served.sessions.metrics.retire();
                    tracing::info!(
                        endpoint = served.config.called(),
                        "endpoint removed, its last session has gone"
                    );
                }
            }
        };
        shared.helpers.spawn(leaving);
    }
}

/// Reports the look-up and each new credential to the service manager.
async fn tell(served: Arc<Served>, endpoints: Endpoints, notifier: Notifier) {
    let mut status = served.credentials.subscribe();
    let mut route = served.sessions.route.clone();
    drop(served);
    loop {
        notifier.status(&endpoints.summary());
        tokio::select! {
            () = route.changed() => {}
            changed = status.changed() => if changed.is_err() {
                return;
            }
        }
    }
}

/// Says where an endpoint listens, and what that means.
fn announce(served: &Served, session_config: &SessionConfig) {
    let endpoint = served.config.called();
    let max_connections = session_config.max_connections;
    for address in &served.bound.tcp {
        tracing::info!(%address, endpoint, max_connections, "listening for Postgres clients");
    }
    for path in &served.bound.unix {
        let socket = path.display();
        tracing::info!(%socket, endpoint, max_connections, "listening for Postgres clients");
    }
    warn_of_exposure(served, &session_config.access);
}

/// Says who else gets in where an endpoint listens.
pub(super) fn warn_of_exposure(served: &Served, access: &AccessPolicy) {
    for address in &served.bound.tcp {
        if address.ip().to_canonical().is_loopback() {
            continue;
        }
        if access.password.is_none() {
            tracing::warn!(
                %address,
                "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is meant, or ask for a password with --local-auth"
            );
        } else if access.certificate.is_none() {
            tracing::warn!(
                %address,
                "what clients of this address say can be read on the way; hint: offer them TLS with --client-tls"
            );
        }
    }
    for path in &served.bound.unix {
        let socket = path.display();
        let is_open = std::fs::metadata(path).is_ok_and(|it| it.permissions().mode() & 0o002 != 0);
        if is_open && access.allowed_uids.is_none() {
            tracing::warn!(
                %socket,
                "any user of this machine who reaches this socket is the Lakebase identity; hint: list the users with --unix-socket-allowed-uids"
            );
        }
    }
}

/// Finds the endpoint where that has not been done, and keeps its credential.
async fn keep(
    served: Arc<Served>,
    access: Access,
    (finder, reporter): (RouteFinder, Option<Reporter>),
    shared: Arc<Shared>,
) {
    let stop = served.stop.clone();
    let search = Search {
        config: &served.config,
        access: &access,
        endpoints: &shared.endpoints,
        finder: &finder,
        reporter: reporter.as_ref(),
    };
    let Some(located) = stop.run_until_cancelled(search.run()).await else {
        return;
    };
    let metrics = Arc::clone(&served.sessions.metrics);
    let credentials = served.credentials.clone();
    let route = Upstream::new(located.endpoint, credentials.clone(), Arc::clone(&metrics));
    let endpoint = route.endpoint();
    tracing::info!(
        endpoint = %endpoint.label,
        host = endpoint.host,
        user = endpoint.user,
        database = endpoint.database,
        "endpoint found"
    );
    finder.found(Arc::new(route));
    if let Some(reporter) = reporter {
        reporter.found();
    }
    drop((endpoint, served));
    drop(shared);
    Refresher::new(located.mint, credentials, metrics)
        .run(stop)
        .await;
}

/// What the roots of an endpoint hold now.
pub(super) fn roots(config: &EndpointConfig) -> Option<Fingerprint> {
    match &config.tls {
        TlsMode::Disabled => None,
        TlsMode::Verified(roots) => tls::fingerprint(roots),
    }
}

/// Whether its certificate is verified by a file of roots.
pub(super) fn has_roots_of_its_own(config: &EndpointConfig) -> bool {
    matches!(&config.tls, TlsMode::Verified(Roots::File(_)))
}

/// The look-up of one endpoint.
struct Search<'a> {
    config: &'a EndpointConfig,
    access: &'a Access,
    endpoints: &'a Endpoints,
    finder: &'a RouteFinder,
    reporter: Option<&'a Reporter>,
}

impl Search<'_> {
    /// Looks the endpoint up until it is found, at the pace at which credentials are requested: what stands in the way is
    /// mostly the same.
    async fn run(&self) -> Target {
        let mut pace = Pace::new(Instant::now());
        let mut logged = None;
        loop {
            let error = match self.attempt().await {
                Ok(located) => return located,
                Err(error) => error,
            };
            let (kind, retry_after) = error.kind();
            pace.failed(Instant::now(), kind, retry_after, jitter);
            self.finder.failed(Problem {
                refusal: refusal(self.config, &error),
                is_held_for: is_held_for(kind, retry_after),
                opens_at: pace.awaited(),
            });
            self.log(&error, &mut logged);
            if let Some(reporter) = self.reporter {
                reporter.failed(error);
            }
            loop {
                let next = pace.next_without(self.finder.demand().exists());
                tokio::select! {
                    () = sleep_until(next) => break,
                    () = self.finder.demand().added() => {}
                }
            }
        }
    }

    async fn attempt(&self) -> Result<Target, StartError> {
        let located = locate(self.config, self.access, QUESTION_PATIENCE).await?;
        refuse_loop(&located, self.endpoints).await?;
        Ok(located)
    }

    /// Logs each error once, and not the one that ends the program.
    fn log(&self, error: &StartError, logged: &mut Option<String>) {
        let text = chain(error).to_string();
        if logged.as_ref() == Some(&text) {
            return;
        }
        let endpoint = self.config.called();
        if error.kind().0.is_transient() {
            tracing::warn!(
                endpoint,
                error = text,
                hint = error.hint(),
                "cannot look up the endpoint, retrying"
            );
        } else if self.reporter.is_none_or(Reporter::has_others) {
            tracing::error!(
                endpoint,
                error = text,
                hint = error.hint(),
                "endpoint cannot be used for now; others are served"
            );
        }
        *logged = Some(text);
    }
}

fn refusal(config: &EndpointConfig, error: &StartError) -> Refusal {
    let mut report = Report::new(
        sqlstate::CANNOT_CONNECT,
        format!(
            "Lakebase endpoint `{}` cannot be used: {}",
            config.called(),
            chain(error)
        ),
    );
    report.hint = error.hint();
    Refusal {
        report,
        reason: if error.kind().0.is_transient() {
            Reason::Waking
        } else {
            Reason::Other
        },
    }
}

/// A proxy that dials itself would take every connection it makes for a client's.
async fn refuse_loop(located: &Target, endpoints: &Endpoints) -> Result<(), StartError> {
    let endpoint = &located.endpoint;
    let ours = endpoints.addresses();
    if !ours.iter().any(|ours| ours.port() == endpoint.port) {
        return Ok(());
    }
    // A name that does not resolve now may later, and then not to us: that is for the login to find out.
    let resolved = match endpoint.addresses.as_fixed() {
        Some(fixed) => fixed.to_vec(),
        None => tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port))
            .await
            .map(Iterator::collect)
            .unwrap_or_default(),
    };
    let is_ours = |address: SocketAddr| {
        ours.iter().any(|ours| {
            let same_machine =
                is_loopback(address.ip()) && (is_loopback(ours.ip()) || ours.ip().is_unspecified());
            address.port() == ours.port() && (address.ip() == ours.ip() || same_machine)
        })
    };
    if resolved.into_iter().any(is_ours) {
        return Err(StartError::Loop {
            host: endpoint.host.clone(),
            port: endpoint.port,
        });
    }
    Ok(())
}
