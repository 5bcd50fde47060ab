//! Shows and changes the log filter at run time: `curl -X PUT -d debug localhost:9090/log-filter`.
//!
//! For this machine only: logging at `trace` costs time and reveals more than a remote client should be able to enable.

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    middleware,
    routing::get,
};

use super::status::only_here;
use crate::telemetry::{LogHandle, chain};

/// Maximum length of a filter in bytes.
const MAX_FILTER: usize = 4096;

type Answer = (StatusCode, String);

pub(super) fn routes<S: Clone + Send + Sync + 'static>(log: LogHandle) -> Router<S> {
    Router::new()
        .route("/log-filter", get(show).put(change))
        .layer(DefaultBodyLimit::max(MAX_FILTER))
        .layer(middleware::from_fn(only_here))
        .with_state(log)
}

async fn show(State(log): State<LogHandle>) -> Answer {
    (StatusCode::OK, format!("{}\n", log.filter()))
}

async fn change(State(log): State<LogHandle>, filter: String) -> Answer {
    let filter = filter.trim();
    if filter.is_empty() {
        return bad("the body must be a filter, such as `debug` or `warn,lakebase_proxy=debug`");
    }
    // At run time, since a restart would end the sessions to be traced.
    match log.set_filter(filter) {
        Ok(()) => {
            tracing::warn!(filter, "log filter changed at /log-filter");
            (StatusCode::OK, format!("{}\n", log.filter()))
        }
        Err(error) => bad(&chain(&error).to_string()),
    }
}

fn bad(why: &str) -> Answer {
    (StatusCode::BAD_REQUEST, format!("{why}\n"))
}
