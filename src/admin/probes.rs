//! `/startup`, `/liveness` and `/readiness`: a status code for probes, reasons for people.

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

use super::deep::{Checked, DeepCheck, LoginTargets};
use crate::{
    net::http::check_intent,
    status::{Health, Verdict},
};

/// The state behind the probes.
#[derive(Clone)]
pub(super) struct Probes {
    pub(super) health: Arc<Health>,
    pub(super) logins: LoginTargets,
    pub(super) deep: Arc<DeepCheck>,
}

/// The query of a probe.
#[derive(Debug, Default, Deserialize)]
struct ProbeQuery {
    format: Option<String>,
    deep: Option<String>,
    endpoint: Option<String>,
}

pub(super) fn router(probes: Probes) -> Router {
    let startup = get(
        |State(probes): State<Probes>, Query(query): Query<ProbeQuery>, headers: HeaderMap| async move {
            answer(&query, &headers, &probes.health.startup(), None)
        },
    );
    let liveness = get(
        |State(probes): State<Probes>, Query(query): Query<ProbeQuery>, headers: HeaderMap| async move {
            answer(&query, &headers, &probes.health.liveness(), None)
        },
    );
    // POST for the deep check, since a login has an effect.
    let readiness = get(readiness).post(readiness);
    Router::new()
        .route("/startup", startup.clone())
        .route("/startupz", startup)
        .route("/liveness", liveness.clone())
        // `livez`, `healthz` and `readyz` are the names of kube-apiserver's probes.
        .route("/livez", liveness.clone())
        .route("/healthz", liveness)
        .route("/readiness", readiness.clone())
        .route("/readyz", readiness)
        .with_state(probes)
}

async fn readiness(
    State(probes): State<Probes>,
    Query(query): Query<ProbeQuery>,
    request: Parts,
) -> Response {
    let headers = &request.headers;
    let is_deep = matches!(query.deep.as_deref(), Some("1" | "true"));
    // A page of another site must not wake the endpoint.
    if is_deep && let Err(refused) = check_intent(&request) {
        return refused;
    }
    let mut verdict = probes.health.readiness();
    // A proxy that is not ready needs no login to fail.
    if !is_deep || !verdict.is_ok() {
        return answer(&query, headers, &verdict, None);
    }
    let endpoint = query.endpoint.as_deref();
    let Some(checked) = probes.deep.check((probes.logins)(), endpoint).await else {
        return (StatusCode::NOT_FOUND, "no endpoint has this name\n").into_response();
    };
    for failed in checked.iter().filter(|checked| !checked.ok) {
        let why = failed.message.as_deref().unwrap_or_default();
        let reason = format!("{}: {why}", failed.endpoint);
        verdict.reasons.push(reason.into());
    }
    answer(&query, headers, &verdict, Some(&checked))
}

fn answer(
    query: &ProbeQuery,
    headers: &HeaderMap,
    verdict: &Verdict,
    deep: Option<&[Checked]>,
) -> Response {
    let (status, word) = if verdict.is_ok() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "error")
    };
    if query.format.as_deref() == Some("json") || accepts(headers, "application/json") {
        let mut body = serde_json::json!({ "status": word, "reasons": verdict.reasons });
        if let (Some(deep), Some(body)) = (deep, body.as_object_mut()) {
            body.insert("deep".to_owned(), serde_json::json!(deep));
        }
        // Text and JSON have one address: a cache must keep them apart (RFC 9110 section 12.5.5).
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

/// Whether the Accept header names this media type.
pub(super) fn accepts(headers: &HeaderMap, wanted: &str) -> bool {
    let values = headers.get_all(ACCEPT).iter();
    let mut kinds = values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|kind| kind.split(';').next());
    // `*/*`, which curl sends, does not count: it gets text.
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case(wanted))
}
