//! SQL text as tokens and statements, as the server's own lexer splits it.
//!
//! Follows src/backend/parser/scan.l of PostgreSQL for tokens, and the grammar for the semicolons that end no statement:
//! those in parentheses (the actions of CREATE RULE) and in BEGIN ATOMIC ... END (the body of a routine in SQL). Knows no
//! more of the grammar: a text that the server rejects is split somehow. Allocates nothing and takes linear time.
//!
//! The text must be in an encoding in which the bytes of ASCII stand for nothing else: see [`is_ascii_safe`].

/// What a backslash in a plain string literal (`'...'`) is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backslash {
    /// A character as any other: `standard_conforming_strings` is on.
    #[default]
    Plain,
    /// The start of an escape.
    Escape,
}

/// The kind of a [`Token`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A keyword or an unquoted identifier.
    Word,
    /// An identifier in double quotes, with or without Unicode escapes.
    QuotedIdentifier,
    /// A string literal of any kind, dollar quotes included.
    String,
    /// A number.
    Number,
    /// `$1`.
    Parameter,
    /// One byte of an operator or of punctuation.
    Symbol(u8),
}

/// A part of a text that is neither whitespace nor comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind,
    /// As it stands in the text, quotes included.
    pub text: &'a [u8],
}

impl Token<'_> {
    /// Whether it is this keyword, or an unquoted identifier of this name.
    pub fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word.as_bytes())
    }

    /// A name as the server compares it; `None` if that is not known.
    pub fn identifier(&self) -> Option<String> {
        // NAMEDATALEN - 1: longer ones are cut.
        let text = str::from_utf8(self.text).ok().filter(|it| it.len() < 64)?;
        match self.kind {
            Kind::Word if text.is_ascii() => Some(text.to_ascii_lowercase()),
            Kind::QuotedIdentifier => {
                let name = text.strip_prefix('"')?.strip_suffix('"')?;
                Some(name.replace("\"\"", "\""))
            }
            _ => None,
        }
    }
}

/// The tokens of a text.
#[derive(Clone, Debug)]
pub struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
    backslash: Backslash,
}

/// The tokens of `text`.
pub fn tokens(text: &[u8], backslash: Backslash) -> Tokens<'_> {
    Tokens {
        text,
        at: 0,
        backslash,
    }
}

impl Tokens<'_> {
    fn byte(&self, ahead: usize) -> Option<u8> {
        self.text.get(self.at + ahead).copied()
    }

    fn skip_while(&mut self, is_part: impl Fn(u8) -> bool) {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|&byte| !is_part(byte));
        self.at += length.unwrap_or(rest.len());
    }

    /// Skips a number, and the letters and digits that follow it.
    fn number(&mut self, start: usize) {
        let is_part = |byte| byte != b'$' && is_identifier(byte) || byte == b'.';
        self.skip_while(is_part);
        let text = self.text.get(start..self.at).unwrap_or_default();
        let is_signed = matches!(self.byte(0), Some(b'+' | b'-'))
            && self.byte(1).is_some_and(|it| it.is_ascii_digit());
        // Not of `0xe+1`, which is a sum.
        let is_decimal = |it: &u8| it.is_ascii_digit() || matches!(it, b'.' | b'_');
        if is_signed
            && let [digits @ .., b'e' | b'E'] = text
            && digits.iter().all(is_decimal)
        {
            self.at += 1;
            self.skip_while(is_part);
        }
    }

    fn skip_space(&mut self) {
        loop {
            match (self.byte(0), self.byte(1)) {
                (Some(byte), _) if is_space(byte) => self.at += 1,
                (Some(b'-'), Some(b'-')) => self.skip_while(|byte| !is_newline(byte)),
                (Some(b'/'), Some(b'*')) => self.skip_comment(),
                _ => return,
            }
        }
    }

    /// Skips a comment in `/* */`; these nest.
    fn skip_comment(&mut self) {
        let mut depth = 0_usize;
        loop {
            match (self.byte(0), self.byte(1)) {
                (Some(b'/'), Some(b'*')) => {
                    depth += 1;
                    self.at += 2;
                }
                (Some(b'*'), Some(b'/')) => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return;
                    }
                }
                (Some(_), _) => self.at += 1,
                (None, _) => return,
            }
        }
    }

    fn word(&mut self) -> Kind {
        let start = self.at;
        self.skip_while(is_identifier);
        let word = self.text.get(start..self.at).unwrap_or_default();
        match (word, self.byte(0), self.byte(1)) {
            (b"e" | b"E", Some(b'\''), _) => self.string(Backslash::Escape),
            (b"b" | b"B" | b"x" | b"X", Some(b'\''), _) => {
                // Two quotes in a row are no escape here: the second one begins another literal.
                self.at += 1;
                self.skip_while(|byte| byte != b'\'');
                self.at = (self.at + 1).min(self.text.len());
                Kind::String
            }
            (b"u" | b"U", Some(b'&'), Some(b'\'')) => {
                self.at += 1;
                self.string(Backslash::Plain)
            }
            (b"u" | b"U", Some(b'&'), Some(b'"')) => {
                self.at += 1;
                self.quoted_identifier()
            }
            _ => Kind::Word,
        }
    }

    /// At a single quote.
    fn string(&mut self, backslash: Backslash) -> Kind {
        loop {
            self.at += 1;
            match self.byte(0) {
                None => return Kind::String,
                // The escaped character may be the last one of an unfinished text.
                Some(b'\\') if backslash == Backslash::Escape => {
                    if self.byte(1).is_some() {
                        self.at += 1;
                    }
                }
                Some(b'\'') if self.byte(1) == Some(b'\'') => self.at += 1,
                Some(b'\'') => {
                    self.at += 1;
                    if !self.continues() {
                        return Kind::String;
                    }
                }
                Some(_) => {}
            }
        }
    }

    /// Whether another part of the same literal follows, behind a line end; then that is at its quote.
    fn continues(&mut self) -> bool {
        let end = self.at;
        let mut has_newline = false;
        loop {
            match (self.byte(0), self.byte(1)) {
                (Some(byte), _) if is_space(byte) => {
                    has_newline |= is_newline(byte);
                    self.at += 1;
                }
                // Comments of the other kind do not belong to this rule.
                (Some(b'-'), Some(b'-')) => self.skip_while(|byte| !is_newline(byte)),
                (Some(b'\''), _) if has_newline => return true,
                _ => {
                    self.at = end;
                    return false;
                }
            }
        }
    }

    /// At a double quote.
    fn quoted_identifier(&mut self) -> Kind {
        loop {
            self.at += 1;
            match (self.byte(0), self.byte(1)) {
                (None, _) => break,
                (Some(b'"'), Some(b'"')) => self.at += 1,
                (Some(b'"'), _) => {
                    self.at += 1;
                    break;
                }
                _ => {}
            }
        }
        Kind::QuotedIdentifier
    }

    /// At a dollar.
    fn dollar(&mut self) -> Kind {
        let start = self.at;
        self.at += 1;
        if self.byte(0).is_some_and(|byte| byte.is_ascii_digit()) {
            self.skip_while(|byte| byte.is_ascii_digit());
            return Kind::Parameter;
        }
        if self.byte(0).is_some_and(is_identifier_start) {
            self.skip_while(|byte| byte != b'$' && is_identifier(byte));
        }
        if self.byte(0) != Some(b'$') {
            self.at = start + 1;
            return Kind::Symbol(b'$');
        }
        self.at += 1;
        let delimiter = self.text.get(start..self.at).unwrap_or_default();
        loop {
            self.skip_while(|byte| byte != b'$');
            let rest = self.text.get(self.at..).unwrap_or_default();
            if rest.is_empty() {
                return Kind::String;
            }
            if rest.starts_with(delimiter) {
                self.at += delimiter.len();
                return Kind::String;
            }
            self.at += 1;
        }
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        self.skip_space();
        let start = self.at;
        let first = self.byte(0)?;
        let kind = match first {
            b'\'' => self.string(self.backslash),
            b'"' => self.quoted_identifier(),
            b'$' => self.dollar(),
            _ if is_identifier_start(first) => self.word(),
            // A letter behind a digit begins no literal: `1e'\''` is an error (since PostgreSQL 15).
            _ if first.is_ascii_digit()
                || first == b'.' && self.byte(1).is_some_and(|it| it.is_ascii_digit()) =>
            {
                self.number(start);
                Kind::Number
            }
            symbol => {
                self.at += 1;
                Kind::Symbol(symbol)
            }
        };
        let text = self.text.get(start..self.at).unwrap_or_default();
        Some(Token { kind, text })
    }
}

/// One statement of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement<'a> {
    /// From its first token to its last, without the semicolon.
    pub text: &'a [u8],
    /// How its strings are read.
    pub backslash: Backslash,
}

impl<'a> Statement<'a> {
    /// Its tokens.
    pub fn tokens(&self) -> Tokens<'a> {
        tokens(self.text, self.backslash)
    }

    /// Whether its first word is this keyword.
    pub fn begins_with(&self, keyword: &str) -> bool {
        self.tokens().next().is_some_and(|it| it.is_word(keyword))
    }
}

/// The statements of a text; empty ones are none, as in the server's answer.
#[derive(Clone, Debug)]
pub struct Statements<'a>(Tokens<'a>);

/// The statements of `text`.
pub fn statements(text: &[u8], backslash: Backslash) -> Statements<'_> {
    Statements(tokens(text, backslash))
}

impl<'a> Iterator for Statements<'a> {
    type Item = Statement<'a>;

    fn next(&mut self) -> Option<Statement<'a>> {
        let tokens = &mut self.0;
        let mut start = None;
        let mut end = 0;
        let mut nesting = Nesting::default();
        while let Some(token) = tokens.next() {
            if token.kind == Kind::Symbol(b';') && nesting.is_outermost() {
                if start.is_some() {
                    break;
                }
                continue;
            }
            end = tokens.at;
            start.get_or_insert(end - token.text.len());
            nesting.enter(&token);
        }
        let text = tokens.text.get(start?..end)?;
        let backslash = tokens.backslash;
        Some(Statement { text, backslash })
    }
}

/// What the tokens of a statement so far have opened.
#[derive(Clone, Copy, Debug, Default)]
struct Nesting {
    parentheses: usize,
    /// BEGIN ATOMIC and the CASEs within.
    bodies: usize,
    head: Head,
    /// The last token was BEGIN.
    is_begin: bool,
    /// The last token makes a label or the name of a column of what follows.
    is_label: bool,
}

/// How a statement begins, as far as that leads to a routine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Head {
    #[default]
    Start,
    Create,
    CreateOr,
    CreateOrReplace,
    Routine,
    Other,
}

impl Nesting {
    fn is_outermost(self) -> bool {
        self.parentheses == 0 && self.bodies == 0
    }

    fn enter(&mut self, token: &Token<'_>) {
        self.head = match self.head {
            Head::Start if token.is_word("create") => Head::Create,
            Head::Create if token.is_word("or") => Head::CreateOr,
            Head::CreateOr if token.is_word("replace") => Head::CreateOrReplace,
            Head::Create | Head::CreateOrReplace
                if token.is_word("function") || token.is_word("procedure") =>
            {
                Head::Routine
            }
            Head::Routine => Head::Routine,
            _ => Head::Other,
        };
        match token.kind {
            Kind::Symbol(b'(') => self.parentheses += 1,
            Kind::Symbol(b')') => self.parentheses = self.parentheses.saturating_sub(1),
            Kind::Word if self.head == Head::Routine && self.parentheses == 0 && !self.is_label => {
                if self.is_begin && token.is_word("atomic")
                    || self.bodies > 0 && token.is_word("case")
                {
                    self.bodies += 1;
                } else if token.is_word("end") {
                    self.bodies = self.bodies.saturating_sub(1);
                }
            }
            _ => {}
        }
        self.is_begin = token.is_word("begin");
        self.is_label = token.is_word("as") || token.kind == Kind::Symbol(b'.');
    }
}

/// Whether a text in this client encoding can be split: in some, the second byte of a character may be a quote or a
/// backslash (`PG_ENCODING_IS_CLIENT_ONLY` in src/include/mb/pg_wchar.h).
pub fn is_ascii_safe(encoding: &str) -> bool {
    // As `clean_encoding_name` in src/common/encnames.c.
    let name: String = encoding
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .map(|it| it.to_ascii_lowercase())
        .collect();
    let unsafe_names = [
        "sjis",
        "shiftjis",
        "mskanji",
        "win932",
        "windows932",
        "shiftjis2004",
        "big5",
        "win950",
        "windows950",
        "gbk",
        "win936",
        "windows936",
        "uhc",
        "win949",
        "windows949",
        "gb18030",
        "johab",
    ];
    !unsafe_names.contains(&name.as_str())
}

/// Since PostgreSQL 16 with the vertical tab, which is an error outside of literals before.
pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

fn is_newline(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

fn is_identifier_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

/// By a table, as it is called for every byte of every text.
#[inline]
pub(super) fn is_identifier(byte: u8) -> bool {
    const IDENTIFIER: [bool; 256] = {
        let mut table = [false; 256];
        let mut byte = 0_u8;
        loop {
            let is_start = byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80;
            table[byte as usize] = is_start || byte.is_ascii_digit() || byte == b'$';
            if byte == u8::MAX {
                break table;
            }
            byte += 1;
        }
    };
    IDENTIFIER[usize::from(byte)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(text: &str) -> Vec<&str> {
        split_with(text, Backslash::Plain)
    }

    fn split_with(text: &str, backslash: Backslash) -> Vec<&str> {
        statements(text.as_bytes(), backslash)
            .map(|it| str::from_utf8(it.text).unwrap())
            .collect()
    }

    #[test]
    fn a_semicolon_ends_a_statement_and_empty_ones_are_none() {
        assert_eq!(split("select 1; select 2"), ["select 1", "select 2"]);
        assert_eq!(split(" ;;\n select 1 ; ; -- rest\n"), ["select 1"]);
        for empty in [
            "",
            ";",
            " \t\n\r\u{b}\u{c};",
            "-- only",
            "/* only",
            "/**/;;",
        ] {
            assert_eq!(split(empty), [""; 0], "{empty:?}");
        }
    }

    #[test]
    fn nothing_within_comments_and_quotes_ends_a_statement() {
        for one in [
            "/* a; /* b; */ c; */ select 1",
            "select 1 -- a; b\n + 1",
            "select 1 -- a; b\r + 1",
            "select 1 /* '; */",
            "select ';', 'a'';', ';\\'",
            "select e'\\';', E'\\\\', e'a'';'",
            "select 'a'\n';'",
            "select e'a' -- note\n '\\';'",
            "select b'0;', X';', n';', u&';', U&'\\0041'';'",
            "select \";\", \"a\"\";\", u&\"d\\0061t;\"",
            "select $$;$$, $a$;$b$;$$;$a$, $ä1$;$ä1$",
            "select $a$ $$;$a$",
            "select a$b$c, $1, 'x' as \"$\"",
            "select 1 +/* ; */ 2 *-- ;\n 3",
            "select U&'a' uescape '!'",
        ] {
            let alone = split(one);
            assert_eq!(alone.len(), 1, "{one}");
            let followed = format!("{one}; select 'next'");
            assert_eq!(split(&followed), [alone[0], "select 'next'"], "{one}");
        }
    }

    #[test]
    fn what_looks_like_a_quote_but_is_none_hides_no_semicolon() {
        for (text, count) in [
            // An identifier may contain dollars, and end in the letter of a prefix.
            ("select a$$; select b$$", 2),
            ("select typee'\\'; select 2", 2),
            // No tag begins with a digit.
            ("select $1$; select $1$", 2),
            ("select $a b$; select $a b$", 2),
            // `*/` without a comment, and an operator that begins like one.
            ("select 1 */ 2; select 3", 2),
            ("select e'a' ';' ; select 2", 2),
            ("select ''; select ''", 2),
            ("select b''';' ; select 2", 2),
        ] {
            assert_eq!(split(text).len(), count, "{text}");
        }
    }

    #[test]
    fn a_backslash_escapes_a_quote_as_the_session_has_it() {
        let text = "select 'a\\'; select 'b'";
        assert_eq!(split(text).len(), 2);
        assert_eq!(split_with(text, Backslash::Escape).len(), 1);
        // Not in these, whatever the setting.
        for text in ["select u&'\\'; select 2", "select b'\\'; select 2"] {
            assert_eq!(split_with(text, Backslash::Escape).len(), 2, "{text}");
        }
        assert_eq!(split_with("select '\\", Backslash::Escape).len(), 1);
    }

    #[test]
    fn statements_within_a_rule_or_a_routine_are_part_of_it() {
        for one in [
            "create rule r as on insert to t do also (insert into a values (1); delete from b)",
            "create function f() returns int begin atomic select 1; select 2; end",
            "CREATE OR REPLACE PROCEDURE p() LANGUAGE sql BEGIN ATOMIC\n insert into t select case when true then case 1 when 1 then 2 end end; END",
            "create function f() returns int begin atomic select 1 as end; select x.end from x; end",
            "create function f() returns int language sql as $$ select 1; $$",
        ] {
            let followed = format!("{one}; select 2;");
            assert_eq!(split(&followed), [one, "select 2"]);
        }
        // Only there.
        assert_eq!(split("begin; select 1; end; select 2").len(), 4);
        assert_eq!(
            split("create function \"begin\"() returns int as 'x'; select 1").len(),
            2
        );
        assert_eq!(
            split("create function begin() returns int as 'x'; select 1").len(),
            2
        );
        assert_eq!(split("create table function (a int); begin; end").len(), 3);
        assert_eq!(split("select 1); select 2").len(), 2);
    }

    #[test]
    fn the_sign_of_an_exponent_is_part_of_its_number() {
        for (text, expected) in [
            ("1.5e+1", &["1.5e+1"][..]),
            ("1e-1,", &["1e-1", ","]),
            ("1_0E+10x", &["1_0E+10x"]),
            ("1e+", &["1e", "+"]),
            ("1e + 1", &["1e", "+", "1"]),
            (".25E-1", &[".25E-1"]),
            ("a.b", &["a", ".", "b"]),
            ("0xe+1", &["0xe", "+", "1"]),
            ("1+1", &["1", "+", "1"]),
        ] {
            let found = tokens(text.as_bytes(), Backslash::Plain).map(|it| it.text);
            let found: Vec<_> = found.map(|it| String::from_utf8_lossy(it)).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn tokens_keep_their_text() {
        let text = b"SET a.\"B\" = E'\\'', 1.5e3 -- end\n, $1, +u&\"x\"";
        let kinds: Vec<Kind> = tokens(text, Backslash::Plain).map(|it| it.kind).collect();
        let symbol = Kind::Symbol;
        assert_eq!(
            kinds,
            [
                Kind::Word,
                Kind::Word,
                symbol(b'.'),
                Kind::QuotedIdentifier,
                symbol(b'='),
                Kind::String,
                symbol(b','),
                Kind::Number,
                symbol(b','),
                Kind::Parameter,
                symbol(b','),
                symbol(b'+'),
                Kind::QuotedIdentifier,
            ]
        );
        assert!(
            tokens(text, Backslash::Plain)
                .next()
                .unwrap()
                .is_word("set")
        );
    }

    #[test]
    fn unsafe_encodings_are_known_by_all_their_names() {
        for name in [
            "SJIS",
            "shift_jis",
            "Windows-932",
            "BIG5",
            "gbk",
            "UHC",
            "GB18030",
            "Johab",
        ] {
            assert!(!is_ascii_safe(name), "{name}");
        }
        for name in ["UTF8", "SQL_ASCII", "latin1", "EUC_JP", "WIN1252", ""] {
            assert!(is_ascii_safe(name), "{name}");
        }
    }

    /// Pieces of which any sequence is a text, each with whether it is a statement of its own.
    fn piece() -> impl Strategy<Value = (String, bool)> {
        let quoted = "[a-z;$\"/*-]{0,6}";
        prop_oneof![
            Just(("select 1".to_owned(), true)),
            quoted.prop_map(|it| (format!("select '{it}'"), true)),
            "[a-z;$'/*-]{0,6}".prop_map(|it| (format!("select \"{it}x\""), true)),
            "[a-z;'/*-]{0,6}".prop_map(|it| (format!("select $q${it}$q$"), true)),
            "[a-z;$'\"-]{0,6}".prop_map(|it| (format!("/*{it}*/"), false)),
            "[a-z;$'\"/*-]{0,6}".prop_map(|it| (format!("--{it}\n"), false)),
            Just((" \n\t".to_owned(), false)),
        ]
    }

    proptest! {
        #[test]
        fn as_many_statements_are_found_as_were_joined(pieces in prop::collection::vec(piece(), 0..10)) {
            let text: Vec<&str> = pieces.iter().map(|(text, _)| text.as_str()).collect();
            let text = text.join(";");
            let count = pieces.iter().filter(|(_, is_statement)| *is_statement).count();
            prop_assert_eq!(split(&text).len(), count, "{}", text);
        }

        #[test]
        fn no_text_makes_it_panic_or_lose_a_byte(
            text in prop::collection::vec(prop::sample::select(&b"aeEuUbx&$1'\"\\/*-;() \n.\xc3"[..]), 0..60),
            is_escape: bool,
        ) {
            let backslash = if is_escape { Backslash::Escape } else { Backslash::Plain };
            let mut end = 0;
            for statement in statements(&text, backslash) {
                let start = statement.text.as_ptr() as usize - text.as_ptr() as usize;
                prop_assert!(start >= end && !statement.text.is_empty());
                end = start + statement.text.len();
                // The same by itself, unless it is cut in the middle of something.
                prop_assert!(statement.tokens().next().is_some());
            }
            prop_assert!(end <= text.len());
        }
    }
}
