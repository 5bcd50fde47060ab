//! From what the workspace (or the network) said to what a person should know: message, detail, hint, and whether waiting helps.
//!
//! Texts are matched first, since several causes share one status; then codes; then statuses.

use std::time::Duration;

use reqwest::StatusCode;

pub(super) use super::error_body::clean;
use super::{api::ApiError, auth::AuthKind, error_body::ErrorBody, host::Host};
use crate::credential::{MintError, MintErrorKind};

/// A call to the workspace failed. Holds no secret.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// What happened, lower-case, no full stop.
    pub message: String,
    /// What the other side said, or what the network did.
    pub detail: Option<String>,
    /// What a person can do about it.
    pub hint: Option<String>,
    /// Whether waiting may heal it.
    pub kind: MintErrorKind,
    /// How long the other side asked us to wait.
    pub retry_after: Option<Duration>,
    /// The HTTP status, where there was one.
    pub status: Option<u16>,
}

/// The mend of a call that the identity may not make.
const GRANT_ACCESS: &str = "grant the identity access to the Lakebase project in this workspace";

impl CallError {
    /// Whether it is the identity's rights that are missing, not the way to the workspace or our proof of who we are.
    pub fn is_forbidden(&self) -> bool {
        self.kind == MintErrorKind::Refused
            && self.status == Some(403)
            && self.hint.as_deref() == Some(GRANT_ACCESS)
    }

    /// Waiting does not help.
    pub(super) fn refused(
        message: impl Into<String>,
        detail: Option<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self::of(MintErrorKind::Refused, message, detail, Some(hint.into()))
    }

    /// Waiting may help.
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

    /// An answer that is not what was asked for.
    pub(super) fn malformed(message: impl Into<String>, detail: Option<String>) -> Self {
        Self::of(MintErrorKind::Malformed, message, detail, None)
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

/// What was being done, for the words of the message.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    /// The time.
    Clock,
    /// A credential for this endpoint or instance.
    Credential(&'a str),
    /// A look at this endpoint or instance.
    Lookup(&'a str),
    Identity,
}

impl Purpose<'_> {
    fn asked(self) -> String {
        match self {
            Self::Credential(_) => "a database credential".to_owned(),
            Self::Lookup(name) => format!("what it knows of `{name}`"),
            Self::Clock => "the time".to_owned(),
            Self::Identity => "who we are".to_owned(),
        }
    }

    fn name(self) -> Option<String> {
        match self {
            Self::Credential(name) | Self::Lookup(name) => Some(name.to_owned()),
            Self::Clock | Self::Identity => None,
        }
    }
}

/// Whose token the call carried, and what to do if the workspace does not take it.
#[derive(Clone, Debug)]
pub(super) struct SignedIn {
    pub(super) kind: AuthKind,
    pub(super) mend: String,
}

/// Explains a failed call.
pub(super) fn diagnose(
    purpose: Purpose<'_>,
    signed_in: &SignedIn,
    host: &Host,
    error: ApiError,
) -> CallError {
    match error {
        ApiError::Network { source } => network(host, &source),
        ApiError::Malformed { reason } => CallError {
            hint: Some("check that `DATABRICKS_HOST` is the workspace, and that no HTTP proxy answers in its place".to_owned()),
            ..CallError::malformed(
                format!("the answer of {host} to the question for {} makes no sense", purpose.asked()),
                Some(reason),
            )
        },
        ApiError::Redirect { location, .. } => redirect(host, &location),
        ApiError::Status { status, body, retry_after } => {
            let explained = explain(purpose, signed_in, host, status, &body);
            answered(explained, status, &body, retry_after)
        }
    }
}

/// Explains why a token endpoint of the workspace gave no token. `refused` and `mend` are for what it says of the
/// identity itself.
pub(super) fn token_endpoint(host: &Host, refused: &str, mend: &str, error: ApiError) -> CallError {
    let (status, body, retry_after) = match error {
        ApiError::Status {
            status,
            body,
            retry_after,
        } => (status, body, retry_after),
        ApiError::Network { source } => return network(host, &source),
        ApiError::Redirect { location, .. } => return redirect(host, &location),
        ApiError::Malformed { reason } => {
            return CallError {
                hint: Some("check that `DATABRICKS_HOST` is the workspace, and that no HTTP proxy answers in its place".to_owned()),
                ..CallError::malformed(
                    format!("the answer of {host} to the question for a workspace token makes no sense"),
                    Some(reason),
                )
            };
        }
    };
    let text = body.message.to_ascii_lowercase();
    let code = body.code.as_deref().unwrap_or_default();
    let explained = if let Some(explained) = blocked(host, &text) {
        explained
    } else if matches!(
        code,
        "invalid_client" | "invalid_grant" | "unauthorized_client"
    ) || text.contains("missing client authentication")
        || status == StatusCode::UNAUTHORIZED
        || (code == "invalid_request" && text.contains("token"))
    {
        (
            format!("the workspace {host} {refused}"),
            Some(mend.to_owned()),
        )
    } else if code == "invalid_scope" {
        (
            format!("the workspace {host} does not grant the scopes asked for"),
            Some(
                "check `scopes` in the profile; `all-apis` is what a service principal usually has"
                    .to_owned(),
            ),
        )
    } else {
        match status.as_u16() {
            404 => (
                format!("{host} has no token endpoint"),
                Some("check that `DATABRICKS_HOST` is the address of a workspace".to_owned()),
            ),
            429 => (
                format!("the token endpoint of {host} limits the rate of calls"),
                Some(TOO_BUSY.to_owned()),
            ),
            500.. => (format!("the token endpoint of {host} failed"), None),
            _ => (
                format!("the token endpoint of {host} refused the request"),
                Some(
                    "check that the service principal is active and assigned to this workspace"
                        .to_owned(),
                ),
            ),
        }
    };
    answered(explained, status, &body, retry_after)
}

/// Explains why somebody other than the workspace did not vouch for us.
pub(super) fn service(
    who: &str,
    hint: impl FnOnce(&ErrorBody) -> Option<String>,
    error: ApiError,
) -> CallError {
    let mut told = match error {
        ApiError::Network { source } => CallError::of(
            MintErrorKind::Unavailable,
            if source.is_timeout() {
                format!("{who} did not answer in time")
            } else {
                format!("cannot reach {who}")
            },
            Some(ApiError::causes(&source)),
            None,
        ),
        ApiError::Malformed { reason } => {
            CallError::malformed(format!("the answer of {who} makes no sense"), Some(reason))
        }
        ApiError::Redirect { location, .. } => CallError::of(
            MintErrorKind::Refused,
            format!("{who} redirected the call instead of answering"),
            Some(format!("redirected to {location}")),
            None,
        ),
        ApiError::Status {
            status,
            body,
            retry_after,
        } => {
            let message = match status.as_u16() {
                429 => format!("{who} limits the rate of calls"),
                500.. => format!("{who} failed"),
                _ => format!("{who} gave no token"),
            };
            let hint = hint(&body);
            return answered((message, hint), status, &body, retry_after);
        }
    };
    told.hint = hint(&ErrorBody::default());
    told
}

const TOO_BUSY: &str =
    "it is asked again by itself; other clients of the same identity may be too busy";

fn answered(
    (message, hint): (String, Option<String>),
    status: StatusCode,
    body: &ErrorBody,
    retry_after: Option<Duration>,
) -> CallError {
    CallError {
        message,
        detail: Some(words(status, body)),
        hint,
        kind: kind(status, body),
        retry_after,
        status: Some(status.as_u16()),
    }
}

pub(super) fn network(host: &Host, source: &reqwest::Error) -> CallError {
    let causes = ApiError::causes(source);
    let lower = causes.to_ascii_lowercase();
    let hint = if lower.contains("certificate") {
        "the workspace's certificate is not trusted here: if a proxy inspects TLS, install its root certificate on this machine, or name a file of roots in `SSL_CERT_FILE`"
    } else if lower.contains("dns") || lower.contains("lookup address") {
        "check `DATABRICKS_HOST` and the name resolution of this machine"
    } else {
        "check that this machine reaches the workspace, and the proxy variables (`HTTPS_PROXY`, `NO_PROXY`)"
    };
    CallError {
        message: if source.is_timeout() {
            format!("the workspace {host} did not answer in time")
        } else {
            format!("cannot reach the workspace {host}")
        },
        detail: Some(causes),
        hint: Some(hint.to_owned()),
        kind: MintErrorKind::Unavailable,
        retry_after: None,
        status: None,
    }
}

fn redirect(host: &Host, location: &str) -> CallError {
    let (message, hint) = if location.contains("private-link-validation-error") {
        (
            format!("the workspace {host} admits private connections only"),
            "reach it through its PrivateLink endpoint, or allow public access in the workspace's private access settings",
        )
    } else {
        (
            format!("{host} redirected the call instead of answering"),
            "check that `DATABRICKS_HOST` is the address of the workspace itself",
        )
    };
    CallError {
        message,
        detail: Some(format!("redirected to {location}")),
        hint: Some(hint.to_owned()),
        kind: MintErrorKind::Refused,
        retry_after: None,
        status: None,
    }
}

/// The server's own words with all that helps its operators to find the call.
fn words(status: StatusCode, body: &ErrorBody) -> String {
    let mut words = format!("HTTP {}", status.as_u16());
    if let Some(code) = &body.code {
        words = format!("{words} {code}");
    }
    words = format!("{words}: {}", body.message);
    if let Some(id) = &body.request_id {
        words = format!("{words} (request id {id})");
    }
    words
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
        // Timeouts, conflicts with an operation under way, and a client that the other side thinks has gone.
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
) -> (String, Option<String>) {
    let text = body.message.to_ascii_lowercase();
    let code = body.code.as_deref().unwrap_or_default();
    let has = |part: &str| text.contains(part);
    let say = |message: String, hint: &str| (message, Some(hint.to_owned()));

    if let Some(explained) = blocked(host, &text) {
        return explained;
    }
    let name = purpose.name();
    // A token that is none comes back as 403, with the number as its code.
    let is_unauthenticated = status == StatusCode::UNAUTHORIZED || has("invalid access token");
    match (status.as_u16(), code, name) {
        _ if is_unauthenticated => {
            let token = match signed_in.kind {
                AuthKind::Pat => "the personal access token".to_owned(),
                AuthKind::OAuthM2m => "the token that its own token endpoint issued".to_owned(),
                kind => format!("the token that {} gave", kind.label()),
            };
            (format!("the workspace {host} refused {token}"), Some(signed_in.mend.clone()))
        }
        (_, "FEATURE_DISABLED", _) => say(
            format!("Lakebase is not enabled in the workspace {host}"),
            "ask a workspace admin to enable Lakebase, or check `DATABRICKS_HOST`",
        ),
        (_, "PERMISSION_NOT_PROPAGATED", _) => say(
            format!("the permissions of the identity have not reached the workspace {host} yet"),
            "it is tried again by itself; a grant takes effect within minutes",
        ),
        (_, "SERVICE_UNDER_MAINTENANCE", _) => say(
            format!("the workspace {host} is under maintenance"),
            "it is tried again by itself",
        ),
        (400..500, "UNAVAILABLE" | "TEMPORARILY_UNAVAILABLE" | "ABORTED", _) => say(
            format!("the workspace {host} could not give {} at the moment", purpose.asked()),
            "it is tried again by itself",
        ),
        (404, "NOT_FOUND" | "ENDPOINT_NOT_FOUND", None) | (404, "ENDPOINT_NOT_FOUND", Some(_)) if has("no api found") => say(
            format!("the workspace {host} does not have this API"),
            "check `DATABRICKS_HOST`, and that Lakebase is offered in the workspace's region",
        ),
        // People see the uid: it is the first part of the endpoint's host.
        (404, _, Some(name)) if name.contains("/endpoints/ep-") => (
            format!("the workspace {host} does not know `{name}`"),
            Some(
                "check `ENDPOINT_NAME`: what begins with `ep-` is the endpoint's uid, and the name ends in its id (`primary`, unless another was chosen)"
                    .to_owned(),
            ),
        ),
        (404, _, Some(name)) => (
            format!("the workspace {host} does not know `{name}`"),
            Some(
                "check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT` with resource ids, \
                 of a project in this workspace that the identity may see"
                    .to_owned(),
            ),
        ),
        (400, "INVALID_PARAMETER_VALUE", Some(name)) => (
            format!("the workspace {host} does not take `{name}` as an endpoint"),
            Some("check `ENDPOINT_NAME`: it is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`".to_owned()),
        ),
        (403, ..) => say(
            format!("the workspace {host} does not allow the identity to ask for {}", purpose.asked()),
            GRANT_ACCESS,
        ),
        (429, ..) => (
            format!("the workspace {host} limits the rate of calls"),
            Some(TOO_BUSY.to_owned()),
        ),
        (500.., ..) => (format!("the workspace {host} failed when asked for {}", purpose.asked()), None),
        _ => (format!("the workspace {host} refused to say {}", purpose.asked()), None),
    }
}

/// What any call may meet, whatever it asks for.
fn blocked(host: &Host, text: &str) -> Option<(String, Option<String>)> {
    let has = |part: &str| text.contains(part);
    let (message, hint) = if has("ip acl") || has("ip access list") {
        (
            format!("the IP access list of the workspace {host} does not admit this machine"),
            "add this machine's public address to the workspace's IP access list",
        )
    } else if has("unauthorized network access") {
        (
            format!("the network policy of the workspace {host} does not admit this machine"),
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
