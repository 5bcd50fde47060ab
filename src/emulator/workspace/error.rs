//! The API's error shape: `error_code`, `message`, `details` with the request's id.

use axum::{
    Json,
    http::{HeaderName, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::emulator::{
    catalog::Kind,
    identity::{hex, random},
};

/// An error answer of the workspace API.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: Value,
    message: String,
    /// Before that of the request.
    detail: Option<Value>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.into(),
            message: message.into(),
            detail: None,
        }
    }

    #[cfg(test)]
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// A request that the state of a resource forbids.
    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BAD_REQUEST", message)
    }

    /// A deletion of what goes with its parent only; declarative clients look for the detail.
    pub(super) fn managed_by_parent(message: String) -> Self {
        let detail = json!({
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "domain": "databricks.com",
            "reason": "RESOURCE_CONFLICT",
            "metadata": { "declarative_context": "MANAGED_BY_PARENT" },
        });
        Self {
            detail: Some(detail),
            ..Self::bad_request(message)
        }
    }

    /// A resource that exists already.
    pub(super) fn already_exists(kind: Kind) -> Self {
        let word = kind.word();
        match kind {
            Kind::Project => Self::new(
                StatusCode::CONFLICT,
                "ALREADY_EXISTS",
                "project with such id already exists in the workspace",
            ),
            Kind::Branch | Kind::Endpoint => Self::new(
                StatusCode::CONFLICT,
                "ALREADY_EXISTS",
                format!("{word} with such id already exists"),
            ),
            Kind::Role | Kind::Database => {
                Self::bad_request(format!("{word} with that name already exists"))
            }
        }
    }

    /// A body that is no JSON object.
    pub(super) fn malformed(error: &serde_json::Error) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "MALFORMED_REQUEST",
            format!("Invalid JSON: {error}"),
        )
    }

    /// A field of another type or form.
    pub(super) fn malformed_field(field: &str) -> Self {
        Self::invalid(format!("Field '{field}' is malformed."))
    }

    /// A failure of the emulator itself.
    pub(super) fn internal() -> Self {
        Self::of_status(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// A request field that is wrong.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_PARAMETER_VALUE", message)
    }

    /// A required field that is missing or empty.
    pub(super) fn required(field: &str) -> Self {
        Self::invalid(format!(
            "Field '{field}' is required, expected non-default value (not \"\")!"
        ))
    }

    /// A resource that does not exist; `kind` is `project`, `branch`, `endpoint` and so on.
    pub(super) fn not_found(kind: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NOT_FOUND",
            format!("{kind} id not found [TraceId: {}]", request_id()),
        )
    }

    /// No way of authentication that the API knows.
    pub(super) fn unauthenticated(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "UNAUTHENTICATED", message)
    }

    /// A token that is none of ours. The code is a number in a string, as the platform sends it.
    pub(super) fn invalid_token() -> Self {
        Self::new(StatusCode::FORBIDDEN, "403", "Invalid access token.")
    }

    /// An identity without the entitlement.
    pub(super) fn no_workspace_access() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "PERMISSION_DENIED",
            "API is disabled for users without workspace-access entitlement",
        )
    }

    /// The platform's usual answer with this status.
    pub(super) fn of_status(status: StatusCode) -> Self {
        let (code, message) = match status.as_u16() {
            400 => ("INVALID_PARAMETER_VALUE", "Invalid request."),
            401 => (
                "UNAUTHENTICATED",
                "Credential was not sent or was of an unsupported type for this API.",
            ),
            403 => (
                "PERMISSION_DENIED",
                "You do not have permission to do this.",
            ),
            404 => ("NOT_FOUND", "Resource not found."),
            409 => ("ALREADY_EXISTS", "Resource already exists."),
            429 => (
                "RESOURCE_EXHAUSTED",
                "Too many requests. Please wait a moment and try again.",
            ),
            503 => (
                "TEMPORARILY_UNAVAILABLE",
                "The service is temporarily unavailable.",
            ),
            504 => ("DEADLINE_EXCEEDED", "The request timed out."),
            _ => ("INTERNAL_ERROR", "An internal error occurred."),
        };
        Self::new(status, code, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let request_id = request_id();
        let request = json!({
            "@type": "type.googleapis.com/google.rpc.RequestInfo",
            "request_id": request_id,
            "serving_data": "",
        });
        let details: Vec<Value> = self.detail.into_iter().chain([request]).collect();
        let body = json!({
            "error_code": self.code,
            "message": self.message,
            "details": details,
        });
        (self.status, [(REQUEST_ID, request_id)], Json(body)).into_response()
    }
}

/// The header that names a request.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A fresh request id.
pub(super) fn request_id() -> String {
    random::<16>().map(|bytes| hex(&bytes)).unwrap_or_default()
}

/// The token endpoint's own error shape (RFC 6749, 5.2).
pub(super) fn token_refusal(status: StatusCode, error: &str, description: &str) -> Response {
    (
        status,
        Json(json!({ "error": error, "error_description": description })),
    )
        .into_response()
}
