//! The settings of sessions: learned from SET and RESET, and carried to another server connection.
//!
//! [`Pending`] follows the transactions of one session, in which a SET may be undone. What has been committed is a list of
//! [`Change`]s, which are applied to the [`Settings`] of the client and to those of the server connection alike. Where the
//! two differ, [`Settings::difference`] is the SQL that makes the connection what the client expects.
//!
//! Only what is certain is learned. Everything else is a reason to pin the session.

mod change;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

pub(super) use self::change::pin_of_change;
pub use self::change::{Change, Dialect};
use crate::{
    protocol::{
        lexer::{Statement, Token},
        requests::TransactionStatus,
        tag::{Command, Discard},
    },
    telemetry::labels::PinReason,
};

/// Settings that one session may have.
const MAX_ENTRIES: usize = 128;
/// Bytes of their SQL.
const MAX_LENGTH: usize = 8 * 1024;

const ROLE: &str = "role";

/// What a session has set, in comparison with a new one. Equal ones share the memory, and are compared by address.
#[derive(Clone, Debug, Default)]
pub struct Settings(Option<Arc<Entries>>);

/// By name in lower case: the statements that set it.
type Entries = BTreeMap<String, String>;

impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            _ => false,
        }
    }
}

impl Eq for Settings {}

/// All settings in use.
#[derive(Debug, Default)]
pub struct SettingsTable(Mutex<HashSet<Arc<Entries>>>);

impl SettingsTable {
    /// The settings with these values, for those of a startup message that are not part of the pool's key.
    pub fn with<'a>(&self, values: impl IntoIterator<Item = (&'a str, &'a str)>) -> Settings {
        let entry = |(name, value): (&str, &str)| (name.to_owned(), change::set(name, value));
        self.intern(values.into_iter().map(entry).collect())
    }

    /// `settings` after `changes`, in a session that began with `base`.
    ///
    /// # Errors
    /// There are too many.
    pub fn apply(
        &self,
        settings: &Settings,
        base: &Settings,
        changes: &[Change],
    ) -> Result<Settings, PinReason> {
        if changes.is_empty() {
            return Ok(settings.clone());
        }
        let mut entries = settings.entries().cloned().unwrap_or_default();
        let base = base.entries();
        for change in changes {
            match change {
                Change::Set { name, sql } => {
                    entries.insert(name.clone(), sql.clone());
                }
                Change::Add { name, sql } => {
                    let earlier = entries.remove(name).unwrap_or_default();
                    entries.insert(name.clone(), change::add(&earlier, sql));
                }
                Change::Reset { name } => {
                    match base.and_then(|base| base.get(name)) {
                        Some(sql) => entries.insert(name.clone(), sql.clone()),
                        None => entries.remove(name),
                    };
                }
                // Without the role: GUC_NO_RESET_ALL in src/backend/utils/misc/guc.c.
                Change::ResetAll => {
                    let role = entries.remove_entry(ROLE);
                    entries = base.cloned().unwrap_or_default();
                    entries.extend(role);
                }
            }
        }
        let length: usize = entries.values().map(String::len).sum();
        if entries.len() > MAX_ENTRIES || length > MAX_LENGTH {
            return Err(PinReason::Settings);
        }
        Ok(self.intern(entries))
    }

    /// The number of different settings in use.
    pub fn len(&self) -> usize {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|entries| Arc::strong_count(entries) > 1);
        table.len()
    }

    /// Whether no session has set anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn intern(&self, entries: Entries) -> Settings {
        if entries.is_empty() {
            return Settings(None);
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = table.get(&entries) {
            return Settings(Some(Arc::clone(known)));
        }
        if table.len() == table.capacity() {
            // Before it grows: most may be of sessions that have ended.
            table.retain(|entries| Arc::strong_count(entries) > 1);
        }
        let entries = Arc::new(entries);
        table.insert(Arc::clone(&entries));
        Settings(Some(entries))
    }
}

impl Settings {
    fn entries(&self) -> Option<&Entries> {
        self.0.as_deref()
    }

    fn get(&self, name: &str) -> Option<&str> {
        Some(self.entries()?.get(name)?.as_str())
    }

    /// The names of what is set, in lower case.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries()
            .into_iter()
            .flat_map(BTreeMap::keys)
            .map(String::as_str)
    }

    /// The statements that set it.
    pub(super) fn texts(&self) -> impl Iterator<Item = &String> {
        self.entries().into_iter().flat_map(BTreeMap::values)
    }

    /// Those that may decide how a server reads a statement.
    pub(super) fn of_scope(&self) -> impl Iterator<Item = (&String, &String)> {
        let entries = self.entries().into_iter().flatten();
        entries.filter(|(name, _)| change::is_of_scope(name))
    }

    /// The query that changes `self` into `wanted`; `None` if they are equal.
    pub fn difference(&self, wanted: &Self) -> Option<String> {
        if self == wanted {
            return None;
        }
        let mut statements = Vec::new();
        // The session's own role has most rights, so everything else is done under it; the role that is left may lack the
        // right to the one that is wanted.
        if self.get(ROLE) != wanted.get(ROLE) && self.get(ROLE).is_some() {
            statements.push("RESET ROLE".to_owned());
        }
        // All of these first: some values conflict with those of other settings.
        for name in self.names().filter(|name| *name != ROLE) {
            let is_partial = || change::is_partial(name) && self.get(name) != wanted.get(name);
            if wanted.get(name).is_none() || is_partial() {
                statements.push(change::reset(name));
            }
        }
        for name in wanted.names().filter(|name| *name != ROLE).chain([ROLE]) {
            if let Some(sql) = wanted.get(name)
                && self.get(name) != Some(sql)
            {
                statements.push(sql.to_owned());
            }
        }
        (!statements.is_empty()).then(|| statements.join("; "))
    }
}

/// The changes of one session that its transactions may still undo.
#[derive(Debug, Default)]
pub struct Pending {
    committed: Vec<Change>,
    /// Of the transaction under way.
    changes: Vec<Change>,
    /// The savepoints, with the number of changes before each.
    savepoints: Vec<(String, usize)>,
    /// A transaction block is open, which an error does not end.
    is_block: bool,
    /// The transaction has changed a setting for itself that may decide how the server reads a statement.
    is_local: bool,
}

impl Pending {
    /// Records a statement that has ended, by its text and its command tag. A text is needed for those that change settings
    /// or the transaction.
    ///
    /// # Errors
    /// The reason to pin the session, whose settings are not known any more.
    pub fn complete(
        &mut self,
        command: Command,
        statement: Option<&Statement<'_>>,
        dialect: Dialect,
    ) -> Result<(), PinReason> {
        let text = || statement.ok_or(PinReason::Settings);
        match command {
            Command::Set | Command::Reset => {
                let text = text()?;
                self.is_local |= change::is_local_of_scope(text);
                self.changes.extend(change::of(text, dialect)?);
            }
            // It commits at once, also within a pipeline whose later statements fail.
            Command::Discard(Discard::All) => {
                self.committed.append(&mut self.changes);
                let name = ROLE.to_owned();
                self.committed
                    .extend([Change::ResetAll, Change::Reset { name }]);
            }
            Command::Begin => self.is_block = true,
            Command::Savepoint => {
                let name = name_behind(text()?, &["savepoint"])?;
                self.savepoints.push((name, self.changes.len()));
            }
            Command::Release => {
                let name = name_behind(text()?, &["release", "savepoint"])?;
                let at = self.savepoint(&name)?;
                self.savepoints.truncate(at);
            }
            Command::Rollback => match rollback_target(text()?)? {
                Some(name) => {
                    let at = self.savepoint(&name)?;
                    let kept = self.savepoints.get(at).map(|(_, kept)| *kept);
                    self.changes.truncate(kept.unwrap_or_default());
                    self.savepoints.truncate(at + 1);
                }
                None => {
                    self.changes.clear();
                    self.end(is_chained(text()?));
                }
            },
            Command::Commit => {
                self.committed.append(&mut self.changes);
                self.end(is_chained(text()?));
            }
            Command::PrepareTransaction => {
                self.committed.append(&mut self.changes);
                self.end(false);
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a transaction may undo a change.
    pub(super) fn is_pending(&self) -> bool {
        !self.changes.is_empty() || !self.committed.is_empty()
    }

    /// Whether the transaction has settings of its own that may decide how the server reads a statement.
    pub(super) fn is_of_scope(&self) -> bool {
        let mut changes = self.changes.iter().chain(&self.committed);
        self.is_local || changes.any(Change::is_of_scope)
    }

    /// Records an ErrorResponse.
    pub fn fail(&mut self) {
        // Without a block, all since the last Sync or in the same query is one transaction.
        if !self.is_block {
            self.changes.clear();
        }
    }

    /// Records a ReadyForQuery, and returns the changes that nothing undoes any more.
    pub fn ready(&mut self, status: TransactionStatus) -> Vec<Change> {
        if status != TransactionStatus::Idle {
            self.is_block = true;
            return Vec::new();
        }
        // A block that has ended without a tag: its COMMIT has failed.
        if self.is_block {
            self.changes.clear();
        }
        self.committed.append(&mut self.changes);
        self.end(false);
        std::mem::take(&mut self.committed)
    }

    fn end(&mut self, is_chained: bool) {
        self.savepoints.clear();
        self.is_block = is_chained;
        self.is_local = false;
    }

    /// The innermost savepoint of that name.
    fn savepoint(&self, name: &str) -> Result<usize, PinReason> {
        let at = self.savepoints.iter().rposition(|(it, _)| it == name);
        at.ok_or(PinReason::Settings)
    }
}

/// The name behind `keywords`, of which only the first is not optional.
fn name_behind(statement: &Statement<'_>, keywords: &[&str]) -> Result<String, PinReason> {
    let tokens: Vec<Token<'_>> = statement.tokens().collect();
    let [first, names @ ..] = &tokens[..] else {
        return Err(PinReason::Settings);
    };
    let name = match names {
        [name] => name,
        // `RELEASE savepoint` releases one of that name.
        [word, name] if keywords.get(1).is_some_and(|it| word.is_word(it)) => name,
        _ => return Err(PinReason::Settings),
    };
    if !keywords.first().is_some_and(|it| first.is_word(it)) {
        return Err(PinReason::Settings);
    }
    name.identifier().ok_or(PinReason::Settings)
}

/// The savepoint of a ROLLBACK; `None` if it ends the transaction.
fn rollback_target(statement: &Statement<'_>) -> Result<Option<String>, PinReason> {
    let tokens: Vec<Token<'_>> = statement.tokens().collect();
    let is = |at: usize, words: &[&str]| {
        let token = tokens.get(at);
        token.is_some_and(|token| words.iter().any(|word| token.is_word(word)))
    };
    // Or the COMMIT of a failed transaction.
    if !is(0, &["rollback", "abort", "commit", "end", "prepare"]) {
        return Err(PinReason::Settings);
    }
    let to = 1 + usize::from(is(1, &["work", "transaction"]));
    if !is(to, &["to"]) {
        return Ok(None);
    }
    let name = match tokens.get(to + 1..).unwrap_or_default() {
        [name] => name,
        [word, name] if word.is_word("savepoint") => name,
        _ => return Err(PinReason::Settings),
    };
    name.identifier().map(Some).ok_or(PinReason::Settings)
}

/// Whether the end of a transaction begins another one: AND CHAIN, and not AND NO CHAIN.
fn is_chained(statement: &Statement<'_>) -> bool {
    let mut last = None;
    for token in statement.tokens() {
        if token.is_word("chain") {
            return last.is_some_and(|it: Token<'_>| it.is_word("and"));
        }
        last = Some(token);
    }
    false
}

#[cfg(test)]
mod tests;
