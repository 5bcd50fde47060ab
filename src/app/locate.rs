//! Completes the settings of an endpoint from the workspace.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;

use super::AppError;
use crate::{
    config::{CredentialSource, DEFAULT_DATABASE, EndpointConfig, TlsMode, without_userinfo},
    credential::{self, Mint},
    net::{blocking, tls},
    status::Label,
    upstream::{Addresses, DroppedParameters, Endpoint, Security},
    workspace::{AppDatabases, CredentialMinter, HostName, LocateError, Wanted, Workspace},
};

/// An endpoint that can be dialed, and the source of its credentials.
pub(crate) struct LocatedEndpoint {
    pub(crate) endpoint: Endpoint,
    pub(crate) mint: Arc<dyn Mint>,
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
    pub(super) fn new<E>(
        source: &CredentialSource,
        workspace: impl FnOnce() -> Result<Workspace, E>,
    ) -> Result<Self, E> {
        match credential::of_settings(source) {
            Some(mint) => Ok(Self::Own(mint)),
            None => workspace().map(Self::Workspace),
        }
    }
}

/// Checks what needs no network: names, and the trusted roots.
pub(super) fn check(config: &EndpointConfig, source: &EndpointSource) -> Result<(), AppError> {
    if let EndpointSource::Workspace(_) = source {
        Wanted::from(config).check().map_err(LocateError::from)?;
    }
    match &config.host {
        Some(host) => security(&config.tls, host).map(drop),
        None => Ok(()),
    }
}

/// Looks up host and user where they are not set; `timeout` is the limit of one request to the workspace, with retries.
pub(super) async fn locate(
    config: &EndpointConfig,
    source: &EndpointSource,
    timeout: Duration,
) -> Result<LocatedEndpoint, AppError> {
    let workspace = match source {
        EndpointSource::Workspace(workspace) => workspace,
        EndpointSource::Own(mint) => {
            // The settings have been checked: such an endpoint has a host and a user.
            let host = config.host.clone().unwrap_or_default();
            let user = config.user.clone().unwrap_or_default();
            let database = config.database_or_default().to_owned();
            let label = Label::new(config.called());
            return Ok(LocatedEndpoint {
                endpoint: endpoint(config, label, host, user, database).await?,
                mint: Arc::clone(mint),
            });
        }
    };
    let located = workspace.locate(&config.into(), timeout).await?;
    // Lakebase's docs, "Connection pooling": not available for OAuth roles. A warning only, since poolers accept OAuth
    // credentials where Databricks has enabled that.
    let direct = located.host.parse::<HostName>().ok();
    if let Some(direct) = direct.and_then(|host| host.direct()) {
        tracing::warn!(
            endpoint = %located.target,
            host = located.host,
            "the host is that of Lakebase's pooler, which may refuse OAuth credentials; hint: set PGHOST to the direct host {direct} if logins are refused"
        );
    }
    if let Some(databases) = &located.app_databases {
        tracing::info!(
            endpoint = %located.target,
            "{databases}; hint: {}",
            AppDatabases::HINT
        );
    }
    let label = Label::new(located.target.as_str());
    let database = located
        .database
        .unwrap_or_else(|| DEFAULT_DATABASE.to_owned());
    Ok(LocatedEndpoint {
        endpoint: endpoint(config, label, located.host, located.user, database).await?,
        mint: Arc::new(CredentialMinter::new(workspace.clone(), located.target)),
    })
}

async fn endpoint(
    config: &EndpointConfig,
    label: Label,
    host: String,
    user: String,
    database: String,
) -> Result<Endpoint, AppError> {
    let (tls, name) = (config.tls.clone(), host.clone());
    // Parses a PEM file, which must not delay the other tasks of the main runtime.
    let security = blocking(move || security(&tls, &name)).await?;
    let addresses = config.host_addresses.iter();
    Ok(Endpoint {
        security,
        label,
        host,
        port: config.port,
        addresses: Addresses::fixed(
            addresses.map(|address| SocketAddr::new(*address, config.port)),
        ),
        user,
        database,
        dropped: DroppedParameters::default(),
    })
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
                AppError::new(
                    format!("`{host}` is not a host name"),
                    Some("set PGHOST to the endpoint's host name (ep-...database...)".to_owned()),
                )
            })?,
        },
    })
}
