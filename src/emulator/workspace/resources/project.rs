//! Projects: each has a Postgres of its own, with one branch at first.

use std::sync::Arc;

use serde_json::json;

use super::{
    Answer, ApiError, branch, endpoint,
    operation::{self, Done},
    random_part,
    request::Change,
};
use crate::emulator::{
    EmulatorOptions,
    catalog::{self, BranchPostgres, Kind, Resource},
    postgres::{Database, LocalPostgres},
    shared::Shared,
};

/// Paths of an update mask.
const FIELDS: &[&str] = &[
    "spec",
    "initial_branch_spec",
    "initial_endpoint_spec",
    "spec.budget_policy_id",
    "spec.custom_tags",
    "spec.default_branch",
    "spec.default_endpoint_settings",
    "spec.default_endpoint_settings.autoscaling_limit_max_cu",
    "spec.default_endpoint_settings.autoscaling_limit_min_cu",
    "spec.default_endpoint_settings.pg_settings",
    "spec.display_name",
    "spec.enable_pg_native_login",
    "spec.history_retention_duration",
];
const GROUPS: &[&str] = &["spec.default_endpoint_settings.suspension"];

pub(super) fn create(shared: &Arc<Shared>, name: &str, change: &Change) -> Answer {
    // Another server is started with what the first one was started with.
    let Some(options) = branch::main_server(shared).map(|server| server.options()) else {
        return Err(branch::foreign_server());
    };
    let time = shared.now().to_string();
    let owner = &shared.identities.user.name;
    let mut project = catalog::project_of(name, random_part(), &time, owner);
    apply(shared, &mut project, change)?;
    let path = format!("{name}/branches/production");
    let uid = format!("br-production-{}", random_part());
    let mut first = catalog::branch_of(&path, uid, &time, true);
    first.is_implicit = true;
    let status = &mut first.document["status"];
    status["current_state"] = "INIT".into();
    let protected = change.flag("initial_branch_spec.is_protected")?;
    status["is_protected"] = protected.unwrap_or(false).into();
    let endpoint = endpoint::primary(&path, &time);
    let limits = endpoint::limits(change, "initial_endpoint_spec")?;
    let contents = catalog::contents(&path, &time, &shared.names, &shared.identities);
    shared.catalog.add([project, first, endpoint]);
    shared.catalog.add(contents);

    let (worker, name) = (Arc::clone(shared), name.to_owned());
    Ok(operation::start(
        shared,
        Kind::Project,
        &name.clone(),
        async move {
            let made = fill(&worker, &path, options).await;
            if made.is_err() {
                worker.catalog.remove(&name);
            } else {
                endpoint::limit(&worker, &format!("{path}/endpoints/primary"), limits).await;
            }
            made
        },
    ))
}

/// Starts the Postgres of a new project.
async fn fill(
    shared: &Arc<Shared>,
    branch: &str,
    options: crate::emulator::LocalPostgresOptions,
) -> Done {
    let server = Arc::new(LocalPostgres::start(options).await?);
    let options = EmulatorOptions {
        database: shared.names.database.clone(),
        sample_notes: false,
        ..EmulatorOptions::default()
    };
    let database = Database::on_local(&server, &shared.identities, &options).await?;
    let server = Some(server);
    branch::open(shared, branch, BranchPostgres { server, database })
}

pub(super) fn update(shared: &Arc<Shared>, existing: &Resource, change: &Change) -> Answer {
    change.check(FIELDS, GROUPS)?;
    let mut changed = existing.clone();
    apply(shared, &mut changed, change)?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Project,
        &existing.name,
        async move {
            let status = changed.document["status"].clone();
            let time = worker.now().to_string();
            worker.catalog.change(&name, &time, |old| *old = status);
            Ok(())
        },
    ))
}

fn apply(shared: &Shared, project: &mut Resource, change: &Change) -> Result<(), ApiError> {
    let status = &mut project.document["status"];
    for field in [
        "display_name",
        "pg_version",
        "history_retention_duration",
        "custom_tags",
        "budget_policy_id",
    ] {
        if let Some(value) = change.field(&format!("spec.{field}")) {
            status[field] = value.clone();
        }
    }
    if let Some(branch) = change.text("spec.default_branch")? {
        if shared.catalog.get(branch).is_none() {
            return Err(ApiError::not_found("branch"));
        }
        status["default_branch"] = branch.into();
    }
    let defaults = "spec.default_endpoint_settings";
    for field in [
        "autoscaling_limit_min_cu",
        "autoscaling_limit_max_cu",
        "pg_settings",
    ] {
        if let Some(value) = change.field(&format!("{defaults}.{field}")) {
            status["default_endpoint_settings"][field] = value.clone();
        }
    }
    if let Some(suspend_after) = change.suspension(defaults)? {
        status["default_endpoint_settings"]["suspend_timeout_duration"] =
            json!(super::timeout(suspend_after));
    }
    if let Some(is_on) = change.flag("spec.enable_pg_native_login")? {
        // One switch for the workspace.
        let turn = |settings: &mut crate::emulator::Settings| settings.native_login = is_on;
        shared.settings.send_modify(turn);
    }
    Ok(())
}

pub(super) fn delete(shared: &Arc<Shared>, existing: &Resource) -> Answer {
    if existing.is_implicit {
        return Err(ApiError::bad_request(
            "the emulator's own project cannot be deleted",
        ));
    }
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Project,
        &existing.name,
        async move {
            branch::close(&worker, &name).await;
            Ok(())
        },
    ))
}
