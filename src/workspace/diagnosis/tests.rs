//! The kind and the hint for each answer of the workspace.

use std::future::pending;

use super::*;
use crate::workspace::{
    api::Api,
    auth::{Boxed, Freshness, TokenSource, WorkspaceToken},
};

const NAME: &str = "projects/p/branches/production/endpoints/primary";

struct NoTokens;

impl TokenSource for NoTokens {
    fn token<'a>(&'a self, _: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(pending())
    }
}

fn signed_in(kind: AuthKind) -> Source {
    let hint = "the service principal is assigned to this workspace";
    Source::new(kind, hint, NoTokens)
}

/// Without a purpose: an answer of the token endpoint.
fn diagnosed(purpose: Option<Purpose<'_>>, status: u16, code: &str, message: &str) -> CallError {
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
    match purpose {
        Some(purpose) => diagnose(purpose, &signed_in(AuthKind::OAuthM2m), &host, error),
        None => token_endpoint(
            &host,
            "refused the client id or its secret",
            "check `DATABRICKS_CLIENT_SECRET`",
            error,
        ),
    }
}

#[test]
fn each_known_refusal_has_its_own_hint() {
    use CallErrorKind::{RateLimited, Refused, Unavailable};
    let credential = Some(Purpose::Credential(NAME));
    let token = None;
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
            "lakebase_runtime",
        ),
        (
            Some(Purpose::Credential(
                "projects/p/branches/production/endpoints/ep-cool-breeze-1",
            )),
            404,
            "NOT_FOUND",
            "endpoint not found",
            Refused,
            "the endpoint's uid",
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
            "retries",
        ),
        (
            credential,
            400,
            "RESOURCE_EXHAUSTED",
            "slow",
            RateLimited,
            "",
        ),
        (token, 400, "invalid_scope", "no", Refused, "all-apis"),
        (token, 429, "", "slow", RateLimited, "retries"),
        (token, 502, "", "oops", Unavailable, ""),
        (token, 503, "", "oops", Unavailable, ""),
        (token, 504, "", "oops", Unavailable, ""),
        (credential, 501, "", "never", Refused, ""),
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
fn a_private_workspace_is_recognized_by_its_redirect() {
    let host = Host::parse("dbc-1.cloud.databricks.com").unwrap().0;
    let redirected = |location: &str| {
        let error = ApiError::Redirect {
            location: location.to_owned(),
            target: None,
        };
        diagnose(Purpose::Identity, &signed_in(AuthKind::Pat), &host, error)
    };
    let private = redirected(
        "https://dbc-1.cloud.databricks.com/login.html?error=private-link-validation-error",
    );
    assert!(private.hint.unwrap().contains("PrivateLink"));
    let other = redirected("https://www.databricks.com/");
    assert!(other.hint.unwrap().contains("DATABRICKS_HOST"));
    assert_eq!(other.kind, CallErrorKind::Refused);
}

/// A permission that was granted a moment ago, or a compute that restarts, answers with a status of 403 or 409.
#[test]
fn temporary_codes_are_retried_with_any_status() {
    for code in [
        "UNAVAILABLE",
        "SERVICE_UNDER_MAINTENANCE",
        "PERMISSION_NOT_PROPAGATED",
        "ABORTED",
        "TEMPORARILY_UNAVAILABLE",
    ] {
        for status in [400, 403, 404, 409, 503] {
            for purpose in [Some(Purpose::Credential(NAME)), None] {
                let error = diagnosed(purpose, status, code, "not now");
                assert_eq!(error.kind, CallErrorKind::Unavailable, "{code} {status}");
                assert!(!error.is_forbidden(), "{code} {status}");
            }
        }
    }
    let error = diagnosed(
        Some(Purpose::Credential(NAME)),
        403,
        "PERMISSION_NOT_PROPAGATED",
        "wait",
    );
    assert!(error.hint.unwrap().contains("retries"));
}
