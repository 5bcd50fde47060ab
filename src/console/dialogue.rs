//! The simple and the extended protocol of the console, without I/O: takes a message, appends the responses.

use std::collections::HashMap;

use bytes::{Buf, BytesMut};

use super::{
    statement::{self, Statement},
    tables::{Rows, Table},
};
use crate::protocol::{
    backend::{
        BindComplete, CloseComplete, EmptyQueryResponse, NoData, ParameterDescription,
        ParseComplete, PortalSuspended, TransactionStatus, command_complete, encode,
        ready_for_query,
    },
    error::{Report, sqlstate},
    frame::{Message, tag},
    rows::{Column, Formats, Value, data_row, row_description},
};

/// Prepared statements per client.
const STATEMENTS: usize = 100;
/// Portals per client; each may hold a row for every session.
const PORTALS: usize = 10;
/// Statements per query, whose responses are built together.
const AT_ONCE: usize = 16;

/// Whether the connection continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The client has sent Terminate.
    End,
    Continue,
}

/// The protocol state of one client.
pub(super) struct Dialogue<R> {
    /// Reads the rows of a table.
    rows: R,
    statements: HashMap<String, Option<Statement>>,
    portals: HashMap<String, Portal>,
    transaction: TransactionStatus,
    /// After an error, messages up to the next Sync are skipped.
    skipping: bool,
}

struct Portal {
    statement: Option<Statement>,
    formats: Formats,
    /// The rows left to send, after the first Execute.
    left: Option<std::vec::IntoIter<Vec<Value>>>,
}

impl<R: Fn(&Table) -> Rows> Dialogue<R> {
    pub(super) fn new(rows: R) -> Self {
        Self {
            rows,
            statements: HashMap::new(),
            portals: HashMap::new(),
            transaction: TransactionStatus::Idle,
            skipping: false,
        }
    }

    /// Appends the responses to one message.
    pub(super) fn handle(&mut self, message: &Message, out: &mut BytesMut) -> Next {
        match message.tag {
            tag::TERMINATE => return Next::End,
            tag::SYNC => {
                self.skipping = false;
                if self.transaction == TransactionStatus::Idle {
                    self.portals.clear();
                }
                ready_for_query(out, self.transaction);
            }
            _ if self.skipping => {}
            tag::QUERY => {
                if let Err(report) = self.simple(message.body(), out) {
                    self.fail(&report, out);
                }
                self.portals.remove("");
                ready_for_query(out, self.transaction);
            }
            _ => {
                if let Err(report) = self.extended(message, out) {
                    self.fail(&report, out);
                    self.skipping = true;
                }
            }
        }
        Next::Continue
    }

    fn fail(&mut self, report: &Report, out: &mut BytesMut) {
        out.extend_from_slice(&report.encode_error());
        if self.transaction == TransactionStatus::Transaction {
            self.transaction = TransactionStatus::Error;
        }
    }

    fn simple(&mut self, mut body: &[u8], out: &mut BytesMut) -> Result<(), Report> {
        let query = string(&mut body)?;
        let parts = statement::split(query);
        if parts.is_empty() {
            encode(&EmptyQueryResponse::new(), out);
        }
        if parts.len() > AT_ONCE {
            return Err(Report::new(
                sqlstate::PROGRAM_LIMIT,
                format!("the console of lakebase-proxy takes {AT_ONCE} statements at a time"),
            ));
        }
        for part in parts {
            let Some(statement) = statement::parse(part)? else {
                continue;
            };
            if let Statement::Show(table) = statement {
                self.check_transaction(statement)?;
                let formats = Formats::default();
                row_description(out, table.columns, &formats);
                for row in (self.rows)(table) {
                    data_row(out, &row, &formats);
                }
            }
            let complete = self.complete(statement)?;
            command_complete(out, complete);
        }
        Ok(())
    }

    fn extended(&mut self, message: &Message, out: &mut BytesMut) -> Result<(), Report> {
        let mut body = message.body();
        match message.tag {
            b'P' => {
                let name = string(&mut body)?.to_owned();
                let query = string(&mut body)?;
                let parts = statement::split(query);
                let statement = match parts[..] {
                    [] => None,
                    [part] => statement::parse(part)?,
                    _ => {
                        return Err(Report::new(
                            sqlstate::SYNTAX_ERROR,
                            "cannot insert multiple commands into a prepared statement",
                        ));
                    }
                };
                keep(&mut self.statements, STATEMENTS, name, statement)?;
                encode(&ParseComplete::new(), out);
            }
            b'B' => {
                let (portal, bound) = self.bind(&mut body)?;
                keep(&mut self.portals, PORTALS, portal, bound)?;
                encode(&BindComplete::new(), out);
            }
            b'D' => self.describe(&mut body, out)?,
            tag::EXECUTE => {
                let name = string(&mut body)?;
                let most = usize::try_from(body.try_get_i32().unwrap_or_default()).unwrap_or(0);
                self.execute(name, most, out)?;
            }
            b'C' => {
                let kind = body.try_get_u8().unwrap_or_default();
                let name = string(&mut body)?;
                if kind == b'P' {
                    self.portals.remove(name);
                } else {
                    self.statements.remove(name);
                }
                encode(&CloseComplete::new(), out);
            }
            // Flush: responses are sent at once anyway. Postgres skips leftovers of a COPY and unexpected passwords too.
            b'H' | b'd' | tag::COPY_DONE | tag::COPY_FAIL | tag::PASSWORD => {}
            tag::FUNCTION_CALL => {
                return Err(Report::new(
                    sqlstate::FEATURE_NOT_SUPPORTED,
                    "the console of lakebase-proxy has no functions",
                ));
            }
            other => {
                return Err(Report::new(
                    sqlstate::PROTOCOL_VIOLATION,
                    format!("unknown message type {other:#04x}"),
                ));
            }
        }
        Ok(())
    }

    fn bind(&self, body: &mut &[u8]) -> Result<(String, Portal), Report> {
        let portal = string(body)?.to_owned();
        let name = string(body)?;
        let statement = *self
            .statements
            .get(name)
            .ok_or_else(|| no_statement(name))?;
        for _ in 0..short(body)? {
            short(body)?;
        }
        if short(body)? != 0 {
            return Err(Report::new(
                sqlstate::PROTOCOL_VIOLATION,
                "bind message supplies parameters, but no statement of the console has any",
            ));
        }
        let formats = (0..short(body)?)
            .map(|_| short(body).map(u16::cast_signed))
            .collect::<Result<Vec<_>, _>>()?;
        let formats = Formats::new(&formats, columns(statement).len()).ok_or_else(|| {
            Report::new(
                sqlstate::PROTOCOL_VIOLATION,
                "bind message requests result formats that the columns do not have",
            )
        })?;
        let bound = Portal {
            statement,
            formats,
            left: None,
        };
        Ok((portal, bound))
    }

    fn describe(&self, body: &mut &[u8], out: &mut BytesMut) -> Result<(), Report> {
        let kind = body.try_get_u8().unwrap_or_default();
        let name = string(body)?;
        let (statement, formats) = if kind == b'P' {
            let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
            (portal.statement, portal.formats.clone())
        } else {
            let statement = self.statements.get(name);
            let statement = *statement.ok_or_else(|| no_statement(name))?;
            // No parameters.
            encode(&ParameterDescription::new(Vec::new()), out);
            (statement, Formats::default())
        };
        match columns(statement) {
            [] => encode(&NoData::new(), out),
            columns => row_description(out, columns, &formats),
        }
        Ok(())
    }

    fn execute(&mut self, name: &str, most: usize, out: &mut BytesMut) -> Result<(), Report> {
        let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
        let Some(statement) = portal.statement else {
            encode(&EmptyQueryResponse::new(), out);
            return Ok(());
        };
        if let Statement::Show(table) = statement {
            self.check_transaction(statement)?;
            let rows = || (self.rows)(table).into_iter();
            if let Some(portal) = self.portals.get_mut(name) {
                let left = portal.left.get_or_insert_with(rows);
                let most = if most == 0 { usize::MAX } else { most };
                for row in left.by_ref().take(most) {
                    data_row(out, &row, &portal.formats);
                }
                if !left.as_slice().is_empty() {
                    encode(&PortalSuspended::new(), out);
                    return Ok(());
                }
            }
        }
        let complete = self.complete(statement)?;
        command_complete(out, complete);
        Ok(())
    }

    fn check_transaction(&self, statement: Statement) -> Result<(), Report> {
        let ends = matches!(statement, Statement::Commit | Statement::Rollback);
        if self.transaction == TransactionStatus::Error && !ends {
            return Err(Report::new(
                sqlstate::FAILED_TRANSACTION,
                "current transaction is aborted, commands ignored until end of transaction block",
            ));
        }
        Ok(())
    }

    /// Completes a statement: its command tag, and its effect on the transaction.
    fn complete(&mut self, statement: Statement) -> Result<&'static str, Report> {
        self.check_transaction(statement)?;
        Ok(match statement {
            Statement::Show(_) => "SHOW",
            Statement::Accepted(tag) => tag,
            Statement::Begin => {
                self.transaction = TransactionStatus::Transaction;
                "BEGIN"
            }
            Statement::Commit if self.transaction != TransactionStatus::Error => {
                self.transaction = TransactionStatus::Idle;
                "COMMIT"
            }
            Statement::Commit | Statement::Rollback => {
                self.transaction = TransactionStatus::Idle;
                "ROLLBACK"
            }
        })
    }
}

fn columns(statement: Option<Statement>) -> &'static [Column] {
    match statement {
        Some(Statement::Show(table)) => table.columns,
        _ => &[],
    }
}

fn keep<V>(
    kept: &mut HashMap<String, V>,
    most: usize,
    name: String,
    value: V,
) -> Result<(), Report> {
    if kept.len() >= most && !kept.contains_key(&name) {
        return Err(Report::new(
            sqlstate::PROGRAM_LIMIT,
            format!("the console of lakebase-proxy keeps {most} prepared statements or portals of a client"),
        )
        .with_hint("Close those that are not used."));
    }
    kept.insert(name, value);
    Ok(())
}

fn string<'a>(body: &mut &'a [u8]) -> Result<&'a str, Report> {
    let end = body.iter().position(|byte| *byte == 0);
    let (text, rest) = end
        .and_then(|end| body.split_at_checked(end))
        .ok_or_else(malformed)?;
    *body = rest.get(1..).unwrap_or_default();
    str::from_utf8(text).map_err(|_| {
        Report::new(
            sqlstate::INVALID_ENCODING,
            "invalid byte sequence for encoding \"UTF8\"",
        )
    })
}

fn short(body: &mut &[u8]) -> Result<u16, Report> {
    body.try_get_u16().map_err(|_| malformed())
}

fn malformed() -> Report {
    Report::new(sqlstate::PROTOCOL_VIOLATION, "invalid message format")
}

fn no_statement(name: &str) -> Report {
    Report::new(
        sqlstate::UNDEFINED_STATEMENT,
        format!("prepared statement \"{name}\" does not exist"),
    )
}

fn no_portal(name: &str) -> Report {
    Report::new(
        sqlstate::UNDEFINED_CURSOR,
        format!("portal \"{name}\" does not exist"),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{
        error::ErrorFields,
        frame::{frame, take_message},
    };

    type Fixed = fn(&Table) -> Rows;

    fn fixed() -> Dialogue<Fixed> {
        Dialogue::new(|_| (1..=3).map(|n| vec![Value::Number(n)]).collect())
    }

    fn send(
        dialogue: &mut Dialogue<Fixed>,
        messages: &[(u8, &[u8])],
    ) -> (String, Vec<ErrorFields>) {
        let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
        for (tag, body) in messages {
            input.extend_from_slice(&frame(*tag, body));
        }
        while let Some(message) = take_message(&mut input, 100_000).unwrap() {
            assert_eq!(dialogue.handle(&message, &mut out), Next::Continue);
        }
        let (mut tags, mut errors) = (String::new(), Vec::new());
        while let Some(message) = take_message(&mut out, 100_000).unwrap() {
            tags.push(message.tag.into());
            if message.tag == b'E' {
                errors.push(ErrorFields::parse(message.body()));
            }
        }
        (tags, errors)
    }

    const PARSE: (u8, &[u8]) = (b'P', b"s\0SHOW STATS\0\0\0");
    const BIND: (u8, &[u8]) = (b'B', b"\0s\0\0\0\0\0\0\0");
    const SYNC: (u8, &[u8]) = (b'S', b"");

    #[test]
    fn a_simple_query_may_hold_several_statements_and_stops_at_the_first_error() {
        let mut dialogue = fixed();
        let (tags, _) = send(&mut dialogue, &[(b'Q', b"SHOW STATS; show version;\0")]);
        assert_eq!(tags, "TDDDCTDDDCZ");
        let (tags, errors) = send(&mut dialogue, &[(b'Q', b"SHOW STATS; no; SHOW STATS\0")]);
        assert_eq!(tags, "TDDDCEZ");
        assert_eq!(errors[0].severity, "ERROR");
        assert_eq!(send(&mut dialogue, &[(b'Q', b" ; \0")]).0, "IZ");
    }

    #[test]
    fn statements_of_a_query_and_portals_of_a_client_are_limited() {
        let mut dialogue = fixed();
        let query = |count: usize| format!("{}\0", "SHOW STATS;".repeat(count)).into_bytes();
        let (tags, _) = send(&mut dialogue, &[(b'Q', &query(AT_ONCE))]);
        assert_eq!(tags.matches('C').count(), AT_ONCE);
        let (tags, errors) = send(&mut dialogue, &[(b'Q', &query(AT_ONCE + 1))]);
        assert_eq!((tags.as_str(), errors[0].code.as_str()), ("EZ", "54000"));

        send(&mut dialogue, &[(b'Q', b"BEGIN\0"), PARSE]);
        for portal in 0..=PORTALS {
            let bind = format!("p{portal}\0s\0\0\0\0\0\0\0").into_bytes();
            let (tags, _) = send(&mut dialogue, &[(b'B', &bind), SYNC]);
            assert_eq!(tags, if portal < PORTALS { "2Z" } else { "EZ" });
        }
    }

    #[test]
    fn a_statement_can_be_prepared_described_and_run_in_pieces() {
        let mut dialogue = fixed();
        let (tags, errors) = send(
            &mut dialogue,
            &[
                PARSE,
                (b'D', b"Ss\0"),
                BIND,
                (b'D', b"P\0"),
                (b'E', b"\0\0\0\0\x02"),
                (b'E', b"\0\0\0\0\x02"),
                (b'C', b"P\0"),
                SYNC,
            ],
        );
        assert_eq!(tags, "1tT2TDDsDC3Z", "{errors:?}");
    }

    #[test]
    fn after_an_error_messages_are_skipped_up_to_sync() {
        let mut dialogue = fixed();
        let (tags, errors) = send(
            &mut dialogue,
            &[
                (b'P', b"\0SELECT 1\0\0\0"),
                BIND,
                (b'E', b"\0\0\0\0\0"),
                SYNC,
                PARSE,
                SYNC,
            ],
        );
        assert_eq!(tags, "EZ1Z");
        assert_eq!(errors[0].code, "0A000");
    }

    #[test]
    fn transactions_are_followed_as_drivers_expect() {
        let mut dialogue = fixed();
        let mut status = |query: &[u8]| {
            let mut input = BytesMut::new();
            input.extend_from_slice(&frame(b'Q', query));
            let message = take_message(&mut input, 1000).unwrap().unwrap();
            let mut out = BytesMut::new();
            dialogue.handle(&message, &mut out);
            char::from(*out.last().unwrap())
        };
        assert_eq!(status(b"BEGIN\0"), 'T');
        assert_eq!(status(b"SHOW STATS\0"), 'T');
        assert_eq!(status(b"PAUSE\0"), 'E');
        assert_eq!(status(b"SHOW STATS\0"), 'E');
        assert_eq!(status(b"COMMIT\0"), 'I');
        assert_eq!(status(b"SHOW STATS\0"), 'I');
    }

    #[test]
    fn invalid_messages_are_reported() {
        for (message, code) in [
            ((b'B', &b"\0t\0\0\0\0\0\0\0"[..]), "26000"),
            ((b'E', b"p\0\0\0\0\0"), "34000"),
            ((b'D', b"Pp\0"), "34000"),
            ((b'P', b"no end"), "08P01"),
            ((b'B', b"\0s\0\0\0\0\x01\0\0"), "08P01"),
            ((b'B', b"\0s\0\0\0\0\0\0\x01\0\x05"), "08P01"),
            ((b'P', b"\0\xff\0\0\0"), "22021"),
            ((b'P', b"\0SHOW STATS; SHOW STATS\0\0\0"), "42601"),
            ((b'?', b""), "08P01"),
            ((b'F', b""), "0A000"),
        ] {
            let mut dialogue = fixed();
            let (tags, errors) = send(&mut dialogue, &[PARSE, message, SYNC]);
            assert_eq!(tags, "1EZ", "{message:?}");
            assert_eq!(errors[0].code, code, "{message:?}");
        }
    }

    #[test]
    fn prepared_statements_of_a_client_are_limited() {
        let mut dialogue = fixed();
        let mut last = Vec::new();
        for number in 0..=STATEMENTS {
            let body = format!("s{number}\0SHOW STATS\0\0\0");
            last = send(&mut dialogue, &[(b'P', body.as_bytes()), SYNC]).1;
        }
        assert_eq!(last[0].code, "54000");
    }

    proptest! {
        #[test]
        fn arbitrary_messages_cause_no_panic(messages in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20)) {
            let mut dialogue = fixed();
            let mut out = BytesMut::new();
            for (tag, body) in messages {
                let mut input = BytesMut::new();
                input.extend_from_slice(&frame(tag, &body));
                if let Ok(Some(message)) = take_message(&mut input, 10_000) {
                    dialogue.handle(&message, &mut out);
                }
            }
        }
    }
}
