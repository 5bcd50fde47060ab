//! What makes a used server connection like a new one.
//!
//! One simple query of statements that a transaction block permits, so that it is one round trip. `DISCARD ALL` is no such
//! statement, and would drop temporary tables, which takes long; a connection with a temporary schema is closed instead: the
//! schema itself stays, and with it traces that a new connection does not have.

use std::fmt::Write as _;

use super::{
    server::{ServerConnection, Unusable},
    settings::Settings,
};
use crate::{
    protocol::{options::literal, requests::TransactionStatus},
    telemetry::labels::{PoolClose, PoolReset},
};

/// In this order: the role first, as it may lack the right to the rest, and the settings last, as they may have changed what
/// the other statements do. Names are qualified, as the client may have changed `search_path`.
const RESET: &str = "RESET SESSION AUTHORIZATION; RESET ROLE; CLOSE ALL; UNLISTEN *; \
    SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD SEQUENCES; DEALLOCATE ALL; RESET ALL; ";

/// What a session did with its server connection, as far as its reset depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// The transaction state that it left.
    pub(crate) status: TransactionStatus,
    /// Whether it sent more than statements that leave nothing.
    pub(crate) is_touched: bool,
    /// Whether the server reported a change of a parameter.
    pub(crate) is_reported: bool,
    /// Whether a reset undoes everything, as far as that can be seen.
    pub(crate) is_resettable: bool,
}

impl Used {
    /// Of a client that has sent nothing.
    pub(crate) const NOT: Self = Self {
        status: TransactionStatus::Idle,
        is_touched: false,
        is_reported: false,
        is_resettable: true,
    };
    /// What clients may have done that have parted with the connection between two transactions.
    const UNKNOWN: Self = Self {
        status: TransactionStatus::Idle,
        is_touched: true,
        is_reported: true,
        is_resettable: true,
    };

    /// Whether the connection is as the session found it.
    pub(super) fn is_clean(self) -> bool {
        self.status == TransactionStatus::Idle && !self.is_touched && !self.is_reported
    }
}

/// The query, and the parameters whose values its last row has behind the temporary schema.
fn statements(used: Used, parameters: &[String], seed: f64) -> String {
    let mut sql = String::with_capacity(512);
    if used.status != TransactionStatus::Idle {
        // First: a failed transaction block accepts nothing else.
        sql.push_str("ROLLBACK; ");
    }
    sql.push_str(RESET);
    // `random` goes on unpredictably, as in a new connection, whether or not the client has called `setseed`.
    let _ = write!(sql, "SELECT pg_catalog.setseed({seed}); ");
    sql.push_str("SELECT pg_catalog.pg_my_temp_schema()");
    for name in parameters {
        let _ = write!(sql, ", pg_catalog.current_setting({}, true)", literal(name));
    }
    sql
}

impl ServerConnection {
    /// Makes the connection like a new one. Not cancel safe.
    ///
    /// # Errors
    /// Why it must be closed.
    pub(super) async fn reset(&mut self, used: Used) -> Result<(), PoolClose> {
        let done = self.reset_uncounted(used).await;
        let result = if done.is_ok() {
            PoolReset::Done
        } else {
            PoolReset::Failed
        };
        self.record.slot.pool().context.metrics.pool_resets[result].inc();
        done
    }

    /// The same if another client than this one has left it, as far as the settings want that. Not cancel safe.
    ///
    /// # Errors
    /// It must be closed.
    pub(super) async fn reset_for(&mut self, client: Option<u64>) -> Result<(), Unusable> {
        let record = &self.record;
        let is_strict = record.slot.pool().context.settings.load().pool_strict;
        if !is_strict || record.left_by.is_none() || record.left_by == client {
            return Ok(());
        }
        self.reset_after_others().await
    }

    /// Makes the connection like a new one after clients that have parted with it between two transactions. Not cancel safe.
    ///
    /// # Errors
    /// It must be closed.
    pub(super) async fn reset_after_others(&mut self) -> Result<(), Unusable> {
        self.reset(Used::UNKNOWN).await.map_err(Unusable::NotReset)
    }

    async fn reset_uncounted(&mut self, used: Used) -> Result<(), PoolClose> {
        // The parameters that changed may not all be the client's doing: those are not reported again.
        let parameters = if used.is_reported {
            self.record.reported.names()
        } else {
            Vec::new()
        };
        let sql = statements(used, &parameters, rand::random_range(-1.0..=1.0));
        let mut last = Vec::new();
        let done = self.query(&sql, |row| last = columns(row)).await;
        if let Err(error) = done {
            tracing::debug!(%error, "server connection could not be reset");
            return Err(match error {
                Unusable::Broken(_) => PoolClose::Server,
                _ => PoolClose::ResetFailed,
            });
        }
        self.record.left_by = None;
        self.record.is_encoding_set = false;
        self.record.reset_name();
        self.record.statements.clear();
        self.record.settings = Settings::default();
        let mut columns = last.into_iter();
        if columns.next().flatten().as_deref() != Some(b"0") {
            return Err(PoolClose::Unresettable);
        }
        for (name, value) in parameters.iter().zip(columns) {
            if let Some(value) = value {
                self.record.reported.set(name, &value);
            }
        }
        Ok(())
    }
}

/// The columns of a DataRow in text format, up to the first that is malformed.
pub(super) fn columns(mut body: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut columns = Vec::new();
    let _count = body.split_off(..2);
    while let Some((length, rest)) = body.split_first_chunk::<4>() {
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            columns.push(None);
            body = rest;
            continue;
        };
        let Some((value, rest)) = rest.split_at_checked(length) else {
            break;
        };
        columns.push(Some(value.to_vec()));
        body = rest;
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_split_into_its_columns() {
        let row = b"\0\x03\0\0\0\x010\xff\xff\xff\xff\0\0\0\x02ab";
        let expected = vec![Some(b"0".to_vec()), None, Some(b"ab".to_vec())];
        assert_eq!(columns(row), expected);
        for cut in 0..row.len() {
            assert!(columns(&row[..cut]).len() <= 3);
        }
    }

    #[test]
    fn an_open_transaction_is_rolled_back_first() {
        let used = |status| Used {
            status,
            is_touched: true,
            is_reported: false,
            is_resettable: true,
        };
        let idle = statements(used(TransactionStatus::Idle), &[], 0.5);
        assert!(idle.starts_with("RESET SESSION AUTHORIZATION"));
        let failed = statements(used(TransactionStatus::Failed), &["a'b".to_owned()], 0.5);
        assert!(failed.starts_with("ROLLBACK; "));
        assert!(failed.ends_with("current_setting(E'a''b', true)"));
    }
}
