//! The composition root: [`build`](App::build) binds every port, [`start`](App::start) serves, a [`Reloader`] applies
//! changed settings.

mod discovery;
mod endpoint;
mod error;
mod locate;
mod outcomes;
mod reload;
mod running;
mod serve;
mod shared;
mod start;

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;

pub use self::{
    endpoint::{Endpoints, Served},
    error::AppError,
    reload::Reloader,
    running::Running,
};
use self::{
    locate::{EndpointSource, LocatedEndpoint, locate},
    serve::BoundEndpoint,
    shared::Shared,
};
use crate::{
    clock::Clock,
    config::{Config, EndpointConfig, Roots},
    listener::{Bound, Inherited, ListenError, Listener},
    net::{descriptors, tcp::listen, tls},
    systemd::Notifier,
    telemetry::{LogHandle, Metrics},
    workspace::Workspace,
};

/// The addresses of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Postgres: the first TCP address of the first endpoint.
    pub postgres: Option<SocketAddr>,
    /// Postgres: every endpoint, in the order of the settings.
    pub endpoints: Vec<Bound>,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
    /// The notes page.
    pub notes: Option<SocketAddr>,
    /// /quitquitquit.
    pub admin: Option<SocketAddr>,
}

/// A program that is bound but not serving yet.
pub struct App {
    bound: Vec<BoundEndpoint>,
    http: Option<TcpListener>,
    notes: Option<TcpListener>,
    admin: Option<TcpListener>,
    addresses: Addresses,
    shared: Shared,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl App {
    /// Binds every port; sends nothing to the workspace yet.
    ///
    /// Fails if the settings of the workspace are invalid where an endpoint needs it, or those of all endpoints: with one that
    /// works, the others are reported and refused to clients.
    pub async fn build(config: Config) -> Result<Self, AppError> {
        Self::build_with(config, Inherited::default()).await
    }

    /// As [`build`](Self::build), with sockets from the service manager instead of those in the settings.
    pub async fn build_with(config: Config, inherited: Inherited) -> Result<Self, AppError> {
        // First: the default of --max-connections is derived from the raised limit.
        descriptors::raise(config.settings.max_connections());
        // Before any thread or task is started, so that a port in use only ends this function.
        let http = bind(config.http, "http-port")?;
        let notes = bind(config.notes, "notes-port")?;
        let admin = bind(config.admin, "admin-port")?;
        let mut listeners = Vec::with_capacity(config.endpoints.len());
        let names: Vec<&str> = config
            .endpoints
            .iter()
            .map(EndpointConfig::called)
            .collect();
        let inherited = inherited.claim(&names, config.settings.allow_remote())?;
        for (endpoint, sockets) in config.endpoints.iter().zip(inherited) {
            listeners.push(if sockets.is_empty() {
                Listener::bind(&endpoint.listen)?
            } else {
                Listener::inherit(sockets)?
            });
        }
        let endpoints: Vec<Bound> = listeners
            .iter()
            .map(|listener| listener.bound().clone())
            .collect();
        let local = |listener: &Option<TcpListener>| {
            listener.as_ref().and_then(|bound| bound.local_addr().ok())
        };
        let addresses = Addresses {
            postgres: endpoints
                .first()
                .and_then(|first| first.tcp.first().copied()),
            http: local(&http),
            notes: local(&notes),
            admin: local(&admin),
            endpoints,
        };

        let shared = Shared::new(&config)?;
        let mut bound = Vec::with_capacity(listeners.len());
        for (endpoint, listener) in config.endpoints.into_iter().zip(listeners) {
            // Metrics of the process are registered once, with the first endpoint.
            let metrics = if bound.is_empty() {
                Arc::clone(&shared.metrics)
            } else {
                shared.metrics.of_another(endpoint.called())?
            };
            let endpoint = BoundEndpoint::new(&shared, endpoint, listener, metrics).await?;
            shared.endpoints.add(&endpoint.served);
            bound.push(endpoint);
        }
        let mut checks = bound
            .iter()
            .map(|endpoint| locate::check(&endpoint.served.config, &endpoint.source));
        if let Some(Err(error)) = checks.next()
            && checks.all(|check| check.is_err())
        {
            return Err(error);
        }
        Ok(Self {
            bound,
            http,
            notes,
            admin,
            addresses,
            shared,
        })
    }

    /// Lets the program change the log filter and count dropped lines.
    #[must_use]
    pub fn with_log(mut self, log: LogHandle) -> Self {
        log.count_dropped(&self.shared.metrics.process.log_lines_dropped);
        self.shared.log = Some(log);
        self
    }

    /// Reports the state to a service manager.
    #[must_use]
    pub fn with_notifier(mut self, notifier: Notifier) -> Self {
        self.shared.notifier = notifier;
        self
    }

    /// The bound addresses.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }
}

/// Budget of one request of [`locate_first`] to the workspace.
const LOCATE_BUDGET: Duration = Duration::from_mins(1);

/// Locates the first endpoint and the source of its credentials, without listening.
pub(crate) async fn locate_first(config: Config) -> Result<LocatedEndpoint, AppError> {
    let [endpoint, ..] = &config.endpoints[..] else {
        return Err(no_endpoint());
    };
    let workspace = || -> Result<Workspace, AppError> {
        let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1)?;
        Ok(Workspace::new(
            config.workspace.clone(),
            &tls,
            Clock::system(),
            Metrics::new()?,
        )?)
    };
    let source = EndpointSource::new(&endpoint.credential, workspace)?;
    locate(endpoint, &source, LOCATE_BUDGET).await
}

/// Binds an HTTP port. `[::]` includes IPv4, so that probes and scrapers of both families reach it.
fn bind(address: Option<SocketAddr>, flag: &str) -> Result<Option<TcpListener>, ListenError> {
    let listener = address.map(|address| {
        listen(address, true).map_err(|source| ListenError::tcp(address, flag, source))
    });
    listener.transpose()
}

fn no_endpoint() -> AppError {
    AppError::new("no endpoint is configured", None)
}
