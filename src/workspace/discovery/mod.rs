//! What the workspace knows of an endpoint, and of us: from whatever names it to the host, the user and the database.
//!
//! Asked once, at start-up, when the settings leave something open; failures that time heals are retried within a budget.

mod bodies;
mod explore;
mod locate;

use std::{fmt, time::Duration};

use super::{CallError, EndpointName, InstanceName, Target, Workspace, error_body};

pub(super) use explore::Explorer;
pub use locate::{Known, LocateError, Located, Wanted};

/// All attempts at one question together.
const BUDGET: Duration = Duration::from_mins(1);

/// What the workspace knows of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Its name, as asked for.
    pub name: String,
    /// The host to connect to; absent while it is being made.
    pub host: Option<String>,
    /// The host of its readable replicas.
    pub read_only_host: Option<String>,
    /// What it is doing.
    pub state: EndpointState,
    /// Switched off: no connection will wake it.
    pub disabled: bool,
    /// Whether it takes writes.
    pub endpoint_type: EndpointType,
    /// After how long without use it is suspended; `None`: never, or not said.
    pub suspend_timeout: Option<Duration>,
}

/// What an endpoint is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointState {
    /// Running.
    Active,
    /// Running, but not well.
    Degraded,
    /// Suspended; a connection wakes it.
    Idle,
    /// Being made or started.
    Init,
    /// Anything else, in the workspace's word.
    Other(String),
}

/// Whether an endpoint takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndpointType {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
    /// Not said, or unknown to us.
    Unknown,
}

/// The databases among an app's resources, where there are several and nothing names the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppDatabases {
    /// The app.
    pub app: String,
    /// The key of the first resource, which is served.
    pub taken: String,
    /// The keys of the others.
    pub others: Vec<String>,
}

impl AppDatabases {
    /// How to serve all of them.
    pub const HINT: &str = "serve each with an --endpoint (or [[endpoint]]) of its own, named by the variable that app.yaml sets with `valueFrom: <key>`";
}

impl fmt::Display for AppDatabases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { app, taken, others } = self;
        let others = others.join("`, `");
        write!(
            f,
            "the app `{app}` has several databases: the resource `{taken}` is served, and `{others}` not"
        )
    }
}

/// Who we are in the workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The e-mail address of a person, the application id of a service principal: the name of the Postgres role.
    pub user_name: String,
    /// The workspace that answered.
    pub workspace_id: Option<String>,
}

impl Workspace {
    /// Looks an endpoint or an instance up. Bounded by a minute.
    pub async fn describe(&self, target: &Target) -> Result<EndpointInfo, CallError> {
        Explorer::new(self, BUDGET).describe(target).await
    }

    /// Looks an endpoint up. Bounded by a minute.
    pub async fn endpoint(&self, name: &EndpointName) -> Result<EndpointInfo, CallError> {
        Explorer::new(self, BUDGET).endpoint(name).await
    }

    /// Looks a database instance up. Bounded by a minute.
    pub async fn instance(&self, name: &InstanceName) -> Result<EndpointInfo, CallError> {
        Explorer::new(self, BUDGET).instance(name).await
    }

    /// Asks the workspace who we are. Bounded by a minute.
    pub async fn me(&self) -> Result<Identity, CallError> {
        Explorer::new(self, BUDGET).me().await
    }
}

impl EndpointState {
    fn parse(text: &str) -> Self {
        match text {
            "ACTIVE" | "AVAILABLE" => Self::Active,
            "DEGRADED" => Self::Degraded,
            "IDLE" => Self::Idle,
            "INIT" | "STARTING" => Self::Init,
            other => Self::Other(error_body::clean(other)),
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
