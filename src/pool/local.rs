//! Resets that drivers send whenever an application returns a connection to its own pool, answered without a server.
//!
//! Sent to the server they would cost a round trip, and `DISCARD ALL` would take the prepared statements of other clients away.
//! Only where they would do nothing but what is known here, for a client at rest.

use bytes::BytesMut;
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};

use crate::protocol::{
    backend::{command_complete, encode, ready_for_query},
    frame::{tag, whole_messages},
    lexer::{Backslash, Statement, Tokens, statements, tokens},
    requests::TransactionStatus,
};

/// Longer queries are the server's.
const LONGEST: usize = 256;

/// What a statement that is answered resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    Cursors,
    Statements,
    Everything,
    Settings,
    Channels,
    Locks,
}

impl Reset {
    const ALL: [(Self, &'static [&'static str]); 6] = [
        (Self::Cursors, &["close", "all"]),
        (Self::Statements, &["deallocate", "all"]),
        (Self::Everything, &["discard", "all"]),
        (Self::Settings, &["reset", "all"]),
        (Self::Channels, &["unlisten", "*"]),
        (Self::Locks, &["select", "pg_advisory_unlock_all", "(", ")"]),
    ];

    /// The one that these begin with, and what follows it.
    fn begins(mut tokens: Tokens<'_>) -> Option<(Self, Tokens<'_>)> {
        let first = tokens.next()?;
        Self::ALL.iter().find_map(|(reset, words)| {
            let (head, others) = words.split_first()?;
            let mut rest = tokens.clone();
            let mut follows = |word: &&str| {
                let token = rest.next();
                token.is_some_and(|it| it.is_word(word) || it.text == word.as_bytes())
            };
            let begins = first.is_word(head) && others.iter().all(&mut follows);
            begins.then_some((*reset, rest))
        })
    }

    fn of(statement: &Statement<'_>) -> Option<Self> {
        let (reset, mut others) = Self::begins(statement.tokens())?;
        others.next().is_none().then_some(reset)
    }

    /// Whether prepared statements end by it.
    pub(super) fn ends_statements(self) -> bool {
        matches!(self, Self::Statements | Self::Everything)
    }

    /// Whether settings get the values of a new session.
    pub(super) fn resets_settings(self) -> bool {
        matches!(self, Self::Settings | Self::Everything)
    }

    fn answer(self, out: &mut BytesMut) {
        let tag = match self {
            Self::Cursors => "CLOSE CURSOR ALL",
            Self::Statements => "DEALLOCATE ALL",
            Self::Everything => "DISCARD ALL",
            Self::Settings => "RESET",
            Self::Channels => "UNLISTEN",
            Self::Locks => {
                // `void`, which is shown as an empty text.
                let column = FieldDescription::new(
                    "pg_advisory_unlock_all".to_owned(),
                    0,
                    0,
                    2278,
                    4,
                    -1,
                    0,
                );
                encode(&RowDescription::new(vec![column]), out);
                encode(&DataRow::new(BytesMut::from(&[0; 4][..]), 1), out);
                "SELECT 1"
            }
        };
        command_complete(out, tag);
    }
}

/// The answer to a query of these.
pub(super) fn answer(resets: &[Reset]) -> BytesMut {
    let mut answer = BytesMut::new();
    for reset in resets {
        reset.answer(&mut answer);
    }
    ready_for_query(&mut answer, TransactionStatus::Idle);
    answer
}

/// The statements of the query at the front, if it is whole and consists of nothing else.
pub(super) fn resets(received: &[u8]) -> Option<Vec<Reset>> {
    let (tag, body) = whole_messages(received).next()?;
    if tag != tag::QUERY || body.len() > LONGEST {
        return None;
    }
    let text = body.strip_suffix(b"\0")?;
    // Most queries begin with another word, and need not be read to their end.
    Reset::begins(tokens(text, Backslash::Plain))?;
    let resets = statements(text, Backslash::Plain).map(|it| Reset::of(&it));
    let resets: Vec<Reset> = resets.collect::<Option<_>>()?;
    // Only alone: the server refuses it within a transaction block, which several statements are.
    let is_refused = resets.len() > 1 && resets.contains(&Reset::Everything);
    (!resets.is_empty() && !text.contains(&0) && !is_refused).then_some(resets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::frame;

    #[test]
    fn only_whole_queries_of_resets_are_answered() {
        let query = |sql: &str| frame(b'Q', format!("{sql}\0").as_bytes());
        for (sql, expected) in [
            ("DISCARD ALL", &[Reset::Everything][..]),
            ("reset all;", &[Reset::Settings]),
            ("  deallocate ALL ; ", &[Reset::Statements]),
            (
                "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;",
                &[
                    Reset::Locks,
                    Reset::Cursors,
                    Reset::Channels,
                    Reset::Settings,
                ],
            ),
        ] {
            let bytes = query(sql);
            assert_eq!(resets(&bytes).as_deref(), Some(expected), "{sql}");
            assert_eq!(
                resets(&[&bytes[..], b"Q\0\0"].concat()).as_deref(),
                Some(expected)
            );
            for cut in 0..bytes.len() {
                assert_eq!(resets(&bytes[..cut]), None, "{sql}, cut at {cut}");
            }
        }
        for sql in [
            "",
            ";",
            "reset all; discard all",
            "discard all; discard all",
            "discard temp",
            "discard",
            "reset all x",
            "reset \"all\"",
            "unlisten a",
            "select 1; reset all",
            "select pg_advisory_unlock_all(1)",
            "select s.pg_advisory_unlock_all()",
            "begin; reset all",
        ] {
            assert_eq!(resets(&query(sql)), None, "{sql}");
        }
        assert_eq!(resets(&frame(b'P', b"\0reset all\0\0\0")), None);
        assert_eq!(resets(&frame(b'Q', b"reset all\0; select 1\0")), None);
    }
}
