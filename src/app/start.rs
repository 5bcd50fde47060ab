//! Starting the program: binds every port, then starts every task.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Addresses, App, AppError,
    serving::{BoundEndpoint, serve},
    shared::Shared,
};
use crate::{
    admin::{self, Admin, AdminState},
    config::{Config, DurationSetting, EndpointConfig, Settings},
    listener::{Inherited, ListenError, Listener},
    net::{descriptors, tcp::listen},
    status::{HttpListener, Registry},
    systemd::Notifier,
    telemetry::LogHandle,
};

/// What a process has beside its configuration.
#[derive(Default)]
pub struct StartOptions {
    /// Sockets from the service manager, in place of those in the settings.
    pub inherited: Inherited,
    /// The log, whose filter a reload changes.
    pub log: Option<LogHandle>,
    /// The service manager that the state is reported to.
    pub notifier: Notifier,
}

impl App {
    /// Starts the program of a process without a service manager.
    pub async fn start(config: Config) -> Result<Self, AppError> {
        Self::start_with(config, StartOptions::default()).await
    }

    /// Binds every port and serves. A port in use is reported before any task or thread is started.
    ///
    /// Fails if the settings of the workspace are invalid where an endpoint needs it, or those of all endpoints: with one that
    /// works, the others are reported and refused to clients.
    pub async fn start_with(config: Config, options: StartOptions) -> Result<Self, AppError> {
        // First: the default of --max-connections is derived from the raised limit.
        descriptors::raise(config.settings.max_connections());
        let http = bind(config.http, "http-port")?;
        let notes = bind(config.notes, "notes-port")?;
        let admin = bind(config.admin, "admin-port")?;
        let listeners = bind_endpoints(&config, options.inherited)?;
        let local = |listener: &Option<TcpListener>| listener.as_ref()?.local_addr().ok();
        let bound = listeners.iter().map(|listener| listener.bound().clone());
        let addresses = Addresses {
            endpoints: bound.collect(),
            http: local(&http),
            notes: local(&notes),
            admin: local(&admin),
        };

        let shared = Arc::new(Shared::new(&config, options.log, options.notifier)?);
        let mut endpoints = Vec::with_capacity(listeners.len());
        for (endpoint, listener) in config.endpoints.into_iter().zip(listeners) {
            // Metrics of the process are registered once, with the first endpoint.
            let metrics = if endpoints.is_empty() {
                Arc::clone(&shared.metrics)
            } else {
                shared.metrics.of_another(endpoint.display_name())?
            };
            let endpoint = BoundEndpoint::new(&shared, endpoint, listener).await?;
            endpoints.push((endpoint, metrics));
        }
        let mut checks = endpoints.iter().map(|(it, _)| it.source.check(&it.config));
        if let Some(Err(error)) = checks.next()
            && checks.all(|check| check.is_err())
        {
            return Err(error);
        }
        drop(checks);

        let http = http
            .map(|listener| serve_http(&shared, listener))
            .transpose()?;
        start_helpers(&shared);
        let is_only = endpoints.len() == 1;
        let initial = serve(&shared, endpoints, is_only);
        let first = initial.first().cloned().ok_or_else(AppError::no_endpoint)?;
        if let Some(listener) = notes {
            serve_notes(&shared, listener, &addresses);
        }
        let end_requested = CancellationToken::new();
        if let Some(listener) = admin {
            let (requested, stop) = (end_requested.clone(), shared.stop.clone());
            shared
                .helpers
                .spawn(admin::quit::serve(listener, requested, stop));
        }
        shared.run(end_when_idle(
            shared.observer.registry.clone(),
            shared.observer.settings.subscribe(),
            end_requested.clone(),
        ));
        announce(&shared, &addresses);
        // With the connection test, `ready` reports startup once it has passed.
        if !shared.settings().run_connection_test() {
            shared.observer.health.set_started();
        }
        Ok(Self {
            addresses,
            shared,
            first,
            initial,
            http,
            end_requested,
        })
    }
}

/// Binds an HTTP port. `[::]` includes IPv4, so that probes and scrapers of both families reach it.
fn bind(address: Option<SocketAddr>, flag: &str) -> Result<Option<TcpListener>, ListenError> {
    let listener = address.map(|address| {
        let listening = listen(address, true).and_then(TcpListener::from_std);
        listening.map_err(|source| ListenError::tcp(address, flag, source))
    });
    listener.transpose()
}

fn bind_endpoints(config: &Config, inherited: Inherited) -> Result<Vec<Listener>, ListenError> {
    let endpoints = config.endpoints.iter();
    let names: Vec<&str> = endpoints
        .clone()
        .map(EndpointConfig::display_name)
        .collect();
    let inherited = inherited.claim(&names, config.settings.allow_remote())?;
    let bind = |(endpoint, sockets): (&EndpointConfig, Vec<_>)| {
        if sockets.is_empty() {
            Listener::bind(&endpoint.listen)
        } else {
            Listener::inherit(sockets)
        }
    };
    endpoints.zip(inherited).map(bind).collect()
}

/// Serves health, metrics and the status page.
fn serve_http(shared: &Shared, listener: TcpListener) -> Result<Admin, AppError> {
    let (snapshots, logins) = (Arc::clone(&shared.observer), Arc::clone(&shared.observer));
    let state = AdminState {
        metrics: Arc::clone(&shared.metrics),
        health: Arc::clone(&shared.observer.health),
        snapshot: Arc::new(move || snapshots.snapshot()),
        logins: Arc::new(move || logins.login_targets()),
        log: shared.log.clone(),
    };
    Ok(Admin::spawn(listener, state, shared.stop.clone())?)
}

#[cfg(feature = "notes")]
fn serve_notes(shared: &Shared, listener: TcpListener, addresses: &Addresses) {
    let Some(address) = addresses.of_first() else {
        tracing::error!(
            "the notes page has no address to connect to; hint: name the inherited Unix socket .s.PGSQL.<port>"
        );
        return;
    };
    let mut options = crate::notes::NotesOptions::new(address);
    options.password = shared.known_password.clone();
    let stop = shared.stop.clone();
    shared.helpers.spawn(async move {
        if let Err(error) = crate::notes::serve(listener, options, stop).await {
            tracing::error!(%error, "the server of the notes page failed");
        }
    });
}

#[cfg(not(feature = "notes"))]
fn serve_notes(_shared: &Shared, _listener: TcpListener, _addresses: &Addresses) {}

/// Starts the heartbeat, the watchdog and the log's summaries.
fn start_helpers(shared: &Shared) {
    // Liveness checks every thread: a blocked one serves no client, whatever the main runtime does.
    let (health, stop) = (Arc::clone(&shared.observer.health), shared.stop.clone());
    let threads = Arc::clone(&shared.threads);
    shared.helpers.spawn(async move {
        let all_respond = || {
            let threads = Arc::clone(&threads);
            async move { threads.all_respond().await }
        };
        health.beat(&stop, all_respond).await;
    });
    if let Some(interval) = shared.notifier.watchdog_interval() {
        let (health, notifier) = (Arc::clone(&shared.observer.health), shared.notifier.clone());
        shared.run(async move {
            // On the main runtime, so that it stops when that blocks.
            loop {
                if health.liveness().is_ok() {
                    notifier.alive();
                }
                sleep(interval).await;
            }
        });
    }
    if let Some(log) = shared.log.clone() {
        shared.run(async move { log.summarize().await });
    }
}

/// Logs the addresses of HTTP and shows them in snapshots.
fn announce(shared: &Shared, addresses: &Addresses) {
    let listeners = [
        (addresses.admin, "/quitquitquit", "answering /quitquitquit"),
        (
            addresses.http,
            "health and metrics",
            "serving health and metrics",
        ),
        (addresses.notes, "notes page", "serving the notes page"),
    ];
    let mut shown = Vec::new();
    for (address, purpose, event) in listeners {
        if let Some(address) = address {
            tracing::info!(%address, "{event}");
            shown.push(HttpListener { purpose, address });
        }
    }
    shared.observer.http.set(shown).ok();
}

/// Requests the end after the idle time of the settings.
async fn end_when_idle(
    registry: Registry,
    settings: watch::Receiver<Settings>,
    end_requested: CancellationToken,
) {
    let time = until_idle(registry, settings).await;
    tracing::info!(
        ?time,
        "no client for this time; shutting down (--exit-when-idle)"
    );
    end_requested.cancel();
}

/// Returns after the idle time of the settings without a session; never without one. Cancel safe.
async fn until_idle(registry: Registry, mut settings: watch::Receiver<Settings>) -> Duration {
    loop {
        let DurationSetting(limit) = settings.borrow_and_update().exit_when_idle();
        // A reload of other settings must not restart the idle time.
        let is_changed = |settings: &Settings| settings.exit_when_idle().0 != limit;
        tokio::select! {
            () = registry.idle_for(limit), if !limit.is_zero() => return limit,
            Ok(_) = settings.wait_for(is_changed) => {}
        }
    }
}
