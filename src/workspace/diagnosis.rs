//! From what the workspace (or the network) said to what a person should know: message, detail, hint, and whether waiting helps.
//!
//! Texts are matched first, since several causes share one status; then codes; then statuses.

use std::time::Duration;

use reqwest::StatusCode;

use super::{api::ApiError, auth::AuthKind, error_body::ErrorBody, settings::Host};
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
        self.status == Some(403) && self.hint.as_deref() == Some(GRANT_ACCESS)
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
    WorkspaceToken,
    /// A credential for this endpoint or instance.
    Credential(&'a str),
    /// A look at this endpoint or instance.
    Lookup(&'a str),
    Identity,
}

impl Purpose<'_> {
    fn asked(self) -> String {
        match self {
            Self::WorkspaceToken => "a workspace token".to_owned(),
            Self::Credential(_) => "a database credential".to_owned(),
            Self::Lookup(name) => format!("what it knows of `{name}`"),
            Self::Identity => "who we are".to_owned(),
        }
    }

    fn name(self) -> Option<String> {
        match self {
            Self::Credential(name) | Self::Lookup(name) => Some(name.to_owned()),
            Self::WorkspaceToken | Self::Identity => None,
        }
    }
}

/// Explains a failed call.
pub(super) fn diagnose(
    purpose: Purpose<'_>,
    auth: AuthKind,
    host: &Host,
    error: ApiError,
) -> CallError {
    match error {
        ApiError::Network { source } => network(host, &source),
        ApiError::Malformed { reason } => CallError {
            message: format!("the answer of {host} to the question for {} makes no sense", purpose.asked()),
            detail: Some(reason),
            hint: Some("check that `DATABRICKS_HOST` is the workspace, and that no HTTP proxy answers in its place".to_owned()),
            kind: MintErrorKind::Malformed,
            retry_after: None,
            status: None,
        },
        ApiError::Redirect { location } => redirect(host, &location),
        ApiError::Status { status, body, retry_after } => {
            let (message, hint) = explain(purpose, auth, host, status, &body);
            CallError {
                message,
                detail: Some(words(status, &body)),
                hint,
                kind: kind(status, &body),
                retry_after,
                status: Some(status.as_u16()),
            }
        }
    }
}

fn network(host: &Host, source: &reqwest::Error) -> CallError {
    let causes = ApiError::causes(source);
    let lower = causes.to_ascii_lowercase();
    let hint = if lower.contains("certificate") {
        "the workspace's certificate is not trusted here: if a proxy inspects TLS, install its root certificate on this machine"
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
        400..=498 => MintErrorKind::Refused,
        _ => MintErrorKind::Unavailable,
    }
}

fn explain(
    purpose: Purpose<'_>,
    auth: AuthKind,
    host: &Host,
    status: StatusCode,
    body: &ErrorBody,
) -> (String, Option<String>) {
    let text = body.message.to_ascii_lowercase();
    let code = body.code.as_deref().unwrap_or_default();
    let has = |part: &str| text.contains(part);
    let say = |message: String, hint: &str| (message, Some(hint.to_owned()));

    if has("ip acl") || has("ip access list") {
        return say(
            format!("the IP access list of the workspace {host} does not admit this machine"),
            "add this machine's public address to the workspace's IP access list",
        );
    }
    if has("unauthorized network access") {
        return say(
            format!("the network policy of the workspace {host} does not admit this machine"),
            "check the workspace's network policy and its PrivateLink (Service-Direct) endpoints",
        );
    }
    if has("workspace-access entitlement") {
        return say(
            "the identity may not use the workspace's API".to_owned(),
            "grant it the `Workspace access` entitlement in the workspace's admin settings",
        );
    }
    if has("required scopes") {
        return say(
            "the workspace token lacks a scope".to_owned(),
            "make a token that has the scopes named in the detail, or one for all APIs",
        );
    }
    if matches!(purpose, Purpose::WorkspaceToken) {
        return token_endpoint(host, status, code, &text);
    }
    let name = purpose.name();
    // A token that is none comes back as 403, with the number as its code.
    let is_unauthenticated = status == StatusCode::UNAUTHORIZED || has("invalid access token");
    match (status.as_u16(), code, name) {
        _ if is_unauthenticated => match auth {
            AuthKind::Pat => say(
                format!("the workspace {host} refused the personal access token"),
                "check `DATABRICKS_TOKEN`: it may have expired, been revoked, or belong to another workspace",
            ),
            AuthKind::OAuthM2m => say(
                format!("the workspace {host} refused the token that its own token endpoint issued"),
                "check that the service principal is assigned to this workspace and that `DATABRICKS_HOST` names it",
            ),
        },
        (_, "FEATURE_DISABLED", _) => say(
            format!("Lakebase is not enabled in the workspace {host}"),
            "ask a workspace admin to enable Lakebase, or check `DATABRICKS_HOST`",
        ),
        (404, "NOT_FOUND" | "ENDPOINT_NOT_FOUND", None) | (404, "ENDPOINT_NOT_FOUND", Some(_)) if has("no api found") => say(
            format!("the workspace {host} does not have this API"),
            "check `DATABRICKS_HOST`, and that Lakebase is offered in the workspace's region",
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
            Some("it is asked again by itself; other clients of the same identity may be too busy".to_owned()),
        ),
        (500.., ..) => (format!("the workspace {host} failed when asked for {}", purpose.asked()), None),
        _ => (format!("the workspace {host} refused to say {}", purpose.asked()), None),
    }
}

fn token_endpoint(
    host: &Host,
    status: StatusCode,
    code: &str,
    text: &str,
) -> (String, Option<String>) {
    if code == "invalid_client"
        || text.contains("missing client authentication")
        || status == StatusCode::UNAUTHORIZED
    {
        return (
            format!("the workspace {host} refused the client id or its secret"),
            Some(
                "check `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`: the secret may have expired, \
                 or belong to another service principal"
                    .to_owned(),
            ),
        );
    }
    match status.as_u16() {
        404 => (
            format!("{host} has no token endpoint"),
            Some("check that `DATABRICKS_HOST` is the address of a workspace".to_owned()),
        ),
        429 => (
            format!("the token endpoint of {host} limits the rate of calls"),
            Some(
                "it is asked again by itself; other clients of the same identity may be too busy"
                    .to_owned(),
            ),
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
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "projects/p/branches/production/endpoints/primary";

    fn diagnosed(purpose: Purpose<'_>, status: u16, code: &str, message: &str) -> CallError {
        let host = Host::parse("dbc-1.cloud.databricks.com").unwrap().0;
        let body = ErrorBody {
            code: (!code.is_empty()).then(|| code.to_owned()),
            message: message.to_owned(),
            request_id: Some("r-7".to_owned()),
            retry_delay: None,
        };
        let error = ApiError::Status {
            status: StatusCode::from_u16(status).unwrap(),
            body,
            retry_after: None,
        };
        diagnose(purpose, AuthKind::OAuthM2m, &host, error)
    }

    #[test]
    fn each_known_refusal_has_its_own_mend() {
        use MintErrorKind::{RateLimited, Refused, Unavailable};
        let credential = Purpose::Credential(NAME);
        let token = Purpose::WorkspaceToken;
        for (purpose, status, code, text, kind, hint) in [
            (
                token,
                401,
                "invalid_client",
                "Client authentication failed",
                Refused,
                "DATABRICKS_CLIENT_SECRET",
            ),
            (
                token,
                400,
                "invalid_request",
                "Missing client authentication",
                Refused,
                "DATABRICKS_CLIENT_SECRET",
            ),
            (
                token,
                404,
                "",
                "Not Found",
                Refused,
                "address of a workspace",
            ),
            (
                token,
                403,
                "",
                "Source IP address: 1.2.3.4 is blocked by Databricks IP ACL for workspace: 1",
                Refused,
                "access list",
            ),
            (
                credential,
                403,
                "PERMISSION_DENIED",
                "Source IP address: 1.2.3.4 is blocked by Databricks IP ACL for workspace: 1",
                Refused,
                "access list",
            ),
            (
                credential,
                403,
                "",
                "Unauthorized network access to workspace 1",
                Refused,
                "network policy",
            ),
            (
                credential,
                403,
                "PERMISSION_DENIED",
                "API is disabled for users without workspace-access entitlement",
                Refused,
                "Workspace access",
            ),
            (
                credential,
                403,
                "PERMISSION_DENIED",
                "Provided PAT token does not have required scopes: postgres",
                Refused,
                "scopes",
            ),
            (
                credential,
                403,
                "PERMISSION_DENIED",
                "no",
                Refused,
                "project",
            ),
            (
                credential,
                404,
                "NOT_FOUND",
                "endpoint id not found [TraceId: 1]",
                Refused,
                "ENDPOINT_NAME",
            ),
            (
                credential,
                404,
                "ENDPOINT_NOT_FOUND",
                "No API found for 'POST /postgres/credentials'",
                Refused,
                "region",
            ),
            (
                credential,
                400,
                "INVALID_PARAMETER_VALUE",
                "Field 'endpoint' is required",
                Refused,
                "ENDPOINT_NAME",
            ),
            (
                credential,
                401,
                "UNAUTHENTICATED",
                "no",
                Refused,
                "assigned to this workspace",
            ),
            (
                credential,
                403,
                "FEATURE_DISABLED",
                "no",
                Refused,
                "enable Lakebase",
            ),
            (
                credential,
                429,
                "REQUEST_LIMIT_EXCEEDED",
                "slow",
                RateLimited,
                "by itself",
            ),
            (
                credential,
                400,
                "RESOURCE_EXHAUSTED",
                "slow",
                RateLimited,
                "",
            ),
            (credential, 409, "", "busy", Unavailable, ""),
            (credential, 500, "", "oops", Unavailable, ""),
            (
                credential,
                503,
                "TEMPORARILY_UNAVAILABLE",
                "soon",
                Unavailable,
                "",
            ),
        ] {
            let error = diagnosed(purpose, status, code, text);
            assert_eq!(error.kind, kind, "{status} {code} {text}");
            assert!(
                error.hint.unwrap_or_default().contains(hint),
                "{status} {code} {text}: no `{hint}`"
            );
            let detail = error.detail.unwrap();
            assert!(detail.contains(text) && detail.contains("r-7"), "{detail}");
            assert!(
                !error.message.ends_with('.') && error.message.starts_with(char::is_lowercase)
                    || code == "FEATURE_DISABLED"
            );
        }
    }

    #[test]
    fn a_private_workspace_is_told_from_a_wrong_address() {
        let host = Host::parse("dbc-1.cloud.databricks.com").unwrap().0;
        let redirected = |location: &str| {
            let error = ApiError::Redirect {
                location: location.to_owned(),
            };
            diagnose(Purpose::Identity, AuthKind::Pat, &host, error)
        };
        let private = redirected(
            "https://dbc-1.cloud.databricks.com/login.html?error=private-link-validation-error",
        );
        assert!(private.hint.unwrap().contains("PrivateLink"));
        let other = redirected("https://www.databricks.com/");
        assert!(other.hint.unwrap().contains("DATABRICKS_HOST"));
        assert_eq!(other.kind, MintErrorKind::Refused);
    }
}
