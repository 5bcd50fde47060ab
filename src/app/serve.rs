//! An endpoint with its listener bound: it discovers the upstream, serves clients and drains.

use std::{os::unix::fs::PermissionsExt, sync::Arc};

use arc_swap::ArcSwap;

use super::{
    AppError,
    discovery::Discovery,
    endpoint::{Endpoints, Served},
    locate::EndpointSource,
    outcomes::Reporter,
    shared::Shared,
};
use crate::{
    config::{EndpointConfig, Roots, TlsMode},
    credential::{CredentialCell, Refresher},
    listener::Listener,
    net::{
        blocking,
        tls::{self, Fingerprint},
    },
    session::{AccessPolicy, EndpointContext, SessionConfig},
    status::{EndpointSessions, Label},
    systemd::Notifier,
    telemetry::Metrics,
    upstream::{Route, RoutePublisher, Upstream},
};

/// An endpoint with its listener bound.
pub(super) struct BoundEndpoint {
    pub(super) served: Arc<Served>,
    pub(super) source: EndpointSource,
    pub(super) listener: Listener,
    pub(super) finder: RoutePublisher,
}

impl BoundEndpoint {
    /// Builds an endpoint around its bound listener.
    pub(super) async fn new(
        shared: &Shared,
        config: EndpointConfig,
        listener: Listener,
        metrics: Arc<Metrics>,
    ) -> Result<Self, AppError> {
        let source = EndpointSource::new(&config.credential, || shared.workspace())?;
        let its = config.clone();
        let roots = blocking(move || roots(&its)).await;
        let label = Label::new(config.called());
        let (finder, route) = Route::channel(label.clone());
        // Of the cut, not of the drain, during which the listeners accept clients to refuse them with the reason.
        let closed = shared.process.shutdown.cutting().child_token();
        let registry = EndpointSessions::new(&shared.registry, label, &metrics, closed);
        let process = Arc::clone(&shared.process);
        let context = Arc::new(EndpointContext::new(process, route, registry, metrics));
        let served = Served {
            bound: listener.bound().clone(),
            roots: ArcSwap::from_pointee(roots),
            config,
            context,
            credentials: if shared.settings().lazy_refresh() {
                CredentialCell::lazy(shared.clock.clone())
            } else {
                CredentialCell::new(shared.clock.clone())
            },
            stop: shared.stop.child_token(),
        };
        Ok(Self {
            served: Arc::new(served),
            source,
            listener,
            finder,
        })
    }

    /// Starts the tasks that serve clients until the endpoint is removed from the settings and its last session has ended. The
    /// `reporter` reports discovery where the start of the program depends on it.
    pub(super) fn start(self, shared: &Arc<Shared>, reporter: Option<Reporter>) {
        let served = Arc::clone(&self.served);
        let context = &served.context;
        announce(&served, &shared.process.config.load_full());
        let Self {
            source,
            listener,
            finder,
            ..
        } = self;
        listener.spawn(
            context,
            &shared.runtimes,
            &shared.clients,
            &shared.helpers,
            &shared.absent,
        );
        let discovery = Discovery {
            served: Arc::clone(&served),
            source,
            endpoints: shared.endpoints.clone(),
            finder,
            reporter,
        };
        shared
            .helpers
            .spawn(discover_and_refresh(discovery, Arc::clone(shared)));
        let notifier = &shared.notifier;
        if notifier.is_connected() {
            let reporting = report_status(
                Arc::clone(&served),
                shared.endpoints.clone(),
                notifier.clone(),
            );
            shared
                .helpers
                .spawn(served.stop.clone().run_until_cancelled_owned(reporting));
        }
        let draining = {
            let shared = Arc::clone(shared);
            async move {
                let drained = served.context.registry.drained();
                // `None` at the end of the process, which removes no endpoint.
                if served.stop.run_until_cancelled(drained).await.is_some() {
                    served.stop.cancel();
                    shared.endpoints.remove(&served);
                    served.context.metrics.retire();
                    tracing::info!(
                        endpoint = served.config.called(),
                        "endpoint removed after its last session ended"
                    );
                }
            }
        };
        shared.helpers.spawn(draining);
    }
}

/// Reports the result of discovery and each new credential to the service manager.
async fn report_status(served: Arc<Served>, endpoints: Endpoints, notifier: Notifier) {
    let mut status = served.credentials.subscribe();
    let mut route = served.context.route.clone();
    // The loop needs the channels only; it must not keep a removed endpoint alive.
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

/// Logs the addresses of an endpoint, with warnings about exposed ones.
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

/// Warns about addresses that other users or machines reach without authentication.
pub(super) fn warn_of_exposure(served: &Served, access: &AccessPolicy) {
    for address in &served.bound.tcp {
        // IPv4 loopback may be written as IPv6, ::ffff:127.0.0.1.
        if address.ip().to_canonical().is_loopback() {
            continue;
        }
        if access.password.is_none() {
            tracing::warn!(
                %address,
                "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is intended, or require a password with --local-auth"
            );
        } else if access.certificate.is_none() {
            tracing::warn!(
                %address,
                "connections to this address are not encrypted; hint: offer TLS with --client-tls"
            );
        }
    }
    for path in &served.bound.unix {
        let socket = path.display();
        // Linux requires write permission on the socket to connect (unix(7)).
        let is_open = std::fs::metadata(path).is_ok_and(|it| it.permissions().mode() & 0o002 != 0);
        if is_open && access.allowed_uids.is_none() {
            tracing::warn!(
                %socket,
                "any user of this machine who reaches this socket is the Lakebase identity; hint: list the users with --unix-socket-allowed-uids"
            );
        }
    }
}

/// Discovers the upstream, then refreshes its credential.
async fn discover_and_refresh(discovery: Discovery, shared: Arc<Shared>) {
    let stop = discovery.served.stop.clone();
    let Some(located) = stop.run_until_cancelled(discovery.run()).await else {
        return;
    };
    let Discovery {
        served,
        finder,
        reporter,
        ..
    } = discovery;
    let metrics = Arc::clone(&served.context.metrics);
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
    // The refresher runs until `stop` is cancelled, and must keep nothing of a removed endpoint alive.
    drop((endpoint, served, shared));
    Refresher::new(located.mint, credentials, metrics)
        .run(stop)
        .await;
}

/// The fingerprint of the trusted roots.
pub(super) fn roots(config: &EndpointConfig) -> Option<Fingerprint> {
    match &config.tls {
        TlsMode::Disabled => None,
        TlsMode::Verified(roots) => tls::fingerprint(roots),
    }
}

/// Whether the trusted roots come from a file, which may change.
pub(super) fn has_roots_file(config: &EndpointConfig) -> bool {
    matches!(&config.tls, TlsMode::Verified(Roots::File(_)))
}
