//! Settings, resolved once: flag > `LAKEBASE_PROXY_*` > file > the environment's own names and defaults. No other room
//! reads the environment.

mod environment;
mod settings;
mod values;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::{
    environment::Environment,
    settings::Settings,
    values::{DurationSetting, PortSetting},
};
use crate::{
    session::{DatabaseMapping, Databases},
    telemetry::{DEFAULT_FILTER, LogOptions},
    tls::Roots,
    upstream::{Keepalive, Limits},
    workspace::{self, EndpointName, NameError},
};

const POSTGRES_PORT: u16 = 5432;
const HTTP_PORT: u16 = 9090;
const NOTES_PORT: u16 = 8000;
/// What Lakebase calls the database of a new project.
const DEFAULT_DATABASE: &str = "databricks_postgres";
/// Descriptors that are not for sessions: sockets of our own, logs, the workspace, name resolution.
const RESERVED_DESCRIPTORS: u64 = 100;
const MAX_SIGTERM_DELAY: Duration = Duration::from_secs(10);
const CLIENT_LOGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Everything the program needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where Postgres clients connect.
    pub listen: SocketAddr,
    /// What they are connected to.
    pub endpoint: EndpointConfig,
    /// Which database they get.
    pub databases: Databases,
    /// Where credentials come from.
    pub workspace: workspace::Settings,
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
    /// How long work under way may go on after a signal.
    pub grace: Duration,
    /// Whether SIGTERM leads to exit code 0.
    pub exit_zero_on_sigterm: bool,
    /// What is logged, and how.
    pub log: LogOptions,
}

/// One endpoint, as far as the settings say.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Its resource name, for which credentials are minted.
    pub name: EndpointName,
    /// Its host; looked up when absent.
    pub host: Option<String>,
    /// Its port.
    pub port: u16,
    /// The role to log in as; the workspace identity when absent.
    pub user: Option<String>,
    /// Whether and how TLS is verified.
    pub tls: TlsMode,
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
    /// The endpoint's name is malformed.
    #[error(transparent)]
    Name(#[from] NameError),
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
            Self::NoEndpoint => {
                "set ENDPOINT_NAME=projects/<project>/branches/<branch>/endpoints/<endpoint>; `databricks postgres list-endpoints projects/<project>/branches/<branch>` shows it. To try without an account: lakebase-proxy demo"
            }
            Self::TwoEndpoints { .. } => "unset one of them",
            Self::Name(_) => {
                "the form is projects/<project>/branches/<branch>/endpoints/<endpoint>"
            }
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
        let settings = match settings.config_file.clone() {
            Some(path) => settings.or(read(&path)?),
            None => settings,
        };
        let environment_port = |name, text: Option<String>| {
            text.map(|text| {
                values::upstream_port(&text)
                    .map(std::num::NonZeroU16::get)
                    .map_err(|_| ConfigError::Variable {
                        variable: name,
                        value: text,
                        expected: "a port (1 to 65535)",
                    })
            })
            .transpose()
        };
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);

        let address = settings.address.unwrap_or(loopback);
        if !address.to_canonical().is_loopback() && !settings.allow_remote.unwrap_or(false) {
            return Err(ConfigError::Remote { address });
        }
        let listen =
            socket(address, settings.port, POSTGRES_PORT).ok_or(ConfigError::NoListener)?;
        let http = socket(
            settings.http_address.unwrap_or(loopback),
            settings.http_port,
            HTTP_PORT,
        );

        let app_port = environment_port("DATABRICKS_APP_PORT", environment.app_port)?;
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

        let name = match (environment.endpoint_name, environment.lakebase_endpoint) {
            (Some(endpoint_name), Some(lakebase_endpoint))
                if endpoint_name != lakebase_endpoint =>
            {
                return Err(ConfigError::TwoEndpoints {
                    endpoint_name,
                    lakebase_endpoint,
                });
            }
            (Some(name), _) | (None, Some(name)) => name.parse()?,
            (None, None) => return Err(ConfigError::NoEndpoint),
        };
        if let Some(host) = &environment.host
            && host
                .split('.')
                .next()
                .is_some_and(|label| label.ends_with("-pooler"))
        {
            return Err(ConfigError::Pooler { host: host.clone() });
        }
        let endpoint = EndpointConfig {
            name,
            tls: tls_mode(
                environment.sslmode.as_deref(),
                environment.sslrootcert.as_deref(),
                environment.host.as_deref(),
            )?,
            host: environment.host,
            port: environment_port("PGPORT", environment.port)?.unwrap_or(POSTGRES_PORT),
            user: environment.user,
        };

        let or = |setting: Option<DurationSetting>, default| {
            setting.map_or(default, |DurationSetting(time)| time)
        };
        let (limits, keepalive) = (Limits::default(), Keepalive::default());
        Ok(Self {
            listen,
            endpoint,
            databases: Databases {
                default: environment
                    .database
                    .unwrap_or_else(|| DEFAULT_DATABASE.to_owned()),
                mapping: settings
                    .database_mapping
                    .unwrap_or(DatabaseMapping::Default),
            },
            workspace: environment.workspace,
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
            grace: or(settings.max_sigterm_delay, MAX_SIGTERM_DELAY),
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
            host: host.unwrap_or("the endpoint").to_owned(),
        }),
        (Some(other), _) => Err(ConfigError::Variable {
            variable: "PGSSLMODE",
            value: other.to_owned(),
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
        assert_eq!(config.listen, "127.0.0.1:5432".parse().unwrap());
        assert_eq!(config.http, Some("127.0.0.1:9090".parse().unwrap()));
        assert_eq!(config.notes, None);
        assert_eq!(
            config.endpoint.tls,
            TlsMode::Verified(Roots::System),
            "require does not mean: do not verify"
        );
        assert!(config.max_connections > 0);
    }

    #[test]
    fn settings_of_a_file_hold_where_nothing_goes_before_them() {
        let file = "port = 6000\nhttp_port = \"none\"\nconnect_timeout = \"1m 30s\"\nnotes = true\nmax_connections = 7";
        let config = resolve(&[("DATABRICKS_APP_PORT", "8080")], file).unwrap();
        assert_eq!(config.listen.port(), 6000);
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
        assert_eq!(config.endpoint.host, None);
        assert_eq!(config.endpoint.port, 5432);
        assert_eq!(config.endpoint.tls, TlsMode::Verified(Roots::System));
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
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<Settings>("prot = 1").is_err());
    }
}
