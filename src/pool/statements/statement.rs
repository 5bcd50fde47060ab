//! A statement of one client, and what the client knows of its result.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, OnceLock},
};

use super::Prepared;
use crate::protocol::frame::split_string;

/// A statement that one client has prepared.
#[derive(Debug)]
pub(super) struct Statement {
    /// Its text, which other clients may have prepared as well.
    pub(super) prepared: Arc<Prepared>,
    /// Bytes of text that count as this client's.
    pub(super) charge: usize,
    /// As the client knows it.
    pub(super) description: Description,
}

impl Statement {
    pub(super) fn new(prepared: Arc<Prepared>, charge: usize) -> Arc<Self> {
        Arc::new(Self {
            prepared,
            charge,
            description: Description::default(),
        })
    }
}

/// What a statement takes and returns, by hashes, as far as a server has described it.
///
/// A server keeps that for as long as it has the statement: if a definition changes the result, it fails with 0A000. Prepared
/// anew, on another connection, the same text is described as of then, which the client does not expect.
#[derive(Debug, Default)]
pub(super) struct Description {
    /// The types of the parameters.
    parameters: OnceLock<u64>,
    /// Names and types of the columns.
    columns: OnceLock<u64>,
}

impl Description {
    /// Whether a Describe of the statement has been answered.
    pub(super) fn is_whole(&self) -> bool {
        self.parameters.get().is_some() && self.columns.get().is_some()
    }

    /// Whether the columns have been described.
    pub(super) fn is_known(&self) -> bool {
        self.columns.get().is_some()
    }

    /// Records what a server has described, unless that is known. A portal has no parameters.
    pub(super) fn learn(&self, parameters: Option<u64>, columns: u64) {
        if let Some(parameters) = parameters {
            self.parameters.get_or_init(|| parameters);
        }
        self.columns.get_or_init(|| columns);
    }

    /// Copies what another one has.
    pub(super) fn adopt(&self, other: &Self) {
        if let Some(columns) = other.columns.get() {
            self.learn(other.parameters.get().copied(), *columns);
        }
    }

    /// Whether both are known to differ.
    pub(super) fn differs(&self, other: &Self) -> bool {
        let differ = |one: &OnceLock<u64>, other: &OnceLock<u64>| matches!((one.get(), other.get()), (Some(one), Some(other)) if one != other);
        differ(&self.parameters, &other.parameters) || differ(&self.columns, &other.columns)
    }
}

/// The hash of a ParameterDescription, or of a portal's name.
pub(super) fn hash(body: &[u8]) -> u64 {
    // Only within the process, and of what servers send.
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// The hash of a RowDescription or NoData: what PostgreSQL compares before it uses a plan again (`equalRowTypes`), and so
/// neither the tables that the columns are of, nor formats.
pub(super) fn hash_of_columns(body: &[u8]) -> u64 {
    /// Of the table: an int4 and an int2.
    const TABLE: usize = 6;
    /// Of the type: its number, its length and its modifier, an int4, int2 and int4.
    const TYPE: usize = 10;
    /// An int2.
    const FORMAT: usize = 2;
    let mut hasher = DefaultHasher::new();
    let (count, mut rest) = body.split_at(body.len().min(2));
    count.hash(&mut hasher);
    while let Some((name, behind)) = split_string(rest)
        && let Some((field, next)) = behind.split_at_checked(TABLE + TYPE + FORMAT)
    {
        (name, field.get(TABLE..TABLE + TYPE)).hash(&mut hasher);
        rest = next;
    }
    rest.hash(&mut hasher);
    hasher.finish()
}
