//! What the workspace knows of an endpoint, and of us.
//!
//! Asked once, at start-up, when the settings leave something open; failures that time heals are retried within a budget.

use std::{fmt, time::Duration};

use reqwest::Method;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{
    Answer, CallError, EndpointName, InstanceName, Target, Workspace, diagnosis::Purpose,
    error_body,
};
use crate::credential::MintErrorKind;

/// All attempts at one question together.
const BUDGET: Duration = Duration::from_mins(1);
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(8);
/// Pages of a list that are read; a branch has a handful of endpoints, a page holds 100.
const MAX_PAGES: usize = 10;

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
        match target {
            Target::Endpoint(name) => self.endpoint(name).await,
            Target::Instance(name) => self.instance(name).await,
        }
    }

    /// Looks an endpoint up. Bounded by a minute.
    pub async fn endpoint(&self, name: &EndpointName) -> Result<EndpointInfo, CallError> {
        let purpose = Purpose::Lookup(name.as_str());
        match self
            .get::<EndpointBody>(purpose, &format!("/api/2.0/postgres/{name}"))
            .await
        {
            Ok(answer) => Ok(answer.value.into_info(name.as_str())),
            // An endpoint that was deleted and made again under its old name is listed, but not found by it.
            Err(error) if error.status == Some(404) => self.listed(name).await?.ok_or(error),
            Err(error) => Err(error),
        }
    }

    /// Looks a database instance up. Bounded by a minute.
    pub async fn instance(&self, name: &InstanceName) -> Result<EndpointInfo, CallError> {
        let purpose = Purpose::Lookup(name.as_str());
        let answer = self
            .get::<InstanceBody>(purpose, &format!("/api/2.0/database/instances/{name}"))
            .await?;
        Ok(answer.value.into_info(name.as_str()))
    }

    /// Asks the workspace who we are. Bounded by a minute.
    pub async fn me(&self) -> Result<Identity, CallError> {
        let answer = self
            .get::<MeBody>(Purpose::Identity, "/api/2.0/preview/scim/v2/Me")
            .await?;
        Ok(Identity {
            user_name: answer.value.user_name,
            workspace_id: answer.workspace_id,
        })
    }

    async fn listed(&self, name: &EndpointName) -> Result<Option<EndpointInfo>, CallError> {
        let mut page_token = String::new();
        for _ in 0..MAX_PAGES {
            let mut path = format!(
                "/api/2.0/postgres/{}/endpoints?page_size=100",
                name.branch()
            );
            if !page_token.is_empty() {
                let encoded: String =
                    url::form_urlencoded::byte_serialize(page_token.as_bytes()).collect();
                path = format!("{path}&page_token={encoded}");
            }
            let page = match self
                .get::<EndpointPage>(Purpose::Lookup(name.branch()), &path)
                .await
            {
                Ok(answer) => answer.value,
                Err(error) if error.status == Some(404) => return Ok(None),
                Err(error) => return Err(error),
            };
            if let Some(found) = page
                .endpoints
                .into_iter()
                .find(|endpoint| endpoint.name == name.as_str())
            {
                return Ok(Some(found.into_info(name.as_str())));
            }
            match page.next_page_token {
                Some(next) if !next.is_empty() && next != page_token => page_token = next,
                _ => break,
            }
        }
        Ok(None)
    }

    /// A GET that waits out what time heals.
    async fn get<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
    ) -> Result<Answer<T>, CallError> {
        let deadline = Instant::now() + BUDGET;
        let mut wait = FIRST_WAIT;
        let mut is_reported = false;
        loop {
            let error = match self.call(purpose, Method::GET, path, None).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = error
                .retry_after
                .unwrap_or_default()
                .max(wait.mul_f64(rand::random_range(0.5..=1.5)));
            let is_worth_it = matches!(
                error.kind,
                MintErrorKind::RateLimited | MintErrorKind::Unavailable
            );
            if !is_worth_it || Instant::now() + pause >= deadline {
                return Err(error);
            }
            if !is_reported {
                warn!(error = %error, detail = error.detail.as_deref(), "retrying");
                is_reported = true;
            }
            sleep(pause).await;
            wait = (wait * 2).min(LAST_WAIT);
        }
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

#[derive(Deserialize)]
struct EndpointPage {
    #[serde(default)]
    endpoints: Vec<EndpointBody>,
    next_page_token: Option<String>,
}

#[derive(Deserialize)]
struct EndpointBody {
    #[serde(default)]
    name: String,
    #[serde(default)]
    status: EndpointStatus,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct EndpointStatus {
    endpoint_type: String,
    current_state: String,
    disabled: bool,
    suspend_timeout_duration: Option<String>,
    hosts: Hosts,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Hosts {
    host: Option<String>,
    read_only_host: Option<String>,
}

impl EndpointBody {
    fn into_info(self, name: &str) -> EndpointInfo {
        let status = self.status;
        EndpointInfo {
            name: name.to_owned(),
            host: status.hosts.host.and_then(host_name),
            read_only_host: status.hosts.read_only_host.and_then(host_name),
            state: EndpointState::parse(&status.current_state),
            disabled: status.disabled,
            endpoint_type: match status.endpoint_type.as_str() {
                "ENDPOINT_TYPE_READ_WRITE" => EndpointType::ReadWrite,
                "ENDPOINT_TYPE_READ_ONLY" => EndpointType::ReadOnly,
                _ => EndpointType::Unknown,
            },
            suspend_timeout: status
                .suspend_timeout_duration
                .as_deref()
                .and_then(error_body::proto_duration),
        }
    }
}

#[derive(Deserialize)]
struct InstanceBody {
    #[serde(default)]
    state: String,
    #[serde(default)]
    effective_stopped: bool,
    read_write_dns: Option<String>,
    read_only_dns: Option<String>,
}

impl InstanceBody {
    fn into_info(self, name: &str) -> EndpointInfo {
        EndpointInfo {
            name: name.to_owned(),
            host: self.read_write_dns.and_then(host_name),
            read_only_host: self.read_only_dns.and_then(host_name),
            state: EndpointState::parse(&self.state),
            disabled: self.effective_stopped || self.state == "STOPPED",
            endpoint_type: EndpointType::ReadWrite,
            suspend_timeout: None,
        }
    }
}

#[derive(Deserialize)]
struct MeBody {
    #[serde(rename = "userName")]
    user_name: String,
}

/// A host name that is worth dialling: what is not even one is as good as absent.
fn host_name(text: String) -> Option<String> {
    let is_name = !text.is_empty()
        && text.len() <= 253
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
    is_name.then_some(text)
}
