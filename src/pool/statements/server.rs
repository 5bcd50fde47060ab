//! The prepared statements of one server connection.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{
    InFlight,
    statement::{Description, Statement},
    text::{Prepared, Scope},
};

/// What a server connection has prepared.
#[derive(Debug)]
pub struct ServerStatements {
    pub(super) names: Names,
    /// Some statements have names that a client has given them.
    has_client_names: bool,
    /// By number.
    pub(super) known: HashMap<u64, Known>,
    /// Closed by the unit of the client with this number, which may be skipped.
    pub(super) leaving: HashMap<u64, u64>,
    pub(super) unnamed: Option<Unnamed>,
    /// Empty: the memory of its last client's.
    pub(super) in_flight: VecDeque<InFlight>,
    limit: usize,
    clock: u64,
}

/// Whose names statements have at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// No client has prepared anything, since the login or the last reset.
    Fresh,
    /// The only client's that has had the connection; the number is that of [`ClientStatements`](super::ClientStatements).
    Exclusive(u64),
    /// The pool's, once the next client has it.
    Shared,
}

/// A statement that the server has.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) statement: Arc<Prepared>,
    pub(super) name: Box<[u8]>,
    /// Where it was prepared.
    pub(super) scope: Scope,
    /// The Parse of this unit of the client has not been answered.
    pub(super) pending: Option<u64>,
    /// As this server has it.
    pub(super) description: Description,
    /// A function has deallocated another statement, and perhaps this one.
    pub(super) is_doubtful: bool,
    /// Messages in flight that name it.
    pub(super) uses: u32,
    used_at: u64,
}

/// The unnamed statement that the server has.
#[derive(Debug)]
pub(super) struct Unnamed {
    pub(super) statement: Arc<Statement>,
    /// As this server has it.
    pub(super) description: Description,
}

impl ServerStatements {
    /// A new connection, which keeps at most `limit` statements once several clients have it.
    pub fn new(limit: usize) -> Self {
        Self {
            names: Names::Fresh,
            has_client_names: false,
            known: HashMap::new(),
            leaving: HashMap::new(),
            unnamed: None,
            in_flight: VecDeque::new(),
            limit: limit.max(1),
            clock: 0,
        }
    }

    /// Whether the client's messages pass as they are.
    pub fn is_exclusive(&self) -> bool {
        matches!(self.names, Names::Exclusive(_))
    }

    /// After a client has left that has prepared nothing. What another has prepared before stays, and is not the next one's.
    pub fn forget_client(&mut self) {
        if self.is_exclusive() && !self.has_client_names && self.unnamed.is_none() {
            self.clear();
        }
    }

    /// Statements that it has.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// After a reset of all statements.
    pub fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Whether statements have names of another client than the one of this exclusive connection, which would find them by SQL.
    pub(in crate::pool) fn has_foreign_names(&self, exclusive: Option<u64>) -> bool {
        self.has_client_names && exclusive.map(Names::Exclusive) != Some(self.names)
    }

    /// Whether statements have names of a client that had the connection to itself, perhaps more than are recorded: of two
    /// names for one text, one is.
    pub(super) fn has_client_names(&self) -> bool {
        self.has_client_names
    }

    /// After a DEALLOCATE ALL for another client.
    pub(in crate::pool) fn share(&mut self) {
        self.clear();
        self.names = Names::Shared;
    }

    /// After a simple query of the pool's own.
    pub fn forget_unnamed(&mut self) {
        self.unnamed = None;
    }

    pub(super) fn add(&mut self, statement: &Arc<Prepared>, name: &[u8], unit: u64, scope: Scope) {
        let known = Known {
            statement: Arc::clone(statement),
            name: name.into(),
            scope,
            pending: Some(unit),
            description: Description::default(),
            is_doubtful: false,
            uses: 0,
            used_at: self.tick(),
        };
        self.has_client_names |= self.is_exclusive();
        self.known.insert(statement.number, known);
    }

    /// After a statement has turned out to be deallocated unseen. Others may be, too.
    pub(super) fn doubt(&mut self) {
        for known in self.known.values_mut() {
            known.is_doubtful = known.pending.is_none() && !known.statement.is_large();
        }
    }

    /// What the server has described of a statement that it has.
    pub(super) fn description(&self, statement: &Arc<Statement>) -> Option<&Description> {
        if let Some(known) = self.known.get(&statement.prepared.number) {
            return Some(&known.description);
        }
        let unnamed = self.unnamed.as_ref();
        let unnamed = unnamed.filter(|it| Arc::ptr_eq(&it.statement, statement));
        unnamed.map(|it| &it.description)
    }

    /// Whether an earlier unit than this one decides if the server has a statement.
    pub(super) fn is_uncertain(&self, number: u64, unit: u64) -> bool {
        let pending = self.known.get(&number).and_then(|it| it.pending);
        let leaving = self.leaving.get(&number).copied();
        pending.or(leaving).is_some_and(|it| it != unit)
    }

    pub(super) fn use_one(&mut self, number: u64) {
        let now = self.tick();
        if let Some(known) = self.known.get_mut(&number) {
            known.uses += 1;
            known.used_at = now;
        }
    }

    pub(super) fn release(&mut self, number: u64) {
        if let Some(known) = self.known.get_mut(&number) {
            known.uses = known.uses.saturating_sub(1);
        }
    }

    /// Removes what has not been used for the longest time, if there is no place for another one.
    pub(super) fn evict(&mut self) -> Option<Known> {
        if self.known.len() < self.limit {
            return None;
        }
        let unused = self.known.iter();
        let unused = unused.filter(|(_, known)| known.is_evictable());
        let number = *unused.min_by_key(|(_, known)| known.used_at)?.0;
        self.known.remove(&number)
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

impl Known {
    fn is_evictable(&self) -> bool {
        self.uses == 0 && self.pending.is_none() && !self.statement.is_large()
    }
}
