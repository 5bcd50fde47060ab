//! The API's JSON, as far as it matters here. Everything may be absent; what makes no sense counts as absent.

use serde::Deserialize;

use super::{EndpointInfo, EndpointState, EndpointType};
use crate::{expiry::Number, workspace::error_body};

/// An endpoint.
#[derive(Deserialize)]
pub(super) struct EndpointBody {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    status: EndpointStatus,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct EndpointStatus {
    endpoint_type: String,
    current_state: String,
    disabled: bool,
    suspend_timeout_duration: Option<Number>,
    hosts: Hosts,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Hosts {
    host: Option<String>,
    read_only_host: Option<String>,
}

impl EndpointBody {
    /// Whether it is known by this uid or answers on this host.
    pub(super) fn answers_to(&self, uid: Option<&str>, host: &str) -> bool {
        let hosts = &self.status.hosts;
        uid.is_some_and(|uid| uid.eq_ignore_ascii_case(&self.uid))
            || [&hosts.host, &hosts.read_only_host]
                .into_iter()
                .flatten()
                .any(|known| known.eq_ignore_ascii_case(host))
    }

    pub(super) fn into_info(self, name: &str) -> EndpointInfo {
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
                .as_ref()
                .and_then(error_body::proto_duration),
        }
    }
}

/// A Provisioned instance.
#[derive(Deserialize)]
pub(super) struct InstanceBody {
    /// May be missing when it was asked for by name.
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    effective_stopped: bool,
    read_write_dns: Option<String>,
    read_only_dns: Option<String>,
}

impl InstanceBody {
    /// Whether it is known by this uid or answers on this host.
    pub(super) fn answers_to(&self, uid: Option<&str>, host: &str) -> bool {
        uid.is_some_and(|uid| uid.eq_ignore_ascii_case(&self.uid))
            || [&self.read_write_dns, &self.read_only_dns]
                .into_iter()
                .flatten()
                .any(|known| known.eq_ignore_ascii_case(host))
    }

    pub(super) fn into_info(self, name: &str) -> EndpointInfo {
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

/// A project.
#[derive(Deserialize)]
pub(super) struct ProjectBody {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) status: ProjectStatus,
}

/// See [`ProjectBody`].
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct ProjectStatus {
    /// Its full name.
    pub(super) default_branch: String,
}

/// A branch.
#[derive(Deserialize)]
pub(super) struct BranchBody {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) status: BranchStatus,
}

/// See [`BranchBody`].
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct BranchStatus {
    #[serde(rename = "default")]
    pub(super) is_default: bool,
}

/// A Postgres role, as the API knows it.
#[derive(Deserialize)]
pub(super) struct RoleBody {
    #[serde(default)]
    pub(super) status: RoleStatus,
}

/// See [`RoleBody`].
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct RoleStatus {
    pub(super) postgres_role: String,
    pub(super) auth_method: String,
}

/// A database: its resource id has hyphens where its name in Postgres has underscores.
#[derive(Deserialize)]
pub(super) struct DatabaseBody {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) status: DatabaseStatus,
}

/// See [`DatabaseBody`].
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct DatabaseStatus {
    pub(super) postgres_database: String,
}

/// A Databricks App.
#[derive(Deserialize)]
pub(super) struct AppBody {
    #[serde(default)]
    pub(super) resources: Vec<AppResource>,
}

/// Something that an app was given.
#[derive(Deserialize)]
pub(super) struct AppResource {
    #[serde(default)]
    pub(super) name: String,
    pub(super) postgres: Option<AppPostgres>,
    pub(super) database: Option<AppDatabase>,
}

/// A resource of Lakebase Autoscaling; full resource names.
#[derive(Clone, Deserialize)]
pub(super) struct AppPostgres {
    #[serde(default)]
    pub(super) branch: String,
    #[serde(default)]
    pub(super) database: String,
}

/// A resource of Lakebase Provisioned.
#[derive(Clone, Deserialize)]
pub(super) struct AppDatabase {
    #[serde(default)]
    pub(super) instance_name: String,
    #[serde(default)]
    pub(super) database_name: String,
}

/// Who we are, in SCIM.
#[derive(Deserialize)]
pub(super) struct MeBody {
    #[serde(rename = "userName")]
    pub(super) user_name: String,
    #[serde(default)]
    pub(super) id: String,
    #[serde(default)]
    pub(super) groups: Vec<MeValue>,
    #[serde(default)]
    pub(super) entitlements: Vec<MeValue>,
}

/// A group or an entitlement.
#[derive(Deserialize)]
pub(super) struct MeValue {
    #[serde(default)]
    pub(super) display: String,
    #[serde(default)]
    pub(super) value: String,
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
