//! The statements of the console, and the errors for all others.

use super::tables::Table;
use crate::protocol::error::{Report, sqlstate};

/// Characters of a statement that an error quotes.
const QUOTED: usize = 40;

/// A statement of the console.
#[derive(Clone, Copy, Debug)]
pub(super) enum Statement {
    /// SHOW with a table.
    Show(&'static Table),
    /// Drivers put transactions around their queries.
    Begin,
    Commit,
    Rollback,
    /// A statement that drivers send by default and that has no effect here, with its command tag.
    Accepted(&'static str),
}

/// Session settings that drivers set by default; they have no effect here.
const SESSION_SETTINGS: &[&str] = &[
    "application_name",
    "bytea_output",
    "characteristics",
    "client_encoding",
    "client_min_messages",
    "datestyle",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "intervalstyle",
    "lock_timeout",
    "names",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "time",
    "timezone",
    "transaction",
];

/// Commands of PgBouncer's console that this one does not have, each with an alternative.
const COMMANDS: &[(&str, &str)] = &[
    (
        "disable",
        "Stop the proxy, or take the endpoint out of the configuration.",
    ),
    (
        "enable",
        "Put the endpoint into the configuration and reload.",
    ),
    (
        "kill",
        "End the session where it runs: pg_terminate_backend() with the remote_pid of SHOW SERVERS.",
    ),
    (
        "kill_client",
        "End the session where it runs: pg_terminate_backend() with the remote_pid of SHOW SERVERS.",
    ),
    (
        "pause",
        "Clients wait by themselves while the endpoint is unavailable.",
    ),
    (
        "reconnect",
        "Sessions end with the connections that they have; new ones connect anew.",
    ),
    ("reload", "Send SIGHUP."),
    ("resume", "Nothing is ever paused."),
    (
        "shutdown",
        "Send SIGTERM, or run `lakebase-proxy shutdown`.",
    ),
    ("suspend", "Nothing is ever suspended."),
    ("wait_close", "Nothing is ever paused."),
];

/// SQL statements, which get a hint of their own.
const SQL: &[&str] = &[
    "alter",
    "analyze",
    "call",
    "checkpoint",
    "close",
    "cluster",
    "comment",
    "copy",
    "create",
    "declare",
    "delete",
    "do",
    "drop",
    "execute",
    "explain",
    "fetch",
    "grant",
    "insert",
    "listen",
    "lock",
    "merge",
    "move",
    "notify",
    "prepare",
    "refresh",
    "reindex",
    "revoke",
    "savepoint",
    "select",
    "table",
    "truncate",
    "unlisten",
    "update",
    "vacuum",
    "values",
    "with",
];

/// Splits a query string into statements, comments included; empty ones are left out.
pub(super) fn split(query: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut begin, mut state) = (0, Lexer::Plain);
    let mut previous = ' ';
    for (at, character) in query.char_indices() {
        if state == Lexer::Plain && character == ';' {
            parts.push(query.get(begin..at).unwrap_or_default());
            begin = at.saturating_add(1);
            previous = ' ';
            continue;
        }
        state = state.next(previous, character);
        previous = character;
    }
    parts.push(query.get(begin..).unwrap_or_default());
    parts.retain(|part| !words(part).is_empty());
    parts
}

/// Parses one statement; `None` for an empty one.
pub(super) fn parse(statement: &str) -> Result<Option<Statement>, Report> {
    let words = words(statement);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let understood = match words[..] {
        [] => return Ok(None),
        ["show", what] => Statement::Show(Table::named(what).ok_or_else(|| unknown(statement))?),
        ["begin", ..] | ["start", "transaction", ..] => Statement::Begin,
        ["commit" | "end", ..] => Statement::Commit,
        ["rollback" | "abort", ..] => Statement::Rollback,
        ["reset", ..] => Statement::Accepted("RESET"),
        ["discard", "all"] => Statement::Accepted("DISCARD ALL"),
        ["deallocate", ..] => Statement::Accepted("DEALLOCATE"),
        ["set", "session" | "local", name, ..] | ["set", name, ..] => {
            if !SESSION_SETTINGS.contains(&name) {
                return Err(read_only("SET").with_hint(
                    "Change the setting at its source (SHOW CONFIG shows it) and reload.",
                ));
            }
            Statement::Accepted("SET")
        }
        [first, ..] => {
            if let Some((command, hint)) = COMMANDS.iter().find(|(command, _)| *command == first) {
                return Err(read_only(&command.to_uppercase()).with_hint(*hint));
            }
            if SQL.contains(&first) {
                return Err(Report::new(
                    sqlstate::FEATURE_NOT_SUPPORTED,
                    format!("the console of lakebase-proxy runs no SQL: `{}`", quoted(statement)),
                )
                .with_hint(
                    "SHOW HELP lists the commands. For SQL, connect to a database of the endpoint, as in `psql -d databricks_postgres`.",
                ));
            }
            return Err(unknown(statement));
        }
    };
    Ok(Some(understood))
}

fn unknown(statement: &str) -> Report {
    Report::new(
        sqlstate::SYNTAX_ERROR,
        format!(
            "the console of lakebase-proxy does not know `{}`",
            quoted(statement)
        ),
    )
    .with_hint("SHOW HELP lists the commands.")
}

fn read_only(what: &str) -> Report {
    Report::new(
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!("the console of lakebase-proxy is read-only: {what} is not possible"),
    )
}

/// The beginning of a statement, in one line.
fn quoted(statement: &str) -> String {
    let line = statement.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// The words of a statement in lower case, without comments.
fn words(statement: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let (mut state, mut previous) = (Lexer::Plain, ' ');
    for character in statement.chars() {
        let before = state;
        state = state.next(previous, character);
        previous = character;
        let is_code = before == Lexer::Plain && state == Lexer::Plain;
        // The first character of a comment was taken for code.
        if matches!(state, Lexer::Line | Lexer::Block)
            && before == Lexer::Plain
            && let Some(word) = words.last_mut()
        {
            word.pop();
        }
        match words.last_mut() {
            Some(word)
                if is_code
                    && !character.is_whitespace()
                    && !matches!(character, '=' | ',' | ';') =>
            {
                word.extend(character.to_lowercase());
            }
            Some(word)
                if matches!(before, Lexer::Single | Lexer::Double)
                    || matches!(state, Lexer::Single | Lexer::Double) =>
            {
                word.push(character);
            }
            _ => words.push(String::new()),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The lexical state within a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lexer {
    Plain,
    Single,
    Double,
    Line,
    Block,
}

impl Lexer {
    fn next(self, previous: char, character: char) -> Self {
        match (self, previous, character) {
            (Self::Plain, _, '\'') => Self::Single,
            (Self::Plain, _, '"') => Self::Double,
            (Self::Plain, '-', '-') => Self::Line,
            (Self::Plain, '/', '*') => Self::Block,
            (Self::Single, _, '\'')
            | (Self::Double, _, '"')
            | (Self::Line, _, '\n')
            | (Self::Block, '*', '/') => Self::Plain,
            (same, ..) => same,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(statement: &str) -> Report {
        parse(statement).unwrap_err()
    }

    #[test]
    fn a_show_is_recognized_in_any_notation() {
        for statement in [
            "SHOW CLIENTS",
            "show clients;",
            "  Show\n\tClients ; ",
            "-- who is here?\nSHOW CLIENTS",
            "/* all; of them */ show /**/ clients --",
        ] {
            let split = split(statement);
            assert_eq!(split.len(), 1, "{statement}: {split:?}");
            let parsed = parse(split[0]);
            assert!(
                matches!(parsed, Ok(Some(Statement::Show(table))) if table.name == "clients"),
                "{statement}"
            );
        }
    }

    #[test]
    fn several_statements_are_split() {
        assert_eq!(
            split("SHOW STATS; -- a;b\n SHOW ';' ;; SHOW \"a;b\""),
            ["SHOW STATS", " -- a;b\n SHOW ';' ", " SHOW \"a;b\""]
        );
        assert!(split(" ; -- nothing\n;").is_empty());
    }

    #[test]
    fn nothing_can_be_changed_from_here() {
        for statement in [
            "PAUSE",
            "resume;",
            "KILL db",
            "SHUTDOWN WAIT_FOR_CLIENTS",
            "RELOAD",
            "SET max_connections = 5",
        ] {
            let report = refused(statement);
            assert_eq!(report.sqlstate, "0A000", "{statement}");
            assert!(
                report.message.contains("read-only"),
                "{statement}: {}",
                report.message
            );
            assert!(report.hint.is_some(), "{statement}");
        }
    }

    #[test]
    fn sql_is_refused_with_a_hint() {
        let report = refused("SELECT pg_catalog.pg_get_userbyid(relowner)\nFROM pg_class");
        assert_eq!(report.sqlstate, "0A000");
        let message = &report.message;
        assert!(
            message.contains("`SELECT pg_catalog.pg_get_userbyid(") && message.ends_with("…`"),
            "{message}"
        );
        assert!(report.hint.unwrap().contains("databricks_postgres"));
    }

    #[test]
    fn an_unknown_statement_is_a_syntax_error() {
        for statement in [
            "SHOW",
            "SHOW POODLES",
            "SHOW 'clients'",
            "hello",
            "show clients now",
        ] {
            let report = refused(statement);
            assert_eq!(report.sqlstate, "42601", "{statement}");
            assert_eq!(
                report.hint.as_deref(),
                Some("SHOW HELP lists the commands.")
            );
        }
    }

    #[test]
    fn default_statements_of_drivers_are_accepted() {
        for (statement, parsed) in [
            ("BEGIN", "Begin"),
            ("START TRANSACTION READ ONLY", "Begin"),
            ("COMMIT", "Commit"),
            ("ROLLBACK", "Rollback"),
            ("SET extra_float_digits = 3", "Accepted(\"SET\")"),
            ("SET application_name='x'", "Accepted(\"SET\")"),
            (
                "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
                "Accepted(\"SET\")",
            ),
            ("DISCARD ALL", "Accepted(\"DISCARD ALL\")"),
        ] {
            let statement = parse(statement).unwrap().unwrap();
            assert_eq!(format!("{statement:?}"), parsed);
        }
        assert!(parse(" -- nothing").unwrap().is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_text_causes_no_panic(text: String) {
            for part in split(&text) {
                let _ = parse(part);
            }
        }
    }
}
