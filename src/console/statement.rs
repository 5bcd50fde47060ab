//! The statements of the console, and the errors for all others.

use super::{
    control::{Action, Command},
    table::Table,
    tables,
};
use crate::protocol::{
    error::{Report, sqlstate},
    requests::TransactionStatus,
};

/// Characters of a statement that an error quotes.
const QUOTED: usize = 40;

/// A statement of the console.
#[derive(Clone, Debug)]
pub(super) enum Statement {
    /// SHOW with a table.
    Show(&'static Table),
    /// A command that changes something.
    Control(Command),
    /// A statement that drivers send around their queries; it changes the transaction status at most.
    Accepted {
        tag: &'static str,
        transaction: Option<TransactionStatus>,
    },
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

/// Splits a query into its statements, without comments; empty ones are left out.
pub(super) fn split(query: &str) -> Vec<String> {
    let mut statements = vec![String::new()];
    let mut rest = query;
    while let Some(first) = rest.chars().next() {
        let up_to = |start: usize, end: &str| {
            let at = rest.get(start..).and_then(|body| body.find(end));
            at.map_or(rest.len(), |at| start + at + end.len())
        };
        // A semicolon separates nothing within quotes or a comment.
        let (length, is_comment) = match first {
            // A doubled quote is read as two literals side by side, which splits the same.
            '\'' => (up_to(1, "'"), false),
            '"' => (up_to(1, "\""), false),
            _ if rest.starts_with("--") => (up_to(2, "\n"), true),
            _ if rest.starts_with("/*") => (up_to(2, "*/"), true),
            _ => (first.len_utf8(), false),
        };
        let (token, behind) = rest.split_at_checked(length).unwrap_or((rest, ""));
        rest = behind;
        match statements.last_mut() {
            Some(statement) if token != ";" => {
                statement.push_str(if is_comment { " " } else { token });
            }
            _ => statements.push(String::new()),
        }
    }
    statements.retain(|statement| !statement.trim().is_empty());
    statements
}

/// Parses one statement of [`split`].
pub(super) fn parse(statement: &str) -> Result<Statement, Report> {
    let lower = statement.to_lowercase();
    let words: Vec<&str> = lower
        // `SET name=value` needs no blanks.
        .split(|c: char| c.is_whitespace() || c == '=')
        .filter(|word| !word.is_empty())
        .collect();
    let (tag, transaction) = match words[..] {
        ["show", ref name @ ..] => {
            let table = match name {
                [name] => tables::named(name),
                _ => None,
            };
            return table.map(Statement::Show).ok_or_else(|| unknown(statement));
        }
        ["kill", ..] => return control(Action::Kill, statement),
        ["pause", ..] => return control(Action::Pause, statement),
        ["reconnect", ..] => return control(Action::Reconnect, statement),
        ["resume", ..] => return control(Action::Resume, statement),
        ["begin", ..] | ["start", "transaction", ..] => {
            ("BEGIN", Some(TransactionStatus::InTransaction))
        }
        ["commit" | "end", ..] => ("COMMIT", Some(TransactionStatus::Idle)),
        ["rollback" | "abort", ..] => ("ROLLBACK", Some(TransactionStatus::Idle)),
        ["reset", ..] => ("RESET", None),
        ["discard", "all"] => ("DISCARD ALL", None),
        ["deallocate", ..] => ("DEALLOCATE", None),
        ["set", "session" | "local", name, ..] | ["set", name, ..]
            if SESSION_SETTINGS.contains(&name) =>
        {
            ("SET", None)
        }
        _ => {
            return Err(refusal(
                words.first().copied().unwrap_or_default(),
                statement,
            ));
        }
    };
    Ok(Statement::Accepted { tag, transaction })
}

fn control(action: Action, statement: &str) -> Result<Statement, Report> {
    let rest = statement.trim().split_once(char::is_whitespace);
    let name = rest.map_or("", |(_, name)| name.trim());
    let quoted = ['"', '\'']
        .iter()
        .find_map(|quote| name.strip_prefix(*quote)?.strip_suffix(*quote));
    let name = quoted.unwrap_or(name);
    // As in PgBouncer before 1.24: a slip must not end every session.
    if name.is_empty() && action == Action::Kill {
        return Err(Report::new(
            sqlstate::SYNTAX_ERROR,
            "a database is required",
        ));
    }
    Ok(Statement::Control(Command {
        action,
        database: (!name.is_empty()).then(|| name.to_owned()),
    }))
}

/// The error for a statement that begins with `command`.
fn refusal(command: &str, statement: &str) -> Report {
    // Commands of PgBouncer's console, each with an alternative.
    let hint = match command {
        "disable" => "Stop the proxy, or take the endpoint out of the configuration.",
        "enable" => "Put the endpoint into the configuration and reload.",
        "kill_client" => {
            "End the session where it runs: pg_terminate_backend() with the remote_pid of SHOW SERVERS."
        }
        "reload" => "Send SIGHUP.",
        "suspend" => "PAUSE waits until the connections of a database are not in use.",
        "wait_close" => "RECONNECT replaces connections; SHOW POOLS lists those in use.",
        "set" => "Change the setting at its source (SHOW CONFIG shows it) and reload.",
        "shutdown" => "Send SIGTERM, or run `lakebase-proxy shutdown`.",
        _ => {
            return Report::new(
                sqlstate::FEATURE_NOT_SUPPORTED,
                format!("the console of lakebase-proxy runs no SQL: `{}`", quoted(statement)),
            )
            .with_hint(
                "SHOW HELP lists the commands. For SQL, connect to a database of the endpoint, as in `psql -d databricks_postgres`.",
            );
        }
    };
    Report::new(
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!(
            "the console of lakebase-proxy has no command {}",
            command.to_uppercase()
        ),
    )
    .with_hint(hint)
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

/// The beginning of a statement, in one line.
fn quoted(statement: &str) -> String {
    let line = statement.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
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
            let parsed = parse(&split[0]);
            assert!(
                matches!(parsed, Ok(Statement::Show(table)) if table.name == "clients"),
                "{statement}"
            );
        }
    }

    #[test]
    fn several_statements_are_split() {
        assert_eq!(
            split("SHOW STATS; -- a;b\n SHOW ';' ;; SHOW \"a;b\""),
            ["SHOW STATS", "   SHOW ';' ", " SHOW \"a;b\""]
        );
        assert!(split(" ; -- nothing\n;").is_empty());
    }

    #[test]
    fn commands_name_their_database_in_any_notation() {
        for (statement, action, database) in [
            ("PAUSE", Action::Pause, None),
            ("pause;", Action::Pause, None),
            (" Resume  Some/Db ", Action::Resume, Some("Some/Db")),
            ("RECONNECT \"a b\"", Action::Reconnect, Some("a b")),
            (
                "kill app (read-only)",
                Action::Kill,
                Some("app (read-only)"),
            ),
        ] {
            let parsed = parse(&split(statement)[0]);
            let database = database.map(str::to_owned);
            assert!(
                matches!(&parsed, Ok(Statement::Control(command)) if *command == Command { action, database }),
                "{statement}: {parsed:?}"
            );
        }
        assert_eq!(refused("KILL").sqlstate, "42601");
    }

    #[test]
    fn other_commands_of_pgbouncer_are_refused_with_a_hint() {
        for statement in [
            "SUSPEND",
            "SHUTDOWN WAIT_FOR_CLIENTS",
            "RELOAD",
            "SET max_connections = 5",
        ] {
            let report = refused(statement);
            assert_eq!(report.sqlstate, "0A000", "{statement}");
            assert!(
                report.message.contains("no command"),
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
        for statement in ["SHOW", "SHOW POODLES", "SHOW 'clients'", "show clients now"] {
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
        for (statement, expected) in [
            ("BEGIN", "BEGIN"),
            ("START TRANSACTION READ ONLY", "BEGIN"),
            ("COMMIT", "COMMIT"),
            ("ROLLBACK", "ROLLBACK"),
            ("SET extra_float_digits = 3", "SET"),
            ("SET application_name='x'", "SET"),
            (
                "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
                "SET",
            ),
            ("DISCARD ALL", "DISCARD ALL"),
        ] {
            let parsed = parse(statement).unwrap();
            assert!(
                matches!(parsed, Statement::Accepted { tag, .. } if tag == expected),
                "{parsed:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_causes_no_panic(text: String) {
            for part in split(&text) {
                let _ = parse(&part);
            }
        }
    }
}
