//! The composition root: [`build`](App::build) binds everything and looks up what the settings leave open,
//! [`start`](App::start) sets it going.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use rustls::pki_types::ServerName;
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin::{Admin, AdminError, Health},
    clock::Clock,
    config::{Config, EndpointConfig, TlsMode},
    credential::{CredentialCell, Refresher},
    listener::Listener,
    session::Sessions,
    shutdown::Shutdown,
    telemetry::Metrics,
    tls::{self, Roots, TlsError},
    upstream::{Endpoint, Label, Security, Upstream, is_loopback},
    workspace::{CallError, CredentialMinter, Target, Workspace, WorkspaceError},
};

/// How long helpers (the health port, the notes page) may take to end once no client is left.
const HELPERS_END: Duration = Duration::from_secs(2);

/// Where a started program can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Postgres.
    pub postgres: SocketAddr,
    /// Health and metrics.
    pub http: Option<SocketAddr>,
    /// The notes page.
    pub notes: Option<SocketAddr>,
}

/// Why the program cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The health port cannot be served.
    #[error("cannot serve health and metrics")]
    Admin(#[from] AdminError),
    /// An address cannot be bound.
    #[error("cannot listen on {address} (--{flag})")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The flag that changes it.
        flag: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The endpoint is switched off.
    #[error("the endpoint `{name}` is disabled")]
    Disabled {
        /// Which.
        name: String,
    },
    /// The host cannot be verified by name.
    #[error("`{host}` is not a host name")]
    HostName {
        /// What was given.
        host: String,
    },
    /// The workspace knows no host for the endpoint.
    #[error("the workspace names no host for the endpoint `{name}`")]
    NoHost {
        /// Which.
        name: String,
    },
    /// The upstream is ourselves.
    #[error("PGHOST `{host}` with PGPORT {port} is this proxy itself")]
    Loop {
        /// Host.
        host: String,
        /// Port.
        port: u16,
    },
    /// What the settings leave open could not be looked up.
    #[error("cannot look up {what}")]
    LookUp {
        /// What was looked up.
        what: &'static str,
        /// Why it could not be.
        source: CallError,
    },
    /// Metrics cannot be registered; a defect.
    #[error("cannot register metrics")]
    Metrics(#[from] prometheus::Error),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[from] TlsError),
    /// The workspace's settings do not do.
    #[error(transparent)]
    Workspace(#[from] WorkspaceError),
}

impl StartError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Bind { flag, source, .. } if source.kind() == io::ErrorKind::AddrInUse => Some(format!(
                "something listens there already: stop it, or choose another port with --{flag} (0 = any free one)"
            )),
            Self::Disabled { .. } => Some("enable the compute: no connection can wake a disabled one".to_owned()),
            Self::HostName { .. } | Self::NoHost { .. } => {
                Some("set PGHOST to the endpoint's host name (ep-...database...)".to_owned())
            }
            Self::Loop { .. } => Some(
                "PGHOST and PGPORT name the Lakebase endpoint, --address and --port where this proxy listens".to_owned(),
            ),
            Self::LookUp { source, .. } => source.hint.clone(),
            Self::Tls(TlsError::Roots { .. } | TlsError::NoRoots { .. }) => {
                Some("PGSSLROOTCERT is a PEM file of trusted roots, or `system`".to_owned())
            }
            Self::Tls(TlsError::Unusable(_)) => {
                Some("install the system's root certificates (Debian: ca-certificates), or set PGSSLROOTCERT".to_owned())
            }
            Self::Workspace(error) => error.hint(),
            Self::Admin(_) | Self::Bind { .. } | Self::Metrics(_) => None,
        }
    }
}

/// Bound, but not serving yet.
pub struct App {
    listener: Listener,
    http: Option<TcpListener>,
    notes: Option<TcpListener>,
    config: Config,
    sessions: Arc<Sessions>,
    refresher: Refresher<CredentialMinter>,
    credentials: CredentialCell,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("addresses", &self.addresses())
            .finish_non_exhaustive()
    }
}

impl App {
    /// Binds every port, and asks the workspace for what the settings leave open.
    pub async fn build(config: Config) -> Result<Self, StartError> {
        let metrics = Metrics::new()?;
        let clock = Clock::system();
        let listener = Listener::bind(config.listen).map_err(|source| StartError::Bind {
            address: config.listen,
            flag: "port",
            source,
        })?;
        let http = bind(config.http, "http-port").await?;
        let notes = bind(config.notes, "notes-port").await?;

        let workspace_tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1);
        let workspace = Workspace::new(
            config.workspace.clone(),
            &*workspace_tls?,
            clock.clone(),
            Arc::clone(&metrics),
        )?;
        let endpoint = locate(&config.endpoint, &workspace).await?;
        refuse_loop(&endpoint, listener.address()).await?;

        let credentials = CredentialCell::new(clock);
        let target = Target::Endpoint(config.endpoint.name.clone());
        let refresher = Refresher::new(
            CredentialMinter::new(workspace, target),
            credentials.clone(),
            Arc::clone(&metrics),
        );
        let upstream = Upstream::new(
            endpoint,
            credentials.clone(),
            config.limits,
            config.keepalive,
            Arc::clone(&metrics),
        );
        let sessions = Arc::new(Sessions {
            upstream: Arc::new(upstream),
            databases: config.databases.clone(),
            client_login_timeout: config.client_login_timeout,
            permits: Arc::new(Semaphore::new(
                config.max_connections.min(Semaphore::MAX_PERMITS),
            )),
            max_connections: config.max_connections,
            cancels: Arc::default(),
            shutdown: Shutdown::new(),
            metrics,
            ids: Arc::new(AtomicU64::new(0)),
        });
        Ok(Self {
            listener,
            http,
            notes,
            config,
            sessions,
            refresher,
            credentials,
        })
    }

    /// Where it will be reached.
    pub fn addresses(&self) -> Addresses {
        let local = |listener: &Option<TcpListener>| {
            listener.as_ref().and_then(|bound| bound.local_addr().ok())
        };
        Addresses {
            postgres: self.listener.address(),
            http: local(&self.http),
            notes: local(&self.notes),
        }
    }

    /// Starts everything.
    pub fn start(self) -> Result<Running, StartError> {
        let addresses = self.addresses();
        let Self {
            listener,
            http,
            notes,
            config,
            sessions,
            refresher,
            credentials,
        } = self;
        let clients = TaskTracker::new();
        let helpers = TaskTracker::new();
        let stop = CancellationToken::new();

        helpers.spawn(refresher.run(stop.clone()));
        let watched = credentials.clone();
        let health = Arc::new(Health::new(move || {
            let status = watched.status();
            if status.state.is_valid() {
                return Ok(());
            }
            let why = status
                .last_error
                .as_ref()
                .map(|error| format!(": {error}"))
                .unwrap_or_default();
            Err(format!("no valid database credential{why}"))
        }));
        let heart = (Arc::clone(&health), stop.clone());
        helpers.spawn(async move { heart.0.beat(&heart.1).await });
        let admin = http
            .map(|listener| {
                Admin::spawn(
                    listener,
                    Arc::clone(&sessions.metrics),
                    Arc::clone(&health),
                    stop.clone(),
                )
            })
            .transpose()?;
        listener.spawn(&sessions, config.keepalive, &clients, &helpers);
        #[cfg(feature = "notes")]
        if let Some(listener) = notes {
            let options = crate::notes::NotesOptions::new(reachable(addresses.postgres));
            let stop = stop.clone();
            helpers.spawn(async move {
                if let Err(error) = crate::notes::serve(listener, options, stop).await {
                    tracing::error!(%error, "the notes page has ended");
                }
            });
        }
        #[cfg(not(feature = "notes"))]
        drop(notes);
        health.set_started();

        let endpoint = sessions.upstream.endpoint();
        tracing::info!(
            address = %addresses.postgres,
            endpoint = %endpoint.label,
            host = endpoint.host,
            user = endpoint.user,
            database = config.databases.default,
            max_connections = config.max_connections,
            "listening for Postgres clients"
        );
        if let Some(address) = addresses.http {
            tracing::info!(%address, "serving health and metrics");
        }
        if let Some(address) = addresses.notes {
            tracing::info!(%address, "serving the notes page");
        }
        if !addresses.postgres.ip().to_canonical().is_loopback() {
            tracing::warn!(
                address = %addresses.postgres,
                user = endpoint.user,
                "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is meant"
            );
        }
        Ok(Running {
            addresses,
            sessions,
            credentials,
            health,
            clients,
            helpers,
            admin,
            stop,
            grace: config.grace,
        })
    }
}

/// A program that serves.
pub struct Running {
    addresses: Addresses,
    sessions: Arc<Sessions>,
    credentials: CredentialCell,
    health: Arc<Health>,
    clients: TaskTracker,
    helpers: TaskTracker,
    admin: Option<Admin>,
    stop: CancellationToken,
    grace: Duration,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Where it is reached.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The credential in use.
    pub fn credentials(&self) -> &CredentialCell {
        &self.credentials
    }

    /// What is counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.sessions.metrics
    }

    /// Refuses new clients, lets work under way finish within the grace time or until `hurry`, then ends what is left.
    pub async fn end(self, hurry: impl Future<Output = ()>) {
        let sessions = self.sessions.metrics.clients_active.get();
        tracing::info!(sessions, grace = ?self.grace, "shutting down");
        self.health.set_draining();
        let shutdown = &self.sessions.shutdown;
        shutdown.drain();
        // The accept loops run until the cut, so that late clients are told why they are refused.
        self.clients.close();
        tokio::select! {
            () = self.clients.wait() => {}
            () = tokio::time::sleep(self.grace) => {}
            () = hurry => {}
        }
        shutdown.cut();
        let cut = timeout(HELPERS_END, self.clients.wait()).await;
        self.stop.cancel();
        self.helpers.close();
        let _ = timeout(HELPERS_END, self.helpers.wait()).await;
        if let Some(admin) = self.admin {
            let _ = timeout(HELPERS_END, admin.ended()).await;
        }
        tracing::info!(complete = cut.is_ok(), "shut down");
    }
}

async fn bind(
    address: Option<SocketAddr>,
    flag: &'static str,
) -> Result<Option<TcpListener>, StartError> {
    let Some(address) = address else {
        return Ok(None);
    };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) => Err(StartError::Bind {
            address,
            flag,
            source,
        }),
    }
}

/// Fills in what the settings leave open by asking the workspace.
async fn locate(config: &EndpointConfig, workspace: &Workspace) -> Result<Endpoint, StartError> {
    let name = config.name.as_str();
    let host =
        match &config.host {
            Some(host) => host.clone(),
            None => {
                let info = workspace.endpoint(&config.name).await.map_err(|source| {
                    StartError::LookUp {
                        what: "the endpoint",
                        source,
                    }
                })?;
                if info.disabled {
                    return Err(StartError::Disabled {
                        name: name.to_owned(),
                    });
                }
                info.host.ok_or_else(|| StartError::NoHost {
                    name: name.to_owned(),
                })?
            }
        };
    let user = match (&config.user, workspace.service_principal()) {
        (Some(user), _) => user.clone(),
        (None, Some(client_id)) => client_id.to_owned(),
        (None, None) => {
            let me = workspace.me().await;
            me.map_err(|source| StartError::LookUp {
                what: "who we are (set PGUSER to skip this)",
                source,
            })?
            .user_name
        }
    };
    let security = match &config.tls {
        TlsMode::Disabled => Security::Plain,
        TlsMode::Verified(roots) => Security::Tls {
            config: tls::client_config(roots, tls::ALPN_POSTGRESQL)?,
            name: ServerName::try_from(host.clone())
                .map_err(|_| StartError::HostName { host: host.clone() })?,
        },
    };
    Ok(Endpoint {
        label: Label::new(name),
        host,
        port: config.port,
        user,
        security,
    })
}

/// A proxy that dials itself would take every connection it makes for a client's.
async fn refuse_loop(endpoint: &Endpoint, ours: SocketAddr) -> Result<(), StartError> {
    if endpoint.port != ours.port() {
        return Ok(());
    }
    // A name that does not resolve now may later, and then not to us: that is for the login to find out.
    let resolved = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await;
    let is_ours = |address: SocketAddr| {
        address == ours
            || (is_loopback(address.ip()) && (is_loopback(ours.ip()) || ours.ip().is_unspecified()))
    };
    if resolved.is_ok_and(|mut addresses| addresses.any(is_ours)) {
        return Err(StartError::Loop {
            host: endpoint.host.clone(),
            port: endpoint.port,
        });
    }
    Ok(())
}

/// Where a client on this machine reaches a listener, also one on every address.
#[cfg(feature = "notes")]
fn reachable(listener: SocketAddr) -> SocketAddr {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}
