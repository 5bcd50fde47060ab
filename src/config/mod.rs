//! Settings, resolved once: flag > `LAKEBASE_PROXY_*` > file > the environment's own names and defaults. No other room
//! reads the environment.

mod change;
mod clash;
mod endpoint;
mod environment;
mod error;
mod file;
#[cfg(fuzzing)]
pub mod fuzzing;
mod listen;
mod local;
mod log;
mod origin;
mod resolve;
mod settings;
mod shown;
mod source;
mod tables;
#[cfg(test)]
mod tests;
mod timeouts;
mod values;

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use secrecy::SecretString;

pub use self::{
    change::Change,
    endpoint::{CredentialSetting, EndpointSettings, HostAddressSetting, ListenSetting},
    environment::{Environment, ServiceManager},
    error::ConfigError,
    file::read,
    listen::{ListenAddresses, UnixSocket},
    local::ClientTls,
    log::{DEFAULT_FILTER, LogOptions},
    origin::{Origin, Origins},
    resolve::DEFAULT_DATABASE,
    settings::Settings,
    shown::ShownSetting,
    source::Source,
    timeouts::{Keepalive, Timeouts},
    values::{
        AddressSetting, ClientTlsSetting, DatabaseMapping, DurationSetting, LocalAuth, ModeSetting,
        PortSetting,
    },
};
pub(crate) use self::{
    listen::{SOCKET_NAME, addresses_conflict, socket_path},
    local::PASSWORD_VARIABLE,
    resolve::{ADMIN_PORT, HTTP_PORT},
    values::without_userinfo,
};
use crate::workspace;

/// Everything the program needs to know.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other"
)]
pub struct Config {
    /// What clients are connected to, and where; at least one.
    pub endpoints: Vec<EndpointConfig>,
    /// What the database names that clients send mean.
    pub database_mapping: DatabaseMapping,
    /// Whether addresses that other machines reach are meant.
    pub allow_remote: bool,
    /// The users who may use Unix sockets, beside our own and root; whomever their permissions let in when absent.
    pub allowed_uids: Option<Vec<u32>>,
    /// Whether and how clients are offered TLS.
    pub client_tls: ClientTls,
    /// Whether TCP clients of other machines must use it.
    pub client_tls_required: bool,
    /// What TCP clients must know, if anything.
    pub local_password: Option<SecretString>,
    /// The file that holds it, if it is in one.
    pub local_password_file: Option<PathBuf>,
    /// Where credentials come from.
    pub workspace: workspace::Settings,
    /// The variables that hold passwords of endpoints.
    pub password_variables: Vec<String>,
    /// How long things may take at the endpoint.
    pub timeouts: Timeouts,
    /// How long a client may take to say what it wants.
    pub client_login_timeout: Duration,
    /// Threads that serve clients.
    pub threads: NonZeroUsize,
    /// Sessions at a time.
    pub max_connections: usize,
    /// How dead peers are noticed.
    pub keepalive: Keepalive,
    /// Where health and metrics are served, if at all.
    pub http: Option<SocketAddr>,
    /// Where the notes page is served, if at all.
    pub notes: Option<SocketAddr>,
    /// Whether TCP clients on this machine may have the console.
    pub admin_console: bool,
    /// The settings, for people.
    pub shown: Vec<ShownSetting>,
    /// Where /quitquitquit is served, if at all.
    pub admin: Option<SocketAddr>,
    /// Whether credentials are refreshed only for a client that needs one.
    pub lazy_refresh: bool,
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
    /// Whether the file is read again when it changes.
    pub watch_config: bool,
}

/// One endpoint, as far as the settings say.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Where its clients connect.
    pub listen: ListenAddresses,
    /// Its resource name; looked up when absent.
    pub name: Option<String>,
    /// Its host; looked up when absent.
    pub host: Option<String>,
    /// The addresses to dial in place of what the host's name resolves to; none: it is resolved.
    pub host_addresses: Vec<IpAddr>,
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

impl CredentialSource {
    /// In words, without a word of what it holds.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
            Self::Password(_) => "password",
            Self::PasswordFile(_) => "password file",
            Self::Workspace => "workspace",
        }
    }
}

/// How the wire to the endpoint is protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Not: `PGSSLMODE=disable`, to a loopback address only.
    Disabled,
    /// TLS, with certificate and name verified, whatever weaker mode `PGSSLMODE` names.
    Verified(Roots),
}

/// The trusted root certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Roots {
    /// Only the certificates in this PEM file (`PGSSLROOTCERT=file`).
    File(PathBuf),
    /// The system's.
    #[default]
    System,
}
