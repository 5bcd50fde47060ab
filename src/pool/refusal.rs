//! What a client is refused that would pin it, with `pin_sessions = "refuse"`.
//!
//! Only what a message shows before the server has it. The search for words, which is right to pin in doubt, would refuse a
//! column named `temp`: what a verification could clear is refused only where its statement shows it.

use super::{
    settings::{Dialect, pin_of_change},
    statements::{ClientMessage, LARGE_STATEMENT},
};
use crate::{
    protocol::{
        error::{Report, sqlstate},
        frame::{split_string, tag, until_zero},
        lexer::{Kind, Statement, Token, statements},
        words::{Verdict, verdict},
    },
    telemetry::labels::PinReason,
};

/// Why a message would pin its client.
pub(super) fn pin_of(message: ClientMessage<'_>, dialect: Dialect) -> Option<PinReason> {
    let ClientMessage { tag, length, body } = message;
    match tag {
        tag::FUNCTION_CALL => Some(PinReason::UnknownState),
        tag::PARSE => {
            let (name, text) = split_string(body)?;
            if length > LARGE_STATEMENT {
                return (!name.is_empty()).then_some(PinReason::LargeStatement);
            }
            pin_of_text(until_zero(text), dialect)
        }
        // A longer one passes before it has arrived as a whole.
        tag::QUERY if body.len() == length => pin_of_text(until_zero(body), dialect),
        _ => None,
    }
}

/// The error in the place of the message's answer.
pub(super) fn report(reason: PinReason) -> Report {
    Report::new(
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!(
            "not supported with pin_sessions = \"refuse\": {}",
            reason.feature()
        ),
    )
    .with_detail(format!(
        "The session would keep its server connection of the pool until it ends (reason: {}).",
        reason.as_str()
    ))
    .with_hint(format!(
        "Use pool_mode = \"auto\", or pool_mode = \"none\" on another listener. {}",
        reason.advice()
    ))
}

fn pin_of_text(text: &[u8], dialect: Dialect) -> Option<PinReason> {
    let all = || statements(text, dialect.backslash);
    let of_keyword = |it: Statement<'_>| {
        if it.begins_with("load") {
            Some(PinReason::Load)
        } else {
            pin_of_change(&it, dialect)
        }
    };
    if let Some(reason) = all().find_map(of_keyword) {
        return Some(reason);
    }
    let suspicions = match verdict(text, dialect.backslash) {
        Verdict::Clean => return None,
        Verdict::Pin(reason) => return Some(reason),
        Verdict::Suspect(suspicions) => suspicions,
    };
    let mut suspicions = suspicions.iter().filter(|(_, is_found)| **is_found);
    suspicions.find_map(|(reason, _)| {
        all()
            .any(|statement| leaves(&statement, reason))
            .then_some(reason)
    })
}

/// Whether a statement leaves in the session what one of its words is suspected of.
fn leaves(statement: &Statement<'_>, reason: PinReason) -> bool {
    // Its text is a string.
    if statement.begins_with("do") {
        return true;
    }
    let mut before: Option<Token<'_>> = None;
    let mut pairs = statement
        .tokens()
        .map(|token| (before.replace(token), token));
    let is_behind =
        |(before, token): (Option<Token<'_>>, Token<'_>), one: &[&str], other: &[&str]| {
            before.is_some_and(|it| one.iter().any(|word| it.is_word(word)))
                && other.iter().any(|word| token.is_word(word))
        };
    match reason {
        PinReason::Listen => statement.begins_with("listen"),
        PinReason::SqlPrepare => {
            statement.begins_with("prepare")
                && !statement
                    .tokens()
                    .nth(1)
                    .is_some_and(|it| it.is_word("transaction"))
        }
        PinReason::Cursor => {
            statement.begins_with("declare")
                && pairs.any(|pair| is_behind(pair, &["with"], &["hold"]))
        }
        PinReason::Temp => pairs.any(|pair| {
            let creates = ["create", "replace", "local", "global", "into"];
            is_behind(pair, &creates, &["temp", "temporary"]) || is_temporary(&pair.1)
        }),
        // Functions, whose names are nothing else.
        _ => true,
    }
}

/// Whether a name is that of a temporary schema, or of the one of this session.
fn is_temporary(token: &Token<'_>) -> bool {
    let name = token.text.strip_prefix(b"\"").unwrap_or(token.text);
    let schema = name.get(..7).unwrap_or_default();
    matches!(token.kind, Kind::Word | Kind::QuotedIdentifier)
        && schema.eq_ignore_ascii_case(b"pg_temp")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::lexer::Backslash;

    const DIALECT: Dialect = Dialect {
        backslash: Backslash::Plain,
        is_utf8: true,
    };

    fn of(tag: u8, body: &[u8]) -> Option<PinReason> {
        let length = body.len();
        pin_of(ClientMessage { tag, length, body }, DIALECT)
    }

    #[test]
    fn what_certainly_outlives_a_transaction_is_refused() {
        for (sql, reason) in [
            ("listen a", PinReason::Listen),
            ("/* a */ select 1; LISTEN a", PinReason::Listen),
            ("prepare p as select 1", PinReason::SqlPrepare),
            ("declare c cursor with hold for select 1", PinReason::Cursor),
            ("create temp table t (a int)", PinReason::Temp),
            (
                "create or replace temporary view t as select 1",
                PinReason::Temp,
            ),
            ("create local temp table t ()", PinReason::Temp),
            (
                "explain analyze create temp table t as select 1",
                PinReason::Temp,
            ),
            ("select 1 into temp t", PinReason::Temp),
            ("create table PG_TEMP.t ()", PinReason::Temp),
            ("drop table \"pg_temp_3\".t", PinReason::Temp),
            (
                "do $$ begin create temp table t (); end $$",
                PinReason::Temp,
            ),
            ("select pg_try_advisory_lock(1)", PinReason::AdvisoryLock),
            ("select nextval('s')", PinReason::Sequence),
            ("select set_config('a.b', 'c', false)", PinReason::SetConfig),
            ("do $$ begin execute 'x'; end $$", PinReason::UnknownState),
            ("load 'auto_explain'", PinReason::Load),
            ("set session authorization x", PinReason::Role),
            ("select 1; set seed = 0.5", PinReason::Setseed),
        ] {
            assert_eq!(
                of(tag::QUERY, format!("{sql}\0").as_bytes()),
                Some(reason),
                "{sql}"
            );
            let parse = format!("name\0{sql}\0\0\0");
            assert_eq!(of(tag::PARSE, parse.as_bytes()), Some(reason), "{sql}");
        }
        assert_eq!(of(tag::FUNCTION_CALL, b""), Some(PinReason::UnknownState));
    }

    #[test]
    fn words_that_only_look_like_it_are_not_refused() {
        for sql in [
            "",
            "select temp, hold, \"listen\" from prepare",
            "select 1 as temporary",
            "insert into t values ('create temp table', 'pg_temp', 'prepare it')",
            "prepare transaction 'a'",
            "with hold as (select 1) select listen from hold",
            "select pg_advisory_xact_lock(1), set_config('a.b', $1, true)",
            "set role x; set search_path = a; set local work_mem = '1MB'; reset all",
            "set nothing that postgres knows",
            "unlisten a",
        ] {
            assert_eq!(of(tag::QUERY, format!("{sql}\0").as_bytes()), None, "{sql}");
        }
        for tag in [tag::BIND, tag::EXECUTE, tag::SYNC, tag::COPY_DATA] {
            assert_eq!(of(tag, b"listen a\0"), None);
        }
    }

    #[test]
    fn a_long_statement_is_refused_if_it_has_a_name() {
        let large = |body| ClientMessage {
            tag: tag::PARSE,
            length: LARGE_STATEMENT + 1,
            body,
        };
        let reason = pin_of(large(b"name\0select"), DIALECT);
        assert_eq!(reason, Some(PinReason::LargeStatement));
        assert_eq!(pin_of(large(b"\0select"), DIALECT), None);
    }

    #[test]
    fn an_error_names_what_is_refused_and_what_helps() {
        let report = report(PinReason::Listen);
        assert_eq!(report.sqlstate, "0A000");
        assert_eq!(
            report.message,
            "not supported with pin_sessions = \"refuse\": LISTEN"
        );
        assert!(report.detail.unwrap().ends_with("(reason: listen)."));
        assert!(report.hint.unwrap().contains("pool_mode = \"auto\""));
    }
}
