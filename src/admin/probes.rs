//! `/startup`, `/liveness` and `/readiness`: a status for whoever probes, reasons for whoever reads.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Query, State},
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, VARY},
        request::Parts,
    },
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;

use super::deep::{Checked, DeepCheck};
use crate::{
    net::http::check_intent,
    overview::Overview,
    status::{Health, Verdict},
};

/// What the probes are answered from.
#[derive(Clone)]
pub(super) struct Probes {
    pub(super) health: Arc<Health>,
    pub(super) overview: Arc<Overview>,
    pub(super) deep: Arc<DeepCheck>,
}

/// What a probe may ask for beside the path.
#[derive(Debug, Default, Deserialize)]
struct Asked {
    format: Option<String>,
    deep: Option<String>,
    endpoint: Option<String>,
}

pub(super) fn router(probes: Probes) -> Router {
    let startup = get(
        |State(probes): State<Probes>, Query(asked): Query<Asked>, headers: HeaderMap| async move {
            answer(&asked, &headers, &probes.health.startup(), None)
        },
    );
    let liveness = get(
        |State(probes): State<Probes>, Query(asked): Query<Asked>, headers: HeaderMap| async move {
            answer(&asked, &headers, &probes.health.liveness(), None)
        },
    );
    // POST is for what has an effect, a login.
    let readiness = get(readiness).post(readiness);
    Router::new()
        .route("/startup", startup.clone())
        .route("/startupz", startup)
        .route("/liveness", liveness.clone())
        .route("/livez", liveness.clone())
        .route("/healthz", liveness)
        .route("/readiness", readiness.clone())
        .route("/readyz", readiness)
        .with_state(probes)
}

async fn readiness(
    State(probes): State<Probes>,
    Query(asked): Query<Asked>,
    request: Parts,
) -> Response {
    let headers = &request.headers;
    let is_deep = matches!(asked.deep.as_deref(), Some("1" | "true"));
    if is_deep && let Err(refused) = check_intent(&request) {
        return refused;
    }
    let mut verdict = probes.health.readiness();
    // What is not ready anyway is not worth a login.
    if !is_deep || !verdict.is_ok() {
        return answer(&asked, headers, &verdict, None);
    }
    let endpoint = asked.endpoint.as_deref();
    let Some(checked) = probes.deep.check(&probes.overview, endpoint).await else {
        return (StatusCode::NOT_FOUND, "no endpoint of that name\n").into_response();
    };
    for failed in checked.iter().filter(|checked| !checked.ok) {
        let why = failed.message.as_deref().unwrap_or_default();
        let reason = format!("{}: {why}", failed.endpoint);
        verdict.reasons.push(reason.into());
    }
    answer(&asked, headers, &verdict, Some(&checked))
}

fn answer(
    asked: &Asked,
    headers: &HeaderMap,
    verdict: &Verdict,
    deep: Option<&[Checked]>,
) -> Response {
    let (status, word) = if verdict.is_ok() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "error")
    };
    if asked.format.as_deref() == Some("json") || wants_json(headers) {
        let mut body = serde_json::json!({ "status": word, "reasons": verdict.reasons });
        if let (Some(deep), Some(body)) = (deep, body.as_object_mut()) {
            body.insert("deep".to_owned(), serde_json::json!(deep));
        }
        return (status, [(VARY, "accept")], Json(body)).into_response();
    }
    let mut text = format!("{word}\n");
    for reason in &verdict.reasons {
        text.push_str(reason);
        text.push('\n');
    }
    for checked in deep.unwrap_or_default().iter().filter(|checked| checked.ok) {
        let (endpoint, took, age) = (&checked.endpoint, checked.took_ms, checked.age_ms / 1000);
        text.extend([format!(
            "{endpoint}: logged in within {took} ms, {age} s ago
"
        )]);
    }
    (status, [(VARY, "accept")], text).into_response()
}

fn wants_json(headers: &HeaderMap) -> bool {
    accepts(headers, "application/json")
}

/// Whether a kind of answer is named in so many words.
pub(super) fn accepts(headers: &HeaderMap, wanted: &str) -> bool {
    headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| {
            value.split(',').any(|kind| {
                kind.split(';')
                    .next()
                    .is_some_and(|kind| kind.trim().eq_ignore_ascii_case(wanted))
            })
        })
}
