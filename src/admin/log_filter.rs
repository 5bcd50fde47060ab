//! What is logged, shown and changed while the program runs: `curl -X PUT -d debug localhost:9090/log-filter`.
//!
//! Only for visitors from this machine: a log at `trace` costs time and shows more than a stranger should switch on.

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    middleware,
    routing::get,
};

use super::status::only_here;
use crate::telemetry::{LogHandle, chain};

/// Longest filter taken, in bytes.
const LONGEST: usize = 4096;

type Answer = (StatusCode, String);

pub(super) fn routes<S: Clone + Send + Sync + 'static>(log: LogHandle) -> Router<S> {
    Router::new()
        .route("/log-filter", get(show).put(change))
        .layer(DefaultBodyLimit::max(LONGEST))
        .layer(middleware::from_fn(only_here))
        .with_state(log)
}

async fn show(State(log): State<LogHandle>) -> Answer {
    (StatusCode::OK, format!("{}\n", log.filter()))
}

async fn change(State(log): State<LogHandle>, filter: String) -> Answer {
    let filter = filter.trim();
    if filter.is_empty() {
        return bad("the body is to be a filter, such as `debug` or `warn,lakebase_proxy=debug`");
    }
    match log.set_filter(filter) {
        Ok(()) => {
            tracing::warn!(filter, "what is logged has been changed at /log-filter");
            (StatusCode::OK, format!("{}\n", log.filter()))
        }
        Err(error) => bad(&chain(&error).to_string()),
    }
}

fn bad(why: &str) -> Answer {
    (StatusCode::BAD_REQUEST, format!("{why}\n"))
}
