//! Autoscaling resources: projects, branches, endpoints, roles and databases. Reads answer at once; a change is a long-running
//! operation, which its client polls.
//!
//! Rules and texts are those of the API as the SDK documents them and as the Databricks CLI's own test server has them.

mod branch;
mod database;
mod endpoint;
mod operation;
mod project;
mod request;
mod role;

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json,
    extract::{Path, Query, State},
};
use serde_json::{Value, json};

use super::{error::ApiError, oidc::Caller, page::Page};
use crate::emulator::{
    catalog::{Kind, Resource},
    compute, identity,
    postgres::Database,
    shared::Shared,
};
use request::Change;
pub(super) use request::duration;

/// Deleted and made again under its old name: listed, but not found by it (databricks/cli#5872).
const LISTED_ONLY: &str = "projects/lakebase-local/branches/development/endpoints/recreated";

/// The longest timeout there is; a compute that never suspends reports it.
const LONGEST_TIMEOUT: &str = "604800s";

type Answer = Result<Json<Value>, ApiError>;

/// What a path below `/api/2.0/postgres/` names.
enum Target<'a> {
    Collection {
        parent: &'a str,
        kind: Kind,
    },
    Resource(Kind),
    /// An operation on any resource.
    Operation,
    Password {
        role: &'a str,
    },
}

impl<'a> Target<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        if parts.iter().any(|part| part.is_empty()) {
            return None;
        }
        if let [.., "operations", _] = parts.as_slice() {
            return Some(Self::Operation);
        }
        if let (Some(role), [.., "roles", _, "password"]) =
            (path.strip_suffix("/password"), parts.as_slice())
        {
            return Some(Self::Password { role });
        }
        let collections: Vec<&str> = parts.iter().step_by(2).copied().collect();
        let kind = Kind::of(&collections)?;
        if parts.len().is_multiple_of(2) {
            return Some(Self::Resource(kind));
        }
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        Some(Self::Collection { parent, kind })
    }
}

/// `GET /api/2.0/postgres/{name}`: one resource, one list or one operation.
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(page): Query<Page>,
) -> Answer {
    match Target::parse(&name) {
        Some(Target::Collection { parent, kind }) => {
            check_path(&shared, parent)?;
            let resources = shared.catalog.list(&name).into_iter();
            let shown = resources.map(|resource| show(&shared, resource));
            page.of(kind.collection(), shown.collect())
        }
        Some(Target::Resource(_)) => {
            let resource = find(&shared, &name)?;
            Ok(Json(show(&shared, resource)))
        }
        Some(Target::Operation) => {
            let found = shared.catalog.operation(&name);
            found
                .map(Json)
                .ok_or_else(|| ApiError::not_found("operation"))
        }
        Some(Target::Password { .. }) | None => Err(ApiError::not_found("resource")),
    }
}

/// `POST /api/2.0/postgres/{name}`: a new resource in a collection, or a role's password.
pub(super) async fn post(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    body: String,
) -> Answer {
    let (parent, kind) = match Target::parse(&name) {
        Some(Target::Collection { parent, kind }) => (parent, kind),
        Some(Target::Password { role }) => return role::password(&find(&shared, role)?),
        _ => return Err(ApiError::not_found("resource")),
    };
    let id = request::id(kind, &query)?;
    check_path(&shared, parent)?;
    let change = Change::parse(&body, None)?;
    let _addition = shared.catalog.additions.lock();
    let name = format!("{name}/{id}");
    if let Some(existing) = shared.catalog.get(&name) {
        return if query.get("replace_existing").is_some_and(|it| it == "true") {
            update(&shared, kind, &existing, &change)
        } else {
            Err(ApiError::already_exists(kind))
        };
    }
    if shared.catalog.is_full() {
        return Err(ApiError::new(
            axum::http::StatusCode::BAD_REQUEST,
            "RESOURCE_LIMIT_EXCEEDED",
            "the emulator has too many resources",
        ));
    }
    match kind {
        Kind::Project => project::create(&shared, &name, &change),
        Kind::Branch => branch::create(&shared, parent, &name, &change),
        Kind::Endpoint => endpoint::create(&shared, parent, &name, &change),
        Kind::Role => role::create(&shared, parent, &name, &change),
        Kind::Database => database::create(&shared, parent, &name, &change),
    }
}

/// `PATCH /api/2.0/postgres/{name}`: changes the fields of the mask.
pub(super) async fn patch(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    body: String,
) -> Answer {
    let Some(Target::Resource(kind)) = Target::parse(&name) else {
        return Err(ApiError::not_found("resource"));
    };
    let existing = find(&shared, &name)?;
    let change = Change::parse(&body, query.get("update_mask").map(String::as_str))?;
    update(&shared, kind, &existing, &change)
}

fn update(shared: &Arc<Shared>, kind: Kind, existing: &Resource, change: &Change) -> Answer {
    match kind {
        Kind::Project => project::update(shared, existing, change),
        Kind::Branch => branch::update(shared, existing, change),
        Kind::Endpoint => endpoint::update(shared, existing, change),
        Kind::Role => role::update(shared, existing, change),
        Kind::Database => database::update(shared, existing, change),
    }
}

/// `DELETE /api/2.0/postgres/{name}`: for good, with or without `purge`.
pub(super) async fn delete(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Answer {
    let Some(Target::Resource(kind)) = Target::parse(&name) else {
        return Err(ApiError::not_found("resource"));
    };
    let existing = find(&shared, &name)?;
    match kind {
        Kind::Project => project::delete(&shared, &existing),
        Kind::Branch => branch::delete(&shared, &existing),
        Kind::Endpoint => endpoint::delete(&shared, &existing),
        Kind::Role => role::delete(&shared, &existing, query.get("reassign_owned_to")),
        Kind::Database => database::delete(&shared, &existing),
    }
}

/// Whether `name` is an endpoint, and if not, which part of it is wrong.
pub(super) fn find_endpoint(shared: &Shared, name: &str) -> Result<(), ApiError> {
    if !matches!(Target::parse(name), Some(Target::Resource(Kind::Endpoint))) {
        return Err(ApiError::invalid(
            "Field 'endpoint' expects 'projects/{project_id}/branches/{branch_id}/endpoints/{endpoint_id}' format",
        ));
    }
    check_path(shared, name)
}

/// The resource with this name; if there is none, the error names the first part that does not exist.
fn find(shared: &Shared, name: &str) -> Result<Resource, ApiError> {
    check_path(shared, name)?;
    let found = shared.catalog.get(name).filter(|_| name != LISTED_ONLY);
    found.ok_or_else(|| ApiError::not_found("endpoint"))
}

/// Whether a resource and those above it exist.
fn check_path(shared: &Shared, name: &str) -> Result<(), ApiError> {
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
    for end in (2..=parts.len()).step_by(2) {
        let path = parts.get(..end).unwrap_or_default();
        if shared.catalog.get(&path.join("/")).is_none() {
            let collections: Vec<&str> = path.iter().step_by(2).copied().collect();
            let kind = Kind::of(&collections).map_or("resource", Kind::word);
            return Err(ApiError::not_found(kind));
        }
    }
    Ok(())
}

/// A resource as the API shows it: with the present state of its compute and the settings.
fn show(shared: &Shared, resource: Resource) -> Value {
    let Resource {
        name, mut document, ..
    } = resource;
    let settings = shared.settings.borrow();
    let status = &mut document["status"];
    match Target::parse(&name) {
        Some(Target::Resource(Kind::Project)) => {
            status["enable_pg_native_login"] = settings.native_login.into();
            let defaults = &mut status["default_endpoint_settings"];
            if defaults["suspend_timeout_duration"].is_null() {
                defaults["suspend_timeout_duration"] = timeout(settings.suspend_after).into();
            }
        }
        Some(Target::Resource(Kind::Endpoint)) => {
            let suspend_after = match shared.endpoints.by_name(&name) {
                None => settings.suspend_after,
                Some(endpoint) => {
                    let state = endpoint.compute.state();
                    let is_active = state == compute::State::Active;
                    status["current_state"] = if is_active { "ACTIVE" } else { "IDLE" }.into();
                    if state == compute::State::Waking {
                        status["pending_state"] = "ACTIVE".into();
                    }
                    status["disabled"] = endpoint.is_disabled().into();
                    let last_active = endpoint.compute.last_active(shared.now());
                    status["last_active_time"] = last_active.to_string().into();
                    endpoint.compute.suspend_after()
                }
            };
            status["suspend_timeout_duration"] = timeout(suspend_after).into();
        }
        _ => {}
    }
    document
}

fn timeout(suspend_after: std::time::Duration) -> String {
    if suspend_after.is_zero() {
        LONGEST_TIMEOUT.to_owned()
    } else {
        format!("{}s", suspend_after.as_secs_f64())
    }
}

/// A part of a uid or of a generated id.
fn random_part() -> String {
    identity::random::<4>().map_or_else(|_| "0".to_owned(), |bytes| identity::hex(&bytes))
}

/// The uid of a new endpoint, which is a label of its host name and so not longer than needed.
fn endpoint_uid(branch: &str) -> String {
    let id = branch.rsplit('/').next().unwrap_or_default();
    let id = id.get(..24).unwrap_or(id).trim_end_matches('-');
    format!("ep-{id}-{}", random_part())
}

/// The answer of a deletion.
fn empty() -> Value {
    json!({ "@type": "type.googleapis.com/google.protobuf.Empty" })
}

/// The Postgres of a branch.
fn postgres_of(shared: &Shared, branch: &str) -> Result<Database, ApiError> {
    let postgres = shared.catalog.postgres(branch);
    let postgres = postgres.ok_or_else(|| {
        ApiError::bad_request("the branch has no data in the emulator, or is not ready yet")
    })?;
    Ok(postgres.database)
}

/// The branch of a role or database.
fn parent(name: &str) -> &str {
    let collection = name
        .rsplit_once('/')
        .map_or("", |(collection, _)| collection);
    collection.rsplit_once('/').map_or("", |(parent, _)| parent)
}
