//! From the layers of settings to the one [`Config`].

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    time::Duration,
};

use super::{
    Config, ConfigError, CredentialSetting, DEFAULT_FILTER, DurationSetting, Environment,
    Keepalive, LogOptions, PortSetting, Settings, Timeouts, clash, listen::PlaceMaker, local,
    shown::shown, tables, without_userinfo,
};
use crate::descriptors;

pub(super) const POSTGRES_PORT: u16 = 5432;
pub(crate) const HTTP_PORT: u16 = 9090;
const NOTES_PORT: u16 = 8000;
/// Cloud SQL Auth Proxy's.
pub(crate) const ADMIN_PORT: u16 = 9091;
/// What Lakebase calls the database of a new project.
pub const DEFAULT_DATABASE: &str = "databricks_postgres";
const MAX_SIGTERM_DELAY: Duration = Duration::from_secs(10);
const CLIENT_LOGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Threads that serve clients at most, lest a slip of the finger starts millions.
const MAX_THREADS: usize = 1024;

/// As many threads as there are processors for us (in a container, as its limit allows), unless `TOKIO_WORKER_THREADS` is
/// set.
fn threads(variable: Option<&str>) -> Result<NonZeroUsize, ConfigError> {
    let Some(value) = variable else {
        return Ok(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    };
    let threads = value.parse().ok();
    threads
        .filter(|threads: &NonZeroUsize| threads.get() <= MAX_THREADS)
        .ok_or_else(|| ConfigError::Variable {
            variable: "TOKIO_WORKER_THREADS",
            value: value.to_owned(),
            expected: "a number of threads (1 to 1024)",
        })
}

impl Config {
    /// Puts the layers together and checks the result.
    pub fn resolve(settings: Settings, environment: Environment) -> Result<Self, ConfigError> {
        let settings = settings.with_file()?;
        let shown = shown(&settings);
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);

        let http = socket(
            settings.http_address.unwrap_or(loopback),
            settings.http_port,
            HTTP_PORT,
        );

        let threads = threads(environment.threads.as_deref())?;
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

        let mut places = PlaceMaker::new(&settings);
        let client_tls = local::client_tls(&settings)?;
        let local_password = local::password(&settings, &environment)?;
        let tables = match settings.endpoints {
            tables if tables.is_empty() => {
                vec![tables::of_environment(&environment, settings.read_only)?]
            }
            tables => tables,
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
            let listen = places.next(table.listen)?;
            endpoints.push(tables::endpoint(table, listen, &environment)?);
        }

        let admin = settings
            .quitquitquit
            .unwrap_or(false)
            .then(|| socket(loopback, settings.admin_port, ADMIN_PORT))
            .flatten();
        let others = [
            ("--http-port", http),
            ("--notes-port", notes),
            ("--admin-port", admin),
        ];
        clash::check(&endpoints, &others)?;

        let or = |setting: Option<DurationSetting>, default| {
            setting.map_or(default, |DurationSetting(time)| time)
        };
        let descriptors = descriptors::raise();
        let (timeouts, keepalive) = (Timeouts::default(), Keepalive::default());
        Ok(Self {
            endpoints,
            database_mapping: settings.database_mapping.unwrap_or_default(),
            allow_remote: settings.allow_remote.unwrap_or(false),
            client_tls,
            client_tls_required: settings.client_tls == Some(super::ClientTlsSetting::Required),
            local_password_file: local_password
                .is_some()
                .then(|| settings.local_password_file.clone())
                .flatten(),
            local_password,
            allowed_uids: settings.unix_socket_allowed_uids,
            workspace: environment.workspace.with_profile(settings.profile),
            password_variables,
            timeouts: Timeouts {
                connect_timeout: or(settings.connect_timeout, timeouts.connect_timeout),
                server_connect_timeout: or(
                    settings.server_connect_timeout,
                    timeouts.server_connect_timeout,
                ),
                credential_timeout: or(settings.credential_timeout, timeouts.credential_timeout),
                capacity_timeout: or(settings.capacity_timeout, timeouts.capacity_timeout),
            },
            client_login_timeout: or(settings.client_login_timeout, CLIENT_LOGIN_TIMEOUT),
            max_connections: match settings.max_connections {
                None | Some(0) => descriptors::sessions(descriptors),
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
            admin_console: settings.admin_console.unwrap_or(false),
            shown,
            admin,
            lazy_refresh: settings.lazy_refresh.unwrap_or(false),
            run_connection_test: settings.run_connection_test.unwrap_or(false),
            min_sigterm_delay: or(settings.min_sigterm_delay, Duration::ZERO),
            grace: or(settings.max_sigterm_delay, MAX_SIGTERM_DELAY),
            exit_when_idle: settings
                .exit_when_idle
                .map(|DurationSetting(time)| time)
                .filter(|time| !time.is_zero()),
            exit_zero_on_sigterm: settings.exit_zero_on_sigterm.unwrap_or(false),
            watch_config: settings.watch_config.unwrap_or(false),
            threads,
            log: LogOptions {
                filter: settings
                    .log_filter
                    .unwrap_or_else(|| DEFAULT_FILTER.to_owned()),
                structured: settings.structured_logs.unwrap_or(false),
            },
        })
    }
}

fn socket(address: IpAddr, port: Option<PortSetting>, default: u16) -> Option<SocketAddr> {
    match port.unwrap_or(PortSetting::Port(default)) {
        PortSetting::None => None,
        PortSetting::Port(port) => Some(SocketAddr::new(address, port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_threads_is_at_least_one_and_bounded() {
        assert_eq!(threads(Some("3")).unwrap().get(), 3);
        for value in ["0", "-1", "many", "99999999", "99999999999999999999"] {
            let error = threads(Some(value)).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("TOKIO_WORKER_THREADS is `{value}`")),
                "{error}"
            );
        }
    }
}
