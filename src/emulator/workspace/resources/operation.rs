//! Long-running operations: the work goes on behind the answer.

use std::{future::Future, sync::Arc};

use axum::Json;
use serde_json::Value;

use super::{empty, show};
use crate::emulator::{
    EmulatorError,
    catalog::{Failure, Kind},
    shared::Shared,
};

/// What an operation's work returns.
pub(super) type Done = Result<(), Failure>;

/// Begins an operation on the resource `name`. Its response is the resource as it is after `work`.
pub(super) fn start(
    shared: &Arc<Shared>,
    kind: Kind,
    name: &str,
    work: impl Future<Output = Done> + Send + 'static,
) -> Json<Value> {
    let operation = shared.catalog.begin(kind, name);
    let answer = shared.catalog.operation(&operation).unwrap_or_default();
    let name = name.to_owned();
    let worker = Arc::clone(shared);
    let task = async move {
        let _turn = worker.catalog.work.lock().await;
        let outcome = work.await.map(|()| {
            let resource = worker.catalog.get(&name);
            resource.map_or_else(empty, |resource| show(&worker, resource))
        });
        worker.catalog.finish(&operation, outcome);
    };
    let task = shared.stop.clone().run_until_cancelled_owned(task);
    shared.tracker.spawn(task);
    Json(answer)
}

impl From<EmulatorError> for Failure {
    fn from(error: EmulatorError) -> Self {
        let refusal = match &error {
            EmulatorError::Query { source } => source.as_db_error(),
            _ => None,
        };
        match refusal {
            // Postgres refuses what was requested.
            Some(refusal) => Self {
                code: "BAD_REQUEST",
                message: refusal.message().to_owned(),
            },
            None => Self {
                code: "INTERNAL_ERROR",
                message: error.to_string(),
            },
        }
    }
}
