//! The discovery of an endpoint: completes its settings from the workspace, retrying until that succeeds, and has its
//! credential refreshed from then on.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use tokio::time::{Instant, sleep_until};

use super::{
    AppError,
    endpoint::{Endpoints, Served},
    shared::open_workspace,
};
use crate::{
    clock::Clock,
    config::{Config, CredentialSource, EndpointConfig, TlsMode, without_userinfo},
    credential::{self, Mint, Pace, Refresher, is_held_for},
    net::{backoff::jitter, blocking, tcp::leads_to, tls},
    protocol::error::{Report, sqlstate},
    status::Label,
    telemetry::{Metrics, chain, labels::Reason},
    upstream::{
        Addresses, DroppedParameters, Endpoint, Problem, Refusal, RoutePublisher, Security,
        Upstream, probe,
    },
    workspace::{
        AppDatabases, CredentialMinter, HostName, LocateError, Located, Workspace, check_names,
    },
};

/// Budget of one request to the workspace, retries included. Short, since the pace of attempts retries as well.
const REQUEST_BUDGET: Duration = Duration::from_secs(2);
/// The same for a command that looks up an endpoint once.
const COMMAND_BUDGET: Duration = Duration::from_mins(1);

/// The discovery of one endpoint.
pub(super) struct Discovery {
    pub(super) served: Arc<Served>,
    pub(super) source: EndpointSource,
    pub(super) publisher: RoutePublisher,
    pub(super) endpoints: Endpoints,
    /// Whether an error that retries do not fix ends the program, which then prints it.
    pub(super) ends_program: bool,
}

impl Discovery {
    /// Discovers the upstream, then refreshes its credential until the endpoint stops.
    pub(super) async fn run(self) {
        let stop = self.served.stop.clone();
        let Some(located) = stop.run_until_cancelled(self.discover()).await else {
            return;
        };
        let metrics = Arc::clone(&self.served.context.metrics);
        let credentials = self.served.credentials.clone();
        let upstream = Upstream::new(located.endpoint, credentials.clone(), Arc::clone(&metrics));
        let endpoint = upstream.endpoint();
        tracing::info!(
            endpoint = %endpoint.label,
            host = endpoint.host,
            user = endpoint.user,
            database = endpoint.database,
            "endpoint found"
        );
        self.publisher.found(Arc::new(upstream));
        self.endpoints.notify();
        // The refresher runs until `stop` is cancelled, and must keep nothing of a removed endpoint alive.
        drop((endpoint, self));
        Refresher::new(located.mint, credentials, metrics)
            .run(stop)
            .await;
    }

    /// Tries until the endpoint is found. Retries follow the pace of credential requests, which fail for the same reasons.
    async fn discover(&self) -> LocatedEndpoint {
        let mut pace = Pace::new(Instant::now());
        // Attempts follow within seconds; a line for each would hide other events.
        let mut logged = None;
        loop {
            let error = match self.attempt().await {
                Ok(located) => return located,
                Err(error) => error,
            };
            pace.failed(Instant::now(), error.kind, error.retry_after, jitter);
            self.publisher.failed(Problem {
                refusal: self.refusal(&error),
                is_held_for: is_held_for(error.kind, error.retry_after),
                opens_at: pace.awaited(),
            });
            self.endpoints.notify();
            let retry_in = pace
                .next_without(false)
                .saturating_duration_since(Instant::now());
            self.log(&error, retry_in, &mut logged);
            loop {
                // A client that arrives during the wait moves the attempt forward, so that the wait is computed again.
                let next = pace.next_without(self.publisher.demand().exists());
                tokio::select! {
                    () = sleep_until(next) => break,
                    () = self.publisher.demand().added() => {}
                }
            }
        }
    }

    async fn attempt(&self) -> Result<LocatedEndpoint, AppError> {
        // Retries within an attempt save a search of many requests from starting again.
        let located = self
            .source
            .locate(&self.served.config, REQUEST_BUDGET)
            .await?;
        refuse_loop(&located.endpoint, &self.endpoints).await?;
        Ok(located)
    }

    fn refusal(&self, error: &AppError) -> Refusal {
        let endpoint = self.served.config.display_name();
        let mut report = Report::new(
            sqlstate::CANNOT_CONNECT,
            format!("Lakebase endpoint `{endpoint}` cannot be used: {error}"),
        );
        report.hint = error.hint().map(str::to_owned);
        Refusal {
            report,
            // `Waking` marks what a retry may fix: `App::proxy_address` waits on for it.
            reason: if error.kind.is_transient() {
                Reason::Waking
            } else {
                Reason::Other
            },
        }
    }

    /// Logs each error once, except the one that ends the program.
    fn log(&self, error: &AppError, retry_in: Duration, logged: &mut Option<String>) {
        let text = chain(error).to_string();
        if logged.as_ref() == Some(&text) {
            return;
        }
        let endpoint = self.served.config.display_name();
        if error.kind.is_transient() {
            tracing::warn!(
                endpoint,
                error = text,
                hint = error.hint(),
                retry_in = ?Duration::from_secs(retry_in.as_secs().saturating_add(1)),
                "cannot look up the endpoint, retrying"
            );
        } else if !self.ends_program {
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

/// Refuses an upstream that is one of our own listeners: each connection would open another.
async fn refuse_loop(endpoint: &Endpoint, endpoints: &Endpoints) -> Result<(), AppError> {
    let ours = endpoints.addresses();
    // No listener has the port: a loop is impossible, and the host need not be resolved.
    if !ours.iter().any(|ours| ours.port() == endpoint.port) {
        return Ok(());
    }
    // A name that does not resolve yet passes; the login reports the error.
    let resolved = match endpoint.addresses.as_fixed() {
        Some(fixed) => fixed.to_vec(),
        None => probe::resolve(&endpoint.host, endpoint.port)
            .await
            .unwrap_or_default(),
    };
    let is_ours = |address: SocketAddr| ours.iter().any(|ours| leads_to(address, *ours));
    if resolved.into_iter().any(is_ours) {
        let (host, port) = (&endpoint.host, endpoint.port);
        return Err(AppError::new(
            format!("PGHOST `{host}` with PGPORT {port} is this proxy itself"),
            Some(
                "PGHOST and PGPORT name the Lakebase endpoint, --address and --port where this proxy listens",
            ),
        ));
    }
    Ok(())
}

/// An endpoint that can be dialed, and the source of its credentials.
pub(crate) struct LocatedEndpoint {
    pub(crate) endpoint: Endpoint,
    pub(crate) mint: Arc<dyn Mint>,
}

/// Locates the first endpoint and the source of its credentials, without listening.
pub(crate) async fn locate_first(config: Config) -> Result<LocatedEndpoint, AppError> {
    let [endpoint, ..] = &config.endpoints[..] else {
        return Err(AppError::no_endpoint());
    };
    let workspace = || open_workspace(config.workspace.clone(), Clock::system(), Metrics::new()?);
    let source = EndpointSource::new(&endpoint.credential, workspace)?;
    source.locate(endpoint, COMMAND_BUDGET).await
}

/// Where an endpoint's host and credentials come from.
#[derive(Clone)]
pub(super) enum EndpointSource {
    /// A source that the settings name.
    Own(Arc<dyn Mint>),
    /// The workspace, which can complete the settings too.
    Workspace(Workspace),
}

impl EndpointSource {
    /// `workspace` is called only if the settings name no other source.
    pub(super) fn new(
        source: &CredentialSource,
        workspace: impl FnOnce() -> Result<Workspace, AppError>,
    ) -> Result<Self, AppError> {
        match credential::of_settings(source) {
            Some(mint) => Ok(Self::Own(mint)),
            None => workspace().map(Self::Workspace),
        }
    }

    /// Checks what needs no network: names, and the trusted roots.
    pub(super) fn check(&self, config: &EndpointConfig) -> Result<(), AppError> {
        if let Self::Workspace(_) = self {
            check_names(config).map_err(LocateError::from)?;
        }
        match &config.host {
            Some(host) => security(&config.tls, host).map(drop),
            None => Ok(()),
        }
    }

    /// Looks up host and user where they are not set; `timeout` is the limit of one request to the workspace, with retries.
    async fn locate(
        &self,
        config: &EndpointConfig,
        timeout: Duration,
    ) -> Result<LocatedEndpoint, AppError> {
        let mut config = config.clone();
        let (label, mint): (_, Arc<dyn Mint>) = match self {
            // The settings have been checked: such an endpoint has a host and a user.
            Self::Own(mint) => (Label::new(config.display_name()), Arc::clone(mint)),
            Self::Workspace(workspace) => {
                let located = workspace.locate(&config, timeout).await?;
                log_doubts(&located);
                config.host = Some(located.host);
                config.user = Some(located.user);
                config.database = located.database;
                let label = Label::new(located.target.as_str());
                let mint = CredentialMinter::new(workspace.clone(), located.target);
                (label, Arc::new(mint))
            }
        };
        let host = config.host.clone().unwrap_or_default();
        let (tls, name) = (config.tls.clone(), host.clone());
        let addresses = config.host_addresses.iter();
        let addresses = addresses.map(|address| SocketAddr::new(*address, config.port));
        let endpoint = Endpoint {
            // Parses a PEM file, which must not delay the other tasks of the main runtime.
            security: blocking(move || security(&tls, &name)).await?,
            label,
            host,
            port: config.port,
            addresses: Addresses::fixed(addresses),
            database: config.database_or_default().to_owned(),
            user: config.user.unwrap_or_default(),
            dropped: DroppedParameters::default(),
        };
        Ok(LocatedEndpoint { endpoint, mint })
    }
}

/// Logs what a person may want to set otherwise.
fn log_doubts(located: &Located) {
    let endpoint = &located.target;
    // Lakebase's docs, "Connection pooling": not available for OAuth roles. A warning only, since poolers accept OAuth
    // credentials where Databricks has enabled that.
    let pooler = located.host.parse::<HostName>().ok();
    if let Some(direct) = pooler.and_then(|host| host.direct()) {
        tracing::warn!(
            %endpoint,
            host = located.host,
            "the host is that of Lakebase's pooler, which may refuse OAuth credentials; hint: set PGHOST to the direct host {direct} if logins are refused"
        );
    }
    if let Some(databases) = &located.app_databases {
        tracing::info!(%endpoint, "{databases}; hint: {}", AppDatabases::HINT);
    }
}

/// The TLS configuration towards `host`; reads the file of roots.
pub(super) fn security(tls: &TlsMode, host: &str) -> Result<Security, AppError> {
    Ok(match tls {
        TlsMode::Disabled => Security::Plain,
        TlsMode::Verified(roots) => Security::Tls {
            config: tls::client_config(roots, tls::ALPN_POSTGRESQL)?,
            name: ServerName::try_from(host.to_owned()).map_err(|_| {
                // A whole URL, perhaps, and then with a password before its host.
                let host = without_userinfo(host);
                let hint = "set PGHOST to the endpoint's host name (ep-...database...)";
                AppError::new(format!("`{host}` is not a host name"), Some(hint))
            })?,
        },
    })
}
