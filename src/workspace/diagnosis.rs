//! Explains failed calls: message, detail, hint, and whether a retry can help.
//!
//! Texts are matched first, since several causes share one status; then codes; then statuses. The texts are those of the
//! workspace API, as collected from the Databricks SDKs, their issues and the CLI's test server.

use reqwest::StatusCode;

pub(super) use super::error_body::clean;
use super::{
    CallError, CallErrorKind,
    api::ApiError,
    auth::{AuthKind, Source},
    error_body::ErrorBody,
    host::Host,
};

pub(super) const GRANT_ACCESS: &str =
    "grant the identity access to the Lakebase project in this workspace";
const CHECK_HOST: &str =
    "check that `DATABRICKS_HOST` is the workspace, and that no HTTP proxy answers in its place";
const RETRIED: &str = "the proxy retries";
const BUSY: &str = "the proxy retries; other clients of the same identity may be too busy";

/// Refusals that any call may get: a part of the answer, the message for the workspace `HOST`, and the hint.
const BLOCKED: [(&str, &str, &str); 5] = [
    ("ip acl", BLOCKED_ADDRESS, ALLOW_ADDRESS),
    ("ip access list", BLOCKED_ADDRESS, ALLOW_ADDRESS),
    (
        "unauthorized network access",
        "the network policy of the workspace HOST blocks this machine",
        "check the workspace's network policy and its PrivateLink (Service-Direct) endpoints; logins at the endpoint are a destination of their own there, `lakebase_runtime`",
    ),
    (
        "workspace-access entitlement",
        "the identity may not use the workspace's API",
        "grant it the `Workspace access` entitlement in the workspace's admin settings",
    ),
    (
        "required scopes",
        "the workspace token lacks a scope",
        "make a token that has the scopes named in the detail, or one for all APIs",
    ),
];
const BLOCKED_ADDRESS: &str = "the IP access list of the workspace HOST blocks this machine";
const ALLOW_ADDRESS: &str = "add this machine's public address to the workspace's IP access list";

/// The object of a call, for messages.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    Clock,
    /// A credential for this endpoint or instance.
    Credential(&'a str),
    /// A look-up of this resource.
    Lookup(&'a str),
    Identity,
}

/// A message and a hint, which may be empty.
type Explained<'a> = (String, &'a str);

/// Explains a failed call to the workspace's API with a token of `source`.
pub(super) fn diagnose(
    purpose: Purpose<'_>,
    source: &Source,
    host: &Host,
    error: ApiError,
) -> CallError {
    by_workspace(host, error, |status, body| {
        explain(purpose, source, host, status, body)
    })
}

/// Explains a failed request for a token at the workspace. `refused` and `hint` are for refusals of the identity.
pub(super) fn token_endpoint(host: &Host, refused: &str, hint: &str, error: ApiError) -> CallError {
    by_workspace(host, error, |status, body| {
        let text = body.message.to_ascii_lowercase();
        let code = body.code.as_deref().unwrap_or_default();
        // RFC 6749 section 5.2; `invalid_request` about the subject token is from RFC 8693.
        let is_identity = matches!(
            code,
            "invalid_client" | "invalid_grant" | "unauthorized_client"
        ) || text.contains("missing client authentication")
            || status == StatusCode::UNAUTHORIZED
            || (code == "invalid_request" && text.contains("token"));
        match status.as_u16() {
            _ if is_identity => (format!("the workspace {host} {refused}"), hint),
            _ if code == "invalid_scope" => (
                format!("the workspace {host} does not grant the requested scopes"),
                "check `scopes` in the profile; `all-apis` is what a service principal usually has",
            ),
            404 => (
                format!("{host} has no token endpoint"),
                "check that `DATABRICKS_HOST` is the address of a workspace",
            ),
            429 => (
                format!("the token endpoint of {host} limits the rate of calls"),
                BUSY,
            ),
            500.. => (format!("the token endpoint of {host} failed"), ""),
            _ => (
                format!("the token endpoint of {host} refused the request"),
                "check that the service principal is active and assigned to this workspace",
            ),
        }
    })
}

/// Explains a failed request for a token at another service.
pub(super) fn service(who: &str, hint: &str, error: ApiError) -> CallError {
    failed(who, hint, error, |status, _| {
        let message = match status.as_u16() {
            429 => format!("{who} limits the rate of calls"),
            500.. => format!("{who} failed"),
            _ => format!("{who} gave no token"),
        };
        (message, hint)
    })
}

/// Explains a failed call to the workspace; `explain` is for statuses that are not in [`BLOCKED`].
fn by_workspace<'a>(
    host: &Host,
    error: ApiError,
    explain: impl FnOnce(StatusCode, &ErrorBody) -> Explained<'a>,
) -> CallError {
    let hint = match &error {
        ApiError::Network { source } => network_hint(source),
        ApiError::Malformed { .. } => CHECK_HOST,
        // Private Link sends browsers and clients alike to an error page
        // (`errors/private_link.py` of the SDK for Python).
        ApiError::Redirect { location, .. }
            if location.contains("private-link-validation-error") =>
        {
            return CallError::refused(format!("the workspace {host} accepts private connections only"))
                .with_detail(format!("redirected to {location}"))
                .with_hint("reach it through its PrivateLink endpoint, or allow public access in the workspace's private access settings");
        }
        ApiError::Redirect { .. } | ApiError::Status { .. } => {
            "check that `DATABRICKS_HOST` is the address of the workspace itself"
        }
    };
    failed(
        &format!("the workspace {host}"),
        hint,
        error,
        |status, body| {
            let text = body.message.to_ascii_lowercase();
            // First: a blocked network has the status of a missing grant, 403.
            let mut blocked = BLOCKED.iter().filter(|(part, ..)| text.contains(part));
            match blocked.next() {
                Some((_, message, hint)) => (message.replace("HOST", &host.to_string()), *hint),
                None => explain(status, body),
            }
        },
    )
}

/// Explains a network failure on the way to the workspace.
pub(super) fn network(host: &Host, source: reqwest::Error) -> CallError {
    by_workspace(host, ApiError::Network { source }, |_, _| {
        Explained::default()
    })
}

/// `hint` is for failures without an answer.
fn failed<'a>(
    who: &str,
    hint: &str,
    error: ApiError,
    explain: impl FnOnce(StatusCode, &ErrorBody) -> Explained<'a>,
) -> CallError {
    match error {
        ApiError::Network { source } => {
            let message = if source.is_timeout() {
                format!("{who} did not answer in time")
            } else {
                format!("cannot reach {who}")
            };
            CallError::unavailable(message)
                .with_detail(ApiError::causes(&source))
                .with_hint(hint)
        }
        ApiError::Malformed { reason } => {
            CallError::malformed(format!("the answer of {who} is malformed"))
                .with_detail(reason)
                .with_hint(hint)
        }
        ApiError::Redirect { location, .. } => {
            CallError::refused(format!("{who} redirected the call instead of answering"))
                .with_detail(format!("redirected to {location}"))
                .with_hint(hint)
        }
        ApiError::Status {
            status,
            body,
            retry_after,
        } => {
            let (message, hint) = explain(status, &body);
            let error = CallError::new(kind(status, &body), message)
                .with_detail(quoted(status, &body))
                .with_hint(hint);
            CallError {
                retry_after,
                status: Some(status.as_u16()),
                ..error
            }
        }
    }
}

fn network_hint(source: &reqwest::Error) -> &'static str {
    // By text, since `reqwest::Error` has no kinds for these.
    let causes = ApiError::causes(source).to_ascii_lowercase();
    if causes.contains("certificate") {
        "the workspace's certificate is not trusted here: if a proxy inspects TLS, install its root certificate on this machine, or name a file of roots in `SSL_CERT_FILE`"
    } else if causes.contains("dns") || causes.contains("lookup address") {
        "check `DATABRICKS_HOST` and the name resolution of this machine"
    } else {
        "check that this machine reaches the workspace, and the proxy variables (`HTTPS_PROXY`, `NO_PROXY`)"
    }
}

/// The server's own words, with the request id for its operators.
fn quoted(status: StatusCode, body: &ErrorBody) -> String {
    let (code, id) = (body.code.as_ref(), body.request_id.as_ref());
    format!(
        "HTTP {}{}: {}{}",
        status.as_u16(),
        code.map_or(String::new(), |code| format!(" {code}")),
        body.message,
        id.map_or(String::new(), |id| format!(" (request id {id})"))
    )
}

fn kind(status: StatusCode, body: &ErrorBody) -> CallErrorKind {
    // Before the status: PERMISSION_NOT_PROPAGATED, for one, would count as a missing grant, which no retry helps.
    match body.code.as_deref().unwrap_or_default() {
        "RESOURCE_EXHAUSTED" | "REQUEST_LIMIT_EXCEEDED" => return CallErrorKind::RateLimited,
        "TEMPORARILY_UNAVAILABLE"
        | "WORKSPACE_TEMPORARILY_UNAVAILABLE"
        | "UNAVAILABLE"
        | "SERVICE_UNDER_MAINTENANCE"
        | "PERMISSION_NOT_PROPAGATED"
        | "ABORTED"
        | "PROJECTS_OPERATION_TIMEOUT" => return CallErrorKind::Unavailable,
        _ => {}
    }
    match status.as_u16() {
        429 => CallErrorKind::RateLimited,
        // Timeouts, conflicts with an operation in progress, and a client that seems gone.
        408 | 409 | 425 | 499 => CallErrorKind::Unavailable,
        // 501 is a method or path that the server does not have, which waiting does not add.
        400..=498 | 501 => CallErrorKind::Refused,
        _ => CallErrorKind::Unavailable,
    }
}

fn explain<'a>(
    purpose: Purpose<'_>,
    source: &'a Source,
    host: &Host,
    status: StatusCode,
    body: &ErrorBody,
) -> Explained<'a> {
    let text = body.message.to_ascii_lowercase();
    let code = body.code.as_deref().unwrap_or_default();
    let (noun, name) = match purpose {
        Purpose::Clock => ("the time".to_owned(), None),
        Purpose::Credential(name) => ("a database credential".to_owned(), Some(name)),
        Purpose::Identity => ("the identity".to_owned(), None),
        Purpose::Lookup(name) => (format!("`{name}`"), Some(name)),
    };
    // A malformed token gets 403, with the number as its code.
    let is_unauthenticated =
        status == StatusCode::UNAUTHORIZED || text.contains("invalid access token");
    match (status.as_u16(), code, name) {
        _ if is_unauthenticated => {
            let token = match source.kind {
                AuthKind::Pat => "the personal access token".to_owned(),
                AuthKind::OAuthM2m => "the token that its own token endpoint issued".to_owned(),
                kind => format!("the token that {} gave", kind.label()),
            };
            (
                format!("the workspace {host} refused {token}"),
                &*source.hint,
            )
        }
        (_, "FEATURE_DISABLED", _) => (
            format!("Lakebase is not enabled in the workspace {host}"),
            "a workspace admin must enable Lakebase; or check `DATABRICKS_HOST`",
        ),
        (_, "PERMISSION_NOT_PROPAGATED", _) => (
            format!("the permissions of the identity have not reached the workspace {host} yet"),
            "the proxy retries; a grant takes effect within minutes",
        ),
        (_, "SERVICE_UNDER_MAINTENANCE", _) => (
            format!("the workspace {host} is under maintenance"),
            RETRIED,
        ),
        (400..500, "UNAVAILABLE" | "TEMPORARILY_UNAVAILABLE" | "ABORTED", _) => (
            format!("the workspace {host} could not return {noun} at the moment"),
            RETRIED,
        ),
        // This code is for a path of the REST API, not for a Lakebase endpoint.
        (404, "NOT_FOUND" | "ENDPOINT_NOT_FOUND", None) | (404, "ENDPOINT_NOT_FOUND", Some(_))
            if text.contains("no api found") =>
        {
            (
                format!("the workspace {host} does not have this API"),
                "check `DATABRICKS_HOST`, and that Lakebase is offered in the workspace's region",
            )
        }
        // The uid is more visible than the id: it is the first label of the endpoint's host.
        (404, _, Some(name)) if name.contains("/endpoints/ep-") => (
            format!("the workspace {host} has no `{name}`"),
            "check `ENDPOINT_NAME`: what begins with `ep-` is the endpoint's uid, and the name ends in its id (`primary`, unless another was chosen)",
        ),
        (404, _, Some(name)) => (
            format!("the workspace {host} has no `{name}`"),
            "check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT` with resource ids, \
             of a project in this workspace that the identity may see",
        ),
        (400, "INVALID_PARAMETER_VALUE", Some(name)) => (
            format!("the workspace {host} does not accept `{name}` as an endpoint"),
            "check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`",
        ),
        (403, ..) => (
            format!("the workspace {host} denied the identity access to {noun}"),
            GRANT_ACCESS,
        ),
        (429, ..) => (
            format!("the workspace {host} limits the rate of calls"),
            BUSY,
        ),
        (500.., ..) => (format!("the workspace {host} failed to return {noun}"), ""),
        _ => (format!("the workspace {host} refused to return {noun}"), ""),
    }
}

#[cfg(test)]
mod tests;
