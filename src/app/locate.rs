//! Filling in what the settings of an endpoint leave open, by asking the workspace.

use rustls::pki_types::ServerName;

use super::{
    StartError,
    source::{Access, Source},
};
use crate::{
    config::{EndpointConfig, TlsMode},
    tls,
    upstream::{Endpoint, Label, Security},
    workspace::{CredentialMinter, EndpointName, Target},
};

/// An endpoint that can be dialled, and who makes its credentials.
pub(super) struct Located {
    pub(super) endpoint: Endpoint,
    pub(super) source: Source,
}

/// Looks up host and user where they are not set.
pub(super) async fn locate(
    config: &EndpointConfig,
    access: &Access,
) -> Result<Located, StartError> {
    let label = Label::new(config.called());
    let workspace = match access {
        Access::Workspace(workspace) => workspace,
        Access::Own(own) => {
            // The settings have been checked: such an endpoint has a host and a user.
            let host = config.host.clone().unwrap_or_default();
            let user = config.user.clone().unwrap_or_default();
            return Ok(Located {
                endpoint: endpoint(config, label, host, user)?,
                source: Source::Own(own.clone()),
            });
        }
    };
    let name = config
        .name
        .as_deref()
        .and_then(|name| name.parse::<EndpointName>().ok());
    let Some(name) = name else {
        return Err(StartError::NoName {
            host: config.host.clone().unwrap_or_default(),
        });
    };
    let host = match &config.host {
        Some(host) => host.clone(),
        None => {
            let look_up = |source| StartError::LookUp {
                what: "the endpoint",
                source,
            };
            let info = workspace.endpoint(&name).await.map_err(look_up)?;
            if info.disabled {
                return Err(StartError::Disabled {
                    name: name.to_string(),
                });
            }
            let (what, host) = if config.read_only {
                ("read-only host", info.read_only_host)
            } else {
                ("host", info.host)
            };
            host.ok_or_else(|| StartError::NoHost {
                what,
                name: name.to_string(),
            })?
        }
    };
    let user = match (&config.user, workspace.service_principal()) {
        (Some(user), _) => user.clone(),
        (None, Some(client_id)) => client_id.to_owned(),
        (None, None) => {
            let look_up = |source| StartError::LookUp {
                what: "who we are (set PGUSER to skip this)",
                source,
            };
            workspace.me().await.map_err(look_up)?.user_name
        }
    };
    Ok(Located {
        endpoint: endpoint(config, label, host, user)?,
        source: Source::Workspace(CredentialMinter::new(
            workspace.clone(),
            Target::Endpoint(name),
        )),
    })
}

fn endpoint(
    config: &EndpointConfig,
    label: Label,
    host: String,
    user: String,
) -> Result<Endpoint, StartError> {
    let security = match &config.tls {
        TlsMode::Disabled => Security::Plain,
        TlsMode::Verified(roots) => Security::Tls {
            config: tls::client_config(roots, tls::ALPN_POSTGRESQL)?,
            name: ServerName::try_from(host.clone())
                .map_err(|_| StartError::HostName { host: host.clone() })?,
        },
    };
    Ok(Endpoint {
        label,
        host,
        port: config.port,
        user,
        security,
    })
}
