//! Branches: each has a Postgres that begins as a copy of its source's, and a read-write endpoint.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::time::sleep;

use super::{
    Answer, ApiError, endpoint,
    operation::{self, Done},
    random_part,
    request::{self, Change},
};
use crate::emulator::{
    app,
    catalog::{self, BranchPostgres, Kind, Resource},
    postgres::{Database, LocalPostgres},
    shared::Shared,
};

/// Paths of an update mask.
const FIELDS: &[&str] = &["spec", "spec.is_protected"];
/// Three fields that exclude each other.
const EXPIRATION: &str = "spec.expiration";
/// Interval between checks whether a branch has expired.
const EXPIRY_RECHECK: Duration = Duration::from_mins(1);

/// The server of the emulated endpoint, unless it is a foreign one.
pub(super) fn main_server(shared: &Shared) -> Option<Arc<LocalPostgres>> {
    shared.catalog.postgres(app::branch())?.server
}

/// A server that is not ours cannot be copied.
pub(super) fn foreign_server() -> ApiError {
    ApiError::bad_request(
        "an emulator with --postgres-url has one branch; without it, the emulator starts a Postgres for each",
    )
}

pub(super) fn create(shared: &Arc<Shared>, project: &str, name: &str, change: &Change) -> Answer {
    for field in ["source_branch_lsn", "source_branch_time", "source_snapshot"] {
        if change.field(&format!("spec.{field}")).is_some() {
            return Err(ApiError::invalid(format!(
                "Field 'spec.{field}': the emulator branches from the present state of a branch only."
            )));
        }
    }
    let source = match change.text("spec.source_branch")? {
        Some(source) => source.to_owned(),
        None => default_branch(shared, project)?,
    };
    if shared.catalog.get(&source).is_none() || !catalog::is_within(&source, project) {
        return Err(ApiError::not_found("branch"));
    }
    let Some(postgres) = shared.catalog.postgres(&source) else {
        return Err(ApiError::bad_request(
            "the source branch has no data in the emulator, or is not ready yet",
        ));
    };
    let Some(server) = postgres.server else {
        return Err(foreign_server());
    };
    let time = shared.now().to_string();
    let uid = format!("br-{}", random_part());
    let mut branch = catalog::branch_of(name, uid, &time, false);
    let status = &mut branch.document["status"];
    status["current_state"] = "INIT".into();
    status["source_branch"] = source.clone().into();
    status["source_branch_time"] = time.clone().into();
    apply(shared, status, change)?;
    let endpoint = endpoint::primary(name, &time);
    let inherited = inherited(shared, &source, name, &time);
    let limits = endpoint::project_limits(shared, project);
    shared.catalog.add([branch, endpoint]);
    shared.catalog.add(inherited);

    let (worker, name) = (Arc::clone(shared), name.to_owned());
    Ok(operation::start(
        shared,
        Kind::Branch,
        &name.clone(),
        async move {
            let made = copy(&worker, &name, &server).await;
            if made.is_err() {
                worker.catalog.remove(&name);
            } else {
                endpoint::limit(&worker, &format!("{name}/endpoints/primary"), limits).await;
                watch_expiry(&worker, &name);
            }
            made
        },
    ))
}

fn default_branch(shared: &Shared, project: &str) -> Result<String, ApiError> {
    let project = super::find(shared, project)?;
    let branch = project.document["status"]["default_branch"].as_str();
    Ok(branch.unwrap_or_default().to_owned())
}

/// The roles and databases of `source`, as those of the new `branch`.
fn inherited(shared: &Shared, source: &str, branch: &str, time: &str) -> Vec<Resource> {
    let kinds = [Kind::Role, Kind::Database].into_iter();
    let all = kinds.flat_map(|kind| {
        let list = shared
            .catalog
            .list(&format!("{source}/{}", kind.collection()));
        list.into_iter().map(move |resource| (kind, resource))
    });
    all.map(|(kind, resource)| {
        let move_over = |name: &str| name.replacen(source, branch, 1);
        let mut status = resource.document["status"].clone();
        if let Some(role) = status["role"].as_str() {
            status["role"] = move_over(role).into();
        }
        let name = move_over(&resource.name);
        Resource {
            password: resource.password,
            ..Resource::new(kind, &name, None, time, status)
        }
    })
    .collect()
}

async fn copy(shared: &Arc<Shared>, branch: &str, source: &LocalPostgres) -> Done {
    let server = Arc::new(source.branch().await?);
    let database = Database::of_branch(&server, &shared.names.database);
    let server = Some(server);
    open(shared, branch, BranchPostgres { server, database })
}

/// Lets clients in: the branch is ready, and so is its endpoint.
pub(super) fn open(shared: &Arc<Shared>, branch: &str, postgres: BranchPostgres) -> Done {
    let name = format!("{branch}/endpoints/primary");
    let uid = shared.catalog.uid_of(&name).unwrap_or_default();
    shared.serve(&name, &uid, postgres.database.clone(), false)?;
    shared.catalog.set_postgres(branch, postgres);
    let time = shared.now().to_string();
    shared.catalog.change(branch, &time, |status| {
        status["current_state"] = "READY".into();
        status["state_change_time"] = time.clone().into();
    });
    Ok(())
}

/// Ends the endpoints and servers of a branch, or of all branches of a project, and forgets them.
pub(super) async fn close(shared: &Arc<Shared>, name: &str) {
    shared
        .endpoints
        .remove(|endpoint| catalog::is_within(&endpoint.name, name));
    let servers = shared.catalog.remove(name);
    // Waiting for Postgres to end blocks.
    let _ = tokio::task::spawn_blocking(move || drop(servers)).await;
}

pub(super) fn update(shared: &Arc<Shared>, existing: &Resource, change: &Change) -> Answer {
    change.check(FIELDS, &[EXPIRATION])?;
    let mut status = existing.document["status"].clone();
    apply(shared, &mut status, change)?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Branch,
        &existing.name,
        async move {
            let time = worker.now().to_string();
            worker.catalog.change(&name, &time, |old| *old = status);
            watch_expiry(&worker, &name);
            Ok(())
        },
    ))
}

fn apply(shared: &Shared, status: &mut Value, change: &Change) -> Result<(), ApiError> {
    if let Some(is_protected) = change.flag("spec.is_protected")? {
        status["is_protected"] = is_protected.into();
    }
    let field = |name| change.member(EXPIRATION, name);
    let text = |name: &'static str| {
        move |value: &Value| {
            let text = value.as_str().map(str::to_owned);
            text.ok_or_else(|| ApiError::malformed_field(name))
        }
    };
    let expires = match (field("ttl"), field("expire_time"), field("no_expiry")) {
        (None, None, None) => return Ok(()),
        (Some(ttl), None, None) => {
            let seconds = request::duration(&text("ttl")(ttl)?);
            let ttl = seconds.and_then(|seconds| SignedDuration::try_from_secs_f64(seconds).ok());
            let ttl = ttl.ok_or_else(|| ApiError::malformed_field("ttl"))?;
            let end = shared.now().checked_add(ttl);
            Some(end.map_err(|_| ApiError::malformed_field("ttl"))?)
        }
        (None, Some(time), None) => {
            let time = text("expire_time")(time)?.parse::<Timestamp>();
            Some(time.map_err(|_| ApiError::malformed_field("expire_time"))?)
        }
        (None, None, Some(Value::Bool(true))) => None,
        (None, None, Some(_)) => {
            return Err(ApiError::invalid(
                "Field 'no_expiry' must be true when it is provided.",
            ));
        }
        _ => {
            return Err(ApiError::invalid(
                "Only one of 'ttl', 'expire_time' and 'no_expiry' may be set.",
            ));
        }
    };
    match (expires, status.as_object_mut()) {
        (Some(time), _) => status["expire_time"] = time.to_string().into(),
        (None, Some(status)) => drop(status.remove("expire_time")),
        (None, None) => {}
    }
    Ok(())
}

/// Deletes the branch at its expiration time, if it has one then.
fn watch_expiry(shared: &Arc<Shared>, name: &str) {
    if expiry(shared, name).is_none() {
        return;
    }
    let (worker, name) = (Arc::clone(shared), name.to_owned());
    let watch = async move {
        // The workspace's clock can be set.
        while let Some(time) = expiry(&worker, &name) {
            let left = time.duration_since(worker.now());
            if left.is_positive() {
                let left = Duration::try_from(left).unwrap_or_default();
                sleep(left.min(EXPIRY_RECHECK)).await;
                continue;
            }
            let _turn = worker.catalog.work.lock().await;
            return close(&worker, &name).await;
        }
    };
    let watch = shared.stop.clone().run_until_cancelled_owned(watch);
    shared.tracker.spawn(watch);
}

fn expiry(shared: &Shared, name: &str) -> Option<Timestamp> {
    let branch = shared.catalog.get(name)?;
    let time = branch.document["status"]["expire_time"].as_str()?;
    time.parse().ok()
}

pub(super) fn delete(shared: &Arc<Shared>, existing: &Resource) -> Answer {
    if existing.document["status"]["is_protected"] == true {
        return Err(ApiError::bad_request("cannot delete protected branch"));
    }
    if existing.is_implicit {
        return Err(ApiError::managed_by_parent(format!(
            "Cannot delete root branch '{}'. Root branches cannot be deleted independently.",
            existing.name
        )));
    }
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Branch,
        &existing.name,
        async move {
            close(&worker, &name).await;
            Ok(())
        },
    ))
}
