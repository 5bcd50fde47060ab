//! From the layers of settings to the one [`Config`].

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
};

use super::{
    Config, ConfigError, CredentialSetting, EndpointConfig, Environment, LOCALHOST, PortSetting,
    Settings, client_access, conflict, endpoint, listen::AddressAssigner,
};

const NOTES_PORT: u16 = 8000;
const MAX_THREADS: usize = 1024;

impl Config {
    /// Merges the layers and validates the result.
    pub fn resolve(settings: Settings, environment: Environment) -> Result<Self, ConfigError> {
        let settings = settings.with_file()?;
        // The variable that Tokio's own multi-thread runtime reads.
        let threads = threads(environment.get("TOKIO_WORKER_THREADS"))?;
        let http = settings.http_port().at(settings.http_address());
        let notes = notes(&settings, environment.get("DATABRICKS_APP_PORT"))?;
        // Validated even if the page is off, so that an invalid port is reported before it matters.
        let notes = notes.filter(|_| settings.notes());
        let admin = settings.admin_port().at(LOCALHOST);
        let admin = admin.filter(|_| settings.quitquitquit());
        let mut tables = settings.endpoints.clone();
        // The variables name an endpoint only if no table does.
        if tables.is_empty() {
            tables.push(endpoint::of_environment(
                &environment,
                settings.read_only(),
            )?);
        }
        let password_variable = |credential: &CredentialSetting| match credential {
            CredentialSetting::PasswordEnv(variable) => Some(variable.clone()),
            _ => None,
        };
        let password_variables = tables
            .iter()
            .filter_map(|table| table.credential.as_ref().and_then(password_variable))
            .collect();
        if settings.max_prepared_statements() == 0 {
            return Err(ConfigError::new(
                "max_prepared_statements is 0, so that no prepared statement could be executed",
                "set it to 1 or more, or leave it out: prepared statements always follow their client, and cost nothing where there are none",
            ));
        }
        let mut addresses = AddressAssigner::new(&settings);
        let endpoints = tables
            .into_iter()
            .map(|table| {
                let listen = addresses.next(table.listen)?;
                EndpointConfig::resolve(table, listen, &settings, &environment)
            })
            .collect::<Result<Vec<_>, _>>()?;
        conflict::check(
            &endpoints,
            &[
                ("--http-port", http),
                ("--notes-port", notes),
                ("--admin-port", admin),
            ],
        )?;
        Ok(Self {
            client_tls: client_access::client_tls(&settings)?,
            local_password: client_access::password(&settings, &environment)?,
            endpoints,
            workspace: environment
                .workspace
                .with_profile(settings.profile().as_deref()),
            password_variables,
            threads,
            http,
            notes,
            admin,
            settings,
        })
    }
}

fn notes(settings: &Settings, app_port: Option<&str>) -> Result<Option<SocketAddr>, ConfigError> {
    let app_port: Option<u16> = match app_port {
        None => None,
        Some(text) => Some(
            text.parse()
                .map_err(|_| ConfigError::variable("DATABRICKS_APP_PORT", text, "a port"))?,
        ),
    };
    // Databricks Apps routes requests to every address of the container.
    let address = match app_port {
        Some(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        None => LOCALHOST,
    };
    let port = PortSetting::Port(app_port.unwrap_or(NOTES_PORT));
    let address = settings.notes_address().unwrap_or(address);
    Ok(settings.notes_port().unwrap_or(port).at(address))
}

/// One thread per available processor (in a container, per its limit), or as many as `TOKIO_WORKER_THREADS`.
fn threads(variable: Option<&str>) -> Result<NonZeroUsize, ConfigError> {
    let Some(value) = variable else {
        return Ok(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    };
    let threads = value.parse().ok();
    threads
        .filter(|threads: &NonZeroUsize| threads.get() <= MAX_THREADS)
        .ok_or_else(|| {
            let expected = "a number of threads (1 to 1024)";
            ConfigError::variable("TOKIO_WORKER_THREADS", value, expected)
        })
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
