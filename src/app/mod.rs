//! The composition root: [`build`](App::build) binds everything and looks up what the settings leave open,
//! [`start`](App::start) sets it going.

mod error;
mod gate;
mod locate;
mod running;
mod source;

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    error::StartError,
    running::{Running, Target},
};
use self::{
    gate::{Gate, Surroundings},
    locate::locate,
    source::Access,
};
use crate::{
    admin::{self, Admin, Health},
    clock::Clock,
    config::{Config, EndpointConfig},
    credential::{CredentialCell, Mint, MintError, Minted},
    listener::{Bound, Inherited, Listener},
    session::{Door, Entrance, Policies, Policy, Presence, Roster, Seats, Sessions},
    shutdown::Shutdown,
    telemetry::{LogHandle, Metrics, chain},
    tls::{self, Roots},
    upstream::{Endpoint, Label, Route, Terms},
    workspace::Workspace,
};

/// Where a started program can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Postgres: the first endpoint, where it listens by TCP.
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

/// Bound, but not serving yet.
pub struct App {
    gates: Vec<Gate>,
    http: Option<TcpListener>,
    notes: Option<TcpListener>,
    admin: Option<TcpListener>,
    addresses: Addresses,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    presence: Presence,
    policies: Policies,
    ending: Ending,
    run_connection_test: bool,
    log: Option<LogHandle>,
}

/// How the program ends.
#[derive(Clone, Copy, Debug)]
struct Ending {
    /// How long clients are still accepted after SIGTERM.
    delay: Duration,
    /// How long work under way may go on.
    grace: Duration,
    /// After how long without a client it ends of itself.
    when_idle: Option<Duration>,
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl App {
    /// Binds every port, and asks the workspace for what the settings leave open. One endpoint that cannot be found
    /// does not stop the others; if none can, the first one's failure is returned.
    pub async fn build(config: Config) -> Result<Self, StartError> {
        Self::build_with(config, Inherited::default()).await
    }

    /// As [`build`](Self::build), with sockets that a service manager has passed in the place of those in the settings.
    pub async fn build_with(config: Config, inherited: Inherited) -> Result<Self, StartError> {
        let http = bind(config.http, "http-port").await?;
        let notes = bind(config.notes, "notes-port").await?;
        let admin = bind(config.admin, "admin-port").await?;
        let mut listeners = Vec::with_capacity(config.endpoints.len());
        let names: Vec<&str> = config
            .endpoints
            .iter()
            .map(EndpointConfig::called)
            .collect();
        let inherited = inherited.claim(&names, config.allow_remote)?;
        for (endpoint, sockets) in config.endpoints.iter().zip(inherited) {
            listeners.push(if sockets.is_empty() {
                Listener::bind(&endpoint.listen)?
            } else {
                Listener::inherit(sockets).map_err(StartError::Inherit)?
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

        let first = config
            .endpoints
            .first()
            .map_or("", |endpoint| endpoint.called());
        let metrics = Metrics::of_endpoint(first)?;
        metrics
            .clients_limit
            .set(i64::try_from(config.max_connections).unwrap_or(i64::MAX));
        let clock = Clock::system();
        let shutdown = Shutdown::new();
        let policies = Policies::new(Policy {
            database_mapping: config.database_mapping,
            client_login_timeout: config.client_login_timeout,
            max_connections: config.max_connections,
            terms: Terms {
                limits: config.limits,
                keepalive: config.keepalive,
            },
        });
        let seats = Seats::default();
        let ids = Arc::new(AtomicU64::new(0));
        let entrance = Arc::new(Entrance {
            allowed_uids: config.allowed_uids.clone(),
        });
        let presence = Presence::default();
        let roster = Arc::new(Roster::default());
        let surroundings = Surroundings {
            ours: addresses
                .endpoints
                .iter()
                .flat_map(|bound| bound.tcp.iter().copied())
                .collect(),
        };
        let shared_workspace = OnceLock::new();
        let workspace = || -> Result<Workspace, StartError> {
            if let Some(workspace) = shared_workspace.get() {
                return Ok(Workspace::clone(workspace));
            }
            let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1)?;
            let workspace = Workspace::new(
                config.workspace.clone(),
                &tls,
                clock.clone(),
                Arc::clone(&metrics),
            )?;
            Ok(shared_workspace.get_or_init(|| workspace).clone())
        };
        let mut gates = Vec::with_capacity(listeners.len());
        for (endpoint, listener) in config.endpoints.into_iter().zip(listeners) {
            let metrics = if gates.is_empty() {
                Arc::clone(&metrics)
            } else {
                metrics.of_another(endpoint.called())?
            };
            let (finder, route) = Route::to(Label::new(endpoint.called()));
            let sessions = Arc::new(Sessions {
                route,
                policies: policies.clone(),
                entrance: Arc::clone(&entrance),
                seats: seats.clone(),
                door: Door::new(shutdown.cutting().child_token()),
                cancels: Arc::default(),
                shutdown: shutdown.clone(),
                metrics,
                presence: presence.clone(),
                roster: Arc::clone(&roster),
                ids: Arc::clone(&ids),
            });
            gates.push(Gate {
                access: Access::new(&endpoint.credential, workspace)?,
                config: endpoint,
                listener,
                sessions,
                credentials: CredentialCell::new(clock.clone()),
                finder,
                located: None,
                surroundings: surroundings.clone(),
            });
        }
        let gates = look_up(gates).await?;
        Ok(Self {
            gates,
            http,
            notes,
            admin,
            addresses,
            metrics,
            shutdown,
            presence,
            policies,
            ending: Ending {
                delay: config.min_sigterm_delay,
                grace: config.grace,
                when_idle: config.exit_when_idle,
            },
            run_connection_test: config.run_connection_test,
            log: None,
        })
    }

    /// Lets the program change what is logged.
    #[must_use]
    pub fn with_log(mut self, log: LogHandle) -> Self {
        self.log = Some(log);
        self
    }

    /// Where it will be reached.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Starts everything.
    pub fn start(self) -> Result<Running, StartError> {
        let Self {
            gates,
            http,
            notes,
            admin,
            addresses,
            metrics,
            shutdown,
            presence,
            policies,
            ending,
            run_connection_test,
            log,
        } = self;
        let clients = TaskTracker::new();
        let helpers = TaskTracker::new();
        let stop = CancellationToken::new();

        let credentials: Vec<CredentialCell> =
            gates.iter().map(|gate| gate.credentials.clone()).collect();
        // There is at least one endpoint; an empty cell stands for none.
        let first = credentials.first().cloned();
        let first = first.unwrap_or_else(|| CredentialCell::new(Clock::system()));
        let health = Arc::new(Health::new(move || any_valid(&credentials)));
        let routes: Vec<Route> = gates
            .iter()
            .map(|gate| gate.sessions.route.clone())
            .collect();
        let heart = (Arc::clone(&health), stop.clone());
        helpers.spawn(async move { heart.0.beat(&heart.1).await });
        let http = http
            .map(|listener| {
                Admin::spawn(
                    listener,
                    Arc::clone(&metrics),
                    Arc::clone(&health),
                    log.clone(),
                    stop.clone(),
                )
            })
            .transpose()?;
        if let Some(log) = log {
            let stop = stop.clone();
            helpers.spawn(async move {
                stop.run_until_cancelled(log.summarize()).await;
            });
        }
        for (gate, bound) in gates.into_iter().zip(&addresses.endpoints) {
            announce(&gate, bound, policies.now().max_connections);
            gate.start(&clients, &helpers, &stop);
        }
        #[cfg(feature = "notes")]
        if let Some(listener) = notes {
            let way = addresses.endpoints.first().and_then(Bound::way);
            let stop = stop.clone();
            match way.map(crate::notes::NotesOptions::new) {
                Some(options) => {
                    helpers.spawn(async move {
                        if let Err(error) = crate::notes::serve(listener, options, stop).await {
                            tracing::error!(%error, "the notes page has ended");
                        }
                    });
                }
                None => tracing::error!(
                    "the notes page has no way in; hint: name the inherited Unix socket .s.PGSQL.<port>"
                ),
            }
        }
        #[cfg(not(feature = "notes"))]
        drop(notes);
        let asked = CancellationToken::new();
        if let Some(listener) = admin {
            helpers.spawn(admin::quit::serve(listener, asked.clone(), stop.clone()));
        }
        if let Some(time) = ending.when_idle {
            let (asked, stop) = (asked.clone(), stop.clone());
            helpers.spawn(async move {
                if stop
                    .run_until_cancelled(presence.gone_for(time))
                    .await
                    .is_some()
                {
                    tracing::info!(?time, "no client for this long; ending (--exit-when-idle)");
                    asked.cancel();
                }
            });
        }
        if let Some(address) = addresses.admin {
            tracing::info!(%address, "answering /quitquitquit");
        }
        if let Some(address) = addresses.http {
            tracing::info!(%address, "serving health and metrics");
        }
        if let Some(address) = addresses.notes {
            tracing::info!(%address, "serving the notes page");
        }
        if !run_connection_test {
            health.set_started();
        }
        Ok(Running {
            addresses,
            metrics,
            shutdown,
            credentials: first,
            routes,
            policies,
            health,
            clients,
            helpers,
            http,
            stop,
            asked,
            ending,
            run_connection_test,
        })
    }
}

/// Looks the first endpoint up and mints one credential for it, without listening anywhere.
pub async fn mint_once(
    config: Config,
) -> Result<(Endpoint, Result<Minted, MintError>), StartError> {
    let [endpoint, ..] = &config.endpoints[..] else {
        return Err(StartError::NoEndpoint);
    };
    let workspace = || -> Result<Workspace, StartError> {
        let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1)?;
        Ok(Workspace::new(
            config.workspace.clone(),
            &tls,
            Clock::system(),
            Metrics::new()?,
        )?)
    };
    let located = locate(endpoint, &Access::new(&endpoint.credential, workspace)?).await?;
    let minted = located.source.mint().await;
    Ok((located.endpoint, minted))
}

/// Says where an endpoint listens, and what that means.
fn announce(gate: &Gate, bound: &Bound, max_connections: usize) {
    let endpoint = gate.config.called();
    for address in &bound.tcp {
        tracing::info!(%address, endpoint, max_connections, "listening for Postgres clients");
        if !address.ip().to_canonical().is_loopback() {
            tracing::warn!(
                %address,
                "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is meant"
            );
        }
    }
    for socket in &bound.unix {
        let socket = socket.display();
        tracing::info!(%socket, endpoint, max_connections, "listening for Postgres clients");
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

/// Looks all endpoints up at a time.
async fn look_up(gates: Vec<Gate>) -> Result<Vec<Gate>, StartError> {
    let total = gates.len();
    let mut looking = JoinSet::new();
    for (index, mut gate) in gates.into_iter().enumerate() {
        looking.spawn(async move {
            let result = gate.look_up().await;
            (index, gate, result)
        });
    }
    let mut done = looking.join_all().await;
    done.sort_by_key(|(index, ..)| *index);
    let failed = done.iter().filter(|(.., result)| result.is_err()).count();
    let mut gates = Vec::with_capacity(total);
    for (_, gate, result) in done {
        match result {
            Err(error) if failed == total => return Err(error),
            Err(error) => tracing::error!(
                endpoint = gate.config.called(),
                error = %chain(&error),
                hint = error.hint(),
                "endpoint cannot be used for now; the others serve"
            ),
            Ok(()) => {}
        }
        gates.push(gate);
    }
    Ok(gates)
}

/// Whether logins can work anywhere, and if not, why.
fn any_valid(credentials: &[CredentialCell]) -> Result<(), String> {
    let mut why = String::new();
    for credential in credentials {
        let status = credential.status();
        if status.state.is_valid() {
            return Ok(());
        }
        if let (true, Some(error)) = (why.is_empty(), &status.last_error) {
            why = format!(": {error}");
        }
    }
    Err(format!("no valid database credential{why}"))
}
