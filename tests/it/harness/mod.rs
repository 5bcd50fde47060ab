//! What the tests of the main job share: an emulator and a proxy in this process, and clients of both.
//!
//! Everything runs on the test's own runtime and ends with it. Only the Postgres behind the emulators is shared: it
//! stops when this process ends, and each emulator has roles of its own on it.

pub(crate) mod binary;
pub(crate) mod emulator;
pub(crate) mod http;
pub(crate) mod https;
pub(crate) mod port;
pub(crate) mod wire;

use std::{ffi::OsString, io::Write, net::SocketAddr, sync::Arc, time::Duration};

use lakebase_proxy::{
    app::{App, AppError},
    config::{Config, DurationSetting, Environment, PortSetting, Settings},
    credential::CredentialCell,
    emulator::{
        Emulator, EmulatorError, EmulatorOptions, LocalPostgres, LocalPostgresOptions,
        PostgresSource,
    },
    protocol::error::ErrorFields,
    telemetry::Metrics,
};
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tokio_util::task::TaskTracker;

use self::wire::Wire;

/// What nothing here takes unless it hangs, on a busy machine too.
pub(crate) const TIMEOUT: Duration = Duration::from_mins(1);

/// The emulator's default database.
pub(crate) const DATABASE: &str = "databricks_postgres";

static SERVER: OnceCell<Arc<LocalPostgres>> = OnceCell::const_new();

/// The Postgres that all emulators of this process share.
pub(crate) async fn server() -> Arc<LocalPostgres> {
    Arc::clone(SERVER.get_or_init(start_server).await)
}

#[expect(
    clippy::exit,
    clippy::disallowed_methods,
    reason = "without a Postgres nearly all tests would fail for one reason, which is reported once"
)]
async fn start_server() -> Arc<LocalPostgres> {
    let options = LocalPostgresOptions {
        download: std::env::var_os("LAKEBASE_PROXY_NO_DOWNLOAD").is_none(),
        ..LocalPostgresOptions::default()
    };
    match LocalPostgres::start(options).await {
        Ok(server) => Arc::new(server),
        Err(error @ EmulatorError::NoPostgres { .. }) => {
            // Unlike the output of macros this is not captured by the test harness.
            let line = format!("\nerror: {error}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            std::process::exit(1);
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// A `PATH` with the programs of the shared server, such as `psql`.
pub(crate) fn path() -> OsString {
    let programs = SERVER.get().map(|server| server.bin_dir().to_owned());
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::env::split_paths(&path).chain(programs)).unwrap()
}

/// An emulator on the shared server.
pub(crate) async fn emulator() -> Emulator {
    let postgres = PostgresSource::Shared(server().await);
    let options = EmulatorOptions {
        postgres,
        ..EmulatorOptions::default()
    };
    Emulator::start(options).await.unwrap()
}

/// A Postgres beside the shared one.
pub(crate) async fn another_server() -> Arc<LocalPostgres> {
    let options = LocalPostgresOptions {
        bin_dir: Some(server().await.bin_dir().to_owned()),
        ..LocalPostgresOptions::default()
    };
    Arc::new(LocalPostgres::start(options).await.unwrap())
}

/// An emulator on a server of its own.
pub(crate) async fn own_server() -> (Arc<LocalPostgres>, Emulator) {
    let server = another_server().await;
    let options = EmulatorOptions {
        postgres: PostgresSource::Shared(Arc::clone(&server)),
        ..EmulatorOptions::default()
    };
    (server, Emulator::start(options).await.unwrap())
}

/// A superuser's session at the shared server, past everything.
pub(crate) async fn superuser() -> Client {
    static DATABASE: OnceCell<()> = OnceCell::const_new();
    // The first emulator makes it, and a test may begin with this.
    DATABASE.get_or_init(async || drop(emulator().await)).await;
    superuser_of(&*server().await).await
}

/// A superuser's session at `server`, past everything.
pub(crate) async fn superuser_of(server: &LocalPostgres) -> Client {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(server.directory().join("s"))
        .user("databricks_control_plane")
        .dbname("databricks_postgres");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    TaskTracker::new().spawn(connection);
    client
}

/// How many sessions the role has at the server itself.
pub(crate) async fn backends(superuser: &Client, role: &str) -> i64 {
    let query = "select count(*) from pg_stat_activity where usename = $1 and backend_type in ('client backend', 'walsender')";
    superuser.query_one(query, &[&role]).await.unwrap().get(0)
}

/// Waits until so many `pg_sleep` queries of the role run: a cancel that comes too early reaches nothing.
pub(crate) async fn until_running(role: &str, count: i64) {
    let superuser = superuser().await;
    // Not before they sleep: a cancel that comes earlier ends them outside of their own exception handlers.
    let query = "select count(*) from pg_stat_activity where usename = $1 and state = 'active' and query like '%sleep%' \
         and wait_event_type in ('Timeout', 'Lock')";
    eventually("the queries run", async || {
        let running: i64 = superuser.query_one(query, &[&role]).await.unwrap().get(0);
        (running == count).then_some(())
    })
    .await;
}

/// A setting of so many milliseconds.
pub(crate) fn millis(count: u64) -> DurationSetting {
    DurationSetting(Duration::from_millis(count))
}

/// `future`, which must end in reasonable time.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let ended = timeout(TIMEOUT, future).await;
    ended.unwrap_or_else(|_| panic!("{what}: still waiting after {TIMEOUT:?}"))
}

/// Looks again and again until there is something to see.
pub(crate) async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what}: not after {TIMEOUT:?}");
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// A proxy in this process.
pub(crate) struct Proxy {
    running: App,
}

/// What a proxy in front of `emulator` is configured with: any free port, no HTTP; `variables` go before the emulator's.
pub(crate) fn config(
    emulator: &Emulator,
    variables: &[(&str, &str)],
    change: impl FnOnce(&mut Settings),
) -> Config {
    let mut settings = Settings {
        port: Some(PortSetting::Port(0)),
        http_port: Some(PortSetting::None),
        max_connections: Some(1000),
        ..Settings::default()
    };
    change(&mut settings);
    let theirs = emulator
        .environment()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let ours = variables
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()));
    Config::resolve(settings, Environment::from_variables(theirs.chain(ours))).unwrap()
}

impl Proxy {
    /// With the default settings; it holds a credential when this returns.
    pub(crate) async fn start(emulator: &Emulator) -> Self {
        Self::with(emulator, |_| {}).await
    }

    /// With other settings; it holds a credential when this returns.
    pub(crate) async fn with(emulator: &Emulator, change: impl FnOnce(&mut Settings)) -> Self {
        let proxy = Self::cold(emulator, &[], change).await.unwrap();
        proxy.warm().await;
        proxy
    }

    /// With other settings and variables, and maybe without a credential yet.
    pub(crate) async fn cold(
        emulator: &Emulator,
        variables: &[(&str, &str)],
        change: impl FnOnce(&mut Settings),
    ) -> Result<Self, AppError> {
        let proxy = Self::unfound(emulator, variables, change).await?;
        proxy.running.found().await?;
        Ok(proxy)
    }

    /// With other settings and variables, and maybe without having found the endpoint.
    pub(crate) async fn unfound(
        emulator: &Emulator,
        variables: &[(&str, &str)],
        change: impl FnOnce(&mut Settings),
    ) -> Result<Self, AppError> {
        Ok(Self {
            running: App::start(config(emulator, variables, change)).await?,
        })
    }

    pub(crate) fn running(&self) -> &App {
        &self.running
    }

    /// Waits for the first credential.
    pub(crate) async fn warm(&self) {
        self.running
            .credentials()
            .get(Instant::now() + TIMEOUT)
            .await
            .unwrap();
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.running
            .addresses()
            .postgres()
            .expect("it listens by TCP")
    }

    /// Where health, metrics and the status page are, which must be switched on.
    pub(crate) fn http(&self) -> SocketAddr {
        self.running.addresses().http.expect("an http port")
    }

    /// Where the notes page is, which must be switched on.
    pub(crate) fn notes(&self) -> SocketAddr {
        self.running.addresses().notes.expect("a notes port")
    }

    pub(crate) fn credentials(&self) -> &CredentialCell {
        self.running.credentials()
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        self.running.metrics()
    }

    /// How an application would be configured: no password, any user.
    pub(crate) fn client_config(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(self.address().port())
            .user("anyone")
            .dbname(DATABASE);
        config
    }

    /// A session of an application.
    pub(crate) async fn client(&self) -> Client {
        within("a session", self.try_client(&self.client_config()))
            .await
            .unwrap()
    }

    pub(crate) async fn try_client(
        &self,
        config: &tokio_postgres::Config,
    ) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = config.connect(NoTls).await?;
        TaskTracker::new().spawn(connection);
        Ok(client)
    }

    /// A session, and the messages that come unasked.
    pub(crate) async fn client_with_messages(
        &self,
    ) -> (
        Client,
        tokio::sync::mpsc::UnboundedReceiver<Result<AsyncMessage, tokio_postgres::Error>>,
    ) {
        let (client, mut connection) = self.client_config().connect(NoTls).await.unwrap();
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        TaskTracker::new().spawn(async move {
            while let Some(message) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if sender.send(message).is_err() {
                    break;
                }
            }
        });
        (client, receiver)
    }

    /// A bare connection, before any message.
    pub(crate) async fn dial(&self) -> Wire {
        Wire::dial(self.address()).await
    }

    /// A bare connection with a session on it.
    pub(crate) async fn session(&self) -> Wire {
        let mut wire = self.dial().await;
        wire.startup(&[("user", "anyone"), ("database", DATABASE)])
            .await;
        wire.welcome().await;
        wire
    }

    /// The error of a refused client.
    pub(crate) async fn refusal(&self) -> ErrorFields {
        let mut wire = self.dial().await;
        wire.startup(&[("user", "anyone"), ("database", DATABASE)])
            .await;
        wire.refusal().await
    }

    /// Drains, as after SIGTERM.
    pub(crate) async fn end(self, hurry: impl Future<Output = ()>) {
        self.running.end(hurry).await;
    }

    /// Waits until no session is left on either side.
    pub(crate) async fn until_quiet(&self) {
        let metrics = self.metrics();
        eventually("the last session ends", async || {
            (metrics.clients_active.get() == 0 && metrics.upstream_active.get() == 0).then_some(())
        })
        .await;
    }
}
