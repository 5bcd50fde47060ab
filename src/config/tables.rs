//! From the tables of endpoints, or the tutorial's variables, to [`EndpointConfig`]s.

use std::{net::IpAddr, num::NonZeroU16};

use super::{
    ConfigError, CredentialSetting, CredentialSource, EndpointConfig, EndpointSettings,
    Environment, ListenAddresses, Roots, TlsMode, endpoint::HostAddressSetting,
    resolve::POSTGRES_PORT, values, without_userinfo,
};

/// The one endpoint that the tutorial's variables define.
pub(super) fn of_environment(
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
    let host_address = environment.host_address.as_ref().map(|text| {
        text.parse().map_err(|_| ConfigError::Variable {
            variable: "PGHOSTADDR",
            value: without_userinfo(text).into_owned(),
            expected: "an IP address, or several with commas between them",
        })
    });
    Ok(EndpointSettings {
        name,
        host: environment.host.clone(),
        host_address: host_address.transpose()?,
        port: port.transpose()?,
        user: environment.user.clone(),
        database: environment.database.clone(),
        read_only: read_only.unwrap_or(false),
        ..EndpointSettings::default()
    })
}

/// Checks one table and fills in what it leaves to the environment.
pub(super) fn endpoint(
    table: EndpointSettings,
    listen: ListenAddresses,
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
        let is_neon = |host: &&String| host.to_ascii_lowercase().ends_with(".neon.tech");
        if let Some(host) = table.host.as_ref().filter(is_neon) {
            return Err(ConfigError::Neon {
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
        table.host_address.as_ref(),
    )?;
    Ok(EndpointConfig {
        listen,
        name: table.name,
        host: table.host,
        host_addresses: table
            .host_address
            .map(|HostAddressSetting(addresses)| addresses)
            .unwrap_or_default(),
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
    host_address: Option<&HostAddressSetting>,
) -> Result<TlsMode, ConfigError> {
    let roots = match sslrootcert {
        None | Some("system") => Roots::System,
        Some(path) => Roots::File(path.into()),
    };
    if sslmode == Some("disable")
        && let Some(HostAddressSetting(addresses)) = host_address
        && let Some(remote) = addresses
            .iter()
            .find(|address| !address.to_canonical().is_loopback())
    {
        return Err(ConfigError::PlainRemote {
            host: remote.to_string(),
        });
    }
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
