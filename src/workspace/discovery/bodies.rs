//! JSON of the workspace API, as far as it is used. All fields may be absent.
//!
//! Types as in `service/postgres.py`, `service/database.py` and `service/apps.py` of the SDK for Python.

use serde::Deserialize;

use super::{EndpointInfo, EndpointState, EndpointType};
use crate::workspace::{error_body::proto_duration, names::HostName, times::Number};

/// A resource of Lakebase Autoscaling.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Resource<S> {
    pub(super) name: String,
    uid: String,
    pub(super) status: S,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Endpoint {
    #[serde(rename = "endpoint_type")]
    kind: EndpointType,
    current_state: String,
    disabled: bool,
    suspend_timeout_duration: Option<Number>,
    hosts: Hosts,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Hosts {
    host: String,
    read_only_host: String,
}

impl Resource<Endpoint> {
    pub(super) fn into_info(self) -> EndpointInfo {
        let status = self.status;
        let suspend_timeout = status.suspend_timeout_duration.as_ref();
        EndpointInfo {
            name: self.name,
            uid: self.uid,
            host: host(status.hosts.host),
            read_only_host: host(status.hosts.read_only_host),
            state: EndpointState::parse(&status.current_state),
            disabled: status.disabled,
            endpoint_type: status.kind,
            suspend_timeout: suspend_timeout.and_then(proto_duration),
        }
    }
}

/// An instance of Lakebase Provisioned.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Instance {
    /// May be absent in the answer to a look-up by uid.
    name: String,
    uid: String,
    state: String,
    effective_stopped: bool,
    read_write_dns: String,
    read_only_dns: String,
}

impl Instance {
    pub(super) fn into_info(self) -> EndpointInfo {
        EndpointInfo {
            name: self.name,
            uid: self.uid,
            host: host(self.read_write_dns),
            read_only_host: host(self.read_only_dns),
            state: EndpointState::parse(&self.state),
            disabled: self.effective_stopped || self.state == "STOPPED",
            endpoint_type: EndpointType::ReadWrite,
            suspend_timeout: None,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Project {
    /// A full name.
    pub(super) default_branch: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Branch {
    #[serde(rename = "default")]
    pub(super) is_default: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct PostgresRole {
    pub(super) postgres_role: String,
    pub(super) auth_method: String,
}

/// Its resource id has hyphens where its name in Postgres has underscores.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Database {
    pub(super) postgres_database: String,
}

/// A Databricks App.
#[derive(Deserialize)]
pub(super) struct App {
    #[serde(default)]
    pub(super) resources: Vec<AppResource>,
}

#[derive(Deserialize)]
pub(super) struct AppResource {
    #[serde(default)]
    pub(super) name: String,
    pub(super) postgres: Option<AppPostgres>,
    pub(super) database: Option<AppDatabase>,
}

/// Lakebase Autoscaling; full resource names.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct AppPostgres {
    pub(super) branch: String,
    pub(super) database: String,
}

/// Lakebase Provisioned.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct AppDatabase {
    pub(super) instance_name: String,
    pub(super) database_name: String,
}

/// The answer of SCIM's `Me` (RFC 7644 section 3.11).
#[derive(Deserialize)]
pub(super) struct Me {
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
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct MeValue {
    display: String,
    value: String,
}

impl MeValue {
    pub(super) fn into_text(self) -> String {
        // RFC 7643 section 4.1.2: a group's `value` is its id, `display` its name. An entitlement has `value` alone.
        match self.display.as_str() {
            "" => self.value,
            _ => self.display,
        }
    }
}

/// A host that can be dialed; an invalid one is as good as absent.
fn host(text: String) -> Option<String> {
    text.parse::<HostName>().ok().map(|_| text)
}
