//! Provisioned instances, apps and SCIM: one of each, all of them the same endpoint and its app.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Query, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{error::ApiError, oidc::Caller, page::Page};
use crate::emulator::{
    AppResource,
    catalog::CREATED,
    compute, identity,
    shared::{Names, Shared},
};

/// `GET /api/2.0/database/instances`
pub(super) async fn list(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Query(page): Query<Page>,
) -> Result<Json<Value>, ApiError> {
    page.of("database_instances", vec![instance(&shared)])
}

/// `GET /api/2.0/database/instances/{name}`
pub(super) async fn get(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if name == Names::INSTANCE {
        Ok(Json(instance(&shared)))
    } else {
        Err(not_found(&name))
    }
}

/// Query of [`find_by_uid`].
#[derive(Deserialize)]
pub(super) struct ByUid {
    #[serde(default)]
    uid: String,
}

/// `GET /api/2.0/database/instances:findByUid`
pub(super) async fn find_by_uid(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Query(query): Query<ByUid>,
) -> Result<Json<Value>, ApiError> {
    if query.uid.is_empty() {
        return Err(ApiError::required("uid"));
    }
    if query.uid == shared.names.instance_uid {
        Ok(Json(instance(&shared)))
    } else {
        Err(not_found(&query.uid))
    }
}

/// `GET /api/2.0/database/instances/{name}/roles`
pub(super) async fn roles(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
    Query(page): Query<Page>,
) -> Result<Json<Value>, ApiError> {
    if name != Names::INSTANCE {
        return Err(not_found(&name));
    }
    let roles = [&shared.identities.app, &shared.identities.user]
        .map(|identity| json!({ "name": identity.name, "identity_type": identity.kind.as_str() }));
    page.of("database_instance_roles", roles.to_vec())
}

/// `GET /api/2.0/apps/{name}`: the app with the resources of the settings, one with a Provisioned database, and one without any.
pub(super) async fn app(
    State(shared): State<Arc<Shared>>,
    _: Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let resources = match name.strip_prefix(Names::APP) {
        Some("") => shared.app_resources(),
        Some("-provisioned") => vec![AppResource::Database {
            key: "database".to_owned(),
            instance_name: Names::INSTANCE.to_owned(),
            database_name: shared.names.database.clone(),
        }],
        Some("-without-database") => vec![AppResource::Secret {
            key: "api-key".to_owned(),
        }],
        _ => {
            return Err(ApiError::new(
                StatusCode::NOT_FOUND,
                "RESOURCE_DOES_NOT_EXIST",
                format!("App with name {name} does not exist or is deleted."),
            ));
        }
    };
    Ok(Json(json!({
        "name": name,
        "service_principal_client_id": shared.identities.app.name,
        "service_principal_name": shared.identities.app.display_name,
        "resources": resources.iter().map(AppResource::to_json).collect::<Vec<_>>(),
    })))
}

/// `GET /api/2.0/preview/scim/v2/Me`
pub(super) async fn me(Caller(identity): Caller) -> Json<Value> {
    let groups: Vec<Value> = identity
        .groups
        .iter()
        .map(|group| json!({ "display": group, "value": group, "type": "direct" }))
        .collect();
    let mut body = json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"],
        "id": identity.id,
        "userName": identity.name,
        "displayName": identity.display_name,
        "active": true,
        "groups": groups,
        "entitlements": [{ "value": "workspace-access" }],
    });
    if let (identity::IdentityKind::User, Some(body)) = (identity.kind, body.as_object_mut()) {
        let email = json!([{ "value": identity.name, "type": "work", "primary": true }]);
        body.insert("emails".to_owned(), email);
    }
    Json(body)
}

/// No instance of this name.
pub(super) fn not_found(name: &str) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "NOT_FOUND",
        format!("Database instance {name} does not exist."),
    )
}

fn instance(shared: &Shared) -> Value {
    // Provisioned has no scale-to-zero: an instance that does not answer is starting.
    let state = if shared.main.compute.state() == compute::State::Active {
        "AVAILABLE"
    } else {
        "STARTING"
    };
    json!({
        "name": Names::INSTANCE,
        "uid": shared.names.instance_uid,
        "state": state,
        "capacity": "CU_1",
        "pg_version": "PG_VERSION_16",
        "read_write_dns": shared.names.host,
        "read_only_dns": shared.names.host,
        "creation_time": CREATED,
        "creator": shared.identities.user.name,
        "stopped": false,
        "effective_stopped": false,
        "effective_node_count": 1,
        "effective_retention_window_in_days": 7,
        "effective_enable_readable_secondaries": false,
        "effective_enable_pg_native_login": shared.settings.borrow().native_login,
    })
}
