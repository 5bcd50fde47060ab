//! Those who vouch for an identity before the workspace issues a token of its own: GitHub, Azure DevOps, Microsoft Entra ID, Azure's
//! instance metadata service, and a local metadata service. All on the workspace's port, each below a path of its own.

use std::sync::Arc;

use axum::{
    Form, Json,
    extract::{Path, Query, State},
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION},
    },
    response::{IntoResponse, Response},
};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::token_refusal;
use crate::emulator::{
    identity::Identity,
    shared::{Names, Shared},
    token::Audience,
};

/// Databricks, as Entra ID knows it.
const DATABRICKS: &str = "2ff814a6-3304-4ab8-85cb-cd0e6f879c1d";
/// The right to manage resources, in the public cloud.
const MANAGEMENT: &str = "https://management.core.windows.net/";

/// A token's text and how many seconds it lives.
fn issue(
    shared: &Shared,
    identity: &Identity,
    audience: Audience,
) -> Result<(String, u64), Response> {
    let seconds = shared.settings.borrow().workspace_token_ttl.as_secs();
    let lifetime = i64::try_from(seconds).unwrap_or(i64::MAX);
    match shared.issue(&identity.name, audience, lifetime) {
        Ok((token, _)) => Ok((token, seconds)),
        Err(_) => Err(StatusCode::INTERNAL_SERVER_ERROR.into_response()),
    }
}

/// Seconds since 1970, `seconds` from now.
fn end(shared: &Shared, seconds: u64) -> i64 {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    shared.now().as_second().saturating_add(seconds)
}

/// Query of [`github`].
#[derive(Deserialize)]
pub(super) struct GithubQuery {
    audience: Option<String>,
}

/// `GET /github/token`: a job's identity token, for the app's service principal.
pub(super) async fn github(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(query): Query<GithubQuery>,
) -> Result<Json<Value>, Response> {
    let expected = format!("Bearer {}", Names::GITHUB_REQUEST_TOKEN);
    let given = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    if given != Some(expected.as_str()) {
        let body = json!({"message": "The request token is not valid"});
        return Err((StatusCode::UNAUTHORIZED, Json(body)).into_response());
    }
    let wanted = format!("{}/oidc/v1/token", shared.workspace_url);
    // For another audience it is a token that the workspace does not take.
    let audience = if query.audience.as_deref() == Some(wanted.as_str()) {
        Audience::Identity
    } else {
        Audience::Management
    };
    let (token, _) = issue(&shared, &shared.identities.app, audience)?;
    Ok(Json(json!({ "value": token })))
}

/// Query of [`azure_devops`].
#[derive(Deserialize)]
pub(super) struct AzureDevOpsQuery {
    #[serde(rename = "api-version", default)]
    version: String,
}

/// `POST /azure-devops/{organization}/{project}/_apis/...`: a job's identity token, for the app's service principal. Its
/// audience is fixed.
pub(super) async fn azure_devops(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(query): Query<AzureDevOpsQuery>,
) -> Result<Json<Value>, Response> {
    let has = |name: HeaderName, expected: &str| {
        headers
            .get(name)
            .is_some_and(|value| value.as_bytes() == expected.as_bytes())
    };
    let expected = format!("Bearer {}", Names::AZURE_DEVOPS_ACCESS_TOKEN);
    if !has(AUTHORIZATION, &expected) {
        let body =
            json!({"message": "TF400813: The user is not authorized to access this resource."});
        return Err((StatusCode::UNAUTHORIZED, Json(body)).into_response());
    }
    if !query.version.ends_with("-preview.1") || !has(CONTENT_LENGTH, "0") {
        let body = json!({"message": "The requested version is not supported, or the request has no length."});
        return Err((StatusCode::BAD_REQUEST, Json(body)).into_response());
    }
    let (token, _) = issue(&shared, &shared.identities.app, Audience::Identity)?;
    Ok(Json(json!({ "oidcToken": token })))
}

/// `GET /aad/auth`: the login page of the workspace's tenant.
pub(super) async fn login_page() -> Response {
    let location = format!(
        "https://login.microsoftonline.com/{}/oauth2/authorize?client_id={DATABRICKS}",
        Names::TENANT
    );
    (StatusCode::FOUND, [(LOCATION, location)]).into_response()
}

/// The form of [`entra_id`].
#[derive(Deserialize)]
pub(super) struct EntraForm {
    #[serde(default)]
    client_id: String,
    client_secret: Option<SecretString>,
    #[serde(default)]
    resource: String,
}

/// `POST /entra/{tenant}/oauth2/token`
pub(super) async fn entra_id(
    State(shared): State<Arc<Shared>>,
    Path(tenant): Path<String>,
    Form(form): Form<EntraForm>,
) -> Result<Json<Value>, Response> {
    let refuse = |status, code, text: &str| Err(token_refusal(status, code, text));
    if tenant != Names::TENANT {
        let text = format!("AADSTS90002: Tenant '{tenant}' not found.");
        return refuse(StatusCode::BAD_REQUEST, "invalid_request", &text);
    }
    let Some(identity) = shared.identities.by_name(&form.client_id) else {
        let text = "AADSTS700016: Application was not found in the directory.";
        return refuse(StatusCode::BAD_REQUEST, "unauthorized_client", text);
    };
    let given = form.client_secret.unwrap_or_default();
    if !identity.has_secret(&given) {
        let text = "AADSTS7000215: Invalid client secret provided.";
        return refuse(StatusCode::UNAUTHORIZED, "invalid_client", text);
    }
    let Some(audience) = audience(&form.resource) else {
        let text = "AADSTS500011: The resource principal was not found in the tenant.";
        return refuse(StatusCode::BAD_REQUEST, "invalid_resource", text);
    };
    let (token, seconds) = issue(&shared, identity, audience)?;
    // Entra ID quotes its numbers.
    Ok(Json(json!({
        "token_type": "Bearer",
        "expires_in": seconds.to_string(),
        "expires_on": end(&shared, seconds).to_string(),
        "resource": form.resource,
        "access_token": token,
    })))
}

/// Query of [`instance_metadata`].
#[derive(Deserialize)]
pub(super) struct InstanceQuery {
    #[serde(default)]
    resource: String,
    client_id: Option<String>,
}

/// `GET /metadata/identity/oauth2/token`: the app's identity is the machine's, any other must be named.
pub(super) async fn instance_metadata(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Query(query): Query<InstanceQuery>,
) -> Result<Json<Value>, Response> {
    let refuse = |text: &str| {
        Err(token_refusal(
            StatusCode::BAD_REQUEST,
            "invalid_request",
            text,
        ))
    };
    if headers.get("metadata").is_none_or(|value| value != "true") {
        return refuse("Required metadata header not specified");
    }
    let identity = match &query.client_id {
        None => Some(&shared.identities.app),
        Some(id) => shared.identities.by_name(id),
    };
    let (Some(identity), Some(audience)) = (identity, audience(&query.resource)) else {
        return refuse("Identity not found");
    };
    let (token, seconds) = issue(&shared, identity, audience)?;
    Ok(Json(json!({
        "token_type": "Bearer",
        "expires_on": end(&shared, seconds).to_string(),
        "resource": query.resource,
        "access_token": token,
    })))
}

/// `GET /metadata-service/{session}`: a service as an editor's extension runs it, with one session.
pub(super) async fn metadata_service(
    State(shared): State<Arc<Shared>>,
    Path(session): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Value>, Response> {
    let has = |name: &str, expected: &str| {
        headers
            .get(name)
            .is_some_and(|value| value.as_bytes() == expected.as_bytes())
    };
    if !has("x-databricks-metadata-version", "1") {
        return Err((StatusCode::BAD_REQUEST, "unknown version").into_response());
    }
    if session != Names::METADATA_SESSION || !has("x-databricks-host", &shared.workspace_url) {
        return Err((StatusCode::NOT_FOUND, "unknown session").into_response());
    }
    let (token, seconds) = issue(&shared, &shared.identities.user, Audience::Workspace)?;
    Ok(Json(json!({
        "access_token": token,
        "token_type": "Bearer",
        "expires_on": end(&shared, seconds),
    })))
}

/// What Entra ID issues for a resource.
fn audience(resource: &str) -> Option<Audience> {
    match resource {
        DATABRICKS => Some(Audience::Workspace),
        MANAGEMENT => Some(Audience::Management),
        _ => None,
    }
}

/// Whether the headers beside the token prove rights on the workspace, if required: an identity that names
/// the workspace's resource is admitted by them.
pub(super) fn is_admitted(shared: &Shared, headers: &HeaderMap, identity: &Identity) -> bool {
    if !headers.contains_key("x-databricks-azure-workspace-resource-id") {
        return true;
    }
    let token = headers
        .get("x-databricks-azure-sp-management-token")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    shared
        .signer
        .verify(token, Audience::Management, shared.now())
        .is_ok_and(|claims| claims.sub == identity.name)
}
