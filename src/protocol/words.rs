//! Words of an SQL text that may leave something in the session, found without an SQL parser.
//!
//! The search is over the whole text, string literals included, because dynamic SQL hides in them. Two kinds of state are
//! no concern: what ends with its transaction (exported snapshots, descriptors of large objects, `pg_advisory_xact_lock`),
//! and what a command tag reports.

use std::sync::LazyLock;

use aho_corasick::{
    Anchored,
    automaton::{Automaton, StateID},
    dfa::{Builder, DFA},
};
use enum_map::{Enum, EnumMap};

use super::lexer::{Backslash, Kind, Token, is_identifier, statements, tokens};
use crate::telemetry::labels::PinReason;

/// A watched word.
#[derive(Clone, Copy, Debug, Enum, PartialEq, Eq)]
pub enum Word {
    /// An advisory lock that outlives its transaction.
    AdvisoryLock,
    /// The value of a sequence that the session remembers is read.
    CurrentValue,
    /// DATABASE.
    Database,
    /// The extension `dblink`, which keeps connections for the session.
    Dblink,
    /// DISCARD.
    Discard,
    /// DO.
    Do,
    /// EXECUTE: within DO, of dynamic SQL.
    Execute,
    /// WITH HOLD of a cursor.
    Hold,
    /// A procedural language that keeps state for the session.
    Language,
    /// LISTEN.
    Listen,
    /// LOAD.
    Load,
    /// The session remembers the value of a sequence.
    NextValue,
    /// SQL that a search cannot read: an identifier with escapes, or a function that executes its argument; also a replication
    /// slot, which may be temporary.
    Opaque,
    /// PREPARE.
    Prepare,
    /// The replication origin of the session.
    ReplicationOrigin,
    /// SET or RESET.
    Set,
    /// `set_config`.
    SetConfig,
    /// `set_limit` of the extension `pg_trgm`, which changes a setting.
    SetLimit,
    /// `setseed`.
    Setseed,
    /// The temporary schema.
    Temporary,
}

/// Where a pattern counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Also within a longer identifier.
    Anywhere,
    /// As an identifier of its own.
    Alone,
}
use Place::{Alone, Anywhere};

const PATTERNS: &[(&str, Place, Word)] = &[
    ("create_logical_replication_slot", Anywhere, Word::Opaque),
    ("create_physical_replication_slot", Anywhere, Word::Opaque),
    ("crosstab", Anywhere, Word::Opaque),
    ("currval", Anywhere, Word::CurrentValue),
    ("database", Alone, Word::Database),
    ("dblink", Anywhere, Word::Dblink),
    ("discard", Alone, Word::Discard),
    ("do", Alone, Word::Do),
    ("execute", Alone, Word::Execute),
    ("hold", Alone, Word::Hold),
    ("lastval", Anywhere, Word::CurrentValue),
    ("listen", Alone, Word::Listen),
    ("load", Alone, Word::Load),
    ("nextval", Anywhere, Word::NextValue),
    ("pg_advisory_lock", Anywhere, Word::AdvisoryLock),
    ("pg_temp", Anywhere, Word::Temporary),
    ("pg_try_advisory_lock", Anywhere, Word::AdvisoryLock),
    ("pljs", Anywhere, Word::Language),
    ("pllua", Anywhere, Word::Language),
    ("plperl", Anywhere, Word::Language),
    ("plpython", Anywhere, Word::Language),
    ("plr", Alone, Word::Language),
    ("pltcl", Anywhere, Word::Language),
    ("plv8", Anywhere, Word::Language),
    ("prepare", Alone, Word::Prepare),
    ("query_to_xml", Anywhere, Word::Opaque),
    (
        "replication_origin_session",
        Anywhere,
        Word::ReplicationOrigin,
    ),
    ("reset", Alone, Word::Set),
    ("set", Alone, Word::Set),
    ("set_config", Anywhere, Word::SetConfig),
    ("set_limit", Alone, Word::SetLimit),
    ("setseed", Anywhere, Word::Setseed),
    ("setval", Anywhere, Word::NextValue),
    ("temp", Alone, Word::Temporary),
    ("temporary", Alone, Word::Temporary),
    ("ts_rewrite", Alone, Word::Opaque),
    ("ts_stat", Alone, Word::Opaque),
    ("u&\"", Anywhere, Word::Opaque),
];

/// The automaton with its start.
static AUTOMATON: LazyLock<(DFA, StateID)> = LazyLock::new(|| {
    // Built by the first text, in a fraction of a millisecond, so that a proxy without a pool has none.
    let mut builder = Builder::new();
    // Stepped by hand, which a prefilter knows nothing of.
    builder.ascii_case_insensitive(true).prefilter(false);
    #[expect(clippy::expect_used, reason = "only too many patterns fail")]
    let automaton = builder
        .build(PATTERNS.iter().map(|(text, ..)| text))
        .expect("few patterns");
    // Without anchored searches there is one start for all, which cannot fail.
    let start = automaton.start_state(Anchored::No).unwrap_or_default();
    (automaton, start)
});

/// The words that a text mentions.
pub type Words = EnumMap<Word, bool>;

/// A search through one text that comes in pieces. It keeps none of it.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    state: StateID,
    /// Bytes of the identifier that the text ends in so far.
    identifier: usize,
    /// That identifier, if it is a word and does not go on.
    pending: Option<Word>,
}

impl Search {
    /// At the start of a text.
    pub fn new() -> Self {
        Self {
            state: AUTOMATON.1,
            identifier: 0,
            pending: None,
        }
    }

    /// Searches another piece, and passes each word to `found` with the position behind it.
    pub fn search(&mut self, piece: &[u8], mut found: impl FnMut(Word, usize)) {
        let Some(first) = piece.first() else { return };
        if let Some(word) = self.pending.take()
            && !is_identifier(*first)
        {
            found(word, 0);
        }
        let (automaton, _) = &*AUTOMATON;
        let mut state = self.state;
        for (at, &byte) in piece.iter().enumerate() {
            state = automaton.next_state(Anchored::No, state, byte);
            if !automaton.is_match(state) {
                continue;
            }
            let end = at + 1;
            for index in 0..automaton.match_len(state) {
                let pattern = automaton.match_pattern(state, index);
                let Some((text, place, word)) = PATTERNS.get(pattern.as_usize()) else {
                    continue;
                };
                if *place == Alone {
                    if !self.begins_identifier(piece, end, text.len()) {
                        continue;
                    }
                    match piece.get(end) {
                        Some(&next) if is_identifier(next) => continue,
                        Some(_) => {}
                        None => {
                            self.pending = Some(*word);
                            continue;
                        }
                    }
                }
                found(*word, end);
            }
        }
        self.state = state;
        let (before, last) = split_identifier(piece);
        let begun = if before.is_empty() {
            self.identifier
        } else {
            0
        };
        self.identifier = begun + last.len();
    }

    /// Whether an identifier begins where a pattern of this length does, which has its `end` in the piece.
    fn begins_identifier(&self, piece: &[u8], end: usize, length: usize) -> bool {
        match end.checked_sub(length + 1) {
            Some(before) => piece.get(before).is_some_and(|it| !is_identifier(*it)),
            None => self.identifier + end == length,
        }
    }

    /// Ends the text, and returns the word that it ends in.
    pub fn end(&mut self) -> Option<Word> {
        let last = self.pending;
        *self = Self::new();
        last
    }
}

impl Default for Search {
    fn default() -> Self {
        Self::new()
    }
}

/// Adds the words that a whole text mentions.
pub fn add_words(text: &[u8], words: &mut Words) {
    let mut search = Search::new();
    search.search(text, |word, _| words[word] = true);
    if let Some(last) = search.end() {
        words[last] = true;
    }
}

/// What a text may leave in the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Clean,
    /// Something that the server shows on request.
    Suspect(EnumMap<PinReason, bool>),
    /// Something that it does not show.
    Pin(PinReason),
}

/// What `text` may leave in the session.
pub fn verdict(text: &[u8], backslash: Backslash) -> Verdict {
    let mut words = Words::default();
    let mut is_local = true;
    let mut search = Search::new();
    search.search(text, |word, end| {
        words[word] = true;
        // After the first that is not, no other can change the verdict.
        if word == Word::SetConfig && is_local {
            is_local = is_local_set_config(text.get(end..).unwrap_or_default(), backslash);
        }
    });
    if let Some(last) = search.end() {
        words[last] = true;
        is_local &= last != Word::SetConfig;
    }
    let in_do = if words[Word::Do] {
        pin_of_do(text, backslash, &words)
    } else {
        None
    };
    let pins = [
        (words[Word::Opaque], PinReason::UnknownState),
        (words[Word::Dblink], PinReason::UnknownState),
        (words[Word::Language], PinReason::UnknownState),
        (words[Word::ReplicationOrigin], PinReason::ReplicationOrigin),
        (words[Word::Setseed], PinReason::Setseed),
        (words[Word::SetConfig] && !is_local, PinReason::SetConfig),
        (words[Word::SetLimit], PinReason::Settings),
        (words[Word::CurrentValue], PinReason::Sequence),
    ];
    let pins = pins.iter().filter(|(is_found, _)| *is_found);
    if let Some(reason) = pins.map(|(_, reason)| *reason).chain(in_do).next() {
        return Verdict::Pin(reason);
    }
    let mut suspicions = EnumMap::default();
    for (word, reason) in [
        (Word::AdvisoryLock, PinReason::AdvisoryLock),
        (Word::Hold, PinReason::Cursor),
        (Word::Listen, PinReason::Listen),
        (Word::NextValue, PinReason::Sequence),
        (Word::Prepare, PinReason::SqlPrepare),
        (Word::Temporary, PinReason::Temp),
    ] {
        suspicions[reason] = words[word];
    }
    if suspicions.values().any(|it| *it) {
        Verdict::Suspect(suspicions)
    } else {
        Verdict::Clean
    }
}

/// Whether the call of `set_config` whose arguments begin `rest` is literally for the transaction only.
fn is_local_set_config(rest: &[u8], backslash: Backslash) -> bool {
    // A bound, as every call in the text is looked at.
    const LONGEST: usize = 4096;
    let rest = rest.get(..LONGEST).unwrap_or(rest);
    let rest = rest.strip_prefix(b"\"").unwrap_or(rest);
    let mut tokens = tokens(rest, backslash);
    if tokens.next().map(|it| it.kind) != Some(Kind::Symbol(b'(')) {
        return false;
    }
    let (mut depth, mut commas) = (1_usize, 0);
    let mut argument: [Option<Token<'_>>; 2] = [None; 2];
    for token in tokens {
        match token.kind {
            Kind::Symbol(b')') if depth == 1 => {
                return commas == 2
                    && matches!(argument, [Some(word), None] if word.is_word("true"));
            }
            // At least 1, as it is more than 1 here.
            Kind::Symbol(b')') => depth -= 1,
            Kind::Symbol(b'(') => depth += 1,
            Kind::Symbol(b',') if depth == 1 => {
                commas += 1;
                argument = [None; 2];
                continue;
            }
            _ => {}
        }
        match &mut argument {
            [first @ None, _] => *first = Some(token),
            [_, second] => *second = Some(token),
        }
    }
    false
}

/// Whether the call of `set_config` whose arguments begin `rest` is literally of a custom setting, such as `app.user`.
pub(super) fn is_of_custom_setting(rest: &[u8]) -> bool {
    // A bound, as every call in the text is looked at.
    let rest = rest.get(..256).unwrap_or(rest);
    let rest = rest.strip_prefix(b"\"").unwrap_or(rest);
    let mut tokens = tokens(rest, Backslash::Plain);
    let begins = tokens.next().map(|it| it.kind) == Some(Kind::Symbol(b'('));
    let name = tokens.next();
    let is_custom = name.is_some_and(|it| {
        it.text.starts_with(b"'") && it.text.contains(&b'.') && !it.text.contains(&b'\\')
    });
    begins && is_custom && tokens.next().map(|it| it.kind) == Some(Kind::Symbol(b','))
}

/// The pin of the statements in `text` that are DO: nothing but the text shows what they execute.
fn pin_of_do(text: &[u8], backslash: Backslash, words: &Words) -> Option<PinReason> {
    let blocks = statements(text, backslash).filter(|it| it.begins_with("do"));
    let mut are_escaped = blocks.map(|it| has_escapes(it.tokens().skip(1))).peekable();
    are_escaped.peek()?;
    if words[Word::Load] {
        Some(PinReason::Load)
    } else if words[Word::Execute] || words[Word::Discard] || are_escaped.any(|it| it) {
        Some(PinReason::UnknownState)
    } else {
        (words[Word::Set] && sets_in_session(text)).then_some(PinReason::Settings)
    }
}

/// Whether the DO in front of `rest` is that of an INSERT.
pub(super) fn is_of_insert(rest: &[u8]) -> bool {
    // A bound, as every DO in the text is looked at.
    let rest = rest.get(..64).unwrap_or(rest);
    let next = tokens(rest, Backslash::Plain).next();
    next.is_some_and(|it| it.is_word("update") || it.is_word("nothing"))
}

/// Whether the DO in front of `rest` has a block that is a string with escapes, in which words cannot be found.
pub(super) fn is_escaped_block(rest: &[u8]) -> bool {
    // A bound, as every DO in the text is looked at.
    let rest = rest.get(..256).unwrap_or(rest);
    has_escapes(tokens(rest, Backslash::Plain))
}

/// Whether there are escapes in what follows a DO: `[LANGUAGE name] 'block'`.
fn has_escapes<'a>(arguments: impl Iterator<Item = Token<'a>>) -> bool {
    let mut strings = arguments.take(3).filter(|it| it.kind == Kind::String);
    strings.any(|it| matches!(it.text.first(), Some(b'e' | b'E' | b'u' | b'U')))
}

/// Whether a SET or RESET in `text`, a block of statements, may be more than the SET of an UPDATE or a SET LOCAL.
pub(super) fn sets_in_session(text: &[u8]) -> bool {
    // A comment may hide what stands before the word, and so may an escape.
    let has_comment = text.windows(2).any(|pair| pair == b"--" || pair == b"*/");
    let is_hidden = has_comment || text.contains(&b'\\');
    let mut may_set = false;
    let mut search = Search::new();
    search.search(text, |word, end| {
        if word == Word::Set && !may_set {
            let (before, behind) = text.split_at(end);
            may_set = !is_local(behind) && (is_hidden || !is_of_update(before));
        }
    });
    may_set || search.end() == Some(Word::Set)
}

fn is_local(behind: &[u8]) -> bool {
    // A bound, as every SET in the text is looked at.
    let behind = behind.get(..64).unwrap_or(behind);
    let mut tokens = tokens(behind, Backslash::Plain);
    let is_local = tokens.next().is_some_and(|it| it.is_word("local"));
    // Not the name of a custom setting, `local.a`.
    is_local && tokens.next().map(|it| it.kind) != Some(Kind::Symbol(b'.'))
}

/// Whether the SET that ends `text` follows a table or its alias, and not the end of a statement or the start of a block.
fn is_of_update(text: &[u8]) -> bool {
    let (text, _set) = split_identifier(text);
    let text = text.trim_ascii_end();
    let (_, word) = split_identifier(text);
    let starts = ["begin", "then", "else", "loop"];
    text.ends_with(b"\"")
        || !word.is_empty()
            && !starts
                .iter()
                .any(|it| word.eq_ignore_ascii_case(it.as_bytes()))
}

/// Splits the identifier off that `text` ends in.
fn split_identifier(text: &[u8]) -> (&[u8], &[u8]) {
    let before = text.iter().rposition(|&byte| !is_identifier(byte));
    text.split_at(before.map_or(0, |at| at + 1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str) -> Verdict {
        verdict(text.as_bytes(), Backslash::Plain)
    }

    fn suspect(reasons: &[PinReason]) -> Verdict {
        let mut suspicions = EnumMap::default();
        for reason in reasons {
            suspicions[*reason] = true;
        }
        Verdict::Suspect(suspicions)
    }

    #[test]
    fn statements_that_leave_nothing_are_clean() {
        for text in [
            "",
            "select 1",
            "update jobs set state = $1 where id = $2",
            "insert into payload (download, temperature, household) values (1, 2, 3) on conflict do nothing",
            "insert into t values (1) on conflict (a) do update set load = excluded.load",
            "select pg_advisory_xact_lock(1), pg_try_advisory_xact_lock(2), pg_advisory_unlock(3)",
            "select set_config('app.user', $1, true)",
            "SELECT SET_CONFIG('a', format('%s, %s', x, (y)), TRUE) from z",
            "select pg_catalog.\"set_config\"('a', 'b', true)",
            "create trigger t after insert on x execute function f()",
            "grant execute on function f() to x",
            "do $$ begin update t set a = 1; set local work_mem = '1MB'; end $$",
            "do $$ begin perform 1; end $$",
            "select lo_open(1, 2), pg_export_snapshot()",
            "select ts_statistics, rewrite_ts_stat from ts_stats",
            "set work_mem = '1MB'",
        ] {
            assert_eq!(of(text), Verdict::Clean, "{text}");
        }
    }

    #[test]
    fn a_custom_setting_is_known_by_its_literal_name() {
        for (arguments, is_custom) in [
            ("('app.user', $1, true)", true),
            ("\" ( 'app.user' , 'x', false)", true),
            ("('search_path', 'app.x', true)", false),
            ("($1, 'app.x', true)", false),
            ("('search' || '_path.', 'x', true)", false),
            ("(E'app\\.user', 'x', true)", false),
            ("('app.user'", false),
            ("", false),
        ] {
            assert_eq!(
                is_of_custom_setting(arguments.as_bytes()),
                is_custom,
                "{arguments}"
            );
        }
    }

    #[test]
    fn what_the_server_shows_makes_a_session_suspect() {
        for (text, reasons) in [
            ("select pg_advisory_lock(1)", &[PinReason::AdvisoryLock][..]),
            (
                "select PG_TRY_ADVISORY_LOCK_shared(1)",
                &[PinReason::AdvisoryLock],
            ),
            ("create temp table x (a int)", &[PinReason::Temp]),
            ("select * into TEMPORARY x from y", &[PinReason::Temp]),
            ("select 1 from pg_temp.x", &[PinReason::Temp]),
            ("create table pg_temp_3.x ()", &[PinReason::Temp]),
            (
                "declare c cursor with hold for select 1",
                &[PinReason::Cursor],
            ),
            ("do $$ begin listen x; end $$", &[PinReason::Listen]),
            (
                "prepare p as select nextval('s')",
                &[PinReason::SqlPrepare, PinReason::Sequence],
            ),
            ("/*a*/listen", &[PinReason::Listen]),
            ("select 'temp'", &[PinReason::Temp]),
        ] {
            assert_eq!(of(text), suspect(reasons), "{text}");
        }
    }

    #[test]
    fn what_it_does_not_show_is_a_pin() {
        for (text, reason) in [
            ("select set_config('a', 'b', false)", PinReason::SetConfig),
            ("select set_config('a', 'b', $1)", PinReason::SetConfig),
            ("select * from ts_stat('select 1')", PinReason::UnknownState),
            ("select crosstab3($1)", PinReason::UnknownState),
            (
                "select set_config('a', 'b', true and false)",
                PinReason::SetConfig,
            ),
            (
                "select set_config('a', 'b', true), set_config('a', 'b', false)",
                PinReason::SetConfig,
            ),
            (
                "select set_config('a', set_config('a', 'b', false), true)",
                PinReason::SetConfig,
            ),
            ("select 'set_config'", PinReason::SetConfig),
            ("select set_config('a', 'b', ]])", PinReason::SetConfig),
            ("select setseed(0.5)", PinReason::Setseed),
            ("select dblink_connect('a', 'b')", PinReason::UnknownState),
            (
                "select u&\"pg\\005fadvisory_lock\"(1)",
                PinReason::UnknownState,
            ),
            ("select currval('s')", PinReason::Sequence),
            ("select lastval()", PinReason::Sequence),
            ("select set_limit(0.5)", PinReason::Settings),
            (
                "select pg_replication_origin_session_setup('a')",
                PinReason::ReplicationOrigin,
            ),
            (
                "do $$ begin execute 'select' || ' 1'; end $$",
                PinReason::UnknownState,
            ),
            ("select 1; DO 'begin load ''x''; end'", PinReason::Load),
            (
                "do language plperl $$ $_SHARED{a} = 1 $$",
                PinReason::UnknownState,
            ),
            (
                "do $$ begin set work_mem = '1MB'; end $$",
                PinReason::Settings,
            ),
            (
                "do $$ begin if true then reset all; end if; end $$",
                PinReason::Settings,
            ),
            ("do $$ begin set local.a = 'b'; end $$", PinReason::Settings),
            (
                "do e'begin\\nset work_mem = ''1MB''; end'",
                PinReason::UnknownState,
            ),
            (
                "do language plpgsql U&'begin\\0020set work_mem = ''1MB''; end'",
                PinReason::UnknownState,
            ),
            (
                "do $$ begin -- note\n set work_mem = '1MB'; end $$",
                PinReason::Settings,
            ),
            (
                "do $$ begin /* note */set work_mem = '1MB'; end $$",
                PinReason::Settings,
            ),
            ("do $$ begin discard temp; end $$", PinReason::UnknownState),
        ] {
            assert_eq!(of(text), Verdict::Pin(reason), "{text}");
        }
    }

    proptest! {
        #[test]
        fn pieces_of_a_text_have_the_words_of_the_whole(
            parts in prop::collection::vec(prop::sample::select(
                &["temp", "orary", "set", "_config", " ", "u&\"", "pg_advisory_lock", "x", "lo", "ad", "$", "'"][..]
            ), 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        ) {
            let text = parts.concat();
            let words = |pieces: &[&[u8]]| {
                let mut words = Words::default();
                let mut search = Search::new();
                for piece in pieces {
                    search.search(piece, |word, _| words[word] = true);
                }
                if let Some(word) = search.end() {
                    words[word] = true;
                }
                words
            };
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            at.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for to in at.into_iter().chain([text.len()]) {
                pieces.push(&text.as_bytes()[from..to]);
                from = to;
            }
            let whole = words(&[text.as_bytes()]);
            prop_assert_eq!(words(&pieces), whole);
            // The rule for a word that must stand alone.
            let is_identifier = |it: char| it.is_ascii_alphanumeric() || it == '_' || it == '$';
            let is_alone = |word: &str| text.split(|it| !is_identifier(it)).any(|it| it == word);
            prop_assert_eq!(whole[Word::Load], is_alone("load"));
            prop_assert_eq!(whole[Word::Set], is_alone("set"));
            prop_assert_eq!(whole[Word::AdvisoryLock], text.contains("pg_advisory_lock"));
        }

        #[test]
        fn no_text_makes_it_panic(text in prop::collection::vec(prop::sample::select(
            &["do ", "set", "set_config", "(", ")", "]", ",", "true", "'", "\"", "$$", "begin", " ", "--", "\n", "local"][..]
        ), 0..30)) {
            of(&text.concat());
            verdict(text.concat().as_bytes(), Backslash::Escape);
        }
    }
}
