//! Minting: `POST /api/2.0/postgres/credentials` and the Provisioned twin, with each field's rule.

use std::{sync::Arc, time::Duration};

use axum::{Json, extract::State};
use jiff::Timestamp;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    error::ApiError,
    oidc::Caller,
    resources::{self, duration},
};
use crate::emulator::{
    shared::{Names, Shared},
    token::Audience,
};

/// The shortest lifetime that may be requested.
const MIN_SECONDS: f64 = 300.0;
/// The longest.
const MAX_SECONDS: f64 = 3600.0;

#[derive(Deserialize)]
struct Request {
    #[serde(default)]
    endpoint: String,
    #[serde(default)]
    claims: Vec<Claim>,
    expire_time: Option<String>,
    ttl: Option<String>,
}

#[derive(Deserialize)]
struct ProvisionedRequest {
    #[serde(default)]
    instance_names: Vec<String>,
    #[serde(default)]
    claims: Vec<Claim>,
}

#[derive(Deserialize)]
struct Claim {
    #[serde(default)]
    permission_set: String,
}

/// `POST /api/2.0/postgres/credentials`
pub(super) async fn mint(
    State(shared): State<Arc<Shared>>,
    Caller(caller): Caller,
    body: String,
) -> Result<Json<Value>, ApiError> {
    let request: Request = parse(&body)?;
    if request.endpoint.is_empty() {
        return Err(ApiError::required("endpoint"));
    }
    resources::find_endpoint(&shared, &request.endpoint)?;
    check_claims(&request.claims)?;
    let now = shared.now();
    let lifetime = match (request.ttl, request.expire_time) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid(
                "Only one of 'ttl' and 'expire_time' may be set.",
            ));
        }
        (Some(ttl), None) => in_range(
            "ttl",
            duration(&ttl).ok_or_else(|| ApiError::malformed_field("ttl"))?,
        )?,
        (None, Some(time)) => {
            let time: Timestamp = time
                .parse()
                .map_err(|_| ApiError::malformed_field("expire_time"))?;
            in_range("expire_time", time.duration_since(now).as_secs_f64())?
        }
        (None, None) => shared.settings.borrow().token_ttl,
    };
    let issued = issue(&shared, &caller.name, lifetime, "expire_time")?;
    shared.tally.issued(&request.endpoint, &caller.name);
    Ok(issued)
}

/// `POST /api/2.0/database/credentials`
pub(super) async fn mint_provisioned(
    State(shared): State<Arc<Shared>>,
    Caller(caller): Caller,
    body: String,
) -> Result<Json<Value>, ApiError> {
    let request: ProvisionedRequest = parse(&body)?;
    if request.instance_names.is_empty() && request.claims.is_empty() {
        return Err(ApiError::required("instance_names"));
    }
    if let Some(name) = request
        .instance_names
        .iter()
        .find(|name| *name != Names::INSTANCE)
    {
        return Err(super::instances::not_found(name));
    }
    check_claims(&request.claims)?;
    let lifetime = shared.settings.borrow().token_ttl;
    let issued = issue(&shared, &caller.name, lifetime, "expiration_time")?;
    for instance in &request.instance_names {
        shared.tally.issued(instance, &caller.name);
    }
    Ok(issued)
}

fn issue(
    shared: &Shared,
    subject: &str,
    lifetime: Duration,
    field: &str,
) -> Result<Json<Value>, ApiError> {
    let seconds = i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX);
    let (token, claims) = shared
        .issue(subject, Audience::Database, seconds)
        .map_err(|_| ApiError::internal())?;
    shared
        .counters
        .change(|counts| counts.credentials_issued += 1);
    let expires = Timestamp::from_second(claims.exp).unwrap_or(Timestamp::MAX);
    Ok(Json(json!({ "token": token, field: expires.to_string() })))
}

fn parse<T: DeserializeOwned>(body: &str) -> Result<T, ApiError> {
    let text = if body.trim().is_empty() { "{}" } else { body };
    serde_json::from_str(text).map_err(|error| ApiError::malformed(&error))
}

fn check_claims(claims: &[Claim]) -> Result<(), ApiError> {
    match claims
        .iter()
        .find(|claim| claim.permission_set != "READ_ONLY")
    {
        Some(claim) => Err(ApiError::invalid(format!(
            "Invalid permission set '{}'.",
            claim.permission_set
        ))),
        None => Ok(()),
    }
}

fn in_range(field: &str, seconds: f64) -> Result<Duration, ApiError> {
    if !(MIN_SECONDS..=MAX_SECONDS).contains(&seconds) {
        return Err(ApiError::invalid(format!(
            "Field '{field}' must be between 300s and 3600s from now."
        )));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| ApiError::malformed_field(field))
}
