//! State that all endpoints of the process share.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    AppError,
    endpoint::{Endpoints, Served},
};
use crate::{
    admin::deep::LoginTarget,
    clock::Clock,
    config::{ClientTlsSetting, Config, EndpointConfig, Settings, WorkspaceSettings},
    console::Console,
    listener::{AbsentSockets, SessionThreads},
    net::descriptors,
    session::{
        AccessPolicy, KnownPassword, ListenerCertificate, LocalPassword, ProcessContext,
        SessionConfig, SharedConfig,
    },
    shutdown::Shutdown,
    status::{Health, HttpListener, Registry, Snapshot},
    systemd::Notifier,
    telemetry::{LogHandle, Metrics},
    workspace::Workspace,
};

/// Shared by all endpoints.
pub(super) struct Shared {
    pub(super) endpoints: Endpoints,
    /// Shared by all sessions.
    pub(super) process: Arc<ProcessContext>,
    pub(super) observer: Arc<Observer>,
    pub(super) absent: AbsentSockets,
    console: Arc<Console>,
    /// The metrics of the first endpoint; rendering them includes all endpoints.
    pub(super) metrics: Arc<Metrics>,
    pub(super) threads: Arc<SessionThreads>,
    /// Tasks of clients, from accept on.
    pub(super) clients: TaskTracker,
    /// All other tasks.
    pub(super) helpers: TaskTracker,
    /// Ends the helpers.
    pub(super) stop: CancellationToken,
    pub(super) clock: Clock,
    /// The password of clients, for the child of `exec` and the notes page.
    pub(super) known_password: KnownPassword,
    pub(super) log: Option<LogHandle>,
    pub(super) notifier: Notifier,
    workspace: OnceLock<Workspace>,
    workspace_settings: WorkspaceSettings,
}

/// The access policy of the configuration. What has not changed since `before` is kept: a self-signed certificate, the
/// count of password attempts, the record of warnings.
pub(super) fn access_policy(
    config: &Config,
    before: Option<(&Config, &AccessPolicy)>,
) -> Result<AccessPolicy, AppError> {
    // A new self-signed certificate would have another fingerprint than the one logged at startup.
    let same_tls = before.filter(|(old, _)| old.client_tls == config.client_tls);
    let (certificate, logged) = match same_tls {
        Some((_, access)) => (access.certificate.clone(), Arc::clone(&access.logged)),
        None => {
            let certificate = ListenerCertificate::new(&config.client_tls)?;
            (certificate.map(Arc::new), Arc::default())
        }
    };
    let same_password = before.filter(|(old, _)| old.has_same_password(config));
    let password = match (same_password, &config.local_password) {
        (Some((_, access)), _) => access.password.clone(),
        (None, None) => None,
        (None, Some(password)) => {
            let message = "cannot derive a verifier from the password for clients";
            let checked = LocalPassword::new(password);
            Some(Arc::new(
                checked.ok_or_else(|| AppError::new(message, None::<String>))?,
            ))
        }
    };
    Ok(AccessPolicy {
        allowed_uids: config.settings.unix_socket_allowed_uids(),
        logged,
        certificate,
        requires_tls: config.settings.client_tls() == ClientTlsSetting::Required,
        password,
    })
}

impl Shared {
    pub(super) fn new(
        config: &Config,
        log: Option<LogHandle>,
        notifier: Notifier,
    ) -> Result<Self, AppError> {
        let first = config.endpoints.first();
        let metrics = Metrics::of_endpoint(first.map_or("", EndpointConfig::display_name))?;
        if let Some(log) = &log {
            log.count_dropped(&metrics.process.log_lines_dropped);
        }
        let endpoints = Endpoints::default();
        let shutdown = Shutdown::new();
        let access = Arc::new(access_policy(config, None)?);
        let session_config = SessionConfig::new(&config.settings, access);
        let session_config: SharedConfig = Arc::new(ArcSwap::from_pointee(session_config));
        let absent = AbsentSockets::default();
        let (served, gone) = (endpoints.clone(), absent.clone());
        let health = Arc::new(Health::new(move || {
            // A removed Unix socket fails readiness until it is made again: no client finds it.
            match (gone.check(), served.any_ready()) {
                (Err(gone), Err(credential)) => Err(format!("{credential}; {gone}")),
                (gone, credential) => gone.and(credential),
            }
        }));
        let observer = Arc::new(Observer {
            started: Timestamp::now(),
            origin: Instant::now(),
            endpoints: endpoints.clone(),
            config: Arc::clone(&session_config),
            registry: Registry::default(),
            shutdown: shutdown.clone(),
            health: Arc::clone(&health),
            settings: watch::Sender::new(config.settings.clone()),
            http: OnceLock::new(),
        });
        let (of_console, served) = (Arc::clone(&observer), endpoints.clone());
        // A closure, since the console is in a layer below `app`.
        let console = Arc::new(Console::new(
            Arc::new(move || of_console.snapshot()),
            Arc::new(move || {
                let served = served.now();
                let contexts = served.iter().map(|served| Arc::clone(&served.context));
                contexts.collect()
            }),
            health,
        ));
        let shared = Self {
            endpoints,
            process: Arc::new(ProcessContext {
                config: session_config,
                shutdown,
                max_handshakes: descriptors::max_handshakes(),
                console: Some(Arc::clone(&console) as _),
            }),
            observer,
            absent,
            console,
            metrics,
            threads: Arc::new(
                SessionThreads::start(config.threads).map_err(|error| AppError::threads(&error))?,
            ),
            clients: TaskTracker::new(),
            helpers: TaskTracker::new(),
            stop: CancellationToken::new(),
            clock: Clock::system(),
            known_password: KnownPassword::default(),
            log,
            notifier,
            workspace: OnceLock::new(),
            workspace_settings: config.workspace.clone(),
        };
        shared.announce(config);
        Ok(shared)
    }

    /// Runs a background task until the program stops.
    pub(super) fn run(&self, task: impl Future<Output: Send> + Send + 'static) {
        self.helpers
            .spawn(self.stop.clone().run_until_cancelled_owned(task));
    }

    /// The settings in force.
    pub(super) fn settings(&self) -> watch::Ref<'_, Settings> {
        self.observer.settings.borrow()
    }

    /// Applies the settings that a reload changes.
    pub(super) fn apply(&self, config: &Config, access: Arc<AccessPolicy>) {
        let session_config = SessionConfig::new(&config.settings, access);
        self.process.config.store(Arc::new(session_config));
        for served in self.endpoints.now().iter() {
            let its = |endpoint: &&EndpointConfig| endpoint.has_same_listener(&served.config);
            let pools = &served.context.pools;
            match config.endpoints.iter().find(its) {
                Some(endpoint) => pools.apply(endpoint.pool_mode, endpoint.pool(&config.settings)),
                // A removed endpoint keeps its mode; it has no new clients.
                None => pools.apply(pools.mode(), config.settings.pool()),
            }
        }
        self.announce(config);
    }

    /// Passes the settings on to everything but sessions.
    fn announce(&self, config: &Config) {
        self.known_password.set(config.local_password.clone());
        let limit = self.process.config.load().max_connections;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.metrics.process.clients_limit.set(limit);
        // Not `send`, which drops the value if nothing subscribes.
        self.observer.settings.send_replace(config.settings.clone());
        self.console.set_over_tcp(config.settings.admin_console());
    }

    /// The workspace, opened for the first endpoint that needs it.
    pub(super) fn workspace(&self) -> Result<Workspace, AppError> {
        if let Some(workspace) = self.workspace.get() {
            return Ok(workspace.clone());
        }
        let (settings, clock) = (self.workspace_settings.clone(), self.clock.clone());
        let workspace = open_workspace(settings, clock, Arc::clone(&self.metrics))?;
        // `get_or_init` cannot report the errors above.
        Ok(self.workspace.get_or_init(|| workspace).clone())
    }
}

pub(super) fn open_workspace(
    settings: WorkspaceSettings,
    clock: Clock,
    metrics: Arc<Metrics>,
) -> Result<Workspace, AppError> {
    let tls = Workspace::tls(&settings)?;
    Ok(Workspace::new(settings, &tls, clock, metrics)?)
}

/// The state that a snapshot is taken of.
pub(super) struct Observer {
    started: Timestamp,
    origin: Instant,
    endpoints: Endpoints,
    config: SharedConfig,
    pub(super) registry: Registry,
    shutdown: Shutdown,
    pub(super) health: Arc<Health>,
    /// The settings in force.
    pub(super) settings: watch::Sender<Settings>,
    pub(super) http: OnceLock<Vec<HttpListener>>,
}

impl Observer {
    pub(super) fn snapshot(&self) -> Snapshot {
        let endpoints = self.endpoints.now();
        Snapshot {
            started: self.started,
            uptime: self.origin.elapsed(),
            phase: self.shutdown.phase(),
            is_started: self.health.startup().is_ok(),
            readiness: self.health.readiness(),
            max_connections: self.config.load().max_connections,
            settings: self.settings.borrow().shown(),
            http: self.http.get().cloned().unwrap_or_default(),
            registry: self.registry.clone(),
            endpoints: endpoints.iter().map(|served| served.snapshot()).collect(),
        }
    }

    /// The endpoints, for deep checks.
    pub(super) fn login_targets(&self) -> Vec<LoginTarget> {
        let connect = self.config.load().connect;
        let endpoints = self.endpoints.now();
        let target = |served: &Arc<Served>| LoginTarget {
            name: served.shown_name(),
            route: served.context.route.clone(),
            connect,
        };
        endpoints.iter().map(target).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, Setting};

    /// Read from the settings in force at each use, or applied by a step of the reload.
    const READ_AT_USE: [&str; 8] = [
        "admin_console",
        "allow_remote",
        "exit_when_idle",
        "exit_zero_on_sigterm",
        "log_filter",
        "max_sigterm_delay",
        "min_sigterm_delay",
        "unix_socket_mode",
    ];
    /// Resolved into `Config::client_tls` and `Config::local_password`, of which [`access_policy`] is made.
    const RESOLVED: [&str; 5] = [
        "client_tls",
        "client_tls_cert",
        "client_tls_key",
        "local_auth",
        "local_password_file",
    ];

    fn session_config_of(file: &str) -> String {
        let name = ("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e");
        let environment = Environment::from_variables([(name.0.to_owned(), name.1.to_owned())]);
        let config = Config::resolve(toml::from_str(file).unwrap(), environment).unwrap();
        let access = access_policy(&config, None).unwrap();
        let sessions = SessionConfig::new(&config.settings, Arc::new(access));
        format!("{sessions:?} {:?}", config.settings.pool())
    }

    fn another_value(setting: &Setting) -> String {
        match (setting.key, &setting.default) {
            ("database_mapping", _) => "\"exact\"".to_owned(),
            (_, Some(toml::Value::Boolean(value))) => (!value).to_string(),
            (_, Some(toml::Value::Integer(_))) => "7".to_owned(),
            (_, Some(_)) => "\"7s\"".to_owned(),
            (_, None) => setting.example.unwrap().to_owned(),
        }
    }

    #[test]
    fn a_live_setting_reaches_the_next_session() {
        let default = session_config_of("");
        for setting in Settings::declared() {
            let is_applied_elsewhere =
                READ_AT_USE.contains(&setting.key) || RESOLVED.contains(&setting.key);
            if !setting.is_live() || is_applied_elsewhere {
                continue;
            }
            let file = format!("{} = {}", setting.key, another_value(&setting));
            assert_ne!(
                session_config_of(&file),
                default,
                "{file} reaches no session; carry it, or add it to READ_AT_USE"
            );
        }
    }
}
