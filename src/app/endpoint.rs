//! An endpoint that the process serves: its listener, its tasks and its state, until its last session has ended.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use arc_swap::ArcSwap;
use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    AppError,
    discovery::{Discovery, EndpointSource},
    shared::Shared,
};
use crate::{
    config::{EndpointConfig, PoolMode, TlsMode},
    credential::{CallError, CredentialCell},
    listener::{self, Bound, Listener},
    net::{
        blocking,
        tcp::is_loopback,
        tls::{self, Fingerprint},
    },
    pool::{PoolContext, Pools},
    session::{AccessPolicy, EndpointContext, SessionConfig},
    status::{
        CredentialSnapshot, EndpointSessions, EndpointSnapshot, Label, RefreshAttempt,
        RefreshError, UpstreamSnapshot,
    },
    systemd::Notifier,
    telemetry::Metrics,
    upstream::{Route, Security},
};

/// An endpoint with its listener bound; everything that can fail has succeeded.
pub(super) struct BoundEndpoint {
    pub(super) config: EndpointConfig,
    pub(super) listener: Listener,
    pub(super) source: EndpointSource,
    roots: Option<Fingerprint>,
}

impl BoundEndpoint {
    pub(super) async fn new(
        shared: &Shared,
        config: EndpointConfig,
        listener: Listener,
    ) -> Result<Self, AppError> {
        Ok(Self {
            source: EndpointSource::new(&config.credential, || shared.workspace())?,
            roots: roots(&config).await,
            config,
            listener,
        })
    }
}

/// Starts the tasks that serve the clients of these endpoints. With `ends_program`, an error of discovery is left to the end of
/// the program.
pub(super) fn serve(
    shared: &Arc<Shared>,
    endpoints: Vec<(BoundEndpoint, Arc<Metrics>)>,
    ends_program: bool,
) -> Vec<Arc<Served>> {
    let mut starting = Vec::with_capacity(endpoints.len());
    // All before the first discovery, which compares its upstream with their addresses.
    for (bound, metrics) in endpoints {
        let label = Label::new(bound.config.display_name());
        let (publisher, route) = Route::channel(label.clone());
        let served = Arc::new(Served::new(shared, &bound, label, route, metrics));
        shared.endpoints.add(&served);
        let discovery = Discovery {
            served,
            source: bound.source,
            publisher,
            endpoints: shared.endpoints.clone(),
            ends_program,
        };
        starting.push((bound.listener, discovery));
    }
    let start = |(listener, discovery): (Listener, Discovery)| {
        let served = Arc::clone(&discovery.served);
        served.announce(&shared.process.config.load());
        listener.spawn(
            &served.context,
            &shared.threads,
            &shared.clients,
            &shared.helpers,
            &served.accepting,
            &shared.absent,
        );
        shared.helpers.spawn(discovery.run());
        if shared.notifier.is_connected() {
            let endpoints = shared.endpoints.clone();
            let reporting = report_status(Arc::clone(&served), endpoints, shared.notifier.clone());
            let stop = served.stop.clone();
            shared
                .helpers
                .spawn(stop.run_until_cancelled_owned(reporting));
        }
        let removal = Arc::clone(&served).remove_when_drained(shared.endpoints.clone());
        shared.helpers.spawn(removal);
        served
    };
    starting.into_iter().map(start).collect()
}

/// Reports the result of discovery and each new credential to the service manager.
async fn report_status(served: Arc<Served>, endpoints: Endpoints, notifier: Notifier) {
    let mut credential = served.credentials.subscribe();
    let mut discovery = endpoints.subscribe();
    // The loop needs the channels only; it must not keep a removed endpoint alive.
    drop(served);
    loop {
        notifier.status(&endpoints.summary());
        let closed = tokio::select! {
            result = discovery.changed() => result,
            result = credential.changed() => result,
        };
        if closed.is_err() {
            return;
        }
    }
}

/// The running state of one endpoint.
pub struct Served {
    /// Its configuration.
    pub config: EndpointConfig,
    /// The addresses that its clients connect to.
    pub bound: Bound,
    /// The context of its sessions.
    pub(crate) context: Arc<EndpointContext>,
    /// Its credential.
    pub credentials: CredentialCell,
    /// The fingerprint of the roots in use.
    pub(super) roots: ArcSwap<Option<Fingerprint>>,
    /// Ends its background tasks.
    pub(super) stop: CancellationToken,
    /// The tasks that hold its listening sockets.
    pub(super) accepting: TaskTracker,
}

impl Served {
    fn new(
        shared: &Shared,
        bound: &BoundEndpoint,
        label: Label,
        route: Route,
        metrics: Arc<Metrics>,
    ) -> Self {
        let process = Arc::clone(&shared.process);
        // Of the cut, not of the drain, during which the listeners accept clients to refuse them with the reason.
        let closed = process.shutdown.cutting().child_token();
        let registry = EndpointSessions::new(&shared.observer.registry, label, &metrics, closed);
        let pools = PoolContext {
            registry: registry.clone(),
            settings: ArcSwap::from_pointee(bound.config.pool(&shared.settings())),
            metrics: Arc::clone(&metrics),
            shutdown: process.shutdown.clone(),
            tasks: shared.helpers.clone(),
            main_runtime: Handle::current(),
            reported_pins: Mutex::default(),
        };
        let pools = Pools::new(bound.config.pool_mode, pools);
        Self {
            config: bound.config.clone(),
            bound: bound.listener.bound().clone(),
            context: Arc::new(EndpointContext::new(
                process, route, registry, metrics, pools,
            )),
            credentials: if shared.settings().lazy_refresh() {
                CredentialCell::lazy(shared.clock.clone())
            } else {
                CredentialCell::new(shared.clock.clone())
            },
            roots: ArcSwap::from_pointee(bound.roots),
            stop: shared.stop.child_token(),
            accepting: TaskTracker::new(),
        }
    }

    /// Whether it has been removed from the settings and serves its last sessions.
    pub(super) fn is_draining(&self) -> bool {
        self.context.registry.is_draining()
    }

    /// Logs its addresses, with warnings about exposed ones.
    fn announce(&self, session_config: &SessionConfig) {
        let endpoint = self.config.display_name();
        let max_connections = session_config.max_connections;
        for address in &self.bound.tcp {
            tracing::info!(%address, endpoint, max_connections, "listening for Postgres clients");
        }
        for path in &self.bound.unix {
            let socket = path.display();
            tracing::info!(%socket, endpoint, max_connections, "listening for Postgres clients");
        }
        let pools = &self.context.pools;
        if pools.mode() != PoolMode::None {
            let pool = pools.settings();
            tracing::info!(
                endpoint,
                mode = pools.mode().as_str(),
                connections = pool.max_size(),
                fleet = pool.fleet_size,
                "clients share server connections, at most so many for each database"
            );
        }
        self.warn_of_exposure(&session_config.access);
    }

    /// Warns about addresses that other users or machines reach without authentication.
    pub(super) fn warn_of_exposure(&self, access: &AccessPolicy) {
        for address in &self.bound.tcp {
            if is_loopback(address.ip()) {
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
        for path in &self.bound.unix {
            let socket = path.display();
            if listener::is_open_to_all(path) && access.allowed_uids.is_none() {
                tracing::warn!(
                    %socket,
                    "any user of this machine who reaches this socket is the Lakebase identity; hint: list the users with --unix-socket-allowed-uids"
                );
            }
        }
    }

    async fn remove_when_drained(self: Arc<Self>, endpoints: Endpoints) {
        let drained = async {
            self.context.registry.drained().await;
            // A reload finds it here as long as it holds its addresses, and waits for their release.
            self.accepting.wait().await;
        };
        // `None` at the end of the process, which removes no endpoint.
        if self.stop.run_until_cancelled(drained).await.is_some() {
            self.stop.cancel();
            endpoints.remove(&self);
            self.context.metrics.retire();
            tracing::info!(
                endpoint = self.config.display_name(),
                "endpoint removed after its last session ended"
            );
        }
    }

    /// The reason why there is no credential as `: reason`; empty if it is not known.
    fn why_not_ready(&self) -> String {
        let error = self.credentials.status().last_error;
        let why = error.map(|error| error.to_string());
        // Before the endpoint is found no credential is requested; the look-up has the reason.
        why.or_else(|| Some(self.context.route.problem()?.report.message))
            .map_or_else(String::new, |why| format!(": {why}"))
    }

    /// The name in the status page and the console.
    pub(super) fn shown_name(&self) -> String {
        let read_only = if self.config.read_only {
            " (read-only)"
        } else {
            ""
        };
        format!("{}{read_only}", self.config.display_name())
    }

    pub(super) fn snapshot(&self) -> EndpointSnapshot {
        let status = self.credentials.status();
        let upstream = self.context.route.found().map(|upstream| {
            let endpoint = upstream.endpoint();
            UpstreamSnapshot {
                host: endpoint.host.clone(),
                port: endpoint.port,
                user: endpoint.user.clone(),
                database: endpoint.database.clone(),
                is_encrypted: matches!(endpoint.security, Security::Tls { .. }),
                missing_databases: upstream.missing_databases(),
            }
        });
        let attempts = self.credentials.attempts().into_iter();
        let attempts = attempts.map(|attempt| RefreshAttempt {
            at: attempt.at,
            took: attempt.took,
            outcome: attempt.outcome.map_err(|error| refresh_error(&error)),
        });
        EndpointSnapshot {
            name: self.shown_name(),
            listening: self.bound.to_strings(),
            sessions: self.context.registry.clone(),
            metrics: Arc::clone(&self.context.metrics),
            pool_mode: self.context.pools.mode(),
            pool_settings: self.context.pools.settings(),
            is_paused: self.context.pools.is_paused(),
            statements: self.context.pools.statements(),
            pools: self.context.pools.snapshot(),
            upstream,
            credential: CredentialSnapshot {
                source: self.config.credential.label(),
                state: status.state,
                generation: status.generation,
                minted_at: status.minted_at,
                due_at: status.due_at(),
                urgent_at: status.urgent_at(),
                expires_at: status.expires_at,
                next_attempt: status.next_attempt,
                last_error: status.last_error.as_deref().map(refresh_error),
                attempts: attempts.collect(),
            },
        }
    }
}

fn refresh_error(error: &CallError) -> RefreshError {
    RefreshError {
        kind: error.kind.into(),
        message: error.message.clone(),
        detail: error.detail.clone(),
        hint: error.hint.clone(),
    }
}

/// The fingerprint of the trusted roots; the system's have none, as they are read at the start only.
pub(super) async fn roots(config: &EndpointConfig) -> Option<Fingerprint> {
    match config.tls.clone() {
        TlsMode::Disabled => None,
        TlsMode::Verified(roots) => blocking(move || tls::fingerprint(&roots)).await,
    }
}

/// The endpoints in the order of the settings; cheap to clone. A removed one is among them until its last session ends.
#[derive(Clone, Default)]
pub struct Endpoints(watch::Sender<Arc<Vec<Arc<Served>>>>);

impl Endpoints {
    /// The endpoints now.
    pub fn now(&self) -> Arc<Vec<Arc<Served>>> {
        Arc::clone(&self.0.borrow())
    }

    /// Changes with the list, and with the result of each endpoint's discovery.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Vec<Arc<Served>>>> {
        self.0.subscribe()
    }

    /// Reports a result of discovery to subscribers.
    pub(super) fn notify(&self) {
        self.0.send_modify(|_| {});
    }

    /// Fails if no endpoint has a valid credential.
    pub(super) fn any_ready(&self) -> Result<(), String> {
        let mut why = String::new();
        for served in &*self.now() {
            // One suffices: a pod that is not ready gets no traffic, not even for its other endpoints.
            if served.credentials.status().is_ready() {
                return Ok(());
            }
            if why.is_empty() {
                why = served.why_not_ready();
            }
        }
        Err(format!("no valid database credential{why}"))
    }

    /// Every TCP address that accepts Postgres clients.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let now = self.now();
        let addresses = now.iter().flat_map(|served| served.bound.tcp.iter());
        addresses.copied().collect()
    }

    /// A status line for the service manager.
    fn summary(&self) -> String {
        let now = self.now();
        let count = match now.len() {
            1 => String::new(),
            count => format!("{count} endpoints, "),
        };
        let mut next_expiry = None;
        for served in now.iter() {
            let status = served.credentials.status();
            if !status.is_ready() {
                let why = served.why_not_ready();
                return format!("serving; {count}no valid database credential{why}");
            }
            next_expiry = next_expiry.into_iter().chain(status.expires_at).min();
        }
        match next_expiry {
            Some(at) => format!("serving; {count}database credential valid until {at:.0}"),
            None => format!("serving; {count}database credential without an end"),
        }
    }

    fn add(&self, served: &Arc<Served>) {
        self.0
            .send_modify(|list| Arc::make_mut(list).push(Arc::clone(served)));
    }

    fn remove(&self, served: &Arc<Served>) {
        // By identity: a reload may have added another endpoint of this name while this one drained.
        self.0
            .send_modify(|list| Arc::make_mut(list).retain(|other| !Arc::ptr_eq(other, served)));
    }
}
