//! Workspace authentication: discovery documents, `/oidc/v1/token`, and the check of what it issued.

use std::sync::Arc;

use axum::{
    Form, Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, StatusCode, header::AUTHORIZATION, request::Parts},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    error::{ApiError, token_refusal},
    vouchers,
};
use crate::emulator::{
    identity::{Identity, IdentityKind},
    shared::Shared,
    token::{Audience, TokenError},
};

/// `GET /.well-known/databricks-config`
pub(super) async fn host_metadata(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(json!({
        "oidc_endpoint": format!("{}/oidc", shared.workspace_url),
        "workspace_id": shared.names.workspace_id,
        "cloud": "AWS",
        "host_type": "workspace",
    }))
}

/// `GET /oidc/.well-known/oauth-authorization-server` (RFC 8414)
pub(super) async fn discovery(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let root = format!("{}/oidc", shared.workspace_url);
    Json(json!({
        "issuer": root,
        "authorization_endpoint": format!("{root}/v1/authorize"),
        "token_endpoint": format!("{root}/v1/token"),
        "jwks_uri": format!("{root}/jwks.json"),
        "scopes_supported": ["all-apis", "offline_access", "postgres"],
        "response_types_supported": ["code"],
        "grant_types_supported": ["client_credentials", TOKEN_EXCHANGE],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "code_challenge_methods_supported": ["S256"],
    }))
}

/// `GET /oidc/jwks.json`
pub(super) async fn key_set(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(shared.signer.jwks())
}

const TOKEN_EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";

/// The form of a token request.
#[derive(Deserialize)]
pub(super) struct TokenRequest {
    subject_token: Option<String>,
    subject_token_type: Option<String>,
    grant_type: Option<String>,
    scope: Option<String>,
    client_id: Option<String>,
    client_secret: Option<SecretString>,
}

/// `POST /oidc/v1/token`
pub(super) async fn token(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Form(request): Form<TokenRequest>,
) -> Result<Response, Response> {
    let identity = match request.grant_type.as_deref() {
        Some("client_credentials") => by_secret(&shared, &headers, &request)?,
        Some(TOKEN_EXCHANGE) => by_exchange(&shared, &request)?,
        Some(_) => {
            return Err(token_refusal(
                StatusCode::BAD_REQUEST,
                "unsupported_grant_type",
                "Unsupported grant type",
            ));
        }
        None => {
            return Err(token_refusal(
                StatusCode::BAD_REQUEST,
                "invalid_request",
                "Missing grant_type",
            ));
        }
    };
    let scope = request.scope.unwrap_or_else(|| "all-apis".to_owned());
    if !scope
        .split_ascii_whitespace()
        .all(|scope| matches!(scope, "all-apis" | "offline_access" | "postgres"))
    {
        return Err(token_refusal(
            StatusCode::BAD_REQUEST,
            "invalid_scope",
            "Unknown scope",
        ));
    }
    let seconds = shared.settings.borrow().workspace_token_ttl.as_secs();
    let issued = shared.issue(
        &identity.name,
        Audience::Workspace,
        i64::try_from(seconds).unwrap_or(i64::MAX),
    );
    let (token, _) = issued.map_err(|_| {
        token_refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "Cannot sign a token",
        )
    })?;
    shared.counters.change(|counts| counts.tokens_issued += 1);
    let body = json!({ "access_token": token, "token_type": "Bearer", "expires_in": seconds, "scope": scope });
    Ok(([("cache-control", "no-store")], Json(body)).into_response())
}

fn by_secret<'a>(
    shared: &'a Shared,
    headers: &HeaderMap,
    request: &TokenRequest,
) -> Result<&'a Identity, Response> {
    let given = basic(headers)
        .or_else(|| Some((request.client_id.clone()?, request.client_secret.clone()?)));
    let Some((client_id, secret)) = given else {
        return Err(token_refusal(
            StatusCode::UNAUTHORIZED,
            "invalid_client",
            "Missing client authentication",
        ));
    };
    let identity = shared.identities.by_name(&client_id);
    identity
        .filter(|identity| identity.has_secret(&secret))
        .ok_or_else(|| {
            token_refusal(
                StatusCode::UNAUTHORIZED,
                "invalid_client",
                "Client authentication failed",
            )
        })
}

/// RFC 8693. A service principal's policy admits tokens of its own name; the account's, those of people.
fn by_exchange<'a>(shared: &'a Shared, request: &TokenRequest) -> Result<&'a Identity, Response> {
    if request.subject_token_type.as_deref() != Some(JWT) {
        return Err(token_refusal(
            StatusCode::BAD_REQUEST,
            "invalid_request",
            "Unsupported subject_token_type",
        ));
    }
    let refuse = |text: &str| token_refusal(StatusCode::BAD_REQUEST, "invalid_grant", text);
    let token = request.subject_token.as_deref().unwrap_or_default();
    let claims = shared
        .signer
        .verify(token, Audience::Identity, shared.now())
        .map_err(|error| refuse(&format!("The subject token is not valid: {error}")))?;
    let identity = shared.identities.by_name(&claims.sub);
    identity
        .filter(|identity| match &request.client_id {
            Some(client_id) => *client_id == identity.name,
            None => identity.kind == IdentityKind::User,
        })
        .ok_or_else(|| refuse("No federation policy matches the subject token"))
}

/// Who makes a request; the extractor is the check.
pub(super) struct Caller(pub(super) Identity);

impl FromRequestParts<Arc<Shared>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, shared: &Arc<Shared>) -> Result<Self, ApiError> {
        let not_sent = || {
            ApiError::unauthenticated(
                "Credential was not sent or was of an unsupported type for this API.",
            )
        };
        let given = parts
            .headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .ok_or_else(not_sent)?;
        let (scheme, token) = given.split_once(' ').ok_or_else(not_sent)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(not_sent());
        }
        let identity = if token.starts_with("dapi") {
            shared
                .identities
                .iter()
                .find(|identity| is_pat(identity, token))
                .ok_or_else(ApiError::invalid_token)?
        } else {
            let claims = match shared
                .signer
                .verify(token, Audience::Workspace, shared.now())
            {
                Ok(claims) if !shared.is_revoked(&claims, Audience::Workspace) => claims,
                Ok(_) | Err(TokenError::Expired(_)) => {
                    return Err(ApiError::unauthenticated(
                        "Access token is expired or revoked.",
                    ));
                }
                Err(_) => return Err(ApiError::invalid_token()),
            };
            shared
                .identities
                .by_name(&claims.sub)
                .ok_or_else(ApiError::invalid_token)?
        };
        if !vouchers::is_admitted(shared, &parts.headers, identity) {
            return Err(ApiError::invalid_token());
        }
        if identity.has_workspace_access {
            Ok(Self(identity.clone()))
        } else {
            Err(ApiError::no_workspace_access())
        }
    }
}

/// Client id and secret from `Authorization: Basic` (RFC 6749, 2.3.1: each form-encoded first; ours need no encoding).
fn basic(headers: &HeaderMap) -> Option<(String, SecretString)> {
    let (scheme, encoded) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (client_id, secret) = text.split_once(':')?;
    Some((client_id.to_owned(), SecretString::from(secret)))
}

fn is_pat(identity: &Identity, given: &str) -> bool {
    identity
        .pat
        .as_ref()
        .is_some_and(|pat| pat.expose_secret() == given)
}
