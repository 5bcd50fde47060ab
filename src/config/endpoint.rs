//! Endpoints as resolved, from `[[endpoint]]` tables, flags, or the variables of Postgres and Databricks.

use std::{net::IpAddr, num::NonZeroU16, path::PathBuf};

use secrecy::{ExposeSecret, SecretString};

use super::{
    ConfigError, CredentialSetting, DEFAULT_DATABASE, EndpointSettings, Environment,
    ListenAddresses, POSTGRES_PORT, PinSessions, PoolMode, PoolSettings, Settings,
    values::host_addresses, without_userinfo,
};

/// The configuration of one endpoint.
#[derive(Clone, Debug, Default)]
pub struct EndpointConfig {
    /// The addresses of its listener.
    pub listen: ListenAddresses,
    /// Its resource name; looked up if `None`.
    pub name: Option<String>,
    /// Its host; looked up if `None`.
    pub host: Option<String>,
    /// The addresses to dial; empty: those that the host resolves to.
    pub host_addresses: Vec<IpAddr>,
    /// Its port.
    pub port: u16,
    /// The role to log in as; the workspace identity if `None`.
    pub user: Option<String>,
    /// The default database, by name or resource id.
    pub database: Option<String>,
    /// The Databricks App to which the database belongs, if nothing else names the endpoint.
    pub app: Option<String>,
    /// Whether to use the read-only host.
    pub read_only: bool,
    /// How its clients share server connections.
    pub pool_mode: PoolMode,
    /// Whether they are refused what needs a connection for longer than a transaction.
    pub pin_sessions: PinSessions,
    /// TLS to the endpoint.
    pub tls: TlsMode,
    /// The source of its credential.
    pub credential: CredentialSource,
}

/// The source of a credential.
#[derive(Clone, Debug, Default)]
pub enum CredentialSource {
    /// A program that prints one.
    Command(Vec<String>),
    /// A fixed password.
    Password(SecretString),
    /// A password in a file, which may change.
    PasswordFile(PathBuf),
    /// The workspace mints it.
    #[default]
    Workspace,
}

/// TLS to the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Off: `PGSSLMODE=disable`, for loopback addresses only.
    Disabled,
    /// Certificate and name are verified, whatever weaker mode `PGSSLMODE` names.
    Verified(Roots),
}

impl Default for TlsMode {
    fn default() -> Self {
        Self::Verified(Roots::default())
    }
}

/// The trusted root certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Roots {
    /// Those in this PEM file (`PGSSLROOTCERT`).
    File(PathBuf),
    /// The system's.
    #[default]
    System,
}

impl EndpointConfig {
    /// Validates one table and completes it from the environment.
    pub(super) fn resolve(
        table: EndpointSettings,
        listen: ListenAddresses,
        settings: &Settings,
        environment: &Environment,
    ) -> Result<Self, ConfigError> {
        // Databricks Apps names an app's database only by its host.
        let app = match &table.name {
            Some(_) => None,
            // PGAPPNAME: set by Databricks Apps for apps with a database.
            None => environment
                .get("DATABRICKS_APP_NAME")
                .or(environment.get("PGAPPNAME"))
                .map(str::to_owned),
        };
        // Without a name, a workspace may have a single endpoint.
        if environment.workspace.host.is_none() && [&table.name, &table.host, &app] == [&None; 3] {
            return Err(ConfigError::new(
                "no endpoint is named: neither ENDPOINT_NAME nor LAKEBASE_ENDPOINT is set",
                "set ENDPOINT_NAME=projects/<project>/branches/<branch>/endpoints/<endpoint> (`databricks postgres list-endpoints projects/<project>/branches/<branch>` shows it), and sign in to its workspace: run `databricks auth login`, or set DATABRICKS_HOST, DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET. To try without an account: lakebase-proxy demo",
            ));
        }
        let endpoint = display_name([&table.name, &table.host, &app]).to_owned();
        let credential = match &table.credential {
            None => CredentialSource::Workspace,
            Some(CredentialSetting::Command(command)) if command.is_empty() => {
                return Err(ConfigError::new(
                    format!("the endpoint `{endpoint}` has an empty credential command"),
                    "write it as `credential = { command = [\"program\", \"argument\"] }`",
                ));
            }
            Some(CredentialSetting::Command(command)) => CredentialSource::Command(command.clone()),
            Some(CredentialSetting::PasswordFile(path)) => {
                CredentialSource::PasswordFile(path.clone())
            }
            Some(CredentialSetting::PasswordEnv(variable)) => match environment.secret(variable) {
                Some(password) => CredentialSource::Password(password),
                None => {
                    return Err(ConfigError::new(
                        format!(
                            "the endpoint `{endpoint}` takes its password from {variable}, which is not set"
                        ),
                        "set it in the environment of the proxy",
                    ));
                }
            },
        };
        if let CredentialSource::Workspace = credential {
            // Neon's hosts begin with `ep-` as well, but no workspace mints a credential for them.
            let is_neon = |host: &&String| host.to_ascii_lowercase().ends_with(".neon.tech");
            if let Some(host) = table.host.as_ref().filter(is_neon) {
                let host = without_userinfo(host);
                return Err(ConfigError::new(
                    format!("PGHOST `{host}` is a host of Neon, not of Databricks Lakebase"),
                    "a Databricks workspace mints no credential for it: set PGHOST to the Lakebase endpoint's host, or configure a password for the endpoint (`credential`)",
                ));
            }
        } else if table.host.is_none() {
            // Only the workspace could look it up.
            return Err(ConfigError::new(
                format!("the endpoint `{endpoint}` has a credential but no host"),
                "add `host` to its table",
            ));
        } else if table.user.is_none() {
            return Err(ConfigError::new(
                format!("the endpoint `{endpoint}` has a credential but no user"),
                "add `user` to its table: the role that the password belongs to",
            ));
        }
        let tls = tls_mode(environment, &table)?;
        Ok(Self {
            listen,
            name: table.name,
            host: table.host,
            host_addresses: table.host_address,
            port: table.port.map_or(POSTGRES_PORT, NonZeroU16::get),
            user: table.user,
            database: table.database,
            app,
            read_only: table.read_only,
            pool_mode: table.pool_mode.unwrap_or(settings.pool_mode()),
            pin_sessions: table.pin_sessions.unwrap_or(settings.pin_sessions()),
            tls,
            credential,
        })
    }

    /// The settings of its pools.
    pub fn pool(&self, settings: &Settings) -> PoolSettings {
        PoolSettings {
            pin_sessions: self.pin_sessions,
            ..settings.pool()
        }
    }

    /// The default database as far as the settings name it.
    pub fn database_or_default(&self) -> &str {
        self.database.as_deref().unwrap_or(DEFAULT_DATABASE)
    }

    /// Its name in logs: the resource name, else the host or the app.
    pub fn display_name(&self) -> &str {
        display_name([&self.name, &self.host, &self.app])
    }

    /// Whether both serve the same clients: they listen on the same addresses.
    pub fn has_same_listener(&self, other: &Self) -> bool {
        // Any free port is the same as any other, so that only the name identifies them.
        let is_any_port = self.listen.port == 0;
        self.listen.has_same_addresses(&other.listen)
            && (!is_any_port
                || (self.display_name() == other.display_name()
                    && self.read_only == other.read_only))
    }

    /// Whether both are configured alike.
    pub fn has_same_config(&self, other: &Self) -> bool {
        self.has_same_listener(other) && self.differences(other).is_empty()
    }

    /// Whether their listeners cannot be open at once.
    pub(super) fn conflicts(&self, other: &Self) -> bool {
        self.listen.conflict(&other.listen).is_some()
    }

    /// The keys that differ, apart from the listener's.
    pub(super) fn differences(&self, other: &Self) -> Vec<&'static str> {
        let same = [
            ("name", self.name == other.name),
            ("host", self.host == other.host),
            ("host_address", self.host_addresses == other.host_addresses),
            ("port", self.port == other.port),
            ("user", self.user == other.user),
            ("database", self.database == other.database),
            ("the app's name", self.app == other.app),
            ("read_only", self.read_only == other.read_only),
            ("TLS", self.tls == other.tls),
            ("credential", self.credential == other.credential),
        ];
        let differ = same.into_iter().filter(|(_, is_same)| !is_same);
        differ.map(|(key, _)| key).collect()
    }
}

fn display_name(names: [&Option<String>; 3]) -> &str {
    let mut names = names.into_iter().flatten();
    names.next().map_or("default", String::as_str)
}

impl CredentialSource {
    /// Its label in the log and on the status page.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
            Self::Password(_) => "password",
            Self::PasswordFile(_) => "password file",
            Self::Workspace => "workspace",
        }
    }
}

impl PartialEq for CredentialSource {
    fn eq(&self, other: &Self) -> bool {
        // By hand, as `SecretString` implements no comparison.
        match (self, other) {
            (Self::Workspace, Self::Workspace) => true,
            (Self::Command(one), Self::Command(other)) => one == other,
            (Self::PasswordFile(one), Self::PasswordFile(other)) => one == other,
            (Self::Password(one), Self::Password(other)) => {
                one.expose_secret() == other.expose_secret()
            }
            _ => false,
        }
    }
}

/// The endpoint that variables define if there are no tables.
pub(super) fn of_environment(
    environment: &Environment,
    read_only: bool,
) -> Result<EndpointSettings, ConfigError> {
    let name = match (
        environment.get("ENDPOINT_NAME"),
        environment.get("LAKEBASE_ENDPOINT"),
    ) {
        (Some(one), Some(other)) if one != other => {
            return Err(ConfigError::new(
                format!("ENDPOINT_NAME is `{one}` but LAKEBASE_ENDPOINT is `{other}`"),
                "unset one of them",
            ));
        }
        (name, alias) => name.or(alias),
    };
    let text = |variable: &str| environment.get(variable).map(str::to_owned);
    let host_address = environment
        .get("PGHOSTADDR")
        .map_or(Ok(Vec::new()), |text| {
            let expected = "an IP address, or several with commas between them";
            host_addresses(text).map_err(|_| ConfigError::variable("PGHOSTADDR", text, expected))
        });
    let port = environment.get("PGPORT").map(|text| {
        let port = text.parse();
        port.map_err(|_| ConfigError::variable("PGPORT", text, "a port (1 to 65535)"))
    });
    Ok(EndpointSettings {
        name: name.map(str::to_owned),
        host: text("PGHOST"),
        host_address: host_address?,
        port: port.transpose()?,
        user: text("PGUSER"),
        database: text("PGDATABASE"),
        read_only,
        ..EndpointSettings::default()
    })
}

fn tls_mode(environment: &Environment, table: &EndpointSettings) -> Result<TlsMode, ConfigError> {
    let plain_remote = |host: &str| {
        ConfigError::new(
            format!("PGSSLMODE is `disable`, but `{host}` is not this machine"),
            "unset PGSSLMODE, or set it to `require`: certificates are always verified",
        )
    };
    match environment.get("PGSSLMODE") {
        // libpq's modes below `verify-full` accept another server's certificate or none (PostgreSQL docs, "SSL
        // Support"); such a server would receive the credential.
        None | Some("allow" | "prefer" | "require" | "verify-ca" | "verify-full") => {
            Ok(TlsMode::Verified(match environment.get("PGSSLROOTCERT") {
                None | Some("system") => Roots::System,
                Some(path) => Roots::File(path.into()),
            }))
        }
        Some("disable") => {
            // They are dialed in place of the host, and the credential must not cross a network in the clear.
            let mut addresses = table.host_address.iter();
            let is_remote = |address: &&IpAddr| !address.to_canonical().is_loopback();
            if let Some(remote) = addresses.find(is_remote) {
                return Err(plain_remote(&remote.to_string()));
            }
            match table.host.as_deref() {
                Some(host) if is_loopback(host) => Ok(TlsMode::Disabled),
                host => Err(plain_remote(&without_userinfo(
                    host.unwrap_or("the endpoint"),
                ))),
            }
        }
        Some(other) => Err(ConfigError::variable(
            "PGSSLMODE",
            other,
            "one of disable, allow, prefer, require, verify-ca, verify-full",
        )),
    }
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}
