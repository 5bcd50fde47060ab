//! The settings that are learned from random programs are those that Postgres has.

use lakebase_proxy::{
    pool::settings::{Dialect, Pending, Settings, SettingsTable},
    protocol::{
        lexer::{Backslash, statements},
        requests::TransactionStatus,
        tag::Command,
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tokio::{io::AsyncRead, io::AsyncWrite};

use super::*;
use crate::harness::wire::Wire;

const PROGRAMS: u64 = 60;

const NAMES: [&str; 15] = [
    "random_page_cost",
    "work_mem",
    "search_path",
    "timezone",
    "datestyle",
    "statement_timeout",
    "application_name",
    "client_encoding",
    "default_transaction_read_only",
    "default_transaction_isolation",
    "default_transaction_deferrable",
    "xmloption",
    "app.user_id",
    "weird.name",
    "role",
];

const STATEMENTS: [&str; 50] = [
    "set random_page_cost = 1.5e+1",
    "set random_page_cost to .25E-1",
    "set work_mem = '7MB'",
    "SET SESSION work_mem TO 9000",
    "set local work_mem = '5MB'",
    "set sort_mem to default",
    "reset work_mem",
    "set search_path = a, \"B c\", pg_catalog",
    "set schema 'it''s'",
    "set search_path = é, \"É\", '\u{4e2d} \\x'",
    "reset search_path",
    "set time zone 'Asia/Tokyo'",
    "set time zone interval '+02:30' hour to minute",
    "set timezone to -7",
    "set time zone local",
    "set datestyle = 'DMY'",
    "set datestyle = 'German'",
    "set datestyle to iso",
    "set datestyle = 'SQL, YMD'",
    "reset datestyle",
    "set statement_timeout = '10min'",
    "set statement_timeout to default",
    "set application_name = $a$it's \\ $b$ 1$a$",
    "set application_name to E'a\\'b\\\\'",
    "reset application_name",
    "set names 'LATIN1'",
    "set client_encoding to utf8",
    "set session characteristics as transaction read only, isolation level serializable",
    "set session characteristics as transaction read write not deferrable",
    "reset default_transaction_isolation",
    "set xml option document",
    "set app.user_id = '1; drop'",
    "set local app.user_id = '2'",
    "set app.user_id to default",
    "set \"Weird.Name\" = on -- note",
    "/* note */ set weird.name = 'x' /* ; */",
    "set role pg_monitor",
    "set role none",
    "reset role",
    "reset all",
    "set transaction_read_only = on",
    "set transaction isolation level read committed",
    "begin",
    "start transaction",
    "select 1",
    "select 1/0",
    "set no_such_setting = 1",
    "savepoint a",
    "rollback to A",
    "savepoint \"B\"",
];
const BLOCK_ENDS: [&str; 9] = [
    "commit",
    "end and chain",
    "rollback",
    "abort work and no chain",
    "release savepoint a",
    "release \"B\"",
    "rollback work to savepoint \"B\"",
    "discard all",
    "commit and chain",
];

/// What the client of one connection has set, as far as the pool has learned it.
#[derive(Default)]
struct Learner {
    pending: Pending,
    settings: Settings,
}

impl Learner {
    /// Sends a query, and learns from the answer. Returns the transaction status.
    async fn query<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        wire: &mut Wire<S>,
        table: &SettingsTable,
        sql: &str,
        dialect: Dialect,
    ) -> TransactionStatus {
        wire.send(&text('Q', sql)).await;
        let mut statements = statements(sql.as_bytes(), dialect.backslash);
        let mut status = TransactionStatus::Idle;
        for reply in wire.until('Z').await {
            match reply.tag {
                'C' => {
                    let command = Command::of(reply.body.strip_suffix(b"\0").unwrap());
                    let statement = statements.next();
                    let learned = self.pending.complete(command, statement.as_ref(), dialect);
                    learned.unwrap_or_else(|reason| panic!("{sql}: {reason:?}"));
                }
                'E' => self.pending.fail(),
                'Z' => {
                    status = match reply.body[0] {
                        b'I' => TransactionStatus::Idle,
                        b'T' => TransactionStatus::InTransaction,
                        _ => TransactionStatus::Failed,
                    };
                }
                _ => {}
            }
        }
        let changes = self.pending.ready(status);
        let none = Settings::default();
        self.settings = table.apply(&self.settings, &none, &changes).unwrap();
        status
    }
}

async fn values<S: AsyncRead + AsyncWrite + Unpin>(wire: &mut Wire<S>) -> Vec<String> {
    let mut values = Vec::new();
    for name in NAMES {
        // In ASCII, whatever the encoding.
        let value = format!("coalesce(nullif(current_setting('{name}', true), ''), 'none')");
        let look = format!("select encode(convert_to({value}, 'UTF8'), 'escape')");
        values.push(format!("{name} = {}", wire.value(&look).await));
    }
    values
}

/// A second connection is brought to the same settings wherever the first one is at rest.
#[tokio::test]
async fn another_connection_gets_the_settings_that_a_program_has_left() {
    let emulator = harness::emulator().await;
    let role = &emulator.identities().app.name;
    let grant = format!("grant pg_monitor to \"{role}\"");
    let superuser = harness::superuser().await;
    superuser.batch_execute(&grant).await.unwrap();
    let table = SettingsTable::default();
    let (mut compared, mut changed) = (0, 0);
    for seed in 0..PROGRAMS {
        let mut random = StdRng::seed_from_u64(seed);
        let mut first = Wire::direct(&emulator).await;
        let mut second = Wire::direct(&emulator).await;
        let mut learner = Learner::default();
        let mut at = Settings::default();
        let mut program = Vec::new();
        for _ in 0..12 {
            let length = *[1, 1, 1, 2, 4].choose(&mut random).unwrap();
            let query: Vec<&str> = (0..length)
                .map(|_| match random.random_range(0..4) {
                    0 => *BLOCK_ENDS.choose(&mut random).unwrap(),
                    _ => *STATEMENTS.choose(&mut random).unwrap(),
                })
                .collect();
            let is_utf8 = !learner.settings.names().any(|it| it == "client_encoding");
            if !is_utf8 && query.iter().any(|it| !it.is_ascii()) {
                continue;
            }
            // A comment at the end needs a line end.
            let sql = query.join("\n;");
            program.push(sql.clone());
            let dialect = Dialect {
                backslash: Backslash::Plain,
                is_utf8: true,
            };
            let status = learner.query(&mut first, &table, &sql, dialect).await;
            if status != TransactionStatus::Idle {
                continue;
            }
            if let Some(difference) = at.difference(&learner.settings) {
                changed += 1;
                second.send(&text('Q', &difference)).await;
                for reply in second.until('Z').await {
                    assert_ne!(
                        reply.tag,
                        'E',
                        "{program:#?}: {difference}: {}",
                        reply.error().message
                    );
                }
            }
            at = learner.settings.clone();
            compared += 1;
            assert_eq!(
                values(&mut first).await,
                values(&mut second).await,
                "seed {seed}: {program:#?}"
            );
        }
    }
    assert!(compared > 200 && changed > 100, "{compared} {changed}");
}
