//! Looks whether a client still has what it may have left in its session.
//!
//! A watched word pins a client although it may only have been a column's name, or the lock may be released and the
//! temporary table dropped. Once another client waits, one query shows that.

use std::{borrow::Cow, time::Duration};

use super::{
    client::ClientState,
    reset::columns,
    server::{ServerConnection, Unusable},
};
use crate::{protocol::options::literal, telemetry::labels::PoolVerification};

/// How long a verification may take: longer than another query of ours, as a slow server still has what the client has left
/// there. A lost network path is noticed earlier, by the keepalive of the connection.
const VERIFICATION_TIMEOUT: Duration = Duration::from_mins(2);

/// Counts what a client has: statements prepared by SQL, cursors outside a transaction, advisory locks of the session, and
/// objects in the temporary schema. Names are qualified, as the client may have changed `search_path`.
///
/// In a transaction that waits for no other, whatever the client has made the default.
const VERIFICATION: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SELECT \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements WHERE from_sql), \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_cursors), \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
        AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) '2615' \
        AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema())";

/// The query for a client. Of settings that something else than a SET has changed, it counts those that are the session's own.
fn verification(unexplained: &[String]) -> Cow<'static, str> {
    if unexplained.is_empty() {
        return VERIFICATION.into();
    }
    let names = unexplained.iter().map(|name| literal(name));
    let names = names.collect::<Vec<_>>().join(", ");
    format!(
        "{VERIFICATION}, (SELECT pg_catalog.count(*) FROM pg_catalog.pg_settings \
            WHERE source OPERATOR(pg_catalog.=) 'session' AND name OPERATOR(pg_catalog.=) ANY (ARRAY[{names}]))"
    )
    .into()
}

impl ServerConnection {
    /// Whether the client has nothing that the query would show. Not cancel safe.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(super) async fn verify(&mut self, client: &mut ClientState) -> Result<bool, Unusable> {
        let mut is_clean = false;
        let sql = verification(&client.unexplained);
        let verified = self.query_within(VERIFICATION_TIMEOUT, &sql, |row| {
            let mut columns = columns(row).into_iter();
            is_clean = columns.all(|value| value.as_deref() == Some(b"0"));
        });
        let result = match verified.await {
            Ok(()) if is_clean => PoolVerification::Clean,
            Ok(()) => PoolVerification::InUse,
            // By the client's own `statement_timeout`, for example.
            Err(error) if error.is_of_statement() => PoolVerification::Failed,
            Err(error) => return Err(error),
        };
        self.record.slot.pool().context.metrics.pool_verifications[result].inc();
        client.verified(result == PoolVerification::Clean);
        Ok(result == PoolVerification::Clean)
    }
}
