//! Settings, resolved once: flag > `LAKEBASE_PROXY_*` > file > the environment's own names and defaults. No other room
//! reads the environment.

mod endpoint;
mod environment;
mod settings;
mod values;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroU16,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;

pub use self::{
    endpoint::{CredentialSetting, EndpointSettings, ListenSetting},
    environment::Environment,
    settings::Settings,
    values::{DurationSetting, PortSetting},
};
use crate::{
    session::DatabaseMapping,
    telemetry::{DEFAULT_FILTER, LogOptions, without_userinfo},
    tls::Roots,
    upstream::{Keepalive, Limits},
    workspace,
};

const POSTGRES_PORT: u16 = 5432;
pub(crate) const HTTP_PORT: u16 = 9090;
const NOTES_PORT: u16 = 8000;
/// Cloud SQL Auth Proxy's.
pub(crate) const ADMIN_PORT: u16 = 9091;
/// What Lakebase calls the database of a new project.
pub const DEFAULT_DATABASE: &str = "databricks_postgres";
/// Descriptors that are not for sessions: sockets of our own, logs, the workspace, name resolution.
const RESERVED_DESCRIPTORS: u64 = 100;
const MAX_SIGTERM_DELAY: Duration = Duration::from_secs(10);
const CLIENT_LOGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Everything the program needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// What clients are connected to, and where; at least one.
    pub endpoints: Vec<EndpointConfig>,
    /// What the database names that clients send mean.
    pub database_mapping: DatabaseMapping,
    /// Where credentials come from.
    pub workspace: workspace::Settings,
    /// The variables that hold passwords of endpoints.
    pub password_variables: Vec<String>,
    /// How long things may take at the endpoint.
    pub limits: Limits,
    /// How long a client may take to say what it wants.
    pub client_login_timeout: Duration,
    /// Sessions at a time.
    pub max_connections: usize,
    /// How dead peers are noticed.
    pub keepalive: Keepalive,
    /// Where health and metrics are served, if at all.
    pub http: Option<SocketAddr>,
    /// Where the notes page is served, if at all.
    pub notes: Option<SocketAddr>,
    /// Where /quitquitquit is served, if at all.
    pub admin: Option<SocketAddr>,
    /// Whether one login must have worked before the proxy counts as started.
    pub run_connection_test: bool,
    /// How long clients are still accepted after SIGTERM.
    pub min_sigterm_delay: Duration,
    /// How long work under way may go on after a signal.
    pub grace: Duration,
    /// After how long without a client the program ends.
    pub exit_when_idle: Option<Duration>,
    /// Whether SIGTERM leads to exit code 0.
    pub exit_zero_on_sigterm: bool,
    /// What is logged, and how.
    pub log: LogOptions,
}

/// One endpoint, as far as the settings say.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Where its clients connect.
    pub listen: SocketAddr,
    /// Its resource name; looked up when absent.
    pub name: Option<String>,
    /// Its host; looked up when absent.
    pub host: Option<String>,
    /// Its port.
    pub port: u16,
    /// The role to log in as; the workspace identity when absent.
    pub user: Option<String>,
    /// The database for clients that name none, by name or resource id.
    pub database: Option<String>,
    /// The Databricks App whose database it is, where nothing else names it.
    pub app: Option<String>,
    /// Whether its read-only host is meant.
    pub read_only: bool,
    /// Whether and how TLS is verified.
    pub tls: TlsMode,
    /// Where its credential comes from.
    pub credential: CredentialSource,
}

impl EndpointConfig {
    /// The database for clients that name none, where only the settings are asked.
    pub fn database_or_default(&self) -> &str {
        self.database.as_deref().unwrap_or(DEFAULT_DATABASE)
    }

    /// What people know it by: its name, else its host.
    pub fn called(&self) -> &str {
        [&self.name, &self.host, &self.app]
            .into_iter()
            .flatten()
            .next()
            .map_or("default", String::as_str)
    }
}

/// Where a credential comes from.
#[derive(Clone, Debug)]
pub enum CredentialSource {
    /// A program that prints one.
    Command(Vec<String>),
    /// A password that stays as it is.
    Password(SecretString),
    /// A password in a file, which may change.
    PasswordFile(PathBuf),
    /// The workspace mints it.
    Workspace,
}

/// How the wire to the endpoint is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Not: `PGSSLMODE=disable`, to a loopback address only.
    Disabled,
    /// TLS, with certificate and name verified, whatever weaker mode `PGSSLMODE` names.
    Verified(Roots),
}

/// What is wrong with the settings. Display is one line, [`hint`](Self::hint) says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file `{}`", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("in the configuration file `{}`", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why, with the line drawn.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A credential names a variable that is not set.
    #[error("the endpoint `{endpoint}` takes its password from {variable}, which is not set")]
    NoPassword {
        /// Which endpoint.
        endpoint: String,
        /// Which variable.
        variable: String,
    },
    /// A credential without an identity.
    #[error("the endpoint `{endpoint}` has a credential of its own, but no user")]
    NoUser {
        /// Which endpoint.
        endpoint: String,
    },
    /// A credential without a host, so that there is nobody to present it to.
    #[error("the endpoint `{endpoint}` has a credential of its own, but no host")]
    NoHost {
        /// Which endpoint.
        endpoint: String,
    },
    /// An empty command.
    #[error("the endpoint `{endpoint}` takes its credential from a command that is empty")]
    NoCommand {
        /// Which endpoint.
        endpoint: String,
    },
    /// No endpoint is named.
    #[error("no endpoint is named: neither ENDPOINT_NAME nor LAKEBASE_ENDPOINT is set")]
    NoEndpoint,
    /// Both variables name one, and not the same.
    #[error("ENDPOINT_NAME is `{endpoint_name}` but LAKEBASE_ENDPOINT is `{lakebase_endpoint}`")]
    TwoEndpoints {
        /// `ENDPOINT_NAME`.
        endpoint_name: String,
        /// `LAKEBASE_ENDPOINT`.
        lakebase_endpoint: String,
    },
    /// A variable holds something it cannot.
    #[error("{variable} is `{value}`, which is not {expected}")]
    Variable {
        /// Which.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// What it should.
        expected: &'static str,
    },
    /// The host is a pooler's, which takes no OAuth.
    #[error("PGHOST `{host}` is a pooler's, which takes no OAuth credential")]
    Pooler {
        /// The host.
        host: String,
    },
    /// TLS off towards another machine.
    #[error("PGSSLMODE is `disable`, but `{host}` is not this machine")]
    PlainRemote {
        /// The host.
        host: String,
    },
    /// Listening where others could connect, without having been told to.
    #[error("--address {address} can be reached from other machines")]
    Remote {
        /// The address.
        address: IpAddr,
    },
    /// Nothing to do.
    #[error("--port is `none`, and there is no other way in")]
    NoListener,
}

impl ConfigError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::File { .. } => {
                "check the path, or leave --config-file out: every setting has a flag and a variable"
            }
            Self::Parse { .. } => "config/lakebase-proxy.toml shows every setting",
            Self::NoPassword { .. } => "set it where the proxy is started",
            Self::NoUser { .. } => "add `user` to its table: the role that the password belongs to",
            Self::NoHost { .. } => "add `host` to its table",
            Self::NoCommand { .. } => {
                "write it as `credential = { command = [\"program\", \"argument\"] }`"
            }
            Self::NoEndpoint => {
                "set ENDPOINT_NAME=projects/<project>/branches/<branch>/endpoints/<endpoint>; `databricks postgres list-endpoints projects/<project>/branches/<branch>` shows it. To try without an account: lakebase-proxy demo"
            }
            Self::TwoEndpoints { .. } => "unset one of them",
            Self::Variable { .. } => return None,
            Self::Pooler { .. } => "use the endpoint's own host: the same name without `-pooler`",
            Self::PlainRemote { .. } => {
                "leave PGSSLMODE out, or set it to `require`: certificates are always verified"
            }
            Self::Remote { .. } => {
                "whoever reaches it is the service principal; if that is meant, add --allow-remote"
            }
            Self::NoListener => "give it a port",
        })
    }
}

impl Config {
    /// Puts the layers together and checks the result.
    pub fn resolve(settings: Settings, environment: Environment) -> Result<Self, ConfigError> {
        let settings = settings.with_file()?;
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);

        let address = settings.address.unwrap_or(loopback);
        let http = socket(
            settings.http_address.unwrap_or(loopback),
            settings.http_port,
            HTTP_PORT,
        );

        let app_port = match &environment.app_port {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| ConfigError::Variable {
                variable: "DATABRICKS_APP_PORT",
                value: without_userinfo(text).into_owned(),
                expected: "a port",
            })?),
        };
        let notes_address = settings.notes_address.unwrap_or_else(|| {
            // Databricks Apps routes to the port on every address.
            if app_port.is_some() {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            } else {
                loopback
            }
        });
        let notes = settings
            .notes
            .unwrap_or(false)
            .then(|| {
                socket(
                    notes_address,
                    settings.notes_port,
                    app_port.unwrap_or(NOTES_PORT),
                )
            })
            .flatten();

        let tables = match settings.endpoints {
            tables if tables.is_empty() => vec![of_environment(&environment, settings.read_only)?],
            tables => tables,
        };
        let mut next_port = match settings.port {
            None => POSTGRES_PORT,
            Some(PortSetting::Port(port)) => port,
            Some(PortSetting::None) => return Err(ConfigError::NoListener),
        };
        let password_variables = tables
            .iter()
            .filter_map(|table| match &table.credential {
                Some(CredentialSetting::PasswordEnv(variable)) => Some(variable.clone()),
                _ => None,
            })
            .collect();
        let mut endpoints = Vec::with_capacity(tables.len());
        for table in tables {
            let listen = match table.listen {
                Some(listen) => SocketAddr::new(listen.address.unwrap_or(address), listen.port),
                None => SocketAddr::new(address, next_port),
            };
            if !listen.ip().to_canonical().is_loopback() && !settings.allow_remote.unwrap_or(false)
            {
                return Err(ConfigError::Remote {
                    address: listen.ip(),
                });
            }
            // Any free port for one is any free port for the next.
            next_port = if listen.port() == 0 {
                0
            } else {
                listen.port().saturating_add(1)
            };
            endpoints.push(endpoint(table, listen, &environment)?);
        }

        let or = |setting: Option<DurationSetting>, default| {
            setting.map_or(default, |DurationSetting(time)| time)
        };
        let (limits, keepalive) = (Limits::default(), Keepalive::default());
        Ok(Self {
            endpoints,
            database_mapping: settings.database_mapping.unwrap_or_default(),
            workspace: environment.workspace.with_profile(settings.profile),
            password_variables,
            limits: Limits {
                connect_timeout: or(settings.connect_timeout, limits.connect_timeout),
                server_connect_timeout: or(
                    settings.server_connect_timeout,
                    limits.server_connect_timeout,
                ),
                capacity_timeout: or(settings.capacity_timeout, limits.capacity_timeout),
            },
            client_login_timeout: or(settings.client_login_timeout, CLIENT_LOGIN_TIMEOUT),
            max_connections: match settings.max_connections {
                None | Some(0) => max_connections_by_descriptors(),
                Some(limit) => limit,
            },
            keepalive: Keepalive {
                idle: or(settings.tcp_keepalive_idle, keepalive.idle),
                interval: or(settings.tcp_keepalive_interval, keepalive.interval),
                count: settings.tcp_keepalive_count.unwrap_or(keepalive.count),
                user_timeout: or(settings.tcp_user_timeout, keepalive.user_timeout),
            },
            http,
            notes,
            admin: settings
                .quitquitquit
                .unwrap_or(false)
                .then(|| socket(loopback, settings.admin_port, ADMIN_PORT))
                .flatten(),
            run_connection_test: settings.run_connection_test.unwrap_or(false),
            min_sigterm_delay: or(settings.min_sigterm_delay, Duration::ZERO),
            grace: or(settings.max_sigterm_delay, MAX_SIGTERM_DELAY),
            exit_when_idle: settings
                .exit_when_idle
                .map(|DurationSetting(time)| time)
                .filter(|time| !time.is_zero()),
            exit_zero_on_sigterm: settings.exit_zero_on_sigterm.unwrap_or(false),
            log: LogOptions {
                filter: settings
                    .log_filter
                    .unwrap_or_else(|| DEFAULT_FILTER.to_owned()),
                structured: settings.structured_logs.unwrap_or(false),
            },
        })
    }
}

impl Settings {
    /// These settings, and the file's where they say nothing.
    pub fn with_file(mut self) -> Result<Self, ConfigError> {
        match self.config_file.take() {
            Some(path) => Ok(self.or(read(&path)?)),
            None => Ok(self),
        }
    }
}

/// Reads a file of settings.
pub fn read(path: &Path) -> Result<Settings, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::File {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

fn socket(address: IpAddr, port: Option<PortSetting>, default: u16) -> Option<SocketAddr> {
    match port.unwrap_or(PortSetting::Port(default)) {
        PortSetting::None => None,
        PortSetting::Port(port) => Some(SocketAddr::new(address, port)),
    }
}

/// The one endpoint that the tutorial's variables define.
fn of_environment(
    environment: &Environment,
    read_only: Option<bool>,
) -> Result<EndpointSettings, ConfigError> {
    let name = match (&environment.endpoint_name, &environment.lakebase_endpoint) {
        (Some(endpoint_name), Some(lakebase_endpoint)) if endpoint_name != lakebase_endpoint => {
            return Err(ConfigError::TwoEndpoints {
                endpoint_name: endpoint_name.clone(),
                lakebase_endpoint: lakebase_endpoint.clone(),
            });
        }
        (Some(name), _) | (None, Some(name)) => Some(name.clone()),
        (None, None) => None,
    };
    let port = environment.port.as_ref().map(|text| {
        values::upstream_port(text).map_err(|_| ConfigError::Variable {
            variable: "PGPORT",
            value: without_userinfo(text).into_owned(),
            expected: "a port (1 to 65535)",
        })
    });
    Ok(EndpointSettings {
        name,
        host: environment.host.clone(),
        port: port.transpose()?,
        user: environment.user.clone(),
        database: environment.database.clone(),
        read_only: read_only.unwrap_or(false),
        ..EndpointSettings::default()
    })
}

fn endpoint(
    table: EndpointSettings,
    listen: SocketAddr,
    environment: &Environment,
) -> Result<EndpointConfig, ConfigError> {
    // Databricks Apps tells an app its database's host, but not its name.
    let app = match &table.name {
        Some(_) => None,
        None => environment.app_name.clone(),
    };
    let called = [&table.name, &table.host, &app]
        .into_iter()
        .flatten()
        .next();
    let called = match (called, &environment.workspace.host) {
        (Some(called), _) => called.clone(),
        // The workspace may tell what there is to name.
        (None, Some(_)) => "default".to_owned(),
        (None, None) => return Err(ConfigError::NoEndpoint),
    };
    let credential = match &table.credential {
        None => CredentialSource::Workspace,
        Some(CredentialSetting::Command(command)) if command.is_empty() => {
            return Err(ConfigError::NoCommand { endpoint: called });
        }
        Some(CredentialSetting::Command(command)) => CredentialSource::Command(command.clone()),
        Some(CredentialSetting::PasswordFile(path)) => CredentialSource::PasswordFile(path.clone()),
        Some(CredentialSetting::PasswordEnv(variable)) => match environment.secret(variable) {
            Some(password) => CredentialSource::Password(password),
            None => {
                return Err(ConfigError::NoPassword {
                    endpoint: called,
                    variable: variable.clone(),
                });
            }
        },
    };
    if let CredentialSource::Workspace = credential {
        if let Some(host) = &table.host
            && host
                .split('.')
                .next()
                .is_some_and(|label| label.ends_with("-pooler"))
        {
            return Err(ConfigError::Pooler {
                host: without_userinfo(host).into_owned(),
            });
        }
    } else if table.host.is_none() {
        return Err(ConfigError::NoHost { endpoint: called });
    } else if table.user.is_none() {
        return Err(ConfigError::NoUser { endpoint: called });
    }
    let tls = tls_mode(
        environment.sslmode.as_deref(),
        environment.sslrootcert.as_deref(),
        table.host.as_deref(),
    )?;
    Ok(EndpointConfig {
        listen,
        name: table.name,
        host: table.host,
        port: table.port.map_or(POSTGRES_PORT, NonZeroU16::get),
        user: table.user,
        database: table.database,
        app,
        read_only: table.read_only,
        tls,
        credential,
    })
}

fn tls_mode(
    sslmode: Option<&str>,
    sslrootcert: Option<&str>,
    host: Option<&str>,
) -> Result<TlsMode, ConfigError> {
    let roots = match sslrootcert {
        None | Some("system") => Roots::System,
        Some(path) => Roots::File(path.into()),
    };
    match (sslmode, host) {
        (None | Some("allow" | "prefer" | "require" | "verify-ca" | "verify-full"), _) => {
            Ok(TlsMode::Verified(roots))
        }
        (Some("disable"), Some(host)) if is_this_machine(host) => Ok(TlsMode::Disabled),
        (Some("disable"), host) => Err(ConfigError::PlainRemote {
            host: without_userinfo(host.unwrap_or("the endpoint")).into_owned(),
        }),
        (Some(other), _) => Err(ConfigError::Variable {
            variable: "PGSSLMODE",
            value: without_userinfo(other).into_owned(),
            expected: "one of disable, allow, prefer, require, verify-ca, verify-full",
        }),
    }
}

fn is_this_machine(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Two descriptors a session, after the soft limit has been raised to the hard one.
fn max_connections_by_descriptors() -> usize {
    let limit = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    usize::try_from(limit.saturating_sub(RESERVED_DESCRIPTORS) / 2)
        .unwrap_or(usize::MAX)
        .clamp(1, 1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "projects/p/branches/b/endpoints/e";

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::from_variables(variables.iter().map(|&(n, v)| (n.to_owned(), v.to_owned())))
    }

    fn resolve(variables: &[(&str, &str)], file: &str) -> Result<Config, ConfigError> {
        let mut all = vec![("ENDPOINT_NAME", NAME)];
        all.extend(variables);
        Config::resolve(toml::from_str(file).unwrap(), environment(&all))
    }

    #[test]
    fn the_tutorials_variables_are_enough() {
        let config = resolve(
            &[
                ("PGHOST", "ep-x.database.us-east-1.cloud.databricks.com"),
                ("PGDATABASE", "databricks_postgres"),
                ("PGUSER", "0f7d6fce-0000-4000-8000-000000000000"),
                ("PGPORT", "5432"),
                ("PGSSLMODE", "require"),
            ],
            "",
        )
        .unwrap();
        let [endpoint] = &config.endpoints[..] else {
            panic!("one endpoint")
        };
        assert_eq!(endpoint.listen, "127.0.0.1:5432".parse().unwrap());
        assert_eq!(config.http, Some("127.0.0.1:9090".parse().unwrap()));
        assert_eq!(config.notes, None);
        assert_eq!(
            config.endpoints[0].tls,
            TlsMode::Verified(Roots::System),
            "require does not mean: do not verify"
        );
        assert!(config.max_connections > 0);
    }

    #[test]
    fn settings_of_a_file_hold_where_nothing_goes_before_them() {
        let file = "port = 6000\nhttp_port = \"none\"\nconnect_timeout = \"1m 30s\"\nnotes = true\nmax_connections = 7";
        let config = resolve(&[("DATABRICKS_APP_PORT", "8080")], file).unwrap();
        assert_eq!(config.endpoints[0].listen.port(), 6000);
        assert_eq!(config.http, None);
        assert_eq!(config.limits.connect_timeout, Duration::from_secs(90));
        assert_eq!(config.notes, Some("0.0.0.0:8080".parse().unwrap()));
        assert_eq!(config.max_connections, 7);
        let flag = Settings {
            port: Some(PortSetting::Port(1)),
            ..Settings::default()
        };
        assert_eq!(
            flag.or(toml::from_str(file).unwrap()).port,
            Some(PortSetting::Port(1))
        );
    }

    #[test]
    fn blank_variables_count_as_unset() {
        let config = resolve(
            &[
                ("PGHOST", " "),
                ("PGPORT", ""),
                ("PGSSLROOTCERT", "system "),
            ],
            "",
        )
        .unwrap();
        assert_eq!(config.endpoints[0].host, None);
        assert_eq!(config.endpoints[0].port, 5432);
        assert_eq!(config.endpoints[0].tls, TlsMode::Verified(Roots::System));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_a_hint() {
        let error = |variables: &[(&str, &str)], file: &str| resolve(variables, file).unwrap_err();
        assert!(matches!(
            error(
                &[("LAKEBASE_ENDPOINT", "projects/p/branches/b/endpoints/other")],
                ""
            ),
            ConfigError::TwoEndpoints { .. }
        ));
        assert!(matches!(
            error(&[], "address = \"0.0.0.0\""),
            ConfigError::Remote { .. }
        ));
        assert!(matches!(
            error(
                &[("PGHOST", "db.example.com"), ("PGSSLMODE", "disable")],
                ""
            ),
            ConfigError::PlainRemote { .. }
        ));
        assert!(matches!(
            error(&[("PGSSLMODE", "off")], ""),
            ConfigError::Variable { .. }
        ));
        assert!(matches!(
            error(&[("PGPORT", "0")], ""),
            ConfigError::Variable { .. }
        ));
        assert!(matches!(
            error(
                &[("PGHOST", "ep-x-pooler.database.cloud.databricks.com")],
                ""
            ),
            ConfigError::Pooler { .. }
        ));
        assert!(matches!(
            error(&[], "port = \"none\""),
            ConfigError::NoListener
        ));
        let none = Config::resolve(Settings::default(), environment(&[])).unwrap_err();
        assert!(
            none.hint()
                .is_some_and(|hint| hint.contains("ENDPOINT_NAME="))
        );
        assert!(resolve(&[("PGHOST", "localhost"), ("PGSSLMODE", "disable")], "").is_ok());
        assert!(resolve(&[], "address = \"0.0.0.0\"\nallow_remote = true").is_ok());
    }

    #[test]
    fn several_endpoints_listen_one_beside_the_other() {
        let config = resolve(
            &[("PGHOST", "not.for.tables"), ("SECRET", "s")],
            "[[endpoint]]\nname = \"projects/p/branches/b/endpoints/e\"\n\
             [[endpoint]]\nname = \"projects/p/branches/b/endpoints/e\"\nread_only = true\ndatabase = \"d\"\n\
             [[endpoint]]\nhost = \"pg\"\nuser = \"u\"\nlisten = 7000\ncredential = { password_env = \"SECRET\" }",
        )
        .unwrap();
        let ports: Vec<_> = config
            .endpoints
            .iter()
            .map(|endpoint| endpoint.listen.port())
            .collect();
        assert_eq!(ports, [5432, 5433, 7000]);
        assert_eq!(
            config.endpoints[0].host, None,
            "PGHOST defines the one endpoint where there is no table"
        );
        assert!(config.endpoints[1].read_only);
        assert!(matches!(
            config.endpoints[2].credential,
            CredentialSource::Password(_)
        ));
    }

    #[test]
    fn a_credential_of_its_own_needs_all_that_the_workspace_would_tell() {
        let error =
            |rest: &str| resolve(&[("SECRET", "s")], &format!("[[endpoint]]\n{rest}")).unwrap_err();
        let password = "credential = { password_env = \"SECRET\" }";
        assert!(matches!(
            error(&format!("name = \"x\"\n{password}")),
            ConfigError::NoHost { .. }
        ));
        assert!(matches!(
            error(&format!("host = \"h\"\n{password}")),
            ConfigError::NoUser { .. }
        ));
        let unset = "host = \"h\"\nuser = \"u\"\ncredential = { password_env = \"UNSET\" }";
        assert!(matches!(error(unset), ConfigError::NoPassword { .. }));
        let empty = "host = \"h\"\nuser = \"u\"\ncredential = { command = [] }";
        assert!(matches!(error(empty), ConfigError::NoCommand { .. }));
        assert!(matches!(error("user = \"u\""), ConfigError::NoEndpoint));
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<Settings>("prot = 1").is_err());
    }
}
