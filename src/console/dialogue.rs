//! The simple and the extended query protocol of the console, without I/O: takes a message, appends the responses.
//!
//! As much of `protocol-flow` as drivers use: prepared statements without parameters, portals, row limits, and the
//! transaction status, which drivers expect to follow their BEGIN and COMMIT.

use std::collections::HashMap;

use bytes::{Buf, BytesMut};

use super::{
    control::Command,
    statement::{self, Statement},
    table::{Rows, Table},
};
use crate::protocol::{
    backend::{
        BindComplete, CloseComplete, EmptyQueryResponse, NoData, ParameterDescription,
        ParseComplete, PortalSuspended, command_complete, encode, ready_for_query,
    },
    error::{Report, sqlstate},
    frame::{Message, tag},
    requests::TransactionStatus,
    rows::{Column, Formats, Value, data_row, row_description},
};

/// Prepared statements per client.
const STATEMENTS: usize = 100;
/// Portals per client; each may hold a row for every session.
const PORTALS: usize = 10;
/// Statements per query, whose responses are built together.
const AT_ONCE: usize = 16;

/// The kind byte of a prepared statement in Describe and Close; any other byte counts as a portal.
const STATEMENT: u8 = b'S';
const PORTAL: u8 = b'P';

/// What statements read and change.
pub(super) trait Backend {
    fn rows(&self, table: &Table) -> Rows;

    /// Not cancel safe.
    fn control(&self, command: &Command) -> impl Future<Output = Result<(), Report>> + Send;
}

/// The protocol state of one client.
pub(super) struct Dialogue<B> {
    backend: B,
    /// Prepared statements and portals, by kind and name.
    prepared: HashMap<(u8, String), Prepared>,
    transaction: TransactionStatus,
    /// After an error, messages up to the next Sync are skipped.
    skipping: bool,
}

/// A prepared statement; or a portal, which has formats of its own and the rows left to send after its first Execute.
#[derive(Clone, Default)]
struct Prepared {
    /// `None` for an empty query.
    statement: Option<Statement>,
    formats: Formats,
    left: Option<std::vec::IntoIter<Vec<Value>>>,
}

impl<B: Backend> Dialogue<B> {
    pub(super) fn new(backend: B) -> Self {
        Self {
            backend,
            prepared: HashMap::new(),
            transaction: TransactionStatus::Idle,
            skipping: false,
        }
    }

    /// Appends the responses to one message. Not cancel safe.
    pub(super) async fn handle(&mut self, message: &Message, out: &mut BytesMut) {
        // Protocol docs, "Extended Query": after an error, everything up to the next Sync is discarded.
        if self.skipping && message.tag != tag::SYNC {
            return;
        }
        let answered = self.answer(message, out).await;
        let ends_request = matches!(message.tag, tag::QUERY | tag::SYNC);
        self.skipping = answered.is_err() && !ends_request;
        if let Err(report) = answered {
            out.extend_from_slice(&report.encode_error());
        }
        if ends_request {
            // A portal lives as long as its transaction.
            if self.transaction == TransactionStatus::Idle {
                self.prepared.retain(|(kind, _), _| *kind == STATEMENT);
            }
            ready_for_query(out, self.transaction);
        }
    }

    async fn answer(&mut self, message: &Message, out: &mut BytesMut) -> Result<(), Report> {
        let mut body = message.body();
        match message.tag {
            tag::QUERY => self.query(string(&mut body)?, out).await?,
            b'P' => {
                let name = string(&mut body)?;
                let statement = match &statement::split(string(&mut body)?)[..] {
                    [] => None,
                    [only] => Some(statement::parse(only)?),
                    // The extended protocol takes one statement; this is the message of Postgres.
                    _ => {
                        return Err(Report::new(
                            sqlstate::SYNTAX_ERROR,
                            "cannot insert multiple commands into a prepared statement",
                        ));
                    }
                };
                let prepared = Prepared {
                    statement,
                    ..Prepared::default()
                };
                self.keep(STATEMENT, name, prepared)?;
                encode(&ParseComplete::new(), out);
            }
            b'B' => {
                let portal = string(&mut body)?;
                let mut bound = self.named(STATEMENT, string(&mut body)?)?.clone();
                bound.formats = formats(&mut body, columns(&bound).len())?;
                self.keep(PORTAL, portal, bound)?;
                encode(&BindComplete::new(), out);
            }
            b'D' => {
                let kind = body.try_get_u8().map_err(|_| malformed())?;
                let described = self.named(kind, string(&mut body)?)?;
                // A statement has two answers to Describe, a portal one (protocol docs, "Extended Query").
                if kind == STATEMENT {
                    encode(&ParameterDescription::new(Vec::new()), out);
                }
                match columns(described) {
                    [] => encode(&NoData::new(), out),
                    columns => row_description(out, columns, &described.formats),
                }
            }
            tag::EXECUTE => {
                let name = string(&mut body)?.to_owned();
                let limit = body.try_get_i32().map_err(|_| malformed())?;
                // As in postgres.c, a negative limit means all rows, like 0.
                self.execute(name, usize::try_from(limit).unwrap_or(0), out)
                    .await?;
            }
            b'C' => {
                let kind = body.try_get_u8().map_err(|_| malformed())?;
                // Protocol docs: closing what does not exist is no error.
                self.prepared.remove(&(kind, string(&mut body)?.to_owned()));
                encode(&CloseComplete::new(), out);
            }
            // Responses need no Flush: they are written as they come. Postgres, too, skips the rest of a COPY and unexpected passwords.
            tag::SYNC | b'H' | b'd' | tag::COPY_DONE | tag::COPY_FAIL | tag::PASSWORD => {}
            tag::FUNCTION_CALL => {
                return Err(Report::new(
                    sqlstate::FEATURE_NOT_SUPPORTED,
                    "the console of lakebase-proxy has no functions",
                ));
            }
            other => return Err(violation(format!("unknown message type {other:#04x}"))),
        }
        Ok(())
    }

    async fn query(&mut self, query: &str, out: &mut BytesMut) -> Result<(), Report> {
        let statements = statement::split(query);
        if statements.is_empty() {
            encode(&EmptyQueryResponse::new(), out);
        }
        // 64 kB of `SHOW CLIENTS;` would make gigabytes of responses.
        if statements.len() > AT_ONCE {
            return Err(Report::new(
                sqlstate::PROGRAM_LIMIT,
                format!("the console of lakebase-proxy takes {AT_ONCE} statements at a time"),
            ));
        }
        for statement in statements {
            let statement = statement::parse(&statement)?;
            if let Statement::Show(table) = statement {
                row_description(out, table.columns, &Formats::default());
                for row in self.backend.rows(table) {
                    data_row(out, &row, &Formats::default());
                }
            }
            self.complete(statement, out).await?;
        }
        Ok(())
    }

    /// Sends at most `limit` rows of a portal; all for 0.
    async fn execute(
        &mut self,
        name: String,
        limit: usize,
        out: &mut BytesMut,
    ) -> Result<(), Report> {
        let statement = self.named(PORTAL, &name)?.statement.clone();
        let portal = self.prepared.entry((PORTAL, name)).or_default();
        if let Some(Statement::Show(table)) = statement {
            let left = portal
                .left
                .get_or_insert_with(|| self.backend.rows(table).into_iter());
            let limit = if limit == 0 { usize::MAX } else { limit };
            for row in left.by_ref().take(limit) {
                data_row(out, &row, &portal.formats);
            }
            if left.len() > 0 {
                encode(&PortalSuspended::new(), out);
                return Ok(());
            }
        }
        match statement {
            Some(statement) => self.complete(statement, out).await,
            None => {
                encode(&EmptyQueryResponse::new(), out);
                Ok(())
            }
        }
    }

    /// Completes a statement. An error fails no transaction: there is nothing to roll back.
    async fn complete(&mut self, statement: Statement, out: &mut BytesMut) -> Result<(), Report> {
        match statement {
            Statement::Show(_) => command_complete(out, "SHOW"),
            Statement::Control(command) => {
                self.backend.control(&command).await?;
                command_complete(out, command.action.as_str());
            }
            Statement::Accepted { tag, transaction } => {
                self.transaction = transaction.unwrap_or(self.transaction);
                command_complete(out, tag);
            }
        }
        Ok(())
    }

    fn named(&self, kind: u8, name: &str) -> Result<&Prepared, Report> {
        self.prepared.get(&(kind, name.to_owned())).ok_or_else(|| {
            if kind == STATEMENT {
                Report::new(
                    sqlstate::UNDEFINED_STATEMENT,
                    format!("prepared statement \"{name}\" does not exist"),
                )
            } else {
                Report::new(
                    sqlstate::UNDEFINED_CURSOR,
                    format!("portal \"{name}\" does not exist"),
                )
            }
        })
    }

    fn keep(&mut self, kind: u8, name: &str, prepared: Prepared) -> Result<(), Report> {
        let key = (kind, name.to_owned());
        let limit = if kind == STATEMENT {
            STATEMENTS
        } else {
            PORTALS
        };
        let kept = self.prepared.keys().filter(|(other, _)| *other == kind);
        if kept.count() >= limit && !self.prepared.contains_key(&key) {
            return Err(Report::new(
                sqlstate::PROGRAM_LIMIT,
                format!("the console of lakebase-proxy keeps {limit} prepared statements or portals of a client"),
            )
            .with_hint("Close those that are not used."));
        }
        self.prepared.insert(key, prepared);
        Ok(())
    }
}

fn columns(prepared: &Prepared) -> &'static [Column] {
    match prepared.statement {
        Some(Statement::Show(table)) => table.columns,
        _ => &[],
    }
}

/// The result formats of a Bind message, behind its parameters.
fn formats(body: &mut &[u8], columns: usize) -> Result<Formats, Report> {
    let codes = |body: &mut &[u8]| {
        let count = body.try_get_u16()?;
        (0..count)
            .map(|_| body.try_get_i16())
            .collect::<Result<Vec<_>, _>>()
    };
    // The formats of the parameters precede their number, even if there are none.
    codes(body).map_err(|_| malformed())?;
    if body.try_get_u16().map_err(|_| malformed())? != 0 {
        return Err(violation(
            "bind message supplies parameters, but no statement of the console has any",
        ));
    }
    let codes = codes(body).map_err(|_| malformed())?;
    Formats::new(&codes, columns).ok_or_else(|| {
        violation("bind message requests result formats that the columns do not have")
    })
}

fn string<'a>(body: &mut &'a [u8]) -> Result<&'a str, Report> {
    let text = std::ffi::CStr::from_bytes_until_nul(body).map_err(|_| malformed())?;
    body.advance(text.count_bytes() + 1);
    text.to_str().map_err(|_| {
        Report::new(
            sqlstate::INVALID_ENCODING,
            "invalid byte sequence for encoding \"UTF8\"",
        )
    })
}

fn malformed() -> Report {
    violation("invalid message format")
}

fn violation(message: impl Into<String>) -> Report {
    Report::new(sqlstate::PROTOCOL_VIOLATION, message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{
        error::ErrorFields,
        frame::{frame, take_message},
    };

    use crate::console::fuzzing::{Fixed, now};

    fn fixed() -> Dialogue<Fixed> {
        Dialogue::new(Fixed)
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
            now(dialogue.handle(&message, &mut out));
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
        let (tags, _) = send(&mut dialogue, &[(b'Q', b"RECONNECT x; SHOW STATS\0")]);
        assert_eq!(tags, "CTDDDCZ");
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
            now(dialogue.handle(&message, &mut out));
            char::from(*out.last().unwrap())
        };
        assert_eq!(status(b"BEGIN\0"), 'T');
        assert_eq!(status(b"SHOW STATS\0"), 'T');
        assert_eq!(status(b"SUSPEND\0"), 'T');
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
                    now(dialogue.handle(&message, &mut out));
                }
            }
        }
    }
}
