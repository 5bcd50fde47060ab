//! Settings, resolved once: flags override `LAKEBASE_PROXY_*`, these the configuration file, and that the variables of
//! Postgres and Databricks and the defaults.
//!
//! [`settings`] declares each setting. This module holds plain values, imports no other module of the crate, and reads the
//! environment, except for the variables of flags (clap) and `LISTEN_FDNAMES` (`cli`).

#[macro_use]
mod declare;
mod change;
mod client_access;
mod conflict;
mod endpoint;
mod endpoint_settings;
mod environment;
mod error;
mod file;
#[cfg(fuzzing)]
pub mod fuzzing;
mod listen;
mod log;
mod origin;
mod pool;
mod reference;
mod resolve;
mod settings;
mod similar;
mod source;
#[cfg(test)]
mod tests;
mod timeouts;
mod values;
mod workspace;

use std::{net::SocketAddr, num::NonZeroUsize};

use secrecy::SecretString;

use self::values::POSTGRES_PORT;
pub use self::{
    change::Change,
    client_access::ClientTls,
    endpoint::{CredentialSource, EndpointConfig, Roots, TlsMode},
    endpoint_settings::{CredentialSetting, EndpointSettings, ListenSetting},
    environment::{Environment, ServiceManager},
    error::ConfigError,
    file::read,
    listen::{ListenAddresses, UnixSocket},
    log::{DEFAULT_FILTER, LogOptions},
    origin::{Origin, Origins},
    pool::{PinSessions, PoolMode, PoolSettings},
    reference::ShownSetting,
    settings::Settings,
    source::Source,
    timeouts::{Keepalive, Timeouts},
    values::{
        ClientTlsSetting, DEFAULT_DATABASE, DatabaseMapping, DurationSetting, LocalAuth,
        ModeSetting, PortSetting,
    },
    workspace::{Attribute, Services, Variables, WorkspaceSettings},
};
pub(crate) use self::{
    client_access::PASSWORD_VARIABLE,
    declare::Setting,
    listen::{SOCKET_NAME, socket_path},
    origin::{VARIABLE_PREFIX, variable},
    reference::text,
    similar::most_similar,
    values::{LOCALHOST, without_userinfo},
    workspace::AuthFamily,
};

/// The configuration of the program.
#[derive(Clone, Debug)]
pub struct Config {
    /// Every setting in force.
    pub settings: Settings,
    /// At least one.
    pub endpoints: Vec<EndpointConfig>,
    /// TLS for clients.
    pub client_tls: ClientTls,
    /// The password of TCP clients, if they need one.
    pub local_password: Option<SecretString>,
    /// Settings of the Databricks workspace.
    pub workspace: WorkspaceSettings,
    /// The variables that hold passwords of endpoints.
    pub password_variables: Vec<String>,
    /// Threads that serve clients.
    pub threads: NonZeroUsize,
    /// The listener of health and metrics; `None` if off.
    pub http: Option<SocketAddr>,
    /// The listener of the notes page; `None` if off.
    pub notes: Option<SocketAddr>,
    /// The listener of /quitquitquit; `None` if off.
    pub admin: Option<SocketAddr>,
}
