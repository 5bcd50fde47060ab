//! Startup parameters that the server refuses, which later logins omit.
//!
//! The edge forwards few startup parameters, so a connection string with `pgbouncer=true` or `max_conns=20` works without
//! the proxy. The proxy sends every parameter as a setting, and the server refuses those that are none. A name counts only if
//! it stands in the server's own sentence about it, since a client could place another name in other errors.

use std::{sync::Arc, time::Duration};

use super::names::RecentNames;
use crate::protocol::error::ErrorFields;

/// Names kept for an endpoint; a client can send any number.
const MAX_NAMES: usize = 256;
/// How long a name is omitted before it is tried again: an upgrade may have added it.
const LIFETIME: Duration = Duration::from_hours(1);

/// The server's sentences about a startup parameter that it refuses, by SQLSTATE; `{}` is the name.
const REFUSALS: &[(&str, &str)] = &[
    ("42704", "unrecognized configuration parameter \"{}\""),
    ("42602", "invalid configuration parameter name \"{}\""),
    ("42501", "permission denied to set parameter \"{}\""),
    ("55P02", "parameter \"{}\" cannot be changed"),
    ("55P02", "parameter \"{}\" cannot be changed now"),
    (
        "55P02",
        "parameter \"{}\" cannot be changed without restarting the server",
    ),
];

/// The parameters that the server of an endpoint refused; shared by all copies.
#[derive(Clone, Debug)]
pub struct DroppedParameters(Arc<RecentNames>);

impl Default for DroppedParameters {
    fn default() -> Self {
        Self(Arc::new(RecentNames::new(MAX_NAMES, LIFETIME)))
    }
}

impl DroppedParameters {
    /// Whether logins omit this parameter.
    pub(super) fn contains(&self, name: &str) -> bool {
        // Postgres compares the names of settings in ASCII, without case.
        self.0.contains(&name.to_ascii_lowercase())
    }

    /// Omits it from now on; logged once for each name.
    pub(super) fn insert(&self, name: &str, reason: &str) {
        if self.0.insert(&name.to_ascii_lowercase()) {
            tracing::warn!(
                parameter = name,
                reason,
                "a startup parameter is dropped, as the endpoint does without the proxy; hint: remove it from the client's connection string"
            );
        }
    }
}

/// The parameter that an error refuses by name.
pub(super) fn refused<'a>(
    error: &ErrorFields,
    parameters: &'a [(String, String)],
) -> Option<&'a str> {
    let sentences: Vec<(&str, &str)> = REFUSALS
        .iter()
        .filter(|(code, _)| *code == error.code)
        .filter_map(|(_, sentence)| sentence.split_once("{}"))
        .collect();
    let names = parameters.iter().map(|(name, _)| name.as_str());
    let is_refused = |name: &&str| {
        sentences.iter().any(|(before, after)| {
            // The whole sentence, so that a name in a client's own text cannot match.
            let quoted = error
                .message
                .strip_prefix(before)
                .and_then(|rest| rest.strip_suffix(after));
            quoted.is_some_and(|quoted| quoted.eq_ignore_ascii_case(name))
        })
    };
    names.into_iter().find(is_refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str, message: &str) -> ErrorFields {
        ErrorFields {
            code: code.to_owned(),
            message: message.to_owned(),
            ..ErrorFields::default()
        }
    }

    #[test]
    fn only_the_servers_own_sentence_names_a_refused_parameter() {
        let parameters = [("search_path", "a"), ("Max_Conns", "20")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (code, message, expected) in [
            (
                "42704",
                "unrecognized configuration parameter \"max_conns\"",
                Some("Max_Conns"),
            ),
            (
                "55P02",
                "parameter \"max_conns\" cannot be changed without restarting the server",
                Some("Max_Conns"),
            ),
            (
                "42704",
                "unrecognized configuration parameter \"other\"",
                None,
            ),
            // A client that names a table access method so would have the setting dropped for all.
            (
                "42704",
                "table access method \"search_path\" does not exist",
                None,
            ),
            (
                "22023",
                "unrecognized configuration parameter \"search_path\"",
                None,
            ),
        ] {
            assert_eq!(
                refused(&error(code, message), &parameters),
                expected,
                "{code} {message}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_dropped_in_any_case_for_an_hour() {
        let dropped = DroppedParameters::default();
        assert!(!dropped.contains("schema"));
        dropped.insert("Schema", "");
        assert!(dropped.clone().contains("sCHEMA"));
        tokio::time::advance(LIFETIME).await;
        assert!(!dropped.contains("schema"));
    }
}
