//! Real answers, changed on request: fields replaced, numbers as strings.

use axum::{
    body::{Body, to_bytes},
    http::header::CONTENT_LENGTH,
    response::Response,
};
use serde_json::{Map, Value};

/// Larger than any answer of ours.
const MAX_BODY: usize = 1 << 20;

/// `response` with `patch` applied to its JSON (RFC 7396).
pub(super) async fn merge(response: Response, patch: &Value) -> Response {
    change(response, |body| apply(body, patch)).await
}

/// `response` with each number of its JSON as a string.
pub(super) async fn quote_numbers(response: Response) -> Response {
    change(response, quote).await
}

/// An answer that is no JSON stays as it is.
async fn change(response: Response, change: impl FnOnce(&mut Value)) -> Response {
    let (mut parts, body) = response.into_parts();
    let bytes = to_bytes(body, MAX_BODY).await.unwrap_or_default();
    let Ok(mut json) = serde_json::from_slice(&bytes) else {
        return Response::from_parts(parts, Body::from(bytes));
    };
    change(&mut json);
    parts.headers.remove(CONTENT_LENGTH);
    Response::from_parts(parts, Body::from(json.to_string()))
}

/// A patch that is an object changes members, `null` removes them; anything else replaces.
fn apply(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                apply(target.entry(name).or_insert(Value::Null), value);
            }
        }
    }
}

fn quote(value: &mut Value) {
    match value {
        Value::Number(number) => *value = Value::String(number.to_string()),
        Value::Array(items) => items.iter_mut().for_each(quote),
        Value::Object(members) => members.values_mut().for_each(quote),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Examples of RFC 7396, appendix A.
    #[test]
    fn patches_merge_as_the_rfc_shows() {
        for (mut target, patch, expected) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            apply(&mut target, &patch);
            assert_eq!(target, expected, "{patch}");
        }
    }

    #[test]
    fn numbers_at_any_depth_become_strings() {
        let mut body = json!({"expires_in":3600,"a":[{"b":0.5}],"c":true,"d":"4"});
        quote(&mut body);
        assert_eq!(
            body,
            json!({"expires_in":"3600","a":[{"b":"0.5"}],"c":true,"d":"4"})
        );
    }
}
