//! `/emulator`: faults, settings and events on request, for people. Tests use the Rust API.

use std::sync::Arc;

use axum::{Json, extract::State, http::StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use crate::emulator::{
    endpoint::Endpoint,
    faults::{Fault, FaultError, FaultStatus},
    sessions::Disruption,
    settings::Settings,
    shared::Shared,
    token::Audience,
};

/// `GET /emulator`: what there is to see and to change.
pub(super) async fn overview(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({
        "state": state_of(&shared.main),
        "faults": shared.faults.pending(),
        "settings": *shared.settings.borrow(),
        "sessions": shared.main.sessions.process_ids().len(),
        "endpoints": shared.endpoints.list().iter().map(|endpoint| json!({
            "name": endpoint.name,
            "host": endpoint.hosts.first(),
            "state": state_of(endpoint),
            "sessions": endpoint.sessions.process_ids().len(),
        })).collect::<Vec<_>>(),
    }))
}

fn state_of(endpoint: &Endpoint) -> String {
    format!("{:?}", endpoint.compute.state()).to_lowercase()
}

/// Body of a change of faults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FaultList {
    faults: Vec<Fault>,
}

/// `GET /emulator/faults`: those to come, and those that have struck as often as they should.
pub(super) async fn faults(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let all = shared.faults.statuses().into_iter();
    let (spent, pending): (Vec<FaultStatus>, Vec<FaultStatus>) =
        all.partition(|status| status.fault.times == Some(0));
    Json(json!({ "faults": pending, "spent": spent }))
}

/// `GET /emulator/counts`: what has happened so far.
pub(super) async fn counts(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let mut body = json!(shared.counters.snapshot());
    if let Some(body) = body.as_object_mut() {
        let tally = shared.tally.snapshot();
        body.insert("logins_by".to_owned(), json!(tally.logins));
        body.insert("credentials_by".to_owned(), json!(tally.credentials));
    }
    Json(body)
}

/// `PUT /emulator/faults`: these and no others.
pub(super) async fn replace_faults(
    State(shared): State<Arc<Shared>>,
    body: String,
) -> Result<Json<Value>, ApiError> {
    let list = parse_faults(&body)?;
    shared.faults.clear();
    for fault in list {
        shared.faults.add(fault).map_err(refused)?;
    }
    Ok(faults(State(shared)).await)
}

/// `POST /emulator/faults`: these too.
pub(super) async fn add_faults(
    State(shared): State<Arc<Shared>>,
    body: String,
) -> Result<Json<Value>, ApiError> {
    for fault in parse_faults(&body)? {
        shared.faults.add(fault).map_err(refused)?;
    }
    Ok(faults(State(shared)).await)
}

/// All of them or none: a list with one that cannot happen changes nothing.
fn parse_faults(body: &str) -> Result<Vec<Fault>, ApiError> {
    let FaultList { faults } = parse(body)?;
    for fault in &faults {
        fault.check().map_err(refused)?;
    }
    Ok(faults)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn refused(error: FaultError) -> ApiError {
    ApiError::invalid(format!("Invalid fault: {error}"))
}

/// `DELETE /emulator/faults`
pub(super) async fn clear_faults(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.faults.clear();
    StatusCode::NO_CONTENT
}

/// `PATCH /emulator/settings`: the fields named change, the others stay.
pub(super) async fn change_settings(
    State(shared): State<Arc<Shared>>,
    body: String,
) -> Result<Json<Value>, ApiError> {
    let changes: serde_json::Map<String, Value> = parse(&body)?;
    let mut merged = json!(*shared.settings.borrow());
    if let Some(merged) = merged.as_object_mut() {
        merged.extend(changes);
    }
    let settings: Settings = serde_json::from_value(merged)
        .map_err(|error| ApiError::invalid(format!("Invalid setting: {error}")))?;
    shared.settings.send_replace(settings);
    Ok(overview(State(shared)).await)
}

/// Something that happens once, now.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    /// The compute goes to sleep.
    Suspend,
    /// Credentials issued so far stop working.
    RevokeCredentials,
    /// Workspace tokens issued so far stop working.
    RevokeTokens,
    /// Sessions end with 57P01.
    TerminateSessions,
    /// Sessions end without a word.
    CloseSessions,
    /// Sessions are reset.
    ResetSessions,
    /// Sessions stop moving bytes.
    StallSessions,
    /// Sessions lose their packets in both directions.
    BlackholeSessions,
    /// Sessions move again.
    ResumeSessions,
    /// A role is bound to another identity.
    LabelRole,
}

/// Body of an event.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventBody {
    event: Event,
    /// The endpoint; the emulated one if absent.
    endpoint: Option<String>,
    /// For `label_role`: the role, the app's if absent.
    role: Option<String>,
    /// For `label_role`: its security label, as `id=NUMBER,type=SERVICE_PRINCIPAL`; absent: none.
    label: Option<String>,
}

/// `POST /emulator/events`
pub(super) async fn event(
    State(shared): State<Arc<Shared>>,
    body: String,
) -> Result<StatusCode, ApiError> {
    let body: EventBody = parse(&body)?;
    let endpoint = match &body.endpoint {
        None => Some(Arc::clone(&shared.main)),
        Some(name) => shared.endpoints.by_name(name),
    };
    let endpoint = endpoint.ok_or_else(|| ApiError::not_found("endpoint"))?;
    let sessions = &endpoint.sessions;
    match body.event {
        Event::Suspend => endpoint.compute.suspend().await,
        Event::RevokeCredentials => shared.revoke(Audience::Database),
        Event::RevokeTokens => shared.revoke(Audience::Workspace),
        Event::TerminateSessions => endpoint.database.terminate(sessions.process_ids()).await,
        Event::CloseSessions => sessions.disrupt(Disruption::Close),
        Event::ResetSessions => sessions.disrupt(Disruption::Reset),
        Event::StallSessions => sessions.disrupt(Disruption::Stall),
        Event::BlackholeSessions => sessions.disrupt(Disruption::Blackhole),
        Event::ResumeSessions => sessions.disrupt(Disruption::None),
        Event::LabelRole => {
            let role = body.role.as_ref().unwrap_or(&shared.identities.app.name);
            let labeled = endpoint.database.label(role, body.label.as_deref()).await;
            labeled.map_err(|error| ApiError::bad_request(error.to_string()))?;
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

fn parse<T: serde::de::DeserializeOwned>(body: &str) -> Result<T, ApiError> {
    serde_json::from_str(body)
        .map_err(|error| ApiError::invalid(format!("Invalid request: {error}")))
}
