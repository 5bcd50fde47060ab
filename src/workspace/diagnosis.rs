//! Explains failed calls: message, detail, hint, and whether a retry can help.
//!
//! Texts are matched first, since several causes share one status; then codes; then statuses. The texts are those of the
//! workspace API, as collected from the Databricks SDKs, their issues and the CLI's test server.

use std::time::Duration;

use reqwest::StatusCode;

pub(super) use super::error_body::clean;
use super::{
    MintError, MintErrorKind, api::ApiError, auth::AuthKind, error_body::ErrorBody, host::Host,
};

/// A failed call to the workspace. Holds no secret.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What happened, lower-case, no full stop.
    pub message: String,
    /// The other side's own words, or the network's error.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// Whether a retry can help.
    pub kind: MintErrorKind,
    /// The wait that the other side requested.
    pub retry_after: Option<Duration>,
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
}

const GRANT_ACCESS: &str = "grant the identity access to the Lakebase project in this workspace";
const CHECK_HOST: &str =
    "check that `DATABRICKS_HOST` is the workspace, and that no HTTP proxy answers in its place";
const CHECK_NAME: &str =
    "check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`";
const RETRIED: &str = "the proxy retries";
const BUSY: &str = "the proxy retries; other clients of the same identity may be too busy";

impl CallError {
    /// Whether the identity lacks the right to make the call, as opposed to a failed authentication or a blocked network.
    pub fn is_forbidden(&self) -> bool {
        self.kind == MintErrorKind::Refused
            && self.status == Some(403)
            && self.hint.as_deref() == Some(GRANT_ACCESS)
    }

    /// A retry does not help.
    pub(super) fn refused(
        message: impl Into<String>,
        detail: Option<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::of(MintErrorKind::Refused, message, detail, Some(hint.into()))
    }

    /// A retry can help.
    pub(super) fn unavailable(
        message: impl Into<String>,
        detail: Option<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::of(
            MintErrorKind::Unavailable,
            message,
            detail,
            Some(hint.into()),
        )
    }

    /// The answer has another form than documented.
    pub(super) fn malformed(message: impl Into<String>, detail: Option<String>) -> Self {
        Self::of(MintErrorKind::Malformed, message, detail, None)
    }

    /// The workspace's answer has another form than documented.
    pub(super) fn malformed_by(host: &Host, detail: &str) -> Self {
        let message = format!("the answer of the workspace {host} is malformed");
        Self::of(
            MintErrorKind::Malformed,
            message,
            Some(detail.to_owned()),
            Some(CHECK_HOST.to_owned()),
        )
    }

    fn of(
        kind: MintErrorKind,
        message: impl Into<String>,
        detail: Option<String>,
        hint: Option<String>,
    ) -> Self {
        Self {
            message: message.into(),
            detail,
            hint,
            kind,
            retry_after: None,
            status: None,
        }
    }
}

impl From<CallError> for MintError {
    fn from(error: CallError) -> Self {
        let CallError {
            message,
            detail,
            hint,
            kind,
            retry_after,
            status: _,
        } = error;
        Self {
            message,
            detail,
            hint,
            kind,
            retry_after,
        }
    }
}

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

impl Purpose<'_> {
    fn noun(self) -> String {
        match self {
            Self::Credential(_) => "a database credential".to_owned(),
            Self::Lookup(name) => format!("`{name}`"),
            Self::Clock => "the time".to_owned(),
            Self::Identity => "the identity".to_owned(),
        }
    }
}

/// The authentication of a call, and the hint for its refusal.
#[derive(Clone, Debug)]
pub(super) struct SignedIn {
    pub(super) kind: AuthKind,
    pub(super) hint: String,
}

/// A message and a hint.
type Explained = (String, Option<String>);

/// Explains a failed call to the workspace's API.
pub(super) fn diagnose(
    purpose: Purpose<'_>,
    signed_in: &SignedIn,
    host: &Host,
    error: ApiError,
) -> CallError {
    by_workspace(host, error, |status, body| {
        explain(purpose, signed_in, host, status, body)
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
        let (message, hint) = match status.as_u16() {
            _ if is_identity => (format!("the workspace {host} {refused}"), Some(hint)),
            _ if code == "invalid_scope" => (
                format!("the workspace {host} does not grant the requested scopes"),
                Some(
                    "check `scopes` in the profile; `all-apis` is what a service principal usually has",
                ),
            ),
            404 => (
                format!("{host} has no token endpoint"),
                Some("check that `DATABRICKS_HOST` is the address of a workspace"),
            ),
            429 => (
                format!("the token endpoint of {host} limits the rate of calls"),
                Some(BUSY),
            ),
            500.. => (format!("the token endpoint of {host} failed"), None),
            _ => (
                format!("the token endpoint of {host} refused the request"),
                Some("check that the service principal is active and assigned to this workspace"),
            ),
        };
        (message, hint.map(str::to_owned))
    })
}

/// Explains a failed request for a token at another service.
pub(super) fn service(who: &str, hint: Option<String>, error: ApiError) -> CallError {
    failed(who, hint.clone(), error, |status, _| {
        let message = match status.as_u16() {
            429 => format!("{who} limits the rate of calls"),
            500.. => format!("{who} failed"),
            _ => format!("{who} gave no token"),
        };
        (message, hint)
    })
}

fn by_workspace(
    host: &Host,
    error: ApiError,
    explain: impl FnOnce(StatusCode, &ErrorBody) -> Explained,
) -> CallError {
    let hint = match &error {
        ApiError::Network { source } => network_hint(source),
        ApiError::Malformed { .. } => CHECK_HOST,
        // Private Link sends browsers and clients alike to an error page
        // (`errors/private_link.py` of the SDK for Python).
        ApiError::Redirect { location, .. }
            if location.contains("private-link-validation-error") =>
        {
            return CallError::refused(
                format!("the workspace {host} accepts private connections only"),
                Some(format!("redirected to {location}")),
                "reach it through its PrivateLink endpoint, or allow public access in the workspace's private access settings",
            );
        }
        ApiError::Redirect { .. } | ApiError::Status { .. } => {
            "check that `DATABRICKS_HOST` is the address of the workspace itself"
        }
    };
    let who = format!("the workspace {host}");
    failed(&who, Some(hint.to_owned()), error, |status, body| {
        blocked(host, &body.message).unwrap_or_else(|| explain(status, body))
    })
}

/// Explains a network failure on the way to the workspace.
pub(super) fn network(host: &Host, source: reqwest::Error) -> CallError {
    by_workspace(host, ApiError::Network { source }, |_, _| {
        Explained::default()
    })
}

/// `hint` is for failures without an answer.
fn failed(
    who: &str,
    hint: Option<String>,
    error: ApiError,
    explain: impl FnOnce(StatusCode, &ErrorBody) -> Explained,
) -> CallError {
    match error {
        ApiError::Network { source } => {
            let message = if source.is_timeout() {
                format!("{who} did not answer in time")
            } else {
                format!("cannot reach {who}")
            };
            let causes = ApiError::causes(&source);
            CallError::of(MintErrorKind::Unavailable, message, Some(causes), hint)
        }
        ApiError::Malformed { reason } => {
            let message = format!("the answer of {who} is malformed");
            CallError::of(MintErrorKind::Malformed, message, Some(reason), hint)
        }
        ApiError::Redirect { location, .. } => CallError::of(
            MintErrorKind::Refused,
            format!("{who} redirected the call instead of answering"),
            Some(format!("redirected to {location}")),
            hint,
        ),
        ApiError::Status {
            status,
            body,
            retry_after,
        } => {
            let (message, hint) = explain(status, &body);
            CallError {
                retry_after,
                status: Some(status.as_u16()),
                ..CallError::of(
                    kind(status, &body),
                    message,
                    Some(quoted(status, &body)),
                    hint,
                )
            }
        }
    }
}

fn network_hint(source: &reqwest::Error) -> &'static str {
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
    let mut text = format!("HTTP {}", status.as_u16());
    if let Some(code) = &body.code {
        text = format!("{text} {code}");
    }
    text = format!("{text}: {}", body.message);
    if let Some(id) = &body.request_id {
        text = format!("{text} (request id {id})");
    }
    text
}

fn kind(status: StatusCode, body: &ErrorBody) -> MintErrorKind {
    match body.code.as_deref() {
        Some("RESOURCE_EXHAUSTED" | "REQUEST_LIMIT_EXCEEDED") => return MintErrorKind::RateLimited,
        Some(
            "TEMPORARILY_UNAVAILABLE"
            | "WORKSPACE_TEMPORARILY_UNAVAILABLE"
            | "UNAVAILABLE"
            | "SERVICE_UNDER_MAINTENANCE"
            | "PERMISSION_NOT_PROPAGATED"
            | "ABORTED"
            | "PROJECTS_OPERATION_TIMEOUT",
        ) => {
            return MintErrorKind::Unavailable;
        }
        _ => {}
    }
    match status.as_u16() {
        429 => MintErrorKind::RateLimited,
        // Timeouts, conflicts with an operation in progress, and a client that seems gone.
        408 | 409 | 425 | 499 => MintErrorKind::Unavailable,
        400..=498 | 501 => MintErrorKind::Refused,
        _ => MintErrorKind::Unavailable,
    }
}

fn explain(
    purpose: Purpose<'_>,
    signed_in: &SignedIn,
    host: &Host,
    status: StatusCode,
    body: &ErrorBody,
) -> Explained {
    let text = body.message.to_ascii_lowercase();
    let code = body.code.as_deref().unwrap_or_default();
    let name = match purpose {
        Purpose::Credential(name) | Purpose::Lookup(name) => Some(name),
        Purpose::Clock | Purpose::Identity => None,
    };
    let noun = purpose.noun();
    // A malformed token gets 403, with the number as its code.
    let is_unauthenticated =
        status == StatusCode::UNAUTHORIZED || text.contains("invalid access token");
    let (message, hint) = match (status.as_u16(), code, name) {
        _ if is_unauthenticated => {
            let token = match signed_in.kind {
                AuthKind::Pat => "the personal access token".to_owned(),
                AuthKind::OAuthM2m => "the token that its own token endpoint issued".to_owned(),
                kind => format!("the token that {} gave", kind.label()),
            };
            (
                format!("the workspace {host} refused {token}"),
                Some(&*signed_in.hint),
            )
        }
        (_, "FEATURE_DISABLED", _) => (
            format!("Lakebase is not enabled in the workspace {host}"),
            Some("a workspace admin must enable Lakebase; or check `DATABRICKS_HOST`"),
        ),
        (_, "PERMISSION_NOT_PROPAGATED", _) => (
            format!("the permissions of the identity have not reached the workspace {host} yet"),
            Some("the proxy retries; a grant takes effect within minutes"),
        ),
        (_, "SERVICE_UNDER_MAINTENANCE", _) => (
            format!("the workspace {host} is under maintenance"),
            Some(RETRIED),
        ),
        (400..500, "UNAVAILABLE" | "TEMPORARILY_UNAVAILABLE" | "ABORTED", _) => (
            format!("the workspace {host} could not return {noun} at the moment"),
            Some(RETRIED),
        ),
        (404, "NOT_FOUND" | "ENDPOINT_NOT_FOUND", None) | (404, "ENDPOINT_NOT_FOUND", Some(_))
            if text.contains("no api found") =>
        {
            (
                format!("the workspace {host} does not have this API"),
                Some(
                    "check `DATABRICKS_HOST`, and that Lakebase is offered in the workspace's region",
                ),
            )
        }
        // The uid is more visible than the id: it is the first label of the endpoint's host.
        (404, _, Some(name)) if name.contains("/endpoints/ep-") => (
            format!("the workspace {host} has no `{name}`"),
            Some(
                "check `ENDPOINT_NAME`: what begins with `ep-` is the endpoint's uid, and the name ends in its id (`primary`, unless another was chosen)",
            ),
        ),
        (404, _, Some(name)) => (
            format!("the workspace {host} has no `{name}`"),
            Some(
                "check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT` with resource ids, \
                 of a project in this workspace that the identity may see",
            ),
        ),
        (400, "INVALID_PARAMETER_VALUE", Some(name)) => (
            format!("the workspace {host} does not accept `{name}` as an endpoint"),
            Some(CHECK_NAME),
        ),
        (403, ..) => (
            format!("the workspace {host} denied the identity access to {noun}"),
            Some(GRANT_ACCESS),
        ),
        (429, ..) => (
            format!("the workspace {host} limits the rate of calls"),
            Some(BUSY),
        ),
        (500.., ..) => (
            format!("the workspace {host} failed to return {noun}"),
            None,
        ),
        _ => (
            format!("the workspace {host} refused to return {noun}"),
            None,
        ),
    };
    (message, hint.map(str::to_owned))
}

/// Refusals that any call may get.
fn blocked(host: &Host, text: &str) -> Option<Explained> {
    let text = text.to_ascii_lowercase();
    let has = |part: &str| text.contains(part);
    let (message, hint) = if has("ip acl") || has("ip access list") {
        (
            format!("the IP access list of the workspace {host} blocks this machine"),
            "add this machine's public address to the workspace's IP access list",
        )
    } else if has("unauthorized network access") {
        (
            format!("the network policy of the workspace {host} blocks this machine"),
            "check the workspace's network policy and its PrivateLink (Service-Direct) endpoints; logins at the endpoint are a destination of their own there, `lakebase_runtime`",
        )
    } else if has("workspace-access entitlement") {
        (
            "the identity may not use the workspace's API".to_owned(),
            "grant it the `Workspace access` entitlement in the workspace's admin settings",
        )
    } else if has("required scopes") {
        (
            "the workspace token lacks a scope".to_owned(),
            "make a token that has the scopes named in the detail, or one for all APIs",
        )
    } else {
        return None;
    };
    Some((message, Some(hint.to_owned())))
}

#[cfg(test)]
mod tests;
