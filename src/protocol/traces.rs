//! What a session has done that may be left on its server connection, from the bytes of both directions.
//!
//! Reads SQL texts and command tags where they stand in the stream, which may be cut anywhere, and copies no text.

use enum_map::{Enum, EnumMap};

use super::{
    frame::{Part, Scanner, Seen, split_string, tag, until_zero},
    lexer::{Backslash, Kind, Statement, statements},
    tag::Command,
    words::{
        Search, Verdict, Word, Words, add_words, is_escaped_block, is_of_custom_setting,
        is_of_insert, sets_in_session, verdict,
    },
};
use crate::telemetry::labels::PinReason;

/// Queries that are read for being plain: more than a health check sends, and no cost for a session that sends many.
const PLAIN_QUERIES: u8 = 8;

/// The traces of one session.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    from_client: Scanner,
    from_server: Scanner,
    reading: Reading,
    /// The text began in an earlier piece.
    is_cut: bool,
    /// An extended query lacks its Sync.
    is_open: bool,
    search: Search,
    words: Words,
    tag: Tag,
    found: EnumMap<Trace, bool>,
    plain: u8,
    /// The database that a statement needs for itself.
    database: Option<Box<str>>,
}

/// What has been found in messages besides [`Word`]s.
#[derive(Clone, Copy, Debug, Enum)]
enum Trace {
    /// A function was called by the function-call protocol.
    Called,
    /// DO.
    Done,
    /// LOAD.
    Loaded,
    /// A DO of which the text does not show all that it executes may have been sent.
    MayExecuteInDo,
    /// A message was sent that is an error by itself, although nothing else would have answered it, or one that belongs to
    /// another protocol than the request that it is in.
    Malformed,
    /// A call of `set_config` that is not for the transaction alone may have been sent.
    MaySetConfig,
    /// A DO that changes a setting may have been sent.
    MaySetInDo,
    /// A call of `set_config` may have been sent that is not of a custom setting, and so may decide how texts are read.
    MaySetScope,
    /// The client has sent more than plain statements.
    Used,
}

/// What the next bytes of the client's message are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Reading {
    /// Of no interest.
    #[default]
    Nothing,
    /// Too many.
    Excess,
    /// The name of a statement, in Parse.
    Name,
    /// SQL.
    Text,
}

/// The tag of a CommandComplete, as far as it has arrived.
#[derive(Clone, Copy, Debug, Default)]
struct Tag {
    text: [u8; Command::LONGEST + 1],
    length: usize,
    is_current: bool,
}

impl Traces {
    /// Whether the client has sent more than statements that leave nothing.
    pub(crate) fn is_used(&self) -> bool {
        self.found[Trace::Used]
    }

    /// Whether a reset undoes everything, as far as that can be seen.
    pub(crate) fn is_resettable(&self) -> bool {
        let is_hidden = self.found[Trace::Done] && self.found[Trace::MayExecuteInDo];
        let kept = [
            Word::Dblink,
            Word::Language,
            Word::Opaque,
            Word::ReplicationOrigin,
        ];
        let is_ruined = self.found[Trace::Loaded] || self.found[Trace::Malformed];
        !is_ruined && !is_hidden && !kept.iter().any(|word| self.words[*word])
    }

    /// Whether the client has sent a text that may set, by `set_config`, what decides how the server reads statements.
    pub(crate) fn may_set_scope(&self) -> bool {
        self.found[Trace::MaySetScope]
    }

    /// Whether the client may have temporary objects, which only its own statements mean.
    pub(crate) fn may_have_temporary(&self) -> bool {
        self.words[Word::Temporary]
    }

    /// Whether the client has sent what the server answers by no rule.
    pub(crate) fn is_malformed(&self) -> bool {
        self.found[Trace::Malformed]
    }

    /// Why the connection cannot be another client's without a reset, although client and server are at rest; the first of
    /// several reasons. In doubt there is one: a word may stand in a comment, or be the name of a column.
    pub(crate) fn pin(&self) -> Option<PinReason> {
        self.pin_of(&self.words)
    }

    /// Whether nothing is the reason but what the server shows on request.
    pub(crate) fn is_suspect(&self) -> bool {
        self.pin().is_some() && self.pin_of(&self.unverifiable()).is_none()
    }

    /// The server has shown that the client has nothing of what it shows. It may have that again at any time by the statements
    /// that it has prepared, which mention these words.
    pub(crate) fn verified(&mut self, prepared: &Words) {
        self.words = self.unverifiable();
        for (word, is_mentioned) in prepared {
            self.words[word] |= is_mentioned;
        }
    }

    fn unverifiable(&self) -> Words {
        let mut words = self.words;
        for word in [
            Word::AdvisoryLock,
            Word::Hold,
            Word::Prepare,
            Word::Temporary,
        ] {
            words[word] = false;
        }
        words
    }

    fn pin_of(&self, words: &Words) -> Option<PinReason> {
        // At each rest, and most clients have done nothing of it.
        let alone = [
            Trace::Called,
            Trace::Loaded,
            Trace::Malformed,
            Trace::MaySetConfig,
        ];
        if *words == Words::default() && !alone.iter().any(|it| self.found[*it]) {
            return None;
        }
        let is_hidden = self.found[Trace::Done] && self.found[Trace::MayExecuteInDo];
        let is_set = self.found[Trace::Done] && self.found[Trace::MaySetInDo];
        let unknown = [Word::Dblink, Word::Language, Word::Opaque];
        let is_unknown = self.found[Trace::Called]
            || self.found[Trace::Malformed]
            || unknown.iter().any(|word| words[*word]);
        let reasons = [
            (is_set || words[Word::SetLimit], PinReason::Settings),
            (self.found[Trace::MaySetConfig], PinReason::SetConfig),
            (words[Word::Listen], PinReason::Listen),
            (words[Word::Temporary], PinReason::Temp),
            (words[Word::AdvisoryLock], PinReason::AdvisoryLock),
            (words[Word::Prepare], PinReason::SqlPrepare),
            (words[Word::Hold], PinReason::Cursor),
            (words[Word::NextValue], PinReason::Sequence),
            (words[Word::CurrentValue], PinReason::Sequence),
            (words[Word::Setseed], PinReason::Setseed),
            (self.found[Trace::Loaded], PinReason::Load),
            (words[Word::ReplicationOrigin], PinReason::ReplicationOrigin),
            (is_hidden || is_unknown, PinReason::UnknownState),
        ];
        let mut found = reasons.into_iter().filter(|(is_found, _)| *is_found);
        found.next().map(|(_, reason)| reason)
    }

    /// Reads what the session has been given with its login.
    pub(crate) fn mentions(&mut self, text: &[u8]) {
        add_words(text, &mut self.words);
    }

    /// Reads what the client sends.
    pub(crate) fn client_sends(&mut self, chunk: &[u8]) {
        let mut scanner = std::mem::take(&mut self.from_client);
        scanner.scan_parts(chunk, |part| match part {
            Part::Event(Seen::Message { tag }) => self.client_begins(tag),
            Part::Event(Seen::Status(_)) => {}
            Part::Body(body) => self.client_continues(body),
        });
        self.from_client = scanner;
    }

    /// Reads the start of a message of the client's, for a caller that finds the messages itself.
    pub(crate) fn client_begins(&mut self, tag: u8) {
        let found = &mut self.found;
        // The rest of a text without its zero byte, which the server rejects.
        self.search = Search::new();
        self.is_cut = false;
        self.reading = match tag {
            tag::QUERY => Reading::Text,
            tag::PARSE => Reading::Name,
            tag::FLUSH => Reading::Excess,
            _ => Reading::Nothing,
        };
        // PostgreSQL 18 may end a simple query within an extended one in a state that fits neither.
        let is_simple = matches!(tag, tag::QUERY | tag::FUNCTION_CALL);
        found[Trace::Malformed] |= !is_request(tag) || self.is_open && is_simple;
        self.is_open = is_extended(tag) || self.is_open && tag != tag::SYNC;
        found[Trace::Used] |= !matches!(tag, tag::QUERY | tag::SYNC | tag::TERMINATE);
        found[Trace::Called] |= tag == tag::FUNCTION_CALL;
    }

    /// Reads the next bytes of the message's body.
    pub(crate) fn client_continues(&mut self, mut body: &[u8]) {
        let Self {
            reading,
            is_cut,
            search,
            words,
            found,
            plain,
            database,
            ..
        } = self;
        found[Trace::Malformed] |= *reading == Reading::Excess && !body.is_empty();
        if *reading == Reading::Name {
            let Some((_, rest)) = split_string(body) else {
                return;
            };
            body = rest;
            *reading = Reading::Text;
        }
        if *reading != Reading::Text {
            return;
        }
        let (text, is_ended) = match split_string(body) {
            Some((text, _)) => (text, true),
            None => (body, false),
        };
        // A text in pieces is not kept, and so not read as a whole: it counts as anything.
        let is_whole = is_ended && !*is_cut;
        *is_cut |= !text.is_empty();
        // Once for each text, which may repeat the words without end.
        let (mut has_set_config, mut has_database) = (false, false);
        let (mut has_do, mut has_set, mut has_execute) = (false, false, false);
        search.search(text, |word, behind| {
            words[word] = true;
            let rest = text.get(behind..).unwrap_or_default();
            match word {
                Word::SetConfig => {
                    has_set_config = true;
                    found[Trace::MaySetScope] |= !is_of_custom_setting(rest);
                }
                Word::Database => has_database = true,
                // The DO of an upsert would make each SET of its client one of the next block.
                Word::Do if is_of_insert(rest) => {}
                Word::Do => {
                    has_do = true;
                    has_execute |= is_escaped_block(rest);
                }
                Word::Set => has_set = true,
                Word::Execute | Word::Load => has_execute = true,
                _ => {}
            }
        });
        if has_database && is_whole {
            *database = statements(text, Backslash::Plain)
                .find_map(|it| needed_database(&it))
                .map(String::into_boxed_str);
        }
        found[Trace::MaySetScope] |= has_set_config && !is_whole;
        found[Trace::MaySetConfig] |= has_set_config && (!is_whole || configures_session(text));
        if is_ended {
            *reading = Reading::Nothing;
            if let Some(word) = search.end() {
                words[word] = true;
                has_do |= word == Word::Do;
                has_set |= word == Word::Set;
                has_execute |= matches!(word, Word::Execute | Word::Load);
            }
        }
        found[Trace::MayExecuteInDo] |= has_execute && (has_do || !is_whole);
        found[Trace::MaySetInDo] |= has_set && (!is_whole || has_do && sets_in_session(text));
        if !found[Trace::Used] {
            *plain += u8::from(is_ended);
            found[Trace::Used] = !is_whole && !text.is_empty()
                || *plain > PLAIN_QUERIES
                || !statements(text, Backslash::Plain).all(|it| is_plain(&it));
        }
    }

    /// The database that a statement since the last call drops, changes or copies.
    pub(crate) fn take_database(&mut self) -> Option<Box<str>> {
        self.database.take()
    }

    /// Takes the rest of the body for that of a message which the server is not sent.
    pub(crate) fn client_is_refused(&mut self) {
        self.reading = Reading::Nothing;
    }

    /// Records a command that the server has completed, for a caller that reads the server's messages itself.
    pub(crate) fn completed(&mut self, command: Command) {
        self.found[Trace::Loaded] |= command == Command::Load;
        self.found[Trace::Done] |= command == Command::Do;
    }

    /// Reads what the server sends.
    pub(crate) fn server_sends(&mut self, chunk: &[u8]) {
        let Self {
            from_server,
            tag,
            found,
            ..
        } = self;
        from_server.scan_parts(chunk, |part| match part {
            Part::Event(Seen::Message { tag: message }) => {
                tag.is_current = message == tag::COMMAND_COMPLETE;
                tag.length = 0;
            }
            Part::Event(Seen::Status(_)) => {}
            Part::Body(body) => {
                if tag.is_current
                    && let Some(command) = tag.add(body)
                {
                    found[Trace::Loaded] |= command == Command::Load;
                    found[Trace::Done] |= command == Command::Do;
                }
            }
        });
    }
}

impl Tag {
    /// Takes another piece, and returns the command at the zero byte that ends the tag.
    fn add(&mut self, piece: &[u8]) -> Option<Command> {
        let text = until_zero(piece);
        for &byte in text {
            // Longer ones are of no interest, and stay longer than those that are.
            if let Some(place) = self.text.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        let is_ended = text.len() < piece.len();
        is_ended.then(|| {
            self.is_current = false;
            Command::of(self.text.get(..self.length).unwrap_or_default())
        })
    }
}

/// Whether a client may send messages of this type once it is logged in.
pub(crate) fn is_request(tag: u8) -> bool {
    let is_copy = matches!(tag, tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL);
    let is_other = matches!(
        tag,
        tag::QUERY | tag::FUNCTION_CALL | tag::SYNC | tag::FLUSH | tag::TERMINATE
    );
    is_extended(tag) || is_copy || is_other
}

/// Whether a message is of the extended query protocol, and a Sync must follow.
pub(crate) fn is_extended(tag: u8) -> bool {
    matches!(
        tag,
        tag::PARSE | tag::BIND | tag::DESCRIBE | tag::EXECUTE | tag::CLOSE
    )
}

/// The database that must have no connections, or gets other settings for new ones, by a statement.
fn needed_database(statement: &Statement<'_>) -> Option<String> {
    let mut tokens = statement.tokens();
    let first = tokens.next()?;
    tokens.next().filter(|it| it.is_word("database"))?;
    let name = if first.is_word("create") {
        // CREATE DATABASE name [WITH] TEMPLATE [=] name
        tokens.find(|it| it.is_word("template"))?;
        tokens.find(|it| it.kind != Kind::Symbol(b'='))
    } else if first.is_word("drop") || first.is_word("alter") {
        tokens.find(|it| !it.is_word("if") && !it.is_word("exists"))
    } else {
        None
    };
    name?.identifier()
}

/// Whether a text calls `set_config` for the session.
fn configures_session(text: &[u8]) -> bool {
    verdict(text, Backslash::Plain) == Verdict::Pin(PinReason::SetConfig)
}

/// Whether a statement calls no function of a user, so that its text shows all that it does, and leaves nothing outside of
/// its transaction: `SELECT 1` of a health check, and the limits of transactions.
fn is_plain(statement: &Statement<'_>) -> bool {
    let mut tokens = statement.tokens();
    let Some(first) = tokens.next() else {
        return true;
    };
    let is_first = |words: &[&str]| words.iter().any(|word| first.is_word(word));
    if is_first(&["begin", "start", "commit", "end", "rollback", "abort"]) {
        // Not COMMIT PREPARED, whose name is a string.
        return tokens.all(|it| matches!(it.kind, Kind::Word | Kind::Symbol(b',')));
    }
    if is_first(&["show"]) {
        return tokens.all(|it| matches!(it.kind, Kind::Word | Kind::Symbol(b'.')));
    }
    // Constants, with names at most: any other word may be a function, a view or a type of a user.
    let mut is_name = false;
    is_first(&["select"])
        && tokens.all(|it| {
            let was_name = std::mem::replace(&mut is_name, it.is_word("as"));
            match it.kind {
                Kind::Number | Kind::Symbol(b',') => true,
                Kind::Word => was_name || is_name,
                // With a backslash, the server may see its end elsewhere.
                Kind::String => it.text.starts_with(b"'") && !it.text.contains(&b'\\'),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::frame;

    fn query(sql: &str) -> Vec<u8> {
        frame(b'Q', format!("{sql}\0").as_bytes())
    }

    fn after(from_client: &[u8], from_server: &[u8]) -> Traces {
        let mut traces = Traces::default();
        traces.client_sends(from_client);
        traces.server_sends(from_server);
        traces
    }

    #[test]
    fn statements_without_a_function_leave_nothing() {
        for sql in [
            "",
            "SELECT 1",
            "select 1 as one, 'a''b', 2; ;",
            "begin; commit",
            "BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY",
            "rollback to a",
            "show app.user",
        ] {
            assert!(!after(&query(sql), b"").is_used(), "{sql}");
        }
        for sql in [
            "select f()",
            "select * from view",
            "select 1 one",
            "select domain '1'",
            "select 1 + 1",
            "select E'a'",
            "select 'a\\', '; listen x; --'",
            "select $$a$$",
            "begin; set work_mem = '1MB'",
            "commit prepared 'x'",
            "listen x",
            "values (1)",
        ] {
            assert!(after(&query(sql), b"").is_used(), "{sql}");
        }
        // The unnamed statement stays.
        let parse = [frame(b'P', b"\0select 1\0\0\0"), frame(b'S', b"")].concat();
        assert!(after(&parse, b"").is_used());
        assert!(!after(&[frame(b'S', b""), frame(b'X', b"")].concat(), b"").is_used());
    }

    #[test]
    fn a_database_that_a_statement_needs_for_itself_is_named() {
        for (sql, database) in [
            ("drop database a", Some("a")),
            (
                "DROP DATABASE IF EXISTS Test_A WITH (FORCE)",
                Some("test_a"),
            ),
            ("/* x */ drop database \"Test \"\"A\"", Some("Test \"A")),
            ("select 1; alter database a rename to b", Some("a")),
            ("create database b with template = a", Some("a")),
            ("create database b owner c template a", Some("a")),
            ("create database b", None),
            ("select database from drop_database", None),
            ("comment on database a is 'drop database a'", None),
            ("drop database", None),
            ("drop database u&\"a\"", None),
        ] {
            for message in [query(sql), frame(b'P', format!("\0{sql}\0\0\0").as_bytes())] {
                let mut traces = after(&message, b"");
                assert_eq!(traces.take_database().as_deref(), database, "{sql}");
                assert_eq!(traces.take_database(), None, "{sql}");
            }
        }
    }

    #[test]
    fn a_simple_query_within_an_extended_one_is_not_understood() {
        let parse = frame(b'P', b"\0select 1\0\0\0");
        let sync = frame(b'S', b"");
        let within = [&parse[..], &query("select 2"), &sync].concat();
        assert!(after(&within, b"").is_malformed());
        assert!(!after(&within, b"").is_resettable());
        let behind = [&parse[..], &sync, &query("select 2")].concat();
        assert!(!after(&behind, b"").is_malformed());
    }

    #[test]
    fn settings_are_found_wherever_the_stream_is_cut() {
        let done = frame(b'C', b"DO\0");
        for (sql, answer, reason) in [
            (
                "do 'begin set a.b = 1; end'",
                &done,
                Some(PinReason::Settings),
            ),
            ("set a.b = 1", &frame(b'C', b"SET\0"), None),
            (
                "select set_config('a.b', '', false)",
                &Vec::new(),
                Some(PinReason::SetConfig),
            ),
            ("select 'a' as reset_", &done, None),
        ] {
            let text = query(sql);
            for cut in 0..=text.len() {
                let mut traces = Traces::default();
                let (first, rest) = text.split_at(cut);
                traces.client_sends(first);
                traces.client_sends(rest);
                traces.server_sends(answer);
                assert_eq!(traces.pin(), reason, "{sql}, cut at {cut}");
            }
        }
    }

    /// The text of a DO may have come long before, as that of a prepared statement.
    #[test]
    fn what_a_block_executes_is_looked_for_in_the_text_of_a_block_only() {
        let (pin, done) = (Traces::pin, frame(b'C', b"DO\0"));
        let parse = |sql: &str| {
            let parse = frame(b'P', format!("\0{sql}\0\0\0").as_bytes());
            [parse, frame(b'S', b"")].concat()
        };
        let harmless = "do $$ begin perform 1; end $$";
        for (sql, reason) in [
            ("set a.b = 1", None),
            ("execute p; load 'x'", None),
            (
                "insert into t values (1) on conflict (a) do update set a = 2",
                None,
            ),
            (
                "insert into t values (1) on conflict do nothing; set a.b = 1",
                None,
            ),
            ("do $$ begin update t set a = 2; end $$", None),
            ("do $$ begin set local a.b = 1; end $$", None),
            ("do $$ begin set a.b = 1; end $$", Some(PinReason::Settings)),
            (
                "do $$ begin set local.b = 1; end $$",
                Some(PinReason::Settings),
            ),
            (
                "insert into t values (1) on conflict do nothing; do 'begin set a.b = 1; end'",
                Some(PinReason::Settings),
            ),
            (
                "do $$ begin execute 'x'; end $$",
                Some(PinReason::UnknownState),
            ),
            ("do 'begin load ''x''; end'", Some(PinReason::UnknownState)),
            (
                "do E'begin\\nset a.b = 1; end'",
                Some(PinReason::UnknownState),
            ),
            ("do $$ begin perform E'\\n'; end $$", None),
        ] {
            for message in [query(sql), parse(sql)] {
                let mut traces = after(&message, b"");
                traces.client_sends(&query(harmless));
                assert_eq!(pin(&traces), None, "{sql}");
                traces.server_sends(&done);
                assert_eq!(pin(&traces), reason, "{sql}");
                let is_resettable = reason != Some(PinReason::UnknownState);
                assert_eq!(traces.is_resettable(), is_resettable, "{sql}");
            }
        }
        // A text in pieces counts as anything.
        let text = query("set a.b = 1");
        let (first, rest) = text.split_at(7);
        let mut traces = after(first, b"");
        traces.client_sends(rest);
        traces.server_sends(&done);
        assert_eq!(traces.pin(), Some(PinReason::Settings));
    }

    #[test]
    fn what_no_reset_undoes_is_found_wherever_the_stream_is_cut() {
        let load = frame(b'C', b"LOAD\0");
        let done = frame(b'C', b"DO\0");
        for (from_client, from_server, is_resettable) in [
            (query("select 1"), frame(b'C', b"SELECT 1\0"), true),
            (query("load 'x'"), frame(b'E', b""), true),
            (
                query("select load from x"),
                frame(b'C', b"SELECT 5\0"),
                true,
            ),
            (query("load 'x'"), load, false),
            (query("do 'begin execute ''x''; end'"), done.clone(), false),
            (query("do 'begin null; end'"), done, true),
            (query("select dblink_connect('x')"), Vec::new(), false),
            (frame(b'P', b"plperl\0select 1\0\0\0"), Vec::new(), true),
            (
                frame(b'P', b"a\0select f('plperl')\0\0\0"),
                Vec::new(),
                false,
            ),
        ] {
            for cut in 0..=from_client.len().max(from_server.len()) {
                let mut traces = Traces::default();
                let (first, rest) = from_client.split_at(cut.min(from_client.len()));
                traces.client_sends(first);
                traces.client_sends(rest);
                let (first, rest) = from_server.split_at(cut.min(from_server.len()));
                traces.server_sends(first);
                traces.server_sends(rest);
                assert_eq!(traces.is_resettable(), is_resettable, "{from_client:?}");
            }
        }
    }
}
