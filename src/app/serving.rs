//! Serving an endpoint: binds it, and starts the tasks that serve its clients.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use super::{
    AppError,
    discovery::{Discovery, EndpointSource},
    endpoint::{Endpoints, Served, roots},
    shared::Shared,
};
use crate::{
    config::EndpointConfig,
    credential::CredentialCell,
    listener::Listener,
    net::tls::Fingerprint,
    pool::{PoolContext, Pools},
    session::EndpointContext,
    status::{EndpointSessions, Label},
    systemd::Notifier,
    telemetry::Metrics,
    upstream::Route,
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

    /// Its running state.
    fn served(&self, shared: &Shared, label: Label, route: Route, metrics: Arc<Metrics>) -> Served {
        let process = Arc::clone(&shared.process);
        // Of the cut, not of the drain, during which the listeners accept clients to refuse them with the reason.
        let closed = process.shutdown.cutting().child_token();
        let registry = EndpointSessions::new(&shared.observer.registry, label, &metrics, closed);
        let pools = PoolContext {
            registry: registry.clone(),
            settings: ArcSwap::from_pointee(self.config.pool(&shared.settings())),
            metrics: Arc::clone(&metrics),
            shutdown: process.shutdown.clone(),
            tasks: shared.helpers.clone(),
            main_runtime: Handle::current(),
            reported_pins: Mutex::default(),
        };
        let pools = Pools::new(self.config.pool_mode, pools);
        Served {
            config: self.config.clone(),
            bound: self.listener.bound().clone(),
            context: Arc::new(EndpointContext::new(
                process, route, registry, metrics, pools,
            )),
            credentials: if shared.settings().lazy_refresh() {
                CredentialCell::lazy(shared.clock.clone())
            } else {
                CredentialCell::new(shared.clock.clone())
            },
            roots: ArcSwap::from_pointee(self.roots),
            stop: shared.stop.child_token(),
            accepting: TaskTracker::new(),
        }
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
        let served = Arc::new(bound.served(shared, label, route, metrics));
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
