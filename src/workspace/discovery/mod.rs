//! Look-ups in the workspace: endpoints by anything that names them, our identity, and roles.

mod bodies;
mod databases;
mod error;
mod locate;
mod lookup;

use std::{fmt, time::Duration};

use serde::Deserialize;

use super::{
    CallError, EndpointName, Target, Workspace,
    diagnosis::clean,
    names::{HostKind, HostName},
};

pub use databases::AppDatabases;
pub use error::LocateError;
pub use locate::{Located, check_names};
pub(super) use lookup::Lookup;

/// An endpoint or an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Its full name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its host; absent while it is created.
    pub host: Option<String>,
    /// The host of its readable replicas.
    pub read_only_host: Option<String>,
    /// Its state.
    pub state: EndpointState,
    /// Whether it is disabled; no connection wakes it then.
    pub disabled: bool,
    /// Whether it takes writes.
    pub endpoint_type: EndpointType,
    /// The idle time until it is suspended; `None` if that is never or unknown.
    pub suspend_timeout: Option<Duration>,
}

impl EndpointInfo {
    /// Whether it has this host or its uid.
    fn answers_to(&self, host: &HostName) -> bool {
        let is_uid = match &host.kind {
            HostKind::Endpoint(uid) | HostKind::Instance(uid) => {
                // `HostName` is in lower case; the API's texts need not be.
                uid.eq_ignore_ascii_case(&self.uid)
            }
            HostKind::Other => false,
        };
        is_uid || self.has_host(host)
    }

    fn has_host(&self, host: &HostName) -> bool {
        let hosts = [&self.host, &self.read_only_host];
        let mut hosts = hosts.into_iter().flatten();
        hosts.any(|known| known.eq_ignore_ascii_case(host.as_str()))
    }

    /// The host for reading, or for reading and writing. A compute of its own for reads has either host.
    fn host_for(&self, read_only: bool) -> Option<String> {
        let (host, replica) = (&self.host, &self.read_only_host);
        let chosen = match (read_only, self.endpoint_type) {
            (false, EndpointType::ReadOnly) => host.as_ref().or(replica.as_ref()),
            (true, EndpointType::ReadOnly) => replica.as_ref().or(host.as_ref()),
            (false, _) => host.as_ref(),
            (true, _) => replica.as_ref(),
        };
        chosen.cloned()
    }
}

/// The state of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// Running.
    Active,
    /// Running, but impaired.
    Degraded,
    /// Suspended; a connection wakes it.
    Idle,
    /// Being created or started.
    Init,
    /// Another state, by the workspace's name for it.
    Other(String),
}

impl Default for EndpointState {
    fn default() -> Self {
        Self::Other(String::new())
    }
}

impl EndpointState {
    fn parse(text: &str) -> Self {
        match text {
            // AVAILABLE and STARTING are states of Provisioned instances.
            "ACTIVE" | "AVAILABLE" => Self::Active,
            "DEGRADED" => Self::Degraded,
            "IDLE" => Self::Idle,
            "INIT" | "STARTING" => Self::Init,
            other => Self::Other(clean(other)),
        }
    }
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Active => f.write_str("active"),
            Self::Degraded => f.write_str("degraded"),
            Self::Idle => f.write_str("idle"),
            Self::Init => f.write_str("starting"),
            Self::Other(word) => f.write_str(word),
        }
    }
}

/// Whether an endpoint takes writes.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
pub enum EndpointType {
    /// Reads only.
    #[serde(rename = "ENDPOINT_TYPE_READ_ONLY")]
    ReadOnly,
    /// Reads and writes.
    #[serde(rename = "ENDPOINT_TYPE_READ_WRITE")]
    ReadWrite,
    /// Absent or unknown.
    #[default]
    #[serde(other)]
    Unknown,
}

/// Our identity in the workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The e-mail address of a person, the application id of a service principal: the name of the Postgres role.
    pub user_name: String,
    /// The numeric id for SCIM calls.
    pub id: String,
    /// Its groups; it may log in as their roles.
    pub groups: Vec<String>,
    /// Its own entitlements; those of its groups may be missing.
    pub entitlements: Vec<String>,
    /// The workspace that answered.
    pub workspace_id: Option<String>,
}

/// A Postgres role of a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its name in Postgres.
    pub name: String,
    /// Whether it logs in with an OAuth credential.
    pub is_oauth: bool,
}

impl Workspace {
    /// Our identity. Without retries.
    pub async fn profile(&self) -> Result<Profile, CallError> {
        self.lookup().profile().await
    }

    /// Without retries.
    fn lookup(&self) -> Lookup<'_> {
        Lookup::new(self, Duration::ZERO)
    }

    /// Looks up an endpoint or an instance. Without retries.
    pub async fn describe(&self, target: &Target) -> Result<EndpointInfo, CallError> {
        match target {
            Target::Endpoint(name) => self.lookup().endpoint(name).await,
            Target::Instance(name) => self.lookup().instance(name).await,
        }
    }

    /// The roles on an endpoint's branch. Without retries.
    pub async fn roles(&self, endpoint: &EndpointName) -> Result<Vec<Role>, CallError> {
        self.lookup().roles(endpoint.branch()).await
    }

    /// The names in Postgres of the databases on an endpoint's branch. Without retries.
    pub async fn databases(&self, endpoint: &EndpointName) -> Result<Vec<String>, CallError> {
        let databases = self.lookup().databases(endpoint.branch()).await?;
        let names = databases
            .into_iter()
            .map(|found| found.status.postgres_database);
        Ok(names.collect())
    }
}
