//! What is logged, shown and changed while the program runs: `curl -X PUT -d debug localhost:9090/log-filter`.
//!
//! Only for visitors from this machine: a log at `trace` costs time and shows more than a stranger should switch on.

use axum::{
    Extension, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    routing::get,
};

use crate::{
    http::Visitor,
    telemetry::{LogHandle, chain},
};

/// Longest filter taken, in bytes.
const LONGEST: usize = 4096;

type Answer = (StatusCode, String);

pub(super) fn routes<S: Clone + Send + Sync + 'static>(log: LogHandle) -> Router<S> {
    Router::new()
        .route("/log-filter", get(show).put(change))
        .layer(DefaultBodyLimit::max(LONGEST))
        .with_state(log)
}

async fn show(State(log): State<LogHandle>, Extension(visitor): Extension<Visitor>) -> Answer {
    if !visitor.is_local() {
        return stranger();
    }
    (StatusCode::OK, format!("{}\n", log.filter()))
}

async fn change(
    State(log): State<LogHandle>,
    Extension(visitor): Extension<Visitor>,
    filter: String,
) -> Answer {
    if !visitor.is_local() {
        return stranger();
    }
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

fn stranger() -> Answer {
    (
        StatusCode::FORBIDDEN,
        "only visitors from this machine may see or change this\n".to_owned(),
    )
}

fn bad(why: &str) -> Answer {
    (StatusCode::BAD_REQUEST, format!("{why}\n"))
}
