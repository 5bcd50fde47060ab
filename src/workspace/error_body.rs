//! Error answers in their many forms, parsed into one.
//!
//! Without I/O. The text is safe to show: one bounded line without known secrets and tokens. The forms are those of
//! `errors/parser.py` in the SDK for Python.

use std::time::Duration;

use reqwest::StatusCode;
use serde_json::Value;

use super::times::Number;
use crate::telemetry::{KnownSecrets, redact};

/// The most characters of foreign text in an error.
pub(super) const MAX_TEXT: usize = 600;

/// An error answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ErrorBody {
    /// The machine-readable code, as sent: `PERMISSION_DENIED`, `invalid_client`, `SCIM_404`.
    pub(super) code: Option<String>,
    pub(super) message: String,
    pub(super) request_id: Option<String>,
    pub(super) retry_delay: Option<Duration>,
}

/// Parses an error answer; `request_id` is that of its headers. Never fails, since one of another form still has a status. Known secrets are masked before text
/// is cut, in any encoding.
pub(super) fn parse(
    status: StatusCode,
    body: &[u8],
    request_id: Option<&str>,
    known: &KnownSecrets,
) -> ErrorBody {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    let mut parsed = match serde_json::from_str::<Value>(text) {
        Ok(value) if value.is_object() => from_json(&value),
        _ if text.starts_with('<') => ErrorBody {
            message: from_html(text),
            ..ErrorBody::default()
        },
        _ => from_plain(text),
    };
    let shown = |text: &str| Some(clean(&known.redact(text))).filter(|text| !text.is_empty());
    parsed.message = shown(&parsed.message).unwrap_or_default();
    parsed.request_id = parsed.request_id.as_deref().or(request_id).and_then(shown);
    parsed.code = parsed.code.as_deref().and_then(shown);
    if parsed.message.is_empty() {
        let reason = status.canonical_reason().unwrap_or("no reason given");
        parsed.message.push_str(reason);
    }
    parsed
}

fn from_json(body: &Value) -> ErrorBody {
    let text = |name: &str| match body.get(name) {
        Some(Value::String(text)) if !text.is_empty() => Some(text.clone()),
        // `error_code` may be a number, such as 403.
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    let (request_id, retry_delay) = from_details(body.get("details"));
    // SCIM (RFC 7644 section 3.12).
    if let (Some(detail), None) = (text("detail"), text("message")) {
        return ErrorBody {
            code: text("status").map(|status| format!("SCIM_{status}")),
            message: text("scimType").map_or(detail.clone(), |kind| format!("{kind} {detail}")),
            request_id,
            retry_delay,
        };
    }
    // OAuth: `error` and `error_description`, in another product `errorCode` and `errorSummary`. API 1.2: `error` alone.
    let error = text("error");
    let description = text("error_description").or_else(|| text("errorSummary"));
    let code = text("error_code")
        .or_else(|| text("errorCode"))
        .or_else(|| {
            error
                .clone()
                // `invalid_client` alone is a code; a sentence is the message of API 1.2.
                .filter(|error| description.is_some() || is_code(error))
        });
    ErrorBody {
        code,
        message: text("message")
            .or(description)
            .or(error)
            .unwrap_or_default(),
        request_id,
        retry_delay,
    }
}

fn from_details(details: Option<&Value>) -> (Option<String>, Option<Duration>) {
    let (mut request_id, mut retry_delay) = (None, None);
    for detail in details.and_then(Value::as_array).into_iter().flatten() {
        let kind = detail
            .get("@type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let field = |name: &str| detail.get(name).and_then(Value::as_str);
        if kind.ends_with("google.rpc.RequestInfo") {
            request_id = field("request_id").map(str::to_owned);
        } else if kind.ends_with("google.rpc.RetryInfo") {
            let delay = detail.get("retry_delay").cloned();
            let delay = delay.and_then(|delay| serde_json::from_value(delay).ok());
            retry_delay = delay.as_ref().and_then(proto_duration);
        }
    }
    (request_id, retry_delay)
}

/// A protobuf Duration in JSON: `"3s"`, `"1.500s"`; or seconds.
pub(super) fn proto_duration(value: &Number) -> Option<Duration> {
    let seconds = match value {
        Number::Text(text) => text.trim().trim_end_matches('s').parse().ok()?,
        Number::Number(seconds) => *seconds,
    };
    Duration::try_from_secs_f64(seconds).ok()
}

/// `ERROR_CODE: message`.
fn from_plain(text: &str) -> ErrorBody {
    match text.split_once(": ") {
        Some((code, message)) if is_code(code) => ErrorBody {
            code: Some(code.to_owned()),
            message: message.to_owned(),
            ..ErrorBody::default()
        },
        _ => ErrorBody {
            message: text.to_owned(),
            ..ErrorBody::default()
        },
    }
}

fn from_html(text: &str) -> String {
    // ASCII lower-casing keeps byte offsets.
    let lower = text.to_ascii_lowercase();
    let between = |open: &str, close: &str| {
        let start = lower.find(open)?;
        let start = start + lower.get(start..)?.find('>')? + 1;
        let end = start + lower.get(start..)?.find(close)?;
        Some(text.get(start..end)?.trim().to_owned()).filter(|inner| !inner.is_empty())
    };
    between("<pre", "</pre")
        .or_else(|| between("<title", "</title"))
        .map_or_else(
            || "the answer is a web page".to_owned(),
            |inner| {
                inner
                    .replace("&lt;", "<")
                    .replace("&gt;", ">")
                    .replace("&quot;", "\"")
                    // Last, so that `&amp;lt;` does not become `<`.
                    .replace("&amp;", "&")
            },
        )
}

fn is_code(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// One bounded line without anything that looks like a token.
pub(super) fn clean(text: &str) -> String {
    let mut words = String::new();
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
    {
        if !words.is_empty() {
            words.push(' ');
        }
        words.push_str(&redact(word));
        // In bytes, of which a character has at most four.
        if words.len() > 4 * MAX_TEXT {
            break;
        }
    }
    match words.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}...", &words[..end]),
        None => words,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(status: u16, body: &str) -> (String, String) {
        let body = parse(
            StatusCode::from_u16(status).unwrap(),
            body.as_bytes(),
            None,
            &KnownSecrets::default(),
        );
        (body.code.unwrap_or_default(), body.message)
    }

    #[test]
    fn every_form_is_parsed() {
        for (status, body, code, message) in [
            (
                403,
                r#"{"error_code":"PERMISSION_DENIED","message":"no"}"#,
                "PERMISSION_DENIED",
                "no",
            ),
            (403, r#"{"error_code":403,"message":"no"}"#, "403", "no"),
            (
                400,
                r#"{"error":"bad thing happened"}"#,
                "",
                "bad thing happened",
            ),
            (
                401,
                r#"{"error":"invalid_client","error_description":"wrong"}"#,
                "invalid_client",
                "wrong",
            ),
            (
                401,
                r#"{"error":"invalid_client"}"#,
                "invalid_client",
                "invalid_client",
            ),
            (
                401,
                r#"{"errorCode":"invalid_client","errorSummary":"wrong"}"#,
                "invalid_client",
                "wrong",
            ),
            (
                404,
                r#"{"detail":"no such user","status":"404","scimType":"none"}"#,
                "SCIM_404",
                "none no such user",
            ),
            (
                400,
                "MALFORMED_REQUEST: vpc_endpoints malformed",
                "MALFORMED_REQUEST",
                "vpc_endpoints malformed",
            ),
            (
                502,
                "<html><head><TITLE>Bad &amp; broken</TITLE></head></html>",
                "",
                "Bad & broken",
            ),
            (
                400,
                "<!doctype html><pre class=\"x\">\n what\n it is </pre>",
                "",
                "what it is",
            ),
            (500, "<html></html>", "", "the answer is a web page"),
            (503, "", "", "Service Unavailable"),
            (503, "[1, 2]", "", "[1, 2]"),
            (403, "{\"message\":", "", "{\"message\":"),
        ] {
            assert_eq!(
                parsed(status, body),
                (code.to_owned(), message.to_owned()),
                "{body}"
            );
        }
    }

    #[test]
    fn details_carry_the_request_id_and_the_delay() {
        let body = parse(
            StatusCode::TOO_MANY_REQUESTS,
            br#"{"error_code":"RESOURCE_EXHAUSTED","message":"slow down","details":[
                {"@type":"type.googleapis.com/google.rpc.RequestInfo","request_id":"r-1","serving_data":""},
                {"@type":"type.googleapis.com/google.rpc.RetryInfo","retry_delay":"1.5s"}, 7]}"#,
            None,
            &KnownSecrets::default(),
        );
        assert_eq!(body.request_id.as_deref(), Some("r-1"));
        assert_eq!(body.retry_delay, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn tokens_are_removed() {
        let token = format!("eyJ{}", "a".repeat(40));
        let (_, message) = parsed(
            400,
            &format!("token '{token}' and dapi{} are bad", "0".repeat(32)),
        );
        assert_eq!(message, "token '[removed]' and [removed] are bad");
    }

    proptest! {
        #[test]
        fn any_bytes_give_one_short_line(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
            let body = parse(StatusCode::BAD_REQUEST, &bytes, None, &KnownSecrets::default());
            prop_assert!(!body.message.is_empty());
            prop_assert!(body.message.chars().count() <= MAX_TEXT + 3);
            prop_assert!(!body.message.contains(|c: char| c.is_control()));
        }

        #[test]
        fn any_object_is_read(key in "(error|error_code|message|detail|details|status)", text in ".*", number: i64) {
            for value in [serde_json::json!(text), serde_json::json!(number), serde_json::json!([{"@type": text}])] {
                parse(StatusCode::OK, serde_json::json!({ key.clone(): value }).to_string().as_bytes(), None, &KnownSecrets::default());
            }
        }
    }
}
