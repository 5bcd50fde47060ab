//! The texts of prepared statements, each once per process.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use super::Sql;
use crate::{
    protocol::{
        frame::until_zero,
        lexer::{Backslash, Kind, tokens},
    },
    status::StatementsSnapshot,
};

/// What a text means, besides itself. Equal texts of equal meaning are one statement: what one client has prepared, another
/// need not.
///
/// A statement is its client's alone ([`Scope::Once`]) while what decides its meaning is not known, or of no other client: within
/// a transaction that has settings of its own or has defined something, behind a definition in the same pipeline, and while
/// the client may have temporary objects. So no client is given a statement of tables that only another has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Meaning {
    /// Where it is prepared.
    pub scope: Scope,
    /// Raised by definitions, as later statements of the same text may return something else: by each CREATE, ALTER or DROP,
    /// DO and CALL of a client of the pool, at the end of its transaction or of a part of it, and by the first statement whose
    /// result is not what its client expects. The last is how definitions of others are found.
    pub epoch: u64,
}

/// What decides how a server reads a text. Names, operators and literals mean something from the time on that a statement is
/// prepared, by the settings of that time: `search_path`, `TimeZone`, `DateStyle`, `client_encoding` and more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// A login with these settings, by a hash of both.
    Settings(u64),
    /// One client for now. The number is never used again.
    Once(u64),
}

impl Default for Scope {
    fn default() -> Self {
        Self::Settings(0)
    }
}

/// A statement that clients have prepared.
#[derive(Debug)]
pub struct Prepared {
    /// Never used again, so that a name made of it is unique.
    pub(super) number: u64,
    /// What follows the name in a Parse: the SQL, and the types of its parameters.
    pub(super) body: Box<[u8]>,
    pub(super) meaning: Meaning,
    pub(super) sql: Option<Sql>,
    /// Its result depends on what else the session has: a cursor, or a statement of PREPARE.
    pub(super) is_of_session: bool,
    hash: u64,
    texts: Weak<Texts>,
}

/// The texts in use.
#[derive(Debug)]
pub struct Texts {
    limit: AtomicUsize,
    numbers: AtomicU64,
    hasher: RandomState,
    table: Mutex<Table>,
    /// Parse messages that a server was sent.
    pub(super) sent: AtomicU64,
    /// Those that were answered without one, as it had the statement.
    pub(super) answered: AtomicU64,
    /// Statements that a server had to give up for others.
    pub(super) evicted: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    by_hash: HashMap<u64, Vec<Weak<Prepared>>>,
    length: usize,
}

impl Texts {
    /// For `limit` bytes of text.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            // 0 is the name of no statement.
            numbers: AtomicU64::new(1),
            hasher: RandomState::new(),
            table: Mutex::default(),
            sent: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        })
    }

    /// Sets another limit. Texts beyond it stay.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes of text in use.
    pub fn length(&self) -> usize {
        self.lock().length
    }

    /// Their numbers.
    pub(in crate::pool) fn snapshot(&self) -> StatementsSnapshot {
        let (statements, memory) = {
            let table = self.lock();
            let same = table.by_hash.values();
            (same.map(Vec::len).sum(), table.length)
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StatementsSnapshot {
            statements,
            memory,
            memory_limit: self.limit.load(Ordering::Relaxed),
            sent: count(&self.sent),
            answered: count(&self.answered),
            evicted: count(&self.evicted),
        }
    }

    /// A number that is never used again.
    pub(in crate::pool) fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// The statement, and whether no other client has it; `None` beyond the limit.
    pub(super) fn intern(
        self: &Arc<Self>,
        body: &[u8],
        meaning: Meaning,
    ) -> Option<(Arc<Prepared>, bool)> {
        let hash = self.hasher.hash_one((body, meaning));
        let mut table = self.lock();
        let known = table.by_hash.get(&hash).into_iter().flatten();
        let known = known
            .filter_map(Weak::upgrade)
            .find(|it| *it.body == *body && it.meaning == meaning);
        if let Some(known) = known {
            return Some((known, false));
        }
        if table.length + body.len() > self.limit.load(Ordering::Relaxed) {
            return None;
        }
        table.length += body.len();
        let mut statement = Prepared::new(body);
        statement.number = self.number();
        statement.meaning = meaning;
        statement.hash = hash;
        statement.texts = Arc::downgrade(self);
        let statement = Arc::new(statement);
        let entry = table.by_hash.entry(hash).or_default();
        entry.push(Arc::downgrade(&statement));
        Some((statement, true))
    }

    /// A statement whose text is not kept.
    pub(super) fn large(&self) -> Arc<Prepared> {
        let mut statement = Prepared::new(b"");
        statement.number = self.number();
        Arc::new(statement)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prepared {
    /// A statement that no table has.
    pub(super) fn new(body: &[u8]) -> Self {
        Self {
            number: 0,
            body: body.into(),
            meaning: Meaning::default(),
            sql: Sql::of_parse(body),
            is_of_session: is_of_session(body),
            hash: 0,
            texts: Weak::new(),
        }
    }

    /// Whether it returns the same as long as nothing is defined.
    pub(super) fn is_comparable(&self) -> bool {
        // A DEALLOCATE is prepared anew by each Bind.
        !self.is_of_session && !matches!(self.sql, Some(Sql::Deallocate(_)))
    }

    /// Whether its text is not kept.
    pub(super) fn is_large(&self) -> bool {
        self.body.is_empty()
    }
}

/// Whether a statement to prepare is a FETCH or EXECUTE.
pub(super) fn is_of_session(body: &[u8]) -> bool {
    let mut tokens = tokens(until_zero(body), Backslash::Plain);
    let first = tokens.find(|it| it.kind != Kind::Symbol(b';'));
    first.is_some_and(|it| it.is_word("fetch") || it.is_word("execute"))
}

impl Drop for Prepared {
    fn drop(&mut self) {
        let Some(texts) = self.texts.upgrade() else {
            return;
        };
        let mut table = texts.lock();
        table.length -= self.body.len();
        if let Some(same) = table.by_hash.get_mut(&self.hash) {
            same.retain(|it| it.strong_count() > 0);
            if same.is_empty() {
                table.by_hash.remove(&self.hash);
            }
        }
    }
}
