//! A Lakebase for one machine: the workspace's API, the edge, and a real Postgres behind it.
//!
//! It serves the demo, the tests, and other people's tests. It keeps Lakebase's rules rather than Postgres's: a token
//! is the password and is judged at login only, TLS begins with `SSLRequest` and names the host, the protocol is 3.0, a
//! sleeping compute refuses. What goes wrong on request is in [`Faults`].
//!
//! ```text
//!  client ──TLS──▶ edge ──Unix socket──▶ Postgres, one for each branch
//!                   ▲ signed by
//!  SDK ──HTTP──▶ workspace        /emulator: faults, settings, events
//! ```
//!
//! The proxy never imports this module, and this module imports leaves only.

mod app;
mod args;
mod catalog;
mod certificates;
mod compute;
mod counts;
mod edge;
mod endpoint;
mod environment;
mod error;
mod faults;
mod identity;
mod loss;
mod postgres;
mod sessions;
mod settings;
mod shared;
mod tally;
mod temporary;
mod token;
mod workspace;

use std::{
    fmt,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tempfile::TempPath;
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use app::AppResource;
pub(crate) use args::duration;
pub use args::{EmulatorArgs, PostgresArgs, run};
pub use counts::Counts;
pub use edge::ServerError;
pub use environment::EnvironmentFormat;
pub use error::EmulatorError;
pub use faults::{
    Action, BadCertificate, Fault, FaultError, FaultStatus, Faults, Response, Site, Strikes,
};
pub use identity::{Identities, Identity, IdentityKind};
pub use postgres::{LocalPostgres, LocalPostgresOptions};
pub use sessions::Disruption;
pub use settings::{OnSuspend, Settings, WhileAsleep};
pub use tally::{CredentialCount, LoginCount, Tally};

use catalog::{BranchPostgres, Catalog};
use certificates::{Authorities, Certificates};
use compute::Common;
use counts::Counters;
use endpoint::{Endpoint, Endpoints};
use postgres::Database;
use shared::{Names, Shared};
use tally::Tallies;
use token::{Audience, Signer};

/// The longest time that can be set: 100 years, which no timer adds up to more than it can hold.
const MAX_DURATION: Duration = Duration::from_hours(876_600);
/// How long connections may take to end when the emulator stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// What an emulator is started with. The default suits tests: any free ports, an own Postgres, the tutorial's table.
#[derive(Clone, Debug)]
pub struct EmulatorOptions {
    /// Port of the workspace API; 0: any.
    pub workspace_port: u16,
    /// Port of the edge; 0: any.
    pub pg_port: u16,
    /// What can be changed later, too.
    pub settings: Settings,
    /// Where the data lives.
    pub postgres: PostgresSource,
    /// Name of the database, made if it is not there.
    pub database: String,
    /// Whether to make the tutorial's `notes` table and its rows.
    pub sample_notes: bool,
    /// Faults that are set before anything answers.
    pub faults: Vec<Fault>,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        Self {
            workspace_port: 0,
            pg_port: 0,
            settings: Settings::default(),
            postgres: PostgresSource::default(),
            database: "databricks_postgres".to_owned(),
            sample_notes: true,
            faults: Vec::new(),
        }
    }
}

/// The Postgres behind the edge.
#[derive(Clone, Debug)]
pub enum PostgresSource {
    /// One of its own, gone when the emulator stops.
    Local(LocalPostgresOptions),
    /// One that outlives the emulator and that others may use.
    Shared(Arc<LocalPostgres>),
    /// Any other, by its connection URL: a superuser's, without TLS.
    Url(SecretString),
}

impl Default for PostgresSource {
    fn default() -> Self {
        Self::Local(LocalPostgresOptions::default())
    }
}

/// The authority's certificate is public, so anybody may read the file.
fn write_authority(directory: &Path, pem: &str) -> io::Result<TempPath> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("lakebase-ca-").suffix(".pem");
    temporary::set_mode(&mut builder, 0o644);
    let mut file = builder.tempfile_in(directory)?;
    file.write_all(pem.as_bytes())?;
    Ok(file.into_temp_path())
}

/// A running emulator; everything it made goes when it is dropped, best through [`Emulator::stop`].
pub struct Emulator {
    shared: Arc<Shared>,
    workspace_port: u16,
    pg_port: u16,
    authority: TempPath,
    /// Declared before the server, whose drop waits: connections end first.
    _stop: StopOnDrop,
    server: Option<Arc<LocalPostgres>>,
}

struct StopOnDrop(CancellationToken);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emulator")
            .field("workspace_port", &self.workspace_port)
            .field("pg_port", &self.pg_port)
            .finish_non_exhaustive()
    }
}

impl Emulator {
    /// Starts everything; it answers when this returns.
    pub async fn start(options: EmulatorOptions) -> Result<Self, EmulatorError> {
        let stop = CancellationToken::new();
        let stop_on_drop = StopOnDrop(stop.clone());
        let faults = Faults::default();
        for fault in &options.faults {
            faults
                .add(fault.clone())
                .map_err(|source| EmulatorError::Fault { source })?;
        }
        // Ports first: a taken one should be reported before a server starts.
        let listeners = edge::Listeners::bind(options.pg_port)?;
        let pg_port = listeners.port;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, options.workspace_port));
        let bind_error = |source| EmulatorError::Bind {
            port: options.workspace_port,
            source,
        };
        let workspace = TcpListener::bind(address).await.map_err(bind_error)?;
        let workspace_port = workspace.local_addr().map_err(bind_error)?.port();
        let workspace_url = format!("http://127.0.0.1:{workspace_port}");

        let identities = Identities::generate()?;
        let names = Names::generate(&options.database)?;
        let authorities = Authorities::generate()?;
        let uid = names.endpoint_uid();
        let hosts = [vec![names.host.clone()], Names::hosts(&uid)].concat();
        let certificates = Certificates::generate(&authorities, &hosts)?;
        let own = async |server: Arc<LocalPostgres>| {
            let database = Database::on_local(&server, &identities, &options).await?;
            Ok::<_, EmulatorError>((Some(server), database))
        };
        let (server, database) = match &options.postgres {
            PostgresSource::Local(local) => {
                own(Arc::new(LocalPostgres::start(local.clone()).await?)).await?
            }
            PostgresSource::Shared(server) => own(Arc::clone(server)).await?,
            PostgresSource::Url(url) => {
                let url = url.expose_secret();
                (None, Database::on_url(url, &identities, &options).await?)
            }
        };
        let directory = server
            .as_ref()
            .map_or_else(std::env::temp_dir, |server| server.directory().to_owned());
        let authority = write_authority(&directory, &authorities.pem())
            .map_err(|source| EmulatorError::Directory { source })?;

        let tracker = TaskTracker::new();
        let counters = Counters::new();
        let settings = watch::Sender::new(options.settings.clone());
        let common = Common {
            settings: settings.clone(),
            counters: counters.clone(),
            tracker: tracker.clone(),
            stop: stop.clone(),
        };
        let name = Names::ENDPOINT.to_owned();
        let main = Endpoint::start(name, hosts, certificates, database, common);
        let main = Arc::new(main);
        let endpoints = Endpoints::default();
        endpoints.add(Arc::clone(&main));
        let postgres = BranchPostgres {
            server: server.clone(),
            database: main.database.clone(),
        };
        let catalog = Catalog::new(&names, &identities, postgres);
        let shared = Arc::new(Shared {
            signer: Signer::generate(format!("{workspace_url}/oidc"))?,
            names,
            workspace_url,
            identities,
            authorities,
            counters,
            tally: Tallies::default(),
            faults,
            settings,
            main,
            endpoints,
            catalog,
            tracker: tracker.clone(),
            stop,
            serial: AtomicU64::new(0),
            credentials_revoked_through: AtomicU64::new(0),
            tokens_revoked_through: AtomicU64::new(0),
        });
        tracker.spawn(edge::serve(listeners, Arc::clone(&shared)));
        tracker.spawn(workspace::serve(workspace, Arc::clone(&shared)));
        Ok(Self {
            shared,
            workspace_port,
            pg_port,
            authority,
            _stop: stop_on_drop,
            server,
        })
    }

    /// Ends connections, then Postgres, and removes what was made.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        self.shared.tracker.close();
        // What takes longer is dropped with the runtime.
        let _ = timeout(STOP_TIMEOUT, self.shared.tracker.wait()).await;
        self.shared
            .main
            .database
            .forget(&self.shared.identities)
            .await;
        let branches = self.shared.catalog.take_postgres();
        // Waiting for Postgres to end blocks.
        let _ = tokio::task::spawn_blocking(move || drop((branches, self))).await;
    }

    /// The workspace's address: `http://127.0.0.1:PORT`.
    pub fn workspace_url(&self) -> &str {
        &self.shared.workspace_url
    }

    /// The workspace's address without a scheme.
    pub fn workspace_address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.workspace_port))
    }

    /// The edge's port on `localhost`.
    pub fn pg_port(&self) -> u16 {
        self.pg_port
    }

    /// The host name of the built-in pooler, which resolves to this machine.
    pub fn pooler_host(&self) -> String {
        format!("{}-pooler.localhost", self.shared.names.endpoint_uid())
    }

    /// The file with the certificate authority to trust.
    pub fn ca_file(&self) -> &Path {
        &self.authority
    }

    /// The endpoint's resource name.
    pub fn endpoint_name(&self) -> &'static str {
        Names::ENDPOINT
    }

    /// The name of the Provisioned instance that is the same compute.
    pub fn instance_name(&self) -> &'static str {
        Names::INSTANCE
    }

    /// Who exists in the workspace.
    pub fn identities(&self) -> &Identities {
        &self.shared.identities
    }

    /// The faults to come.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// A client of its own Postgres's package, for machines without one.
    pub(crate) fn psql(&self) -> Option<std::path::PathBuf> {
        let psql = self.server.as_ref()?.bin_dir().join("psql");
        psql.exists().then_some(psql)
    }

    /// The settings as they are.
    pub fn settings(&self) -> Settings {
        self.shared.settings.borrow().clone()
    }

    /// Changes settings; they hold from the next request or connection on.
    pub fn configure(&self, change: impl FnOnce(&mut Settings)) {
        self.shared.settings.send_modify(change);
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.shared.counters.snapshot()
    }

    /// Waits until the counts satisfy `reached`, and returns them; `None` if that takes longer than `within`.
    pub async fn wait_for(
        &self,
        within: Duration,
        reached: impl FnMut(&Counts) -> bool,
    ) -> Option<Counts> {
        self.shared.counters.until(within, reached).await
    }

    /// Who logged in where, and for whom credentials were issued.
    pub fn tally(&self) -> Tally {
        self.shared.tally.snapshot()
    }

    /// Whether the compute takes connections.
    pub fn is_active(&self) -> bool {
        self.shared.main.compute.state() == compute::State::Active
    }

    /// Sends the compute to sleep now.
    pub async fn suspend(&self) {
        self.shared.main.compute.suspend().await;
    }

    /// Ends the running sessions as an administrator does: FATAL 57P01.
    pub async fn terminate_sessions(&self) {
        let main = &self.shared.main;
        main.database.terminate(main.sessions.process_ids()).await;
    }

    /// Does something to the connections of the running sessions.
    pub fn disrupt_sessions(&self, disruption: Disruption) {
        self.shared.main.sessions.disrupt(disruption);
    }

    /// Makes the database credentials issued so far worthless at login; newly minted ones work.
    pub fn revoke_credentials(&self) {
        self.shared.revoke(Audience::Database);
    }

    /// Makes the workspace tokens issued so far worthless; newly issued ones work.
    pub fn revoke_workspace_tokens(&self) {
        self.shared.revoke(Audience::Workspace);
    }

    /// A database credential for `identity`, as minted by the API, without a request.
    pub fn credential_for(
        &self,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<String, EmulatorError> {
        self.token_for(identity, Audience::Database, lifetime)
    }

    fn token_for(
        &self,
        identity: &Identity,
        audience: Audience,
        lifetime: Duration,
    ) -> Result<String, EmulatorError> {
        let seconds = i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX);
        self.shared
            .issue(&identity.name, audience, seconds)
            .map(|(token, _)| token)
    }

    /// A workspace token for `identity`, as a command-line tool that is logged in would print it.
    pub fn workspace_token_for(
        &self,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<String, EmulatorError> {
        self.token_for(identity, Audience::Workspace, lifetime)
    }

    /// An identity token that the workspace exchanges for one of its own, as Kubernetes would project it.
    pub fn identity_token_for(
        &self,
        identity: &Identity,
        lifetime: Duration,
    ) -> Result<String, EmulatorError> {
        self.token_for(identity, Audience::Identity, lifetime)
    }

    /// The variables of a GitHub Actions job with access to its identity token, which is the app's.
    pub fn github_variables(&self) -> [(&'static str, String); 2] {
        let url = format!("{}/github/token?api-version=2.0", self.workspace_url());
        [
            ("ACTIONS_ID_TOKEN_REQUEST_URL", url),
            (
                "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
                Names::GITHUB_REQUEST_TOKEN.to_owned(),
            ),
        ]
    }

    /// The variables of a job in Azure Pipelines with access to its identity token, which is the app's.
    pub fn azure_devops_variables(&self) -> [(&'static str, String); 6] {
        let collection = format!("{}/azure-devops/organization/", self.workspace_url());
        [
            ("SYSTEM_TEAMFOUNDATIONCOLLECTIONURI", collection),
            (
                "SYSTEM_ACCESSTOKEN",
                Names::AZURE_DEVOPS_ACCESS_TOKEN.to_owned(),
            ),
            ("SYSTEM_TEAMPROJECTID", "a-project".to_owned()),
            ("SYSTEM_HOSTTYPE", "build".to_owned()),
            ("SYSTEM_PLANID", "plan-1".to_owned()),
            ("SYSTEM_JOBID", "job-1".to_owned()),
        ]
    }

    /// The address of a local metadata service, which hands out the user's tokens.
    pub fn metadata_service_url(&self) -> String {
        format!(
            "{}/metadata-service/{}",
            self.workspace_url(),
            Names::METADATA_SESSION
        )
    }

    /// Where Microsoft Entra ID answers; ends with a slash.
    pub fn entra_id_url(&self) -> String {
        format!("{}/entra/", self.workspace_url())
    }

    /// The tenant in Microsoft Entra ID.
    pub fn tenant(&self) -> &'static str {
        Names::TENANT
    }

    /// A role with a Postgres password, for logins without a token; needs [`Settings::native_login`].
    pub async fn create_native_role(
        &self,
        name: &str,
        password: &str,
    ) -> Result<(), EmulatorError> {
        let database = &self.shared.main.database;
        database.create_native_role(name, password).await
    }

    /// Gives a role this security label, or none: the identity that it is bound to, as `id=NUMBER,type=SERVICE_PRINCIPAL`.
    pub async fn label_role(&self, role: &str, label: Option<&str>) -> Result<(), EmulatorError> {
        self.shared.main.database.label(role, label).await
    }

    /// Runs statements as the superuser, past the edge, in the maintenance database.
    pub async fn execute(&self, script: &str) -> Result<(), EmulatorError> {
        self.shared.main.database.execute(script).await
    }
}
