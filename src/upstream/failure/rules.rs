//! The one table of failure classes.
//!
//! Texts are matched first, because the edge sends most of its errors under a catch-all SQLSTATE and hides an IP access
//! list behind a transient one; then the SQLSTATE.
//!
//! A class decides what happens to other clients too (they wait for an endpoint that wakes, a credential is replaced for
//! all), so no client may choose it. Servers repeat a client's texts in their errors: a database name in a 28000, a
//! setting's value in a 22023. Therefore a text decides only under the SQLSTATEs of an edge or a starting server, quoted
//! parts are not matched, and a rule whose words one of the client's texts contains cannot make others wait.

use super::Class;
use crate::protocol::error::ErrorFields;

/// Parts in lower case, all of which must occur; what that means; what to do about it.
type Rule = (&'static [&'static str], Class, Option<&'static str>);

/// The first rule that fits wins.
const RULES: &[Rule] = &[
    (
        &["blocked by databricks ip acl"],
        Class::Permission,
        Some(IP_ACCESS),
    ),
    (
        &["ip address", "not allowed to connect"],
        Class::Permission,
        Some(IP_ACCESS),
    ),
    (
        &["unauthorized network access"],
        Class::Permission,
        Some(NETWORK_POLICY),
    ),
    (&["network policy"], Class::Permission, Some(NETWORK_POLICY)),
    (
        &["lakebase_runtime"],
        Class::Permission,
        Some(NETWORK_POLICY),
    ),
    (
        &["did not match the security label"],
        Class::WrongIdentity,
        None,
    ),
    (&["no security label"], Class::WrongIdentity, None),
    (&["not a valid jwt encoding"], Class::WrongKind, None),
    (&["failed to decode token for role"], Class::WrongKind, None),
    (&["sasl authentication failed"], Class::WrongKind, None),
    (&["token", "has expired"], Class::Identity, None),
    (
        &["not yet ready to use"],
        Class::Identity,
        Some("This machine's clock and the endpoint's differ: check the clock."),
    ),
    (&["invalid jwt token audience"], Class::Identity, None),
    (&["jwk not found"], Class::Identity, None),
    (&["missing key id"], Class::Identity, None),
    (&["signature error"], Class::Identity, None),
    (
        &["invalid authorization for databricks identity login"],
        Class::Identity,
        None,
    ),
    (&["password authentication failed"], Class::Identity, None),
    (
        &["role \"", "does not exist"],
        Class::Permission,
        Some(MISSING_ROLE),
    ),
    (
        &["is not permitted to log in"],
        Class::Permission,
        Some("ALTER ROLE ... LOGIN, or make it with databricks_create_role."),
    ),
    (&["no pg_hba.conf entry"], Class::Permission, None),
    (&["pg_hba.conf rejects"], Class::Permission, None),
    (
        &["endpoint is disabled"],
        Class::Permission,
        Some("Enable the compute: no connection can wake a disabled one."),
    ),
    (
        &["endpoint cannot be found"],
        Class::Permission,
        Some("Check ENDPOINT_NAME and PGHOST: there is no such endpoint."),
    ),
    (&["too many connections"], Class::Capacity, None),
    (&["too many clients already"], Class::Capacity, None),
    (&["connection slots are reserved"], Class::Capacity, None),
    (&["failed to acquire permit"], Class::Capacity, None),
    (
        &["too many database connection attempts"],
        Class::Capacity,
        None,
    ),
    (&["no more connections allowed"], Class::Capacity, None),
    (&["invalid protocol version"], Class::Protocol, None),
    (
        &["does not have sni"],
        Class::Protocol,
        Some("Set PGHOST to the endpoint's host name: an IP address carries no SNI."),
    ),
    (
        &["unsupported startup parameter"],
        Class::Protocol,
        Some(POOLER),
    ),
    (&["endpoint id is not specified"], Class::Protocol, None),
    (&["inconsistent project name"], Class::Protocol, None),
    (&["connection is insecure"], Class::Protocol, None),
    (&["received unencrypted data"], Class::Protocol, None),
    (
        &["external authorization failed"],
        Class::Waking,
        Some(
            "The endpoint is asleep, paused or refuses this address. Retry; if it lasts, check the compute, the workspace's IP access list, the network policy (`lakebase_runtime`) and the private link.",
        ),
    ),
    (&["endpoint is idle"], Class::Waking, None),
    (
        &["waiting for endpoint to become active"],
        Class::Waking,
        None,
    ),
    (&["couldn't connect to compute node"], Class::Waking, None),
    (&["control plane request failed"], Class::Waking, None),
    (&["authentication timed out"], Class::Waking, None),
    (&["client handshake timeout"], Class::Waking, None),
    (&["insecure connection"], Class::Waking, None),
    (&["database system is"], Class::Waking, None),
    (&["not yet accepting connections"], Class::Waking, None),
];

pub(super) const MISSING_ROLE: &str = "Make the role on this branch: CREATE EXTENSION IF NOT EXISTS databricks_auth; SELECT databricks_create_role('{user}', '{kind}');";
pub(super) const POOLER: &str = "Set PGHOST to the direct host ({direct}): poolers accept OAuth credentials, and startup parameters, only where Databricks has enabled that.";
const NETWORK_POLICY: &str = "A network policy refuses the address that this proxy connects from: allow it for the destination `lakebase_runtime`, which is apart from the workspace's API.";
const IP_ACCESS: &str =
    "Add the address this proxy connects from to the workspace's IP access list.";

/// The class of an error, and what to do about it where that is more than the class says.
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
    let mut fitting = RULES
        .iter()
        .filter(|(parts, ..)| parts.iter().all(|part| text.contains(part)))
        .peekable();
    if fitting.peek().is_none() {
        return (by_code, hint_of_sqlstate(error));
    }
    let client_texts: Vec<String> = client_texts.into_iter().map(letters).collect();
    let (doubtful, certain): (Vec<&Rule>, Vec<&Rule>) =
        fitting.partition(|(parts, ..)| may_be_of_a_client(parts, &client_texts));
    if let Some(&&(_, class, hint)) = certain.first() {
        return (class, hint);
    }
    // The words may be the server's or the client's. The classes that concern this client alone do no harm.
    if !concerns_others(by_code) {
        return (by_code, None);
    }
    let harmless = doubtful
        .iter()
        .find(|(_, class, _)| !concerns_others(*class));
    if let Some(&&(_, class, hint)) = harmless {
        return (class, hint);
    }
    if doubtful.iter().any(|(_, class, _)| *class == by_code) {
        return (by_code, None);
    }
    (Class::Other, None)
}

/// Whether a text under this code can decide: the codes of edges and of starting servers, and none that a client's
/// settings cause (22023, 42704, 22P02, 55P02, 58P01, ...).
fn texts_decide_under(code: &str) -> bool {
    matches!(code, "" | super::INTERNAL_ERROR | "57P03" | "53300")
        || code.starts_with("08")
        || code.starts_with("28")
}

/// Whether other clients wait, or get another credential, because of it.
fn concerns_others(class: Class) -> bool {
    matches!(
        class,
        Class::Identity | Class::Waking | Class::WrongIdentity
    )
}

/// Whether these words may come from one of the client's texts. A single word does not count: half of the table would
/// be out of force for the clients of a database called `token`.
fn may_be_of_a_client(parts: &[&str], client_texts: &[String]) -> bool {
    parts
        .iter()
        .filter(|part| part.trim().contains([' ', '_']))
        .map(|part| letters(part))
        .any(|part| client_texts.iter().any(|text| text.contains(&part)))
}

/// What is left of a text however a server quotes, escapes, folds or trims it.
fn letters(text: &str) -> String {
    text.chars()
        .filter(|character| character.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

/// In lower case, with `""` for whatever stands between quotation marks of any language: names and values. A mark
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

/// Where the quotation ends that this mark opens, closing mark included.
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

/// SQLSTATEs that decide where no text did.
fn class_of_sqlstate(code: &str) -> Class {
    match code {
        // 57P05 is missing: a client's own `idle_session_timeout` causes it.
        "57P01" | "57P02" | "57P03" => Class::Waking,
        "53300" => Class::Capacity,
        "28P01" | "28000" => Class::Identity,
        "42501" | "3D000" => Class::Permission,
        "08P01" | "0A000" => Class::Protocol,
        code if code.starts_with("08") => Class::Waking,
        _ => Class::Other,
    }
}

/// What to do about what the SQLSTATE alone decides.
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
