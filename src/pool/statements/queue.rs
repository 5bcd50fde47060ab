//! The messages of a client that have not been answered, and what their answers change.

use std::sync::Arc;

use bytes::BytesMut;

use super::{Passage, Prepared, server::Known, sql::Sql, statement::Statement};

/// A portal by its name, and the statement that it executes.
pub(super) type Portal = Box<(Box<[u8]>, Sql)>;

/// A message in flight, or an answer in its place.
#[derive(Debug)]
pub(super) struct InFlight {
    /// Later messages of the client have higher ones.
    pub(super) id: u64,
    /// The number of its unit, which ends in a Sync or a Query.
    pub(super) unit: u64,
    pub(super) awaits: Awaits,
    pub(super) shown: Shown,
    pub(super) effect: Effect,
    /// The number of the statement that it names, which must not be evicted before its answer.
    pub(super) statement: Option<u64>,
}

/// Which answer of the server ends it.
#[derive(Debug)]
pub(super) enum Awaits {
    Parse,
    Bind,
    Close,
    /// Of this statement or a portal of it, if the client has it.
    Describe(Option<Arc<Statement>>),
    Execute,
    Sync,
    Query,
    CopyEnd,
    /// Nothing: these messages are the answer.
    Answer(BytesMut),
}

/// What the client gets of an answer.
#[derive(Debug)]
pub(super) enum Shown {
    All,
    /// Errors only.
    Errors,
    /// Errors only, and these without a position in a text that is not the client's.
    ErrorsOfPool,
    /// This error, if the server reports that a statement does not exist.
    Instead(BytesMut),
}

impl Shown {
    /// What becomes of an answer that is no error.
    pub(super) fn passage(&self) -> Passage {
        match self {
            Self::All | Self::Instead(_) => Passage::Pass,
            Self::Errors | Self::ErrorsOfPool => Passage::Drop,
        }
    }
}

/// What an answer changes.
#[derive(Debug)]
pub(super) enum Effect {
    None,
    /// The server has a statement, if it was sent; the client has it by a name, if that is its own.
    Parsed {
        prepared: Arc<Prepared>,
        own: Option<(Box<[u8]>, Arc<Statement>)>,
        is_sent: bool,
    },
    /// The unnamed statement of the server, and of the client.
    Unnamed {
        statement: Option<Arc<Statement>>,
        is_sent: bool,
        is_clients: bool,
    },
    Closed {
        name: Box<[u8]>,
        is_sent: bool,
    },
    Evicted(Box<Known>),
    /// Of each CommandComplete in turn.
    Sql(Vec<Option<Sql>>),
    /// What a portal executes, if that is of interest.
    Bound(Option<Portal>),
}
