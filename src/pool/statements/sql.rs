//! Statements of SQL after which a session has other prepared statements or settings.

use super::cut;
use crate::protocol::{
    frame::split_string,
    lexer::{Backslash, Kind, Statement, Token, statements},
    tag::{Command, Discard},
};

/// A statement whose end changes what is known of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sql {
    Deallocate(Box<[u8]>),
    DeallocateAll,
    Prepare(Box<[u8]>),
    /// A statement after which others may mean or return something else.
    Definition,
    /// A SET or RESET, or a statement that decides what becomes of one.
    OfSettings(Box<[u8]>),
}

/// Of a word that begins such a statement.
const LONGEST_WORD: usize = b"deallocate".len();

impl Sql {
    fn of(statement: &Statement<'_>) -> Option<Self> {
        let mut tokens = statement.tokens();
        let first = tokens.next().filter(|it| it.kind == Kind::Word)?;
        let mut lower = [0; LONGEST_WORD];
        let word = lower.get_mut(..first.text.len())?;
        word.copy_from_slice(first.text);
        word.make_ascii_lowercase();
        match &*word {
            b"set" | b"reset" | b"commit" | b"end" | b"rollback" | b"abort" | b"savepoint"
            | b"release" => Some(Self::OfSettings(statement.text.into())),
            // Some have the tag of a SELECT, and dynamic SQL may be hidden in a procedure.
            b"create" | b"alter" | b"drop" | b"do" | b"call" => Some(Self::Definition),
            b"discard" => {
                let is_all = tokens.next().is_some_and(|it| it.is_word("all"));
                is_all.then_some(Self::DeallocateAll)
            }
            b"prepare" => identifier(&tokens.next()?).map(Self::Prepare),
            b"deallocate" => {
                let mut name = tokens.next()?;
                if name.is_word("prepare") {
                    // Also a name.
                    name = tokens.next().unwrap_or(name);
                }
                if tokens.next().is_some() {
                    // A syntax error.
                    None
                } else if name.is_word("all") {
                    Some(Self::DeallocateAll)
                } else {
                    identifier(&name).map(Self::Deallocate)
                }
            }
            _ => None,
        }
    }

    /// Those of a simple query; none if all of its statements are without one.
    pub(super) fn of_query(sql: &[u8]) -> Vec<Option<Self>> {
        // Most queries are one statement, and its beginning shows that it has none.
        let trimmed = sql.trim_ascii_end();
        let text = trimmed.strip_suffix(b";").unwrap_or(trimmed);
        let backslash = Backslash::Plain;
        if !text.contains(&b';') && Self::of(&Statement { text, backslash }).is_none() {
            return Vec::new();
        }
        let mut effects = Vec::new();
        for (at, statement) in statements(sql, backslash).enumerate() {
            let effect = Self::of(&statement);
            // Before the first of them, none has to be counted.
            if effect.is_some() || !effects.is_empty() {
                effects.resize(at, None);
                effects.push(effect);
            }
        }
        effects
    }

    pub(super) fn of_parse(body: &[u8]) -> Option<Self> {
        let (sql, _) = split_string(body)?;
        let mut all = statements(sql, Backslash::Plain);
        Self::of(&all.next()?).filter(|_| all.next().is_none())
    }

    /// Whether a statement that ends with this tag can be it.
    pub(super) fn has_tag(&self, command: Command) -> bool {
        match self {
            Self::Deallocate(_) => command == Command::Deallocate,
            Self::DeallocateAll => matches!(
                command,
                Command::DeallocateAll | Command::Discard(Discard::All)
            ),
            Self::Prepare(_) => command == Command::Prepare,
            Self::Definition | Self::OfSettings(_) => true,
        }
    }

    /// Whether it changes the names of prepared statements.
    pub(super) fn changes_names(&self) -> bool {
        matches!(self, Self::Deallocate(_) | Self::DeallocateAll)
    }
}

/// A name as the server has it. Beyond ASCII it cuts a long one between two characters.
fn identifier(token: &Token<'_>) -> Option<Box<[u8]>> {
    let name = match token.kind {
        Kind::Word => token.text.to_ascii_lowercase(),
        Kind::QuotedIdentifier => {
            let inner = token.text.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
            let inner = String::from_utf8(inner.to_vec()).ok()?;
            inner.replace("\"\"", "\"").into_bytes()
        }
        _ => return None,
    };
    let mut cut = cut(&name);
    while cut.len() < name.len() && str::from_utf8(cut).is_err() && str::from_utf8(&name).is_ok() {
        cut = cut.get(..cut.len() - 1)?;
    }
    Some(cut.into())
}
