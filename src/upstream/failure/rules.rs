//! The table of error texts and their classes.
//!
//! Texts are matched first, because the edge sends most of its errors under a catch-all SQLSTATE and hides an IP access
//! list behind a transient one. Then the SQLSTATE is.
//!
//! A class affects other clients too: they wait for an endpoint that wakes, and a credential is replaced for all. So no
//! client may choose it, although servers repeat a client's texts in their errors (a database name in a 28000, a setting's
//! value in a 22023). Therefore a text decides only under the SQLSTATEs of an edge or a starting server, quoted parts are
//! not matched, and a rule whose text occurs in one of the client's texts cannot make others wait.

use super::{
    Class::{self, Capacity, Identity, Permission, Protocol, Waking, WrongIdentity, WrongKind},
    INTERNAL_ERROR,
};
use crate::protocol::error::ErrorFields;

/// An error text and its meaning.
struct Rule {
    class: Class,
    /// In lower case. Every part between the `*` must occur, in any order.
    text: &'static str,
    /// In place of the hint of the class.
    hint: Option<&'static str>,
}

impl Rule {
    fn parts(&self) -> impl Iterator<Item = &'static str> {
        self.text.split('*')
    }
}

const fn rule(class: Class, text: &'static str, hint: Option<&'static str>) -> Rule {
    Rule { class, text, hint }
}

/// The first rule that matches wins.
const RULES: &[Rule] = &[
    // First: the edge hides these causes in the detail of its transient `External authorization failed`.
    rule(Permission, "blocked by databricks ip acl", Some(IP_ACCESS)),
    rule(
        Permission,
        "ip address*not allowed to connect",
        Some(IP_ACCESS),
    ),
    rule(
        Permission,
        "unauthorized network access",
        Some(NETWORK_POLICY),
    ),
    rule(Permission, "network policy", Some(NETWORK_POLICY)),
    rule(Permission, "lakebase_runtime", Some(NETWORK_POLICY)),
    rule(WrongIdentity, "did not match the security label", None),
    rule(WrongIdentity, "no security label", None),
    // Neon's proxy, in front of autoscaling endpoints: a personal access token or a native password.
    rule(WrongKind, "not a valid jwt encoding", None),
    rule(WrongKind, "failed to decode token for role", None),
    rule(WrongKind, "sasl authentication failed", None),
    // Texts of Neon's proxy and of databricks_auth, under XX000 or class 28.
    rule(Identity, "token*has expired", None),
    rule(Identity, "not yet ready to use", Some(CLOCK)),
    rule(Identity, "invalid jwt token audience", None),
    rule(Identity, "jwk not found", None),
    rule(Identity, "missing key id", None),
    rule(Identity, "signature error", None),
    rule(
        Identity,
        "invalid authorization for databricks identity login",
        None,
    ),
    rule(Identity, "password authentication failed", None),
    // PostgreSQL's own; the name between the quotation marks is not part of the text here.
    rule(Permission, "role \"*does not exist", Some(MISSING_ROLE)),
    rule(Permission, "is not permitted to log in", Some(NO_LOGIN)),
    rule(Permission, "no pg_hba.conf entry", None),
    rule(Permission, "pg_hba.conf rejects", None),
    rule(Permission, "endpoint is disabled", Some(DISABLED)),
    rule(Permission, "endpoint cannot be found", Some(NO_ENDPOINT)),
    // PostgreSQL's limits, then those of Neon's proxy and of PgBouncer.
    rule(Capacity, "too many connections", None),
    rule(Capacity, "too many clients already", None),
    rule(Capacity, "connection slots are reserved", None),
    rule(Capacity, "failed to acquire permit", None),
    rule(Capacity, "too many database connection attempts", None),
    rule(Capacity, "no more connections allowed", None),
    // Not retried: the next attempt would send the same bytes, and a pool's own timeout would hide the reason.
    rule(Protocol, "invalid protocol version", None),
    rule(Protocol, "does not have sni", Some(NO_SNI)),
    rule(Protocol, "unsupported startup parameter", Some(POOLER)),
    rule(Protocol, "endpoint id is not specified", None),
    rule(Protocol, "inconsistent project name", None),
    rule(Protocol, "connection is insecure", None),
    rule(Protocol, "received unencrypted data", None),
    // One text for a paused endpoint, an authorization service slower than 200 ms and a private link.
    rule(
        Waking,
        "external authorization failed",
        Some(ASLEEP_OR_BLOCKED),
    ),
    rule(Waking, "endpoint is idle", None),
    rule(Waking, "waiting for endpoint to become active", None),
    rule(Waking, "couldn't connect to compute node", None),
    rule(Waking, "control plane request failed", None),
    rule(Waking, "authentication timed out", None),
    // The edge's limit of 15 s for a handshake, under either text.
    rule(Waking, "client handshake timeout", None),
    rule(Waking, "insecure connection", None),
    // 57P03: starting up, shutting down, in recovery.
    rule(Waking, "database system is", None),
    rule(Waking, "not yet accepting connections", None),
];

const CLOCK: &str = "This machine's clock and the endpoint's differ: check the clock.";
const NO_LOGIN: &str = "ALTER ROLE ... LOGIN, or make it with databricks_create_role.";
const DISABLED: &str = "Enable the compute: no connection can wake a disabled one.";
const NO_ENDPOINT: &str = "Check ENDPOINT_NAME and PGHOST: there is no such endpoint.";
const NO_SNI: &str = "Set PGHOST to the endpoint's host name: an IP address carries no SNI.";
const ASLEEP_OR_BLOCKED: &str = "The endpoint is asleep, paused or refuses this address. Retry; if it lasts, check the compute, the workspace's IP access list, the network policy (`lakebase_runtime`) and the private link.";
pub(super) const MISSING_ROLE: &str = "Make the role on this branch: CREATE EXTENSION IF NOT EXISTS databricks_auth; SELECT databricks_create_role('{user}', '{kind}');";
pub(super) const POOLER: &str = "Set PGHOST to the direct host ({direct}): poolers accept OAuth credentials, and startup parameters, only where Databricks has enabled that.";
const NETWORK_POLICY: &str = "A network policy refuses the address that this proxy connects from: allow it for the destination `lakebase_runtime`, which is apart from the workspace's API.";
const IP_ACCESS: &str =
    "Add the address this proxy connects from to the workspace's IP access list.";

/// The class of an error, and a hint that is more specific than that of the class.
pub(super) fn classify<'a>(
    error: &ErrorFields,
    client_texts: impl IntoIterator<Item = &'a str>,
) -> (Class, Option<&'static str>) {
    let by_code = class_of_sqlstate(&error.code);
    if !texts_decide_under(&error.code) {
        return (by_code, hint_of_sqlstate(error));
    }
    let text = without_quotations(&error.message)
        + "\n"
        + &without_quotations(error.detail.as_deref().unwrap_or_default());
    let mut matching = RULES
        .iter()
        .filter(|rule| rule.parts().all(|part| text.contains(part)))
        .peekable();
    if matching.peek().is_none() {
        return (by_code, hint_of_sqlstate(error));
    }
    let client_texts: Vec<String> = client_texts.into_iter().map(letters).collect();
    let (doubtful, certain): (Vec<&Rule>, Vec<&Rule>) =
        matching.partition(|rule| may_be_of_a_client(rule, &client_texts));
    if let Some(rule) = certain.first() {
        return (rule.class, rule.hint);
    }
    // The text may be the server's or the client's. A class that concerns this client alone does no harm.
    if !concerns_others(by_code) {
        return (by_code, None);
    }
    if let Some(rule) = doubtful.iter().find(|rule| !concerns_others(rule.class)) {
        return (rule.class, rule.hint);
    }
    if doubtful.iter().any(|rule| rule.class == by_code) {
        return (by_code, None);
    }
    (Class::Other, None)
}

/// Whether a text under this code decides: the codes of edges and of starting servers, and none that a client's settings
/// cause (22023, 42704, 22P02, 55P02, 58P01, ...).
fn texts_decide_under(code: &str) -> bool {
    matches!(code, "" | INTERNAL_ERROR | "57P03" | "53300")
        || code.starts_with("08")
        || code.starts_with("28")
}

/// Whether the class makes other clients wait, or replaces their credential.
fn concerns_others(class: Class) -> bool {
    matches!(class, Identity | Waking | WrongIdentity)
}

/// Whether the error's text may come from one of the client's texts. A single word does not count: half of the table would
/// not apply to the clients of a database named `token`.
fn may_be_of_a_client(rule: &Rule, client_texts: &[String]) -> bool {
    rule.parts()
        .filter(|part| part.trim().contains([' ', '_']))
        .map(letters)
        .any(|part| client_texts.iter().any(|text| text.contains(&part)))
}

/// The part of a text that is the same however a server quotes, escapes, folds or trims it.
fn letters(text: &str) -> String {
    text.chars()
        .filter(|character| character.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

/// The text in lower case, with `""` in place of every quotation, in the marks of any language: names and values. A mark
/// without its counterpart is text.
fn without_quotations(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while let Some(character) = rest.chars().next() {
        let behind = &rest[character.len_utf8()..];
        match end_of_quotation(before, character, behind) {
            Some(end) => {
                plain.push_str("\"\"");
                rest = &behind[end..];
                before = '"';
            }
            None => {
                plain.extend(character.to_lowercase());
                rest = behind;
                before = character;
            }
        }
    }
    plain
}

/// The end of the quotation that this mark opens, including the closing mark.
fn end_of_quotation(before: char, mark: char, behind: &str) -> Option<usize> {
    let closing: &[char] = match mark {
        '"' => &['"'],
        '`' => &['`', '\''],
        // Not the apostrophe of "couldn't".
        '\'' if !before.is_alphanumeric() => &['\''],
        '\u{ab}' => &['\u{bb}'],
        '\u{bb}' => &['\u{ab}', '\u{bb}'],
        '\u{2018}' => &['\u{2019}'],
        '\u{201c}' | '\u{201d}' | '\u{201e}' => &['\u{201c}', '\u{201d}'],
        _ => return None,
    };
    behind
        .char_indices()
        .filter(|(_, character)| closing.contains(character))
        .map(|(at, character)| (character, at + character.len_utf8()))
        .find(|(character, end)| {
            let next = behind[*end..].chars().next();
            !matches!(character, '\'' | '\u{2019}')
                || next.is_none_or(|next| !next.is_alphanumeric())
        })
        .map(|(_, end)| end)
}

/// The class by SQLSTATE, where no text matches.
fn class_of_sqlstate(code: &str) -> Class {
    match code {
        // Not 57P05, which a client's own `idle_session_timeout` causes.
        "57P01" | "57P02" | "57P03" => Waking,
        "53300" => Capacity,
        "28P01" | "28000" => Identity,
        "42501" | "3D000" => Permission,
        "08P01" | "0A000" => Protocol,
        // The rest of class 08 means that a connection broke.
        code if code.starts_with("08") => Waking,
        _ => Class::Other,
    }
}

/// The hint by SQLSTATE, where no text matches.
fn hint_of_sqlstate(error: &ErrorFields) -> Option<&'static str> {
    match error.code.as_str() {
        "3D000" => Some(
            "Check PGDATABASE: the Postgres name has underscores (databricks_postgres) where the resource id has hyphens.",
        ),
        "42501" if error.message.starts_with("permission denied for database") => {
            Some("GRANT CONNECT ON DATABASE to the role.")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
