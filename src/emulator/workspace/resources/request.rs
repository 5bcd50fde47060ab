//! What requests have in common: ids, fields, update masks, durations.

use std::{collections::HashMap, time::Duration};

use serde_json::{Map, Value};

use super::{Kind, random_part};
use crate::emulator::workspace::error::ApiError;

/// The id of a new resource, from the query; roles and databases may leave it out.
pub(super) fn id(kind: Kind, query: &HashMap<String, String>) -> Result<String, ApiError> {
    let field = format!("{}_id", kind.word());
    let shortest = match kind {
        Kind::Project | Kind::Branch | Kind::Endpoint => 1,
        Kind::Role | Kind::Database => 4,
    };
    let id = match query.get(&field).filter(|id| !id.is_empty()) {
        Some(id) => id.clone(),
        None if shortest == 1 => return Err(ApiError::required(&field)),
        None => format!("{}-{}", kind.word(), random_part()),
    };
    let is_known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let is_valid = (shortest..=63).contains(&id.len())
        && id.starts_with(|first: char| first.is_ascii_lowercase())
        && id.bytes().all(is_known);
    if is_valid {
        Ok(id)
    } else {
        Err(ApiError::invalid(format!(
            "Field '{field}' must be {shortest}-63 characters, start with a lowercase letter, and contain only lowercase letters, \
             numbers and hyphens (RFC 1123)."
        )))
    }
}

/// The `spec` of a request, and the fields of it that count.
pub(super) struct Change {
    body: Value,
    /// Empty: all that are given.
    mask: Vec<String>,
}

impl Change {
    pub(super) fn parse(body: &str, mask: Option<&str>) -> Result<Self, ApiError> {
        let text = if body.trim().is_empty() { "{}" } else { body };
        let body: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| ApiError::malformed(&error))?;
        let paths = mask.unwrap_or_default().split(',').map(str::trim);
        Ok(Self {
            body: body.into(),
            mask: paths
                .filter(|path| !path.is_empty() && *path != "*")
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Whether the mask names this very field.
    pub(super) fn names(&self, path: &str) -> bool {
        self.mask.iter().any(|masked| masked == path)
    }

    /// Refuses paths of the mask that are not `known`, or whose field is not given. `groups` are names for several fields of
    /// which one may be given.
    pub(super) fn check(&self, known: &[&str], groups: &[&str]) -> Result<(), ApiError> {
        for path in &self.mask {
            let is_group = groups.contains(&path.as_str());
            if !is_group && !known.contains(&path.as_str()) {
                return Err(ApiError::invalid(format!(
                    "Unknown field path in update_mask: '{path}'"
                )));
            }
            // A whole message may be left out.
            let parent = path.rsplit_once('.').map(|(parent, _)| parent);
            let parent_is_given = parent.is_some_and(|parent| self.at(parent).is_some());
            if !is_group && parent_is_given && self.at(path).is_none() {
                return Err(ApiError::invalid(format!(
                    "Field '{path}' is in update_mask but not provided in request"
                )));
            }
        }
        Ok(())
    }

    /// A given field that the mask does not leave out; `path` is that in the mask, `field` its last part in the body.
    pub(super) fn member(&self, path: &str, field: &str) -> Option<&Value> {
        let is_masked = self.mask.is_empty()
            || self.mask.iter().any(|masked| {
                let rest = path.strip_prefix(masked.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            });
        let parent = path.rsplit_once('.').map_or("", |(parent, _)| parent);
        self.at(parent)
            .and_then(|parent| parent.get(field))
            .filter(|_| is_masked)
    }

    /// A given field that the mask does not leave out.
    pub(super) fn field(&self, path: &str) -> Option<&Value> {
        self.member(path, path.rsplit('.').next().unwrap_or_default())
    }

    /// The same as a text; empty is left out.
    pub(super) fn text(&self, path: &str) -> Result<Option<&str>, ApiError> {
        match self.field(path) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(_) => Err(ApiError::malformed_field(path)),
        }
    }

    pub(super) fn flag(&self, path: &str) -> Result<Option<bool>, ApiError> {
        match self.field(path) {
            None => Ok(None),
            Some(value) => {
                let flag = value.as_bool();
                flag.map(Some)
                    .ok_or_else(|| ApiError::malformed_field(path))
            }
        }
    }

    pub(super) fn number(&self, path: &str) -> Result<Option<f64>, ApiError> {
        match self.field(path) {
            None => Ok(None),
            Some(value) => {
                let number = value.as_f64();
                number
                    .map(Some)
                    .ok_or_else(|| ApiError::malformed_field(path))
            }
        }
    }

    fn at(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        parts.try_fold(&self.body, |value, part| value.get(part))
    }

    /// How long a compute may be idle, by two fields that exclude each other; zero: for ever.
    pub(super) fn suspension(&self, parent: &str) -> Result<Option<Duration>, ApiError> {
        let path = format!("{parent}.suspension");
        let timeout = self.member(&path, "suspend_timeout_duration");
        let timeout_field = format!("{parent}.suspend_timeout_duration");
        match (timeout, self.member(&path, "no_suspension")) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(ApiError::invalid(
                "Only one of 'suspend_timeout_duration' and 'no_suspension' may be set.",
            )),
            (None, Some(Value::Bool(true))) => Ok(Some(Duration::ZERO)),
            (None, Some(_)) => Err(ApiError::invalid(
                "Field 'no_suspension' must be true when it is provided.",
            )),
            (Some(timeout), None) => {
                let seconds = timeout.as_str().and_then(duration);
                let seconds = seconds.ok_or_else(|| ApiError::malformed_field(&timeout_field))?;
                if (60.0..=604_800.0).contains(&seconds) {
                    Ok(Some(Duration::from_secs_f64(seconds)))
                } else {
                    Err(ApiError::invalid(
                        "Field 'suspend_timeout_duration' must be between 60s and 604800s.",
                    ))
                }
            }
        }
    }
}

/// A protobuf Duration in JSON: decimal seconds with an `s`.
pub(in crate::emulator::workspace) fn duration(text: &str) -> Option<f64> {
    text.strip_suffix('s')?
        .parse()
        .ok()
        .filter(|seconds: &f64| seconds.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(body: &str, mask: &str) -> Change {
        Change::parse(body, Some(mask)).unwrap()
    }

    #[test]
    fn the_mask_decides_which_fields_count() {
        let body = r#"{"spec":{"is_protected":true,"ttl":"60s"}}"#;
        for (mask, protected, ttl) in [
            ("", true, true),
            ("*", true, true),
            ("spec", true, true),
            ("spec.is_protected", true, false),
            ("spec.expiration", false, true),
            ("spec.is_protected, spec.expiration", true, true),
            ("spec.is_prot", false, false),
        ] {
            let change = change(body, mask);
            assert_eq!(
                change.field("spec.is_protected").is_some(),
                protected,
                "{mask}"
            );
            assert_eq!(
                change.member("spec.expiration", "ttl").is_some(),
                ttl,
                "{mask}"
            );
        }
    }

    #[test]
    fn a_mask_names_known_fields_that_are_given() {
        let body = r#"{"spec":{"disabled":true}}"#;
        let check = |mask| {
            let checked =
                change(body, mask).check(&["spec", "spec.disabled", "spec.x"], &["spec.g"]);
            checked.err().map(|error| error.message().to_owned())
        };
        for mask in ["", "spec", "spec.disabled", "spec.g", "*"] {
            assert_eq!(check(mask), None, "{mask}");
        }
        assert_eq!(
            check("spec.suspend_timeout_duration").as_deref(),
            Some("Unknown field path in update_mask: 'spec.suspend_timeout_duration'")
        );
        assert_eq!(
            check("spec.disabled,spec.x").as_deref(),
            Some("Field 'spec.x' is in update_mask but not provided in request")
        );
    }

    #[test]
    fn ids_have_the_apis_form() {
        let checked = |kind: Kind, text: &str| {
            let query = HashMap::from([(format!("{}_id", kind.word()), text.to_owned())]);
            id(kind, &query)
        };
        for text in ["a", "pr-7", &"a".repeat(63)] {
            assert_eq!(checked(Kind::Branch, text).unwrap(), text);
        }
        for text in ["7pr", "PR", "a_b", "-a", "a/b", &"a".repeat(64)] {
            assert!(checked(Kind::Branch, text).is_err(), "{text}");
        }
        assert!(checked(Kind::Branch, "").is_err());
        assert!(checked(Kind::Role, "abc").is_err());
        assert!(checked(Kind::Role, "").unwrap().starts_with("role-"));
    }
}
