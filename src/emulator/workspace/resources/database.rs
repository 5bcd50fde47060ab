//! Databases of a branch's Postgres.

use std::sync::Arc;

use serde_json::json;

use super::{
    Answer, ApiError, operation, parent, postgres_of, request::Change, role::postgres_role,
};
use crate::emulator::{
    catalog::{Kind, Resource},
    shared::Shared,
};

/// Paths of an update mask.
const FIELDS: &[&str] = &["spec", "spec.postgres_database", "spec.role"];

pub(super) fn create(shared: &Arc<Shared>, branch: &str, name: &str, change: &Change) -> Answer {
    let Some(role) = change.text("spec.role")? else {
        return Err(ApiError::required("database.spec.role"));
    };
    let Some(database) = change.text("spec.postgres_database")? else {
        return Err(ApiError::required("database.spec.postgres_database"));
    };
    let owner = postgres_role(shared, role)?;
    let postgres = postgres_of(shared, branch)?;
    let status = json!({ "postgres_database": database, "role": role });
    let time = shared.now().to_string();
    let resource = Resource::new(Kind::Database, name, None, &time, status);
    shared.catalog.add([resource]);
    let (worker, name, database) = (Arc::clone(shared), name.to_owned(), database.to_owned());
    Ok(operation::start(
        shared,
        Kind::Database,
        &name.clone(),
        async move {
            let made = postgres.create_database(&database, &owner).await;
            if made.is_err() {
                worker.catalog.remove(&name);
            }
            Ok(made?)
        },
    ))
}

pub(super) fn update(shared: &Arc<Shared>, existing: &Resource, change: &Change) -> Answer {
    change.check(FIELDS, &[])?;
    let status = &existing.document["status"];
    let old = status["postgres_database"].as_str().unwrap_or_default();
    let old = old.to_owned();
    let new = change.text("spec.postgres_database")?.map(str::to_owned);
    let role = change.text("spec.role")?.map(str::to_owned);
    let owner = role.as_deref().map(|role| postgres_role(shared, role));
    let owner = owner.transpose()?;
    let postgres = postgres_of(shared, parent(&existing.name))?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Database,
        &existing.name,
        async move {
            let time = worker.now().to_string();
            if let (Some(owner), Some(role)) = (owner, role) {
                postgres.set_owner(&old, &owner).await?;
                worker
                    .catalog
                    .change(&name, &time, |status| status["role"] = role.into());
            }
            if let Some(new) = new.filter(|new| *new != old) {
                postgres.rename_database(&old, &new).await?;
                worker.catalog.change(&name, &time, |status| {
                    status["postgres_database"] = new.into();
                });
            }
            Ok(())
        },
    ))
}

pub(super) fn delete(shared: &Arc<Shared>, existing: &Resource) -> Answer {
    let database = existing.document["status"]["postgres_database"].as_str();
    let database = database.unwrap_or_default().to_owned();
    let postgres = postgres_of(shared, parent(&existing.name))?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Database,
        &existing.name,
        async move {
            postgres.drop_database(&database).await?;
            worker.catalog.remove(&name);
            Ok(())
        },
    ))
}
