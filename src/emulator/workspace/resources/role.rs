//! Roles of a branch's Postgres.

use std::sync::Arc;

use axum::Json;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use super::{Answer, ApiError, operation, parent, postgres_of, request::Change};
use crate::emulator::{
    catalog::{Kind, Resource},
    identity::{hex, random},
    postgres::{Attributes, NewRole},
    shared::Shared,
};

/// Paths of an update mask.
const FIELDS: &[&str] = &[
    "spec",
    "spec.membership_roles",
    "spec.attributes.createdb",
    "spec.attributes.createrole",
    "spec.attributes.bypassrls",
];
const SUPERUSER: &str = "DATABRICKS_SUPERUSER";

pub(super) fn create(shared: &Arc<Shared>, branch: &str, name: &str, change: &Change) -> Answer {
    let Some(role) = change.text("spec.postgres_role")? else {
        return Err(ApiError::required("role.spec.postgres_role"));
    };
    let identity = change.text("spec.identity_type")?;
    if let Some(other) = identity
        && !matches!(other, "USER" | "SERVICE_PRINCIPAL" | "GROUP")
    {
        return Err(ApiError::invalid(format!(
            "Invalid identity type '{other}'."
        )));
    }
    let by_identity = if identity.is_some() {
        "LAKEBASE_OAUTH_V1"
    } else {
        "PG_PASSWORD_SCRAM_SHA_256"
    };
    let method = change.text("spec.auth_method")?.unwrap_or(by_identity);
    let password = match (method, identity) {
        ("LAKEBASE_OAUTH_V1", Some(_)) | ("NO_LOGIN", _) => None,
        ("PG_PASSWORD_SCRAM_SHA_256", None) => {
            let random = random::<16>().map_err(|_| ApiError::internal())?;
            Some(SecretString::from(hex(&random)))
        }
        (other, _) => {
            return Err(ApiError::invalid(format!("Invalid auth method '{other}'.")));
        }
    };
    let mut status = json!({
        "postgres_role": role,
        "auth_method": method,
        "identity_type": identity.unwrap_or("IDENTITY_TYPE_UNSPECIFIED"),
        "membership_roles": [],
        "attributes": { "bypassrls": false, "createdb": false, "createrole": false },
    });
    apply(&mut status, change)?;
    let database = postgres_of(shared, branch)?;
    let new = NewRole {
        name: role.to_owned(),
        identity_type: identity.map(str::to_owned),
        password: password.clone(),
        can_login: method != "NO_LOGIN",
        attributes: attributes(&status),
    };
    let time = shared.now().to_string();
    let resource = Resource {
        password,
        ..Resource::new(Kind::Role, name, None, &time, status)
    };
    shared.catalog.add([resource]);
    let (worker, name) = (Arc::clone(shared), name.to_owned());
    Ok(operation::start(
        shared,
        Kind::Role,
        &name.clone(),
        async move {
            let made = database.create_role(&new).await;
            if made.is_err() {
                worker.catalog.remove(&name);
            }
            Ok(made?)
        },
    ))
}

pub(super) fn update(shared: &Arc<Shared>, existing: &Resource, change: &Change) -> Answer {
    for field in ["identity_type", "auth_method", "postgres_role"] {
        if change.names(&format!("spec.{field}")) {
            return Err(ApiError::invalid(format!(
                "Field 'spec.{field}' cannot be changed."
            )));
        }
    }
    change.check(FIELDS, &[])?;
    let mut status = existing.document["status"].clone();
    apply(&mut status, change)?;
    let database = postgres_of(shared, parent(&existing.name))?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Role,
        &existing.name,
        async move {
            let role = status["postgres_role"].as_str().unwrap_or_default();
            database.alter_role(role, attributes(&status)).await?;
            let time = worker.now().to_string();
            worker.catalog.change(&name, &time, |old| *old = status);
            Ok(())
        },
    ))
}

fn apply(status: &mut Value, change: &Change) -> Result<(), ApiError> {
    for field in ["bypassrls", "createdb", "createrole"] {
        if let Some(is_on) = change.flag(&format!("spec.attributes.{field}"))? {
            status["attributes"][field] = is_on.into();
        }
    }
    if let Some(memberships) = change.field("spec.membership_roles") {
        let all = memberships.as_array();
        let all = all.ok_or_else(|| ApiError::malformed_field("spec.membership_roles"))?;
        if let Some(other) = all.iter().find(|role| **role != SUPERUSER) {
            return Err(ApiError::invalid(format!(
                "Invalid membership role {other}."
            )));
        }
        status["membership_roles"] = memberships.clone();
    }
    Ok(())
}

fn attributes(status: &Value) -> Attributes {
    let is_on = |field: &str| status["attributes"][field] == true;
    let memberships = status["membership_roles"].as_array();
    Attributes {
        bypassrls: is_on("bypassrls"),
        createdb: is_on("createdb"),
        createrole: is_on("createrole"),
        is_superuser: memberships.is_some_and(|all| all.iter().any(|role| *role == SUPERUSER)),
    }
}

/// The Postgres name of the role with this resource name.
pub(super) fn postgres_role(shared: &Shared, name: &str) -> Result<String, ApiError> {
    let role = shared.catalog.get(name);
    let role = role.ok_or_else(|| ApiError::not_found("role"))?;
    let role = role.document["status"]["postgres_role"].as_str();
    role.map(str::to_owned)
        .ok_or_else(|| ApiError::not_found("role"))
}

pub(super) fn delete(
    shared: &Arc<Shared>,
    existing: &Resource,
    reassign_to: Option<&String>,
) -> Answer {
    let role = postgres_role(shared, &existing.name)?;
    let heir = reassign_to.map(|name| postgres_role(shared, name));
    let heir = heir.transpose()?;
    let database = postgres_of(shared, parent(&existing.name))?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Role,
        &existing.name,
        async move {
            database.drop_role(&role, heir.as_deref()).await?;
            worker.catalog.remove(&name);
            Ok(())
        },
    ))
}

/// `POST .../roles/{role}/password`
pub(super) fn password(role: &Resource) -> Answer {
    match &role.password {
        Some(password) => Ok(Json(json!({ "password": password.expose_secret() }))),
        None => Err(ApiError::bad_request("the role has no password")),
    }
}
