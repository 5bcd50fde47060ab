//! The Postgres behind the edge: an own one, or any that the user names.
//!
//! Owns finding, starting and preparing it, and the control plane's questions to it. Knows nothing of the edge's rules.

#[cfg(unix)]
mod copy;
#[cfg(unix)]
mod fetch;
#[cfg(unix)]
mod find;
mod objects;
mod schema;
#[cfg_attr(windows, path = "no_server.rs")]
mod server;

use std::{io, path::PathBuf, sync::Arc};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::Mutex,
};
use tokio_postgres::{
    Config, Statement,
    config::{Host, SslMode},
};

pub(crate) use objects::{Attributes, NewRole};
pub use server::LocalPostgres;

use super::{
    EmulatorError, EmulatorOptions,
    identity::{Identities, hex, random},
};
use crate::net::unix::UnixStream;
use schema::{Connected, OAUTH_MARK, identifier, query_error};

/// The superuser of an own cluster.
#[cfg(unix)]
const SUPERUSER: &str = "databricks_control_plane";

/// How to run the local Postgres.
#[derive(Clone, Debug)]
pub struct LocalPostgresOptions {
    /// Where `initdb` and `postgres` are; absent: looked for.
    pub bin_dir: Option<PathBuf>,
    /// Whether Postgres may be downloaded if this machine has none.
    pub download: bool,
    /// Whether commits reach the disk before they are acknowledged. Off: nothing here is worth keeping.
    pub fsync: bool,
    /// `max_connections` of the server.
    pub max_connections: u16,
}

impl Default for LocalPostgresOptions {
    fn default() -> Self {
        Self {
            bin_dir: None,
            download: true,
            fsync: false,
            max_connections: 1000,
        }
    }
}

/// A byte stream to Postgres.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A role, as far as logins are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Role {
    pub(crate) kind: RoleKind,
    /// Its security label for `databricks_auth`: the identity that it is bound to.
    pub(crate) label: Option<String>,
}

/// How a role may log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RoleKind {
    /// No such role.
    Missing,
    /// Made by `databricks_create_role`: with a token.
    OAuth,
    /// A group's role: with a member's token.
    Group,
    /// Made by plain `CREATE ROLE`.
    Plain,
    /// Made by plain `CREATE ROLE`, with a Postgres password that may be used when native login is on.
    Native,
}

/// One endpoint's database; cheap to clone.
#[derive(Clone)]
pub(crate) struct Database(Arc<Inner>);

struct Inner {
    target: Target,
    maintenance: Config,
    database: String,
    /// The password of roles, for servers that require one, as foreign ones do.
    role_password: Option<SecretString>,
    control: Mutex<Option<Arc<Control>>>,
}

enum Target {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// The control plane's own session.
struct Control {
    connected: Connected,
    role: Statement,
}

const ROLE_QUERY: &str = "select shobj_description(oid, 'pg_authid'), \
     pg_has_role(oid, 'databricks_native', 'member') and not rolsuper, \
     (select label from pg_shseclabel where objoid = oid and classoid = 'pg_authid'::regclass \
         and provider = 'databricks_auth') \
     from pg_roles where rolname = $1";
const BUSY_QUERY: &str =
    "select exists (select from pg_stat_activity where pid = any($1) and state <> 'idle')";
const TERMINATE_QUERY: &str = "select pg_terminate_backend(pid) from unnest($1::int[]) as pid";

impl Database {
    /// Prepares an own server for one emulator.
    pub(crate) async fn on_local(
        server: &LocalPostgres,
        identities: &Identities,
        options: &EmulatorOptions,
    ) -> Result<Self, EmulatorError> {
        let maintenance = server.config("postgres");
        schema::prepare(&maintenance, identities, options, None).await?;
        Ok(Self::of_branch(server, &options.database))
    }

    /// A server that was prepared before it was copied.
    pub(crate) fn of_branch(server: &LocalPostgres, database: &str) -> Self {
        Self::new(
            Target::Unix(server.socket()),
            server.config("postgres"),
            database,
            None,
        )
    }

    /// Prepares the server that `url` names; its user must be a superuser.
    pub(crate) async fn on_url(
        url: &str,
        identities: &Identities,
        options: &EmulatorOptions,
    ) -> Result<Self, EmulatorError> {
        let mut maintenance: Config = url
            .parse()
            .map_err(|source| EmulatorError::PostgresUrl { source })?;
        maintenance.ssl_mode(SslMode::Disable);
        let port = maintenance.get_ports().first().copied().unwrap_or(5432);
        let target = match maintenance.get_hosts().first() {
            Some(Host::Tcp(host)) => Target::Tcp(host.clone(), port),
            #[cfg(unix)]
            Some(Host::Unix(directory)) => Target::Unix(directory.join(format!(".s.PGSQL.{port}"))),
            None => return Err(EmulatorError::PostgresUrlHost),
        };
        let password = hex(&random::<16>()?);
        schema::prepare(&maintenance, identities, options, Some(&password)).await?;
        Ok(Self::new(
            target,
            maintenance,
            &options.database,
            Some(SecretString::from(password)),
        ))
    }

    fn new(
        target: Target,
        maintenance: Config,
        database: &str,
        role_password: Option<SecretString>,
    ) -> Self {
        let database = database.to_owned();
        Self(Arc::new(Inner {
            target,
            maintenance,
            database,
            role_password,
            control: Mutex::default(),
        }))
    }

    /// A new connection to the server, without any message yet.
    pub(crate) async fn dial(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match &self.0.target {
            Target::Tcp(host, port) => Box::new(TcpStream::connect((host.as_str(), *port)).await?),
            Target::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }

    /// The answer to the server's request for a role's password.
    pub(crate) fn role_password(&self) -> Option<&str> {
        self.0
            .role_password
            .as_ref()
            .map(ExposeSecret::expose_secret)
    }

    /// How `name` may log in.
    pub(crate) async fn role(&self, name: &str) -> Result<Role, EmulatorError> {
        let control = self.control().await?;
        let row = control
            .connected
            .client
            .query_opt(&control.role, &[&name])
            .await
            .map_err(query_error)?;
        let Some(row) = row else {
            return Ok(Role {
                kind: RoleKind::Missing,
                label: None,
            });
        };
        let comment: Option<String> = row.try_get(0).map_err(query_error)?;
        let is_native: Option<bool> = row.try_get(1).map_err(query_error)?;
        let label = row.try_get(2).map_err(query_error)?;
        let kind = match comment
            .as_deref()
            .and_then(|comment| comment.strip_prefix(OAUTH_MARK))
        {
            Some("GROUP") => RoleKind::Group,
            Some(_) => RoleKind::OAuth,
            None if is_native == Some(true) => RoleKind::Native,
            None => RoleKind::Plain,
        };
        // Roles created later need the password, too, if the server requires one.
        if let Some(password) = self.role_password()
            && matches!(kind, RoleKind::Group | RoleKind::OAuth)
        {
            let statement = format!(
                "alter role {} password {}",
                identifier(name),
                escape_literal(password)
            );
            control
                .connected
                .client
                .batch_execute(&statement)
                .await
                .map_err(query_error)?;
        }
        Ok(Role { kind, label })
    }

    /// Gives a role this security label, or none.
    pub(crate) async fn label(&self, role: &str, label: Option<&str>) -> Result<(), EmulatorError> {
        self.execute(&schema::label(role, label)).await
    }

    /// Makes a role with a Postgres password.
    pub(crate) async fn create_native_role(
        &self,
        name: &str,
        password: &str,
    ) -> Result<(), EmulatorError> {
        let control = self.control().await?;
        let statement = format!(
            "create role {} login password {} in role databricks_native",
            identifier(name),
            escape_literal(password)
        );
        control
            .connected
            .client
            .batch_execute(&statement)
            .await
            .map_err(query_error)
    }

    /// Runs statements as the superuser, in the maintenance database.
    pub(crate) async fn execute(&self, script: &str) -> Result<(), EmulatorError> {
        self.control()
            .await?
            .connected
            .client
            .batch_execute(script)
            .await
            .map_err(query_error)
    }

    /// Whether any of these sessions is inside a query or a transaction.
    pub(crate) async fn is_busy(&self, process_ids: Vec<i32>) -> bool {
        if process_ids.is_empty() {
            return false;
        }
        let Ok(control) = self.control().await else {
            return false;
        };
        let row = control
            .connected
            .client
            .query_one(BUSY_QUERY, &[&process_ids])
            .await;
        row.is_ok_and(|row| row.try_get(0).unwrap_or(false))
    }

    /// Ends these sessions as an administrator does (57P01).
    pub(crate) async fn terminate(&self, process_ids: Vec<i32>) {
        if let Ok(control) = self.control().await
            && let Err(error) = control
                .connected
                .client
                .execute(TERMINATE_QUERY, &[&process_ids])
                .await
        {
            tracing::warn!(%error, "cannot end the emulator's sessions");
        }
    }

    /// Takes the roles of one emulator away again from a server that is not ours.
    pub(crate) async fn forget(&self, identities: &Identities) {
        if self.0.role_password.is_none() {
            return;
        }
        if let Err(error) = schema::forget(&self.0.maintenance, &self.0.database, identities).await
        {
            tracing::warn!(%error, "cannot remove the emulator's roles");
        }
    }

    async fn control(&self) -> Result<Arc<Control>, EmulatorError> {
        let mut slot = self.0.control.lock().await;
        if let Some(control) = slot
            .as_ref()
            .filter(|control| !control.connected.client.is_closed())
        {
            return Ok(Arc::clone(control));
        }
        let mut config = self.0.maintenance.clone();
        config.application_name("lakebase-emulator");
        let connected = Connected::open(&config).await?;
        let role = connected
            .client
            .prepare(ROLE_QUERY)
            .await
            .map_err(query_error)?;
        Ok(Arc::clone(
            slot.insert(Arc::new(Control { connected, role })),
        ))
    }
}

/// A text as an SQL literal.
fn escape_literal(text: &str) -> String {
    if text.contains('\\') {
        format!(" E'{}'", text.replace('\\', r"\\").replace('\'', "''"))
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}
