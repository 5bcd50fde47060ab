//! SET and RESET as changes of settings, in SQL that means the same in any session.

use std::fmt::Write as _;

use super::ROLE;
use crate::{
    protocol::lexer::{Backslash, Kind, Statement, Token, is_ascii_safe},
    telemetry::labels::PinReason,
};

/// A change of the settings of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A setting has a value.
    Set {
        /// In lower case.
        name: String,
        /// A statement.
        sql: String,
    },
    /// A part of a setting has a value.
    Add {
        /// In lower case.
        name: String,
        /// A statement.
        sql: String,
    },
    /// A setting has the value of a new session.
    Reset {
        /// In lower case.
        name: String,
    },
    /// All have, except for the role.
    ResetAll,
}

impl Change {
    /// Whether it resets a setting that a pool sets by a SET for each client, and not by the login.
    pub(in crate::pool) fn is_reset_of_login(&self) -> bool {
        match self {
            Self::ResetAll => true,
            Self::Reset { name } => name == "application_name" || name == "client_encoding",
            Self::Set { .. } | Self::Add { .. } => false,
        }
    }

    /// Whether it may decide how the server reads a statement.
    pub(super) fn is_of_scope(&self) -> bool {
        match self {
            Self::ResetAll => true,
            Self::Set { name, .. } | Self::Add { name, .. } | Self::Reset { name } => {
                is_of_scope(name)
            }
        }
    }

    /// Whether it changes this setting, by its name in lower case.
    pub(crate) fn concerns(&self, setting: &str) -> bool {
        match self {
            Self::ResetAll => true,
            Self::Set { name, .. } | Self::Add { name, .. } | Self::Reset { name } => {
                // What a role may do is reported, too.
                name == setting || name == ROLE && setting == "is_superuser"
            }
        }
    }
}

/// How a session reads the texts of its client.
#[derive(Clone, Copy, Debug)]
pub struct Dialect {
    /// By `standard_conforming_strings`.
    pub backslash: Backslash,
    /// Whether `client_encoding` is UTF-8.
    pub is_utf8: bool,
}

/// Whether a setting may decide how a server reads a statement when that is prepared. Few certainly do not, which clients set
/// often; of any other, only equal values have equal texts be one statement.
pub(super) fn is_of_scope(name: &str) -> bool {
    let is_other = name.contains('.')
        || name.ends_with("_timeout")
        || name.starts_with("default_transaction_")
        || name.starts_with("log_")
        || matches!(
            name,
            "application_name" | "client_min_messages" | "synchronous_commit" | "work_mem"
        );
    !is_other
}

/// Whether a SET is of its transaction alone, and of a setting that may decide how a server reads a statement.
pub(super) fn is_local_of_scope(statement: &Statement<'_>) -> bool {
    let tokens: Vec<Token<'_>> = statement.tokens().collect();
    match &tokens[..] {
        [set, local, rest @ ..] if set.is_word("set") && local.is_word("local") => {
            name(rest).map_or(true, |(name, _)| is_of_scope(&name))
        }
        _ => false,
    }
}

/// Whether SET changes a part of the value: the style, or the order of day and month.
pub(super) fn is_partial(name: &str) -> bool {
    name == "datestyle"
}

/// `sql` behind the statements of `earlier`, but not twice.
pub(super) fn add(earlier: &str, sql: &str) -> String {
    // The last of two equal ones decides the same as both do.
    let mut statements: Vec<&str> = earlier.split("; ").filter(|it| *it != sql).collect();
    statements.retain(|it| !it.is_empty());
    statements.push(sql);
    statements.join("; ")
}

/// The statement that sets a value.
pub(super) fn set(name: &str, value: &str) -> String {
    let mut sql = format!("SET {} TO ", quoted(name));
    literal(&mut sql, value);
    sql
}

/// The statement that resets a setting.
pub(super) fn reset(name: &str) -> String {
    format!("RESET {}", quoted(name))
}

/// The parts of a name in quotes, as some are reserved words.
fn quoted(name: &str) -> String {
    let parts: Vec<String> = name.split('.').map(|part| format!("\"{part}\"")).collect();
    parts.join(".")
}

/// The changes by a SET or RESET that has succeeded.
pub(super) fn of(statement: &Statement<'_>, dialect: Dialect) -> Result<Vec<Change>, PinReason> {
    let tokens: Vec<Token<'_>> = statement.tokens().collect();
    match &tokens[..] {
        [first, rest @ ..] if first.is_word("set") => of_set(rest, dialect),
        [first, rest @ ..] if first.is_word("reset") => of_reset(rest),
        _ => Err(PinReason::Settings),
    }
}

/// Why a statement would pin the session, if it is a SET or RESET of something else than a setting.
pub(in crate::pool) fn pin_of_change(
    statement: &Statement<'_>,
    dialect: Dialect,
) -> Option<PinReason> {
    let is_change = statement.begins_with("set") || statement.begins_with("reset");
    // What is not known as a form of SET is the server's to refuse.
    let reason = is_change.then(|| of(statement, dialect).err()).flatten();
    reason.filter(|reason| *reason != PinReason::Settings)
}

fn of_reset(tokens: &[Token<'_>]) -> Result<Vec<Change>, PinReason> {
    let change = match tokens {
        [all] if all.is_word("all") => Change::ResetAll,
        [time, zone] if time.is_word("time") && zone.is_word("zone") => Change::Reset {
            name: "timezone".to_owned(),
        },
        [transaction, isolation, ..]
            if transaction.is_word("transaction") && isolation.kind == Kind::Word =>
        {
            return Ok(Vec::new());
        }
        [session, authorization]
            if session.is_word("session") && authorization.is_word("authorization") =>
        {
            return Err(PinReason::Role);
        }
        _ => match name(tokens)? {
            (name, []) => return special(&name, Change::Reset { name: name.clone() }),
            _ => return Err(PinReason::Settings),
        },
    };
    Ok(vec![change])
}

fn of_set(tokens: &[Token<'_>], dialect: Dialect) -> Result<Vec<Change>, PinReason> {
    let is = |at: usize, word: &str| tokens.get(at).is_some_and(|it| it.is_word(word));
    // `local` and `session` may be names themselves.
    let is_name = tokens
        .get(1)
        .is_some_and(|it| it.is_word("to") || matches!(it.kind, Kind::Symbol(b'=' | b'.')));
    if is(0, "local") && !is_name {
        return Ok(Vec::new());
    }
    if is(0, "session") && is(1, "authorization") {
        return Err(PinReason::Role);
    }
    if is(0, "session") && is(1, "characteristics") {
        return characteristics(tokens.get(2..).unwrap_or_default());
    }
    if is(0, "session") && !is_name {
        return of_set(tokens.get(1..).unwrap_or_default(), dialect);
    }
    if is(0, "transaction") && !is_name {
        return Ok(Vec::new());
    }
    let forms = [
        (&["time", "zone"][..], "timezone"),
        (&["names"], "client_encoding"),
        (&["schema"], "search_path"),
        (&["xml", "option"], "xmloption"),
        (&["role"], ROLE),
    ];
    for (words, name) in forms {
        if is_name || !words.iter().enumerate().all(|(at, word)| is(at, word)) {
            continue;
        }
        let value = tokens.get(words.len()..).unwrap_or_default();
        let is_reset = match value {
            [] => true,
            [word] => word.is_word("default") || name == "timezone" && word.is_word("local"),
            _ => false,
        };
        if is_reset {
            let name = name.to_owned();
            return Ok(vec![Change::Reset { name }]);
        }
        let mut sql = format!("SET {}", words.join(" ").to_uppercase());
        return value_of(name, value, &mut sql, dialect).map(|change| vec![change]);
    }
    let (name, rest) = name(tokens)?;
    let value = match rest {
        [to, value @ ..] if to.is_word("to") || to.kind == Kind::Symbol(b'=') => value,
        // SET ... FROM CURRENT, and what may come.
        _ => return Err(PinReason::Settings),
    };
    if let [word] = value
        && word.is_word("default")
    {
        return special(&name, Change::Reset { name: name.clone() });
    }
    let mut sql = format!("SET {} TO", quoted(&name));
    let change = value_of(&name, value, &mut sql, dialect)?;
    special(&name, change)
}

/// The name at the front, and what follows it.
fn name<'a, 'b>(tokens: &'a [Token<'b>]) -> Result<(String, &'a [Token<'b>]), PinReason> {
    let mut name = String::new();
    let mut rest = tokens;
    loop {
        let [part, behind @ ..] = rest else {
            return Err(PinReason::Settings);
        };
        let part = part
            .identifier()
            .filter(|it| it.is_ascii() && !it.contains('"'));
        name.push_str(&part.ok_or(PinReason::Settings)?.to_ascii_lowercase());
        let [Token { kind, .. }, next @ ..] = behind else {
            break (rest = behind);
        };
        if *kind != Kind::Symbol(b'.') {
            break (rest = behind);
        }
        name.push('.');
        rest = next;
    }
    // Former names: `map_old_guc_names` in guc.c.
    let name = match name.as_str() {
        "sort_mem" => "work_mem".to_owned(),
        "vacuum_mem" => "maintenance_work_mem".to_owned(),
        _ => name,
    };
    Ok((name, rest))
}

/// A change, unless the setting is none of the session.
fn special(name: &str, change: Change) -> Result<Vec<Change>, PinReason> {
    match name {
        "seed" => Err(PinReason::Setseed),
        "session_authorization" => Err(PinReason::Role),
        // Of the transaction.
        "transaction_isolation" | "transaction_read_only" | "transaction_deferrable" => {
            Ok(Vec::new())
        }
        _ => Ok(vec![change]),
    }
}

/// `SET SESSION CHARACTERISTICS`, behind these words.
fn characteristics(tokens: &[Token<'_>]) -> Result<Vec<Change>, PinReason> {
    let words: Vec<String> = tokens
        .iter()
        .filter(|it| it.kind != Kind::Symbol(b','))
        .map(|it| String::from_utf8_lossy(it.text).to_ascii_lowercase())
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut rest = words
        .strip_prefix(&["as", "transaction"])
        .ok_or(PinReason::Settings)?;
    let mut changes = Vec::new();
    while !rest.is_empty() {
        let (name, value, behind) = match rest {
            ["isolation", "level", "serializable", behind @ ..] => {
                ("isolation", "serializable", behind)
            }
            ["isolation", "level", "repeatable", "read", behind @ ..] => {
                ("isolation", "repeatable read", behind)
            }
            ["isolation", "level", "read", "committed", behind @ ..] => {
                ("isolation", "read committed", behind)
            }
            ["isolation", "level", "read", "uncommitted", behind @ ..] => {
                ("isolation", "read uncommitted", behind)
            }
            ["read", "only", behind @ ..] => ("read_only", "on", behind),
            ["read", "write", behind @ ..] => ("read_only", "off", behind),
            ["deferrable", behind @ ..] => ("deferrable", "on", behind),
            ["not", "deferrable", behind @ ..] => ("deferrable", "off", behind),
            _ => return Err(PinReason::Settings),
        };
        let name = format!("default_transaction_{name}");
        let sql = set(&name, value);
        changes.push(Change::Set { name, sql });
        rest = behind;
    }
    Ok(changes)
}

/// The change to a value, with the start of its statement.
fn value_of(
    name: &str,
    value: &[Token<'_>],
    sql: &mut String,
    dialect: Dialect,
) -> Result<Change, PinReason> {
    if value.is_empty() {
        return Err(PinReason::Settings);
    }
    for token in value {
        sql.push(' ');
        append(sql, token, dialect)?;
    }
    if name == "client_encoding" {
        let [token] = value else {
            return Err(PinReason::Settings);
        };
        let encoding = String::from_utf8_lossy(token.text);
        if !is_ascii_safe(&encoding) {
            return Err(PinReason::Encoding);
        }
    }
    let (name, sql) = (name.to_owned(), std::mem::take(sql));
    Ok(if is_partial(&name) {
        Change::Add { name, sql }
    } else {
        Change::Set { name, sql }
    })
}

/// Appends a token so that it means the same whatever `standard_conforming_strings` and `client_encoding` are.
fn append(sql: &mut String, token: &Token<'_>, dialect: Dialect) -> Result<(), PinReason> {
    let Some(text) = str::from_utf8(token.text)
        .ok()
        .filter(|it| dialect.is_utf8 || it.is_ascii())
    else {
        return Err(PinReason::Encoding);
    };
    let is_simple = text.is_ascii() && !text.contains('\\');
    match (token.kind, text.as_bytes()) {
        (_, [b'u' | b'U', b'&', ..]) => return Err(PinReason::Settings),
        (Kind::String, [b'\'' | b'e' | b'E', ..]) if is_simple => sql.push_str(text),
        (Kind::String, [b'\'', inner @ .., b'\'']) => {
            // Between two parts of one literal there is no content.
            if inner
                .windows(2)
                .any(|it| matches!(it, [b'\'', byte] if *byte != b'\''))
                && text.contains(['\n', '\r'])
            {
                return Err(PinReason::Settings);
            }
            let inner = text.get(1..text.len() - 1).unwrap_or_default();
            match dialect.backslash {
                Backslash::Plain => literal(sql, &inner.replace("''", "'")),
                Backslash::Escape => escaped(sql, inner),
            }
        }
        (Kind::String, [b'e' | b'E', b'\'', .., b'\'']) => {
            escaped(sql, text.get(2..text.len() - 1).unwrap_or_default());
        }
        (Kind::String, [b'$', ..]) => {
            let tag = text
                .get(1..)
                .and_then(|it| it.find('$'))
                .unwrap_or_default()
                + 2;
            let content = text.get(tag..text.len().saturating_sub(tag));
            literal(sql, content.ok_or(PinReason::Settings)?);
        }
        (Kind::Word | Kind::QuotedIdentifier, _) if text.is_ascii() => sql.push_str(text),
        (Kind::Word, _) => literal(sql, &text.to_ascii_lowercase()),
        (Kind::QuotedIdentifier, [b'"', .., b'"']) => {
            let inner = text.get(1..text.len() - 1).unwrap_or_default();
            literal(sql, &inner.replace("\"\"", "\""));
        }
        (Kind::Number, _) | (Kind::Symbol(_), [b',' | b'-' | b'+' | b'(' | b')']) => {
            sql.push_str(text);
        }
        _ => return Err(PinReason::Settings),
    }
    Ok(())
}

/// Appends a string literal.
fn literal(sql: &mut String, content: &str) {
    let content = content.replace('\\', "\\\\").replace('\'', "''");
    escaped(sql, &content);
}

/// Appends a string literal whose quotes and backslashes are escaped.
fn escaped(sql: &mut String, content: &str) {
    sql.push_str("E'");
    let mut is_escape = false;
    for character in content.chars() {
        if character.is_ascii() {
            sql.push(character);
            is_escape = character == '\\' && !is_escape;
            continue;
        }
        if is_escape {
            // Of no effect before such a character, and of another one before its escape.
            sql.pop();
            is_escape = false;
        }
        let _ = write!(sql, "\\U{:08x}", u32::from(character));
    }
    sql.push('\'');
}
