//! Endpoints: a host and a compute each, on the data of their branch.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::{Answer, ApiError, endpoint_uid, operation, request::Change};
use crate::emulator::{
    catalog::{self, Kind, Resource},
    compute::Limits,
    shared::Shared,
};

/// Paths of an update mask.
const FIELDS: &[&str] = &[
    "spec",
    "spec.autoscaling_limit_max_cu",
    "spec.autoscaling_limit_min_cu",
    "spec.disabled",
    "spec.group.enable_readable_secondaries",
    "spec.group.max",
    "spec.group.min",
    "spec.settings.pg_settings",
];
const GROUPS: &[&str] = &["spec.suspension"];

/// Compute units that the API accepts.
const MIN_UNITS: f64 = 0.5;
const MAX_UNITS: f64 = 64.0;
/// The most that the maximum may be above the minimum.
const MAX_UNITS_APART: f64 = 16.0;

/// The read-write endpoint that comes with a branch.
pub(super) fn primary(branch: &str, time: &str) -> Resource {
    let name = format!("{branch}/endpoints/primary");
    let mut endpoint = catalog::endpoint_of(&name, &endpoint_uid(branch), time, false);
    endpoint.is_implicit = true;
    endpoint
}

pub(super) fn create(shared: &Arc<Shared>, branch: &str, name: &str, change: &Change) -> Answer {
    let is_read_only = match change.text("spec.endpoint_type")? {
        Some("ENDPOINT_TYPE_READ_ONLY") => true,
        Some("ENDPOINT_TYPE_READ_WRITE") => {
            return Err(ApiError::invalid(
                "A branch can only have one READ_WRITE endpoint.",
            ));
        }
        Some(other) => {
            return Err(ApiError::invalid(format!(
                "Invalid endpoint type '{other}'."
            )));
        }
        None => return Err(ApiError::required("endpoint.spec.endpoint_type")),
    };
    let Some(postgres) = shared.catalog.postgres(branch) else {
        return Err(ApiError::bad_request(
            "the branch has no data in the emulator, or is not ready yet",
        ));
    };
    let time = shared.now().to_string();
    let uid = endpoint_uid(branch);
    let mut endpoint = catalog::endpoint_of(name, &uid, &time, is_read_only);
    apply(&mut endpoint.document["status"], change)?;
    let limits = limits(change, "spec")?;
    shared.catalog.add([endpoint]);
    let (worker, name) = (Arc::clone(shared), name.to_owned());
    Ok(operation::start(
        shared,
        Kind::Endpoint,
        &name.clone(),
        async move {
            let served = worker.serve(&name, &uid, postgres.database, is_read_only);
            if served.is_err() {
                worker.catalog.remove(&name);
            }
            served?;
            limit(&worker, &name, limits).await;
            Ok(())
        },
    ))
}

pub(super) fn update(shared: &Arc<Shared>, existing: &Resource, change: &Change) -> Answer {
    change.check(FIELDS, GROUPS)?;
    let mut status = existing.document["status"].clone();
    apply(&mut status, change)?;
    let given = limits(change, "spec")?;
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Endpoint,
        &existing.name,
        async move {
            let time = worker.now().to_string();
            worker.catalog.change(&name, &time, |old| *old = status);
            limit(&worker, &name, given).await;
            Ok(())
        },
    ))
}

/// The limits that a request sets.
#[derive(Clone, Copy, Default)]
pub(super) struct GivenLimits {
    suspend_after: Option<Duration>,
    is_disabled: Option<bool>,
}

pub(super) fn limits(change: &Change, spec: &str) -> Result<GivenLimits, ApiError> {
    Ok(GivenLimits {
        suspend_after: change.suspension(spec)?,
        is_disabled: change.flag(&format!("{spec}.disabled"))?,
    })
}

/// What a project sets for new endpoints.
pub(super) fn project_limits(shared: &Shared, project: &str) -> GivenLimits {
    let project = shared.catalog.get(project);
    let seconds = project.and_then(|project| {
        let defaults = &project.document["status"]["default_endpoint_settings"];
        super::request::duration(defaults["suspend_timeout_duration"].as_str()?)
    });
    GivenLimits {
        suspend_after: seconds.map(Duration::from_secs_f64),
        is_disabled: None,
    }
}

/// Applies limits to the compute of an endpoint; one that is only listed has none.
pub(super) async fn limit(shared: &Shared, name: &str, given: GivenLimits) {
    if let Some(endpoint) = shared.endpoints.by_name(name) {
        let old = endpoint.compute.limits();
        let limits = Limits {
            suspend_after: given.suspend_after.or(old.suspend_after),
            is_disabled: given.is_disabled.unwrap_or(old.is_disabled),
        };
        if limits != old {
            endpoint.compute.limit(limits).await;
        }
    }
}

fn apply(status: &mut Value, change: &Change) -> Result<(), ApiError> {
    for field in ["autoscaling_limit_min_cu", "autoscaling_limit_max_cu"] {
        if let Some(units) = change.number(&format!("spec.{field}"))? {
            status[field] = json!(units);
        }
    }
    let units = |field: &str| status[field].as_f64().unwrap_or_default();
    let (min, max) = (
        units("autoscaling_limit_min_cu"),
        units("autoscaling_limit_max_cu"),
    );
    if !(MIN_UNITS..=MAX_UNITS).contains(&min) || !(min..=MAX_UNITS).contains(&max) {
        return Err(ApiError::invalid(
            "Autoscaling limits must be between 0.5 and 64 Compute Units, the minimum not above the maximum.",
        ));
    }
    if max - min > MAX_UNITS_APART {
        return Err(ApiError::invalid(
            "The difference between the minimum and maximum Compute Units must not exceed 16.",
        ));
    }
    for field in ["min", "max", "enable_readable_secondaries"] {
        if let Some(value) = change.field(&format!("spec.group.{field}")) {
            status["group"][field] = value.clone();
        }
    }
    if status["group"]["min"] != status["group"]["max"] {
        return Err(ApiError::invalid(
            "Field 'spec.group.min' must be equal to 'spec.group.max'.",
        ));
    }
    if let Some(settings) = change.field("spec.settings.pg_settings") {
        status["settings"]["pg_settings"] = settings.clone();
    }
    Ok(())
}

pub(super) fn delete(shared: &Arc<Shared>, existing: &Resource) -> Answer {
    if existing.is_implicit {
        return Err(ApiError::managed_by_parent(format!(
            "Cannot delete read-write endpoint '{}'. Read-write endpoints cannot be deleted.",
            existing.name
        )));
    }
    let (worker, name) = (Arc::clone(shared), existing.name.clone());
    Ok(operation::start(
        shared,
        Kind::Endpoint,
        &existing.name,
        async move {
            worker.endpoints.remove(|endpoint| endpoint.name == name);
            worker.catalog.remove(&name);
            Ok(())
        },
    ))
}
