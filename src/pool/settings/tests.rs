//! SET statements by themselves, then random transactions against a small model of a server.

use proptest::prelude::*;

use super::*;
use crate::protocol::lexer::{Backslash, statements};

const UTF8: Dialect = Dialect {
    backslash: Backslash::Plain,
    is_utf8: true,
};

fn changes_in(sql: &str, dialect: Dialect) -> Result<Vec<Change>, PinReason> {
    let statement = statements(sql.as_bytes(), dialect.backslash)
        .next()
        .unwrap();
    change::of(&statement, dialect)
}

/// The SQL that a new session needs after these statements.
fn learned(sql: &[&str]) -> Result<Option<String>, PinReason> {
    let table = SettingsTable::default();
    let mut settings = Settings::default();
    for sql in sql {
        let changes = changes_in(sql, UTF8)?;
        settings = table.apply(&settings, &Settings::default(), &changes)?;
    }
    Ok(Settings::default().difference(&settings))
}

#[test]
fn a_value_is_set_again_as_it_was() {
    for (sql, expected) in [
        ("set work_mem = '7MB'", "SET \"work_mem\" TO '7MB'"),
        ("SET SESSION Work_Mem to 7000", "SET \"work_mem\" TO 7000"),
        (
            "set app.user_id = 'it''s'",
            "SET \"app\".\"user_id\" TO 'it''s'",
        ),
        ("set \"Weird.Name\" = on", "SET \"weird\".\"name\" TO on"),
        (
            "set search_path = a, \"B c\", 'd' -- note",
            "SET \"search_path\" TO a , \"B c\" , 'd'",
        ),
        (
            "set time zone interval '+02' hour to minute",
            "SET TIME ZONE interval '+02' hour to minute",
        ),
        ("set /* note */ time zone -7", "SET TIME ZONE - 7"),
        ("set names 'latin1'", "SET NAMES 'latin1'"),
        ("set schema 's'", "SET SCHEMA 's'"),
        ("set xml option document", "SET XML OPTION document"),
        ("set role none", "SET ROLE none"),
        ("set a.b = 'c:\\d'", "SET \"a\".\"b\" TO E'c:\\\\d'"),
        (
            "set a.b = $q$it's \\$q$",
            "SET \"a\".\"b\" TO E'it''s \\\\'",
        ),
        ("set a.b = 'é'", "SET \"a\".\"b\" TO E'\\U000000e9'"),
        (
            "set a.b = E'\\é\\\\é'",
            "SET \"a\".\"b\" TO E'\\U000000e9\\\\\\U000000e9'",
        ),
        (
            "set search_path = É",
            "SET \"search_path\" TO E'\\U000000c9'",
        ),
        (
            "set session characteristics as transaction isolation level repeatable read, read only not deferrable",
            "SET \"default_transaction_deferrable\" TO E'off'; SET \"default_transaction_isolation\" TO E'repeatable read'; SET \"default_transaction_read_only\" TO E'on'",
        ),
    ] {
        assert_eq!(learned(&[sql]).unwrap().as_deref(), Some(expected), "{sql}");
    }
    let old = Dialect {
        backslash: Backslash::Escape,
        is_utf8: true,
    };
    let changes = changes_in("set a.b = '\\''", old).unwrap();
    let sql = "SET \"a\".\"b\" TO E'\\''".to_owned();
    let name = "a.b".to_owned();
    assert_eq!(changes, [Change::Set { name, sql }]);
}

#[test]
fn what_ends_with_the_transaction_or_is_reset_needs_nothing() {
    for sql in [
        &["set local work_mem = '7MB'"][..],
        &["set transaction read only"],
        &["set transaction_read_only = on"],
        &["set work_mem = '7MB'", "reset work_mem"],
        &["set work_mem = '7MB'", "set sort_mem to default"],
        &["set timezone = 'UTC'", "set time zone local"],
        &["set names 'latin1'", "reset client_encoding"],
        &["set role x", "reset role", "set a.b = 1", "reset all"],
    ] {
        assert_eq!(learned(sql), Ok(None), "{sql:?}");
    }
    // The role stays.
    let role = learned(&["set role x", "reset all"]);
    assert_eq!(role.unwrap().as_deref(), Some("SET ROLE x"));
    // Both parts count.
    let style = learned(&[
        "set datestyle = 'DMY'",
        "set datestyle = 'ISO'",
        "set datestyle = 'DMY'",
    ]);
    let expected = "SET \"datestyle\" TO 'ISO'; SET \"datestyle\" TO 'DMY'";
    assert_eq!(style.unwrap().as_deref(), Some(expected));
}

#[test]
fn what_cannot_be_repeated_is_a_pin() {
    for (sql, reason) in [
        ("set seed = 0.5", PinReason::Setseed),
        ("set session authorization x", PinReason::Role),
        ("reset session authorization", PinReason::Role),
        ("set client_encoding = 'SJIS'", PinReason::Encoding),
        ("set names 'big5'", PinReason::Encoding),
        ("set work_mem from current", PinReason::Settings),
        ("set a.b = u&'\\0061'", PinReason::Settings),
        ("set a.b = $1", PinReason::Settings),
        ("select 1", PinReason::Settings),
    ] {
        assert_eq!(changes_in(sql, UTF8), Err(reason), "{sql}");
    }
    let latin1 = Dialect {
        is_utf8: false,
        ..UTF8
    };
    assert_eq!(
        changes_in("set a.b = 'é'", latin1),
        Err(PinReason::Encoding)
    );
    let long = format!("set a.b = '{}'", "x".repeat(MAX_LENGTH));
    assert_eq!(learned(&[&long]), Err(PinReason::Settings));
    let many: Vec<String> = (0..=MAX_ENTRIES)
        .map(|it| format!("set a.b{it} = 1"))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(learned(&many), Err(PinReason::Settings));
    assert!(learned(&many[1..]).is_ok());
}

#[test]
fn a_role_is_left_first_and_taken_last() {
    let table = SettingsTable::default();
    let with = |values: &[(&'static str, &'static str)]| table.with(values.iter().copied());
    let (one, other) = (
        with(&[("role", "a"), ("a.b", "1")]),
        with(&[("role", "b"), ("x.y", "2")]),
    );
    assert_eq!(
        one.difference(&other).unwrap(),
        "RESET ROLE; RESET \"a\".\"b\"; SET \"x\".\"y\" TO E'2'; SET \"role\" TO E'b'"
    );
    let same_role = with(&[("role", "a")]);
    assert_eq!(one.difference(&same_role).unwrap(), "RESET \"a\".\"b\"");
    assert_eq!(one.difference(&one), None);
}

#[test]
fn equal_settings_are_one_and_are_freed_with_their_last_user() {
    let table = SettingsTable::default();
    let none = Settings::default();
    let set = |name: &str| changes_in(&format!("set a.{name} = 1"), UTF8).unwrap();
    let one = table
        .apply(&none, &none, &[set("x"), set("y")].concat())
        .unwrap();
    let other = table
        .apply(&none, &none, &[set("y"), set("x")].concat())
        .unwrap();
    assert!(one == other && table.len() == 1);
    drop((one, other));
    assert!(table.is_empty());
    for number in 0..10_000 {
        table
            .apply(&none, &none, &set(&format!("v{number}")))
            .unwrap();
    }
    assert!(table.0.lock().unwrap().capacity() < 100, "none is in use");
}

#[test]
fn the_values_of_the_startup_message_are_those_of_a_reset() {
    let table = SettingsTable::default();
    let base = table.with([("application_name", "app"), ("client_encoding", "LATIN1")]);
    let apply = |settings: &Settings, sql| {
        let changes = changes_in(sql, UTF8).unwrap();
        table.apply(settings, &base, &changes).unwrap()
    };
    let changed = apply(&base, "set application_name = 'other'");
    assert!(changed != base);
    assert!(apply(&changed, "reset all") == base);
    assert!(apply(&changed, "reset application_name") == base);
}

#[test]
fn a_statement_without_its_text_is_a_pin() {
    for command in [
        Command::Set,
        Command::Rollback,
        Command::Savepoint,
        Command::Release,
    ] {
        let mut pending = Pending::default();
        assert_eq!(
            pending.complete(command, None, UTF8),
            Err(PinReason::Settings)
        );
    }
}

/// Statements of a program. Names are indexes, values are small numbers.
#[derive(Clone, Debug)]
enum Step {
    Set(u8, u8),
    SetLocal(u8, u8),
    Reset(u8),
    ResetAll,
    Begin,
    Commit(bool),
    Rollback(bool),
    Savepoint(u8),
    RollbackTo(u8),
    Release(u8),
    Fail,
    Select,
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0..3_u8;
    prop_oneof![
        6 => (name.clone(), 0..4_u8).prop_map(|(name, value)| Step::Set(name, value)),
        1 => (name.clone(), 0..4_u8).prop_map(|(name, value)| Step::SetLocal(name, value)),
        2 => name.clone().prop_map(Step::Reset),
        1 => Just(Step::ResetAll),
        3 => Just(Step::Begin),
        2 => any::<bool>().prop_map(Step::Commit),
        2 => any::<bool>().prop_map(Step::Rollback),
        2 => name.clone().prop_map(Step::Savepoint),
        2 => name.clone().prop_map(Step::RollbackTo),
        1 => name.prop_map(Step::Release),
        2 => Just(Step::Fail),
        1 => Just(Step::Select),
    ]
}

type Values = BTreeMap<u8, u8>;

/// A server as far as settings and transactions are concerned, with whole copies for everything that may be undone.
#[derive(Default)]
struct Server {
    values: Values,
    block: Option<Block>,
}

struct Block {
    begin: Values,
    savepoints: Vec<(u8, Values)>,
    has_failed: bool,
}

impl Server {
    fn status(&self) -> TransactionStatus {
        match &self.block {
            None => TransactionStatus::Idle,
            Some(block) if block.has_failed => TransactionStatus::Failed,
            Some(_) => TransactionStatus::InTransaction,
        }
    }

    fn block(&self) -> Block {
        Block {
            begin: self.values.clone(),
            savepoints: Vec::new(),
            has_failed: false,
        }
    }

    /// Executes a query of several statements, and returns the tags and texts up to the first error.
    fn query(&mut self, steps: &[Step]) -> (Vec<(Command, String)>, bool) {
        // What an error undoes outside of a block.
        let mut begin = self.values.clone();
        let mut done = Vec::new();
        for step in steps {
            match self.step(step, &mut begin) {
                Some((command, sql)) => done.push((command, sql)),
                None => {
                    match &mut self.block {
                        Some(block) => block.has_failed = true,
                        None => self.values = begin,
                    }
                    return (done, true);
                }
            }
        }
        (done, false)
    }

    fn step(&mut self, step: &Step, begin: &mut Values) -> Option<(Command, String)> {
        let may_run = matches!(
            step,
            Step::Commit(_) | Step::Rollback(_) | Step::RollbackTo(_)
        );
        if self.block.as_ref().is_some_and(|block| block.has_failed) && !may_run {
            return None;
        }
        Some(match step {
            Step::Set(name, value) => {
                self.values.insert(*name, *value);
                (Command::Set, format!("set a.n{name} = {value}"))
            }
            Step::SetLocal(name, value) => (Command::Set, format!("SET LOCAL a.n{name} = {value}")),
            Step::Reset(name) => {
                self.values.remove(name);
                (Command::Reset, format!("reset a.n{name}"))
            }
            Step::ResetAll => {
                self.values.clear();
                (Command::Reset, "RESET ALL".to_owned())
            }
            Step::Begin => {
                if self.block.is_none() {
                    self.block = Some(Block {
                        begin: begin.clone(),
                        ..self.block()
                    });
                }
                (Command::Begin, "begin".to_owned())
            }
            Step::Commit(chain) | Step::Rollback(chain) => {
                if *chain && self.block.is_none() {
                    return None;
                }
                let is_rollback = matches!(step, Step::Rollback(_));
                let block = self.block.take();
                let has_failed = block.as_ref().is_some_and(|block| block.has_failed);
                if is_rollback || has_failed {
                    self.values = block.map_or(begin.clone(), |block| block.begin);
                }
                begin.clone_from(&self.values);
                if *chain {
                    self.block = Some(self.block());
                }
                let chain = if *chain {
                    " and chain"
                } else {
                    " AND NO CHAIN"
                };
                let verb = if is_rollback { "rollback" } else { "end work" };
                let command = if is_rollback || has_failed {
                    Command::Rollback
                } else {
                    Command::Commit
                };
                (command, format!("{verb}{chain}"))
            }
            Step::Savepoint(name) => {
                let block = self.block.as_mut()?;
                block.savepoints.push((*name, self.values.clone()));
                (Command::Savepoint, format!("savepoint N{name}"))
            }
            Step::RollbackTo(name) => {
                let block = self.block.as_mut()?;
                let at = block.savepoints.iter().rposition(|(it, _)| it == name)?;
                self.values = block.savepoints[at].1.clone();
                block.savepoints.truncate(at + 1);
                block.has_failed = false;
                let sql = format!("ROLLBACK TRANSACTION TO SAVEPOINT \"n{name}\"");
                (Command::Rollback, sql)
            }
            Step::Release(name) => {
                let block = self.block.as_mut()?;
                let at = block.savepoints.iter().rposition(|(it, _)| it == name)?;
                block.savepoints.truncate(at);
                (Command::Release, format!("release n{name}"))
            }
            Step::Fail => return None,
            Step::Select => (Command::Other, "select 1".to_owned()),
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_learned_is_what_the_server_has(
        program in prop::collection::vec(prop::collection::vec(step(), 1..4), 1..12),
    ) {
        let table = SettingsTable::default();
        let none = Settings::default();
        let (mut server, mut pending, mut settings) = (Server::default(), Pending::default(), none.clone());
        for query in program {
            let (done, has_failed) = server.query(&query);
            for (command, sql) in done {
                let statement = statements(sql.as_bytes(), Backslash::Plain).next();
                pending.complete(command, statement.as_ref(), UTF8).unwrap();
            }
            if has_failed {
                pending.fail();
            }
            let changes = pending.ready(server.status());
            settings = table.apply(&settings, &none, &changes).unwrap();
            if server.status() == TransactionStatus::Idle {
                let expected: Vec<String> = server.values.iter()
                    .map(|(name, value)| format!("SET \"a\".\"n{name}\" TO {value}")).collect();
                let expected = (!expected.is_empty()).then(|| expected.join("; "));
                prop_assert_eq!(none.difference(&settings), expected);
            }
        }
    }

    #[test]
    fn no_text_makes_it_panic(parts in prop::collection::vec(prop::sample::select(
        &["set ", "reset ", "session ", "local ", "a.b", "\"", "'", "\\", "=", " to ", "é", "$$", "names", "time zone", ",", "u&", "e'", "x", "\n", "."][..]
    ), 0..12), is_utf8: bool, is_escape: bool) {
        let dialect = Dialect {
            backslash: if is_escape { Backslash::Escape } else { Backslash::Plain },
            is_utf8,
        };
        let sql = parts.concat();
        for statement in statements(sql.as_bytes(), dialect.backslash) {
            let Ok(changes) = change::of(&statement, dialect) else { continue };
            for change in changes {
                if let Change::Set { sql, .. } | Change::Add { sql, .. } = change {
                    prop_assert!(sql.is_ascii());
                    for backslash in [Backslash::Plain, Backslash::Escape] {
                        prop_assert_eq!(statements(sql.as_bytes(), backslash).count(), 1, "{}", sql);
                    }
                }
            }
        }
    }
}
