//! Autoscaling resources: projects, their branches, and what hangs on a branch.
//!
//! One endpoint is real; the others are there so that lists have more than one entry and pages more than one page.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Query, State},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{error::ApiError, oidc::Caller};
use crate::emulator::{
    compute,
    shared::{Names, Shared},
};

/// The API's largest page, and its default here.
const MAX_PAGE: usize = 100;

/// A branch's id and those of its endpoints.
type Branch = (&'static str, &'static [&'static str]);

/// Every project, branch and endpoint there is.
const TREE: [(&str, &[Branch]); 2] = [
    (
        "lakebase-local",
        &[
            ("production", &["primary", "replica"]),
            ("development", &["primary", "recreated"]),
            ("archive", &["primary"]),
        ],
    ),
    ("another-project", &[("production", &["primary"])]),
];

/// Switched off for good; the real one is by [`crate::emulator::Settings::is_disabled`].
const DISABLED: &str = "projects/lakebase-local/branches/archive/endpoints/primary";
/// Deleted and made again under its old name: listed, but not found by it (databricks/cli#5872).
const LISTED_ONLY: &str = "projects/lakebase-local/branches/development/endpoints/recreated";

/// Paging parameters of a list.
#[derive(Default, Deserialize)]
pub(super) struct Page {
    page_size: Option<usize>,
    page_token: Option<String>,
}

impl Page {
    /// One page of `items` under `key`, with the token of the next.
    pub(super) fn of(&self, key: &str, items: Vec<Value>) -> Result<Json<Value>, ApiError> {
        let size = self
            .page_size
            .filter(|size| *size > 0)
            .unwrap_or(MAX_PAGE)
            .min(MAX_PAGE);
        let start: usize = match self.page_token.as_deref().filter(|token| !token.is_empty()) {
            None => 0,
            Some(token) => token
                .strip_prefix("page-")
                .and_then(|offset| offset.parse().ok())
                .ok_or_else(|| ApiError::invalid("Invalid page token."))?,
        };
        let next = (items.len() > start.saturating_add(size))
            .then(|| format!("page-{}", start.saturating_add(size)));
        let page: Vec<Value> = items.into_iter().skip(start).take(size).collect();
        let mut body = json!({ key: page });
        if let (Some(next), Some(body)) = (next, body.as_object_mut()) {
            body.insert("next_page_token".to_owned(), next.into());
        }
        Ok(Json(body))
    }
}

/// `GET /api/2.0/postgres/{name}`: one resource or one list, as the path has it.
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<Value>, ApiError> {
    let parts: Vec<&str> = name.split('/').collect();
    match parts.as_slice() {
        ["projects"] => page.of(
            "projects",
            TREE.iter().map(|(id, _)| project(&shared, id)).collect(),
        ),
        ["projects", id] => {
            branches_of(id)?;
            Ok(Json(project(&shared, id)))
        }
        ["projects", parent, "branches"] => {
            let branches = branches_of(parent)?;
            page.of(
                "branches",
                branches
                    .iter()
                    .map(|(id, _)| branch(&shared, parent, id))
                    .collect(),
            )
        }
        ["projects", parent, "branches", id] => {
            endpoints_of(parent, id)?;
            Ok(Json(branch(&shared, parent, id)))
        }
        ["projects", parent, "branches", id, kind] => {
            let endpoints = endpoints_of(parent, id)?;
            let parent = format!("projects/{parent}/branches/{id}");
            let items = match *kind {
                "endpoints" => endpoints
                    .iter()
                    .map(|id| endpoint(&shared, &parent, id))
                    .collect(),
                "roles" => roles(&shared, &parent),
                "databases" => vec![database(&shared, &parent)],
                _ => return Err(ApiError::not_found("resource")),
            };
            page.of(kind, items)
        }
        ["projects", parent, "branches", branch, kind, id] => {
            endpoints_of(parent, branch)?;
            let parent = format!("projects/{parent}/branches/{branch}");
            let found = match *kind {
                "endpoints" if name == LISTED_ONLY => None,
                "endpoints" => {
                    find_endpoint(&name)?;
                    Some(endpoint(&shared, &parent, id))
                }
                "roles" => roles(&shared, &parent)
                    .into_iter()
                    .find(|role| role["name"] == name.as_str()),
                "databases" => Some(database(&shared, &parent))
                    .filter(|database| database["name"] == name.as_str()),
                _ => None,
            };
            found
                .map(Json)
                .ok_or_else(|| ApiError::not_found(kind.strip_suffix('s').unwrap_or(kind)))
        }
        _ => Err(ApiError::not_found("resource")),
    }
}

/// Whether `name` is an endpoint, and if not, which part of it is wrong.
pub(super) fn find_endpoint(name: &str) -> Result<(), ApiError> {
    let parts: Vec<&str> = name.split('/').collect();
    let ["projects", project, "branches", branch, "endpoints", id] = parts.as_slice() else {
        return Err(ApiError::invalid(
            "Field 'endpoint' expects 'projects/{project_id}/branches/{branch_id}/endpoints/{endpoint_id}' format",
        ));
    };
    let endpoints = endpoints_of(project, branch)?;
    if endpoints.contains(id) {
        Ok(())
    } else {
        Err(ApiError::not_found("endpoint"))
    }
}

fn branches_of(project: &str) -> Result<&'static [Branch], ApiError> {
    let found = TREE.iter().find(|(id, _)| *id == project);
    found
        .map(|(_, branches)| *branches)
        .ok_or_else(|| ApiError::not_found("project"))
}

fn endpoints_of(project: &str, branch: &str) -> Result<&'static [&'static str], ApiError> {
    let found = branches_of(project)?.iter().find(|(id, _)| *id == branch);
    found
        .map(|(_, endpoints)| *endpoints)
        .ok_or_else(|| ApiError::not_found("branch"))
}

fn project(shared: &Shared, id: &str) -> Value {
    json!({
        "name": format!("projects/{id}"),
        "uid": format!("{id}-{}", shared.names.suffix),
        "project_id": id,
        "create_time": CREATED,
        "update_time": CREATED,
        "status": {
            "project_id": id,
            "display_name": id,
            "owner": shared.identities.user.name,
            "pg_version": 17,
            "default_branch": format!("projects/{id}/branches/production"),
            "enable_pg_native_login": shared.settings.borrow().native_login,
            "history_retention_duration": "604800s",
            "default_endpoint_settings": {
                "autoscaling_limit_min_cu": 0.5,
                "autoscaling_limit_max_cu": 4.0,
                "suspend_timeout_duration": suspend_timeout(shared),
                "pg_settings": {},
            },
        },
    })
}

fn branch(shared: &Shared, project: &str, id: &str) -> Value {
    let is_default = id == "production";
    let mut status = json!({
        "branch_id": id,
        "current_state": "READY",
        "default": is_default,
        "is_protected": false,
        "logical_size_bytes": 31_457_280,
    });
    if let (false, Some(status)) = (is_default, status.as_object_mut()) {
        status.insert(
            "source_branch".to_owned(),
            format!("projects/{project}/branches/production").into(),
        );
    }
    json!({
        "name": format!("projects/{project}/branches/{id}"),
        "uid": format!("br-{id}-{}", shared.names.suffix),
        "branch_id": id,
        "parent": format!("projects/{project}"),
        "create_time": CREATED,
        "update_time": CREATED,
        "status": status,
    })
}

fn endpoint(shared: &Shared, parent: &str, id: &str) -> Value {
    let name = format!("{parent}/endpoints/{id}");
    let is_real = name == Names::ENDPOINT;
    let is_replica = id == "replica";
    let state = if is_real {
        shared.compute.state()
    } else {
        compute::State::Idle
    };
    let uid = shared.uid_of(&name);
    let host = shared.host_of(&name);
    let hosts = if is_replica {
        json!({ "read_only_host": host })
    } else {
        let suffixed = |suffix: &str| format!("{uid}{suffix}.localhost");
        json!({
            "host": host,
            "read_only_host": suffixed("-ro"),
            "read_write_pooled_host": suffixed("-pooler"),
            "read_only_pooled_host": suffixed("-ro-pooler"),
        })
    };
    let mut status = json!({
        "endpoint_id": id,
        "endpoint_type": if is_replica { "ENDPOINT_TYPE_READ_ONLY" } else { "ENDPOINT_TYPE_READ_WRITE" },
        "current_state": if state == compute::State::Active { "ACTIVE" } else { "IDLE" },
        "disabled": name == DISABLED || (is_real && shared.settings.borrow().is_disabled),
        "autoscaling_limit_min_cu": 0.5,
        "autoscaling_limit_max_cu": 4.0,
        "suspend_timeout_duration": suspend_timeout(shared),
        "last_active_time": if is_real { shared.compute.last_active(shared.now()).to_string() } else { CREATED.to_owned() },
        "hosts": hosts,
        "group": { "min": 1, "max": 1, "enable_readable_secondaries": false },
        "settings": { "pg_settings": {} },
    });
    if let (compute::State::Waking, Some(status)) = (state, status.as_object_mut()) {
        status.insert("pending_state".to_owned(), "ACTIVE".into());
    }
    json!({
        "name": name,
        "uid": uid,
        "endpoint_id": id,
        "parent": parent,
        "create_time": CREATED,
        "update_time": CREATED,
        "status": status,
    })
}

fn roles(shared: &Shared, parent: &str) -> Vec<Value> {
    [(&shared.identities.app, "app"), (&shared.identities.user, "owner")]
        .into_iter()
        .map(|(identity, id)| {
            json!({
                "name": format!("{parent}/roles/{id}"),
                "role_id": id,
                "parent": parent,
                "status": {
                    "postgres_role": identity.name,
                    "auth_method": "LAKEBASE_OAUTH_V1",
                    "identity_type": identity.kind.as_str(),
                    "attributes": { "bypassrls": false, "createdb": id == "owner", "createrole": id == "owner" },
                },
            })
        })
        .collect()
}

fn database(shared: &Shared, parent: &str) -> Value {
    // Resource ids take no underscores.
    let id = shared.names.database.replace('_', "-");
    json!({
        "name": format!("{parent}/databases/{id}"),
        "database_id": id,
        "parent": parent,
        "status": { "postgres_database": shared.names.database, "role": format!("{parent}/roles/owner") },
    })
}

fn suspend_timeout(shared: &Shared) -> String {
    let suspend_after = shared.settings.borrow().suspend_after;
    // Never suspending is reported as the longest timeout there is.
    if suspend_after.is_zero() {
        "604800s".to_owned()
    } else {
        format!("{}s", suspend_after.as_secs_f64())
    }
}

/// The creation time of everything.
pub(super) const CREATED: &str = "2026-01-01T00:00:00Z";
