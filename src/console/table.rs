//! The shape of a table: its columns, each declared with its value in a row.

use std::borrow::Cow;

use crate::{
    protocol::rows::{Column, Value},
    status::Snapshot,
    telemetry::escape,
};

/// The rows of a table.
pub(super) type Rows = Vec<Vec<Value>>;

/// A table that SHOW displays.
#[derive(Debug)]
pub(super) struct Table {
    /// Its name, in lower case.
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) columns: &'static [Column],
    pub(super) read: fn(&Snapshot) -> Rows,
}

impl Table {
    /// The rows of a snapshot.
    pub(super) fn rows(&self, snapshot: &Snapshot) -> Rows {
        let mut rows = (self.read)(snapshot);
        // Clients choose names and servers send messages: their control characters must not reach a terminal.
        for value in rows.iter_mut().flatten() {
            if let Value::Text(text) = value
                && let Cow::Owned(escaped) = escape(text)
            {
                *text = escaped;
            }
        }
        rows
    }
}

/// Declares a [`Table`]: what it lists, and for each column its name, its kind and its value in a row.
macro_rules! table {
    ($name:ident $help:literal |$snapshot:pat_param| $items:expr, |$row:pat_param| {
        $($column:ident: $kind:ident = $value:expr;)+
    }) => {
        Table {
            name: stringify!($name),
            help: $help,
            columns: &[$(Column { name: stringify!($column), kind: Kind::$kind }),+],
            read: |$snapshot| $items.into_iter().map(|$row| vec![$(Value::from($value)),+]).collect(),
        }
    };
}
pub(super) use table;
