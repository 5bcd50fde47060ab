//! Texts of SET and RESET: what a session has learned of them, set on another connection, is learned there again, and what
//! leads from one session's settings to another's does so. The first byte selects how texts are read, a zero byte ends the
//! text of the first session.
#![no_main]

use lakebase_proxy::{
    pool::settings::{Dialect, Pending, Settings, SettingsTable},
    protocol::{
        lexer::{Backslash, statements},
        requests::TransactionStatus,
        tag::Command,
    },
};
use libfuzzer_sys::fuzz_target;

/// The settings after a text in one transaction; `None` if they are not known any more.
fn after(
    table: &SettingsTable,
    before: &Settings,
    text: &[u8],
    dialect: Dialect,
) -> Option<Settings> {
    let mut pending = Pending::default();
    for statement in statements(text, dialect.backslash) {
        let command = match statement.tokens().next() {
            Some(first) if first.is_word("reset") => Command::Reset,
            Some(first) if first.is_word("savepoint") => Command::Savepoint,
            Some(first) if first.is_word("release") => Command::Release,
            Some(first) if first.is_word("rollback") => Command::Rollback,
            Some(first) if first.is_word("commit") => Command::Commit,
            Some(first) if first.is_word("begin") => Command::Begin,
            _ => Command::Set,
        };
        pending.complete(command, Some(&statement), dialect).ok()?;
    }
    let mut changes = pending.ready(TransactionStatus::InTransaction);
    changes.extend(pending.ready(TransactionStatus::Idle));
    table.apply(before, &Settings::default(), &changes).ok()
}

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    let dialect = Dialect {
        backslash: if first % 2 == 0 {
            Backslash::Plain
        } else {
            Backslash::Escape
        },
        is_utf8: first % 4 < 2,
    };
    let table = SettingsTable::default();
    let none = Settings::default();
    let known: Vec<Settings> = data
        .splitn(2, |&byte| byte == 0)
        .filter_map(|text| after(&table, &none, text, dialect))
        .collect();
    for from in known.iter().chain([&none]) {
        for to in known.iter().chain([&none]) {
            let Some(sql) = from.difference(to) else {
                assert!(from == to);
                continue;
            };
            // Whatever the session that it is for reads backslashes and bytes as.
            for backslash in [Backslash::Plain, Backslash::Escape] {
                let dialect = Dialect {
                    backslash,
                    is_utf8: false,
                };
                let learned = after(&table, from, sql.as_bytes(), dialect);
                assert!(learned.as_ref() == Some(to), "{from:?} {sql} {learned:?}");
            }
        }
    }
});
