//! What a client may have left in its session is looked for once another client waits.

use std::time::Duration;

use lakebase_proxy::telemetry::labels::{PinReason, PoolVerification};
use tokio::time::sleep;

use super::{
    misuse::answers,
    transaction::{shared, sharing},
    *,
};
use crate::{
    console::{console, rows},
    harness::wire::Wire,
};

impl Proxy {
    fn verifications(&self, result: PoolVerification) -> u64 {
        self.metrics().pool_verifications[result].get()
    }
}

/// Each is pinned by a word, and has nothing.
#[tokio::test]
async fn a_client_that_has_nothing_any_more_parts_with_its_connection() {
    for (statement, reason) in [
        ("select 1 as temp", PinReason::Temp),
        (
            "begin; create temp table t (a int) on commit drop; commit",
            PinReason::Temp,
        ),
        ("create temp table t (a int); drop table t", PinReason::Temp),
        (
            "select pg_advisory_lock(7), pg_advisory_unlock(7)",
            PinReason::AdvisoryLock,
        ),
        (
            "prepare p as select 1; execute p; deallocate p",
            PinReason::SqlPrepare,
        ),
        (
            "begin; declare c cursor with hold for select 1; commit; close c",
            PinReason::Cursor,
        ),
    ] {
        let (emulator, proxy) = sharing(1).await;
        let (client, other) = (proxy.client().await, proxy.client().await);
        client.simple_query(statement).await.unwrap();
        client.simple_query("set app.owner = 'mine'").await.unwrap();
        assert_eq!(proxy.pins(reason), 1, "{statement}");
        for _ in 0..2 {
            assert_eq!(value(&other, "select 1").await, "1", "{statement}");
            assert_eq!(value(&client, "show app.owner").await, "mine");
        }
        assert_eq!(proxy.verifications(PoolVerification::Clean), 1);
        assert_eq!(emulator.counts().logins, 1, "{statement}");
    }
}

#[tokio::test]
async fn a_client_keeps_its_connection_until_it_has_nothing_any_more() {
    for (has, look, expected, ends) in [
        (
            "create temp table t as select 7 as a",
            "select a from t",
            "7",
            "drop table t",
        ),
        (
            "create function pg_temp.f() returns int language sql as 'select 8'",
            "select pg_temp.f()",
            "8",
            "drop function pg_temp.f()",
        ),
        (
            "create type pg_temp.e as enum ('a')",
            "select 'a'::pg_temp.e",
            "a",
            "drop type pg_temp.e",
        ),
        (
            "select pg_advisory_lock(9)",
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
            "1",
            "select pg_advisory_unlock(9)",
        ),
        ("prepare p as select 10", "execute p", "10", "deallocate p"),
        (
            "begin; declare c scroll cursor with hold for select 11; commit",
            "fetch first c",
            "11",
            "close c",
        ),
    ] {
        let (emulator, proxy) = sharing(1).await;
        let (client, other) = (proxy.client().await, proxy.client().await);
        client.simple_query(has).await.unwrap();
        let mut waiting = JoinSet::new();
        waiting.spawn(async move { value(&other, "select 12").await });
        for round in 1..4 {
            eventually("it is looked for", async || {
                (proxy.verifications(PoolVerification::InUse) >= round).then_some(())
            })
            .await;
            assert_eq!(value(&client, look).await, expected, "{has}");
        }
        assert!(waiting.try_join_next().is_none(), "{has}");
        client.simple_query(ends).await.unwrap();
        let served = within("the other client", waiting.join_next()).await;
        assert_eq!(served.unwrap().unwrap(), "12");
        assert_eq!(emulator.counts().logins, 1, "{has}");
    }
}

#[tokio::test]
async fn a_verification_leaves_the_unnamed_statement() {
    let (_emulator, proxy) = sharing(1).await;
    let mut client = proxy.session().await;
    let other = proxy.client().await;
    client.query("select pg_advisory_lock(3)").await;
    let unnamed = [message('P', b"\0select 42\0\0\0"), sync()].concat();
    client.send(&unnamed).await;
    client.until('Z').await;
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { value(&other, "select 1").await });
    eventually("it is looked for", async || {
        (proxy.verifications(PoolVerification::InUse) > 0).then_some(())
    })
    .await;
    for _ in 0..2 {
        let execute = [statements::execute("", &[]), sync()].concat();
        client.send(&execute).await;
        assert_eq!(client.tags().await, "2TDCZ");
    }
    client.query("select pg_advisory_unlock(3)").await;
    within("the other client", waiting.join_next()).await;
}

/// The connection is the client's own, where SQL finds statements of the protocol by their names.
#[tokio::test]
async fn a_verification_leaves_the_names_of_statements() {
    let (_emulator, proxy) = sharing(1).await;
    let mut client = proxy.session().await;
    let other = proxy.client().await;
    client.query("select pg_advisory_lock(4)").await;
    for name in ["s", ""] {
        let prepare = [statements::prepare(name, "select 42"), sync()].concat();
        client.send(&prepare).await;
        assert_eq!(client.tags().await, "1Z");
    }
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { value(&other, "select 1").await });
    eventually("it is looked for", async || {
        (proxy.verifications(PoolVerification::InUse) > 0).then_some(())
    })
    .await;
    for _ in 0..2 {
        let unnamed = [statements::execute("", &[]), sync()].concat();
        client.send(&unnamed).await;
        assert_eq!(client.tags().await, "2TDCZ");
    }
    assert_eq!(client.value("execute s").await, "42");
    client.send(&[message('C', b"Ss\0"), sync()].concat()).await;
    assert_eq!(client.tags().await, "3Z");
    client.query("prepare s as select 43").await;
    assert_eq!(client.value("execute s").await, "43");
    client.query("deallocate s").await;
    client.query("select pg_advisory_unlock(4)").await;
    within("the other client", waiting.join_next()).await;
}

/// Its text is not sent again.
#[tokio::test]
async fn a_statement_that_was_prepared_before_a_verification_is_remembered() {
    let (_emulator, proxy) = sharing(1).await;
    let mut client = proxy.session().await;
    let other = proxy.client().await;
    for (name, sql) in [
        ("creates", "create temp table t as select 42 as a"),
        ("drops", "drop table t"),
    ] {
        let prepare = format!("{name}\0{sql}\0\0\0");
        let prepare = [message('P', prepare.as_bytes()), sync()].concat();
        client.send(&prepare).await;
        client.until('Z').await;
    }
    let execute = |name| {
        let bind = format!("\0{name}\0\0\0\0\0\0\0");
        let run = message('E', b"\0\0\0\0\0");
        [message('B', bind.as_bytes()), run, sync()].concat()
    };
    for round in 1..4 {
        // With nothing, it parts.
        assert_eq!(value(&other, "select 1").await, "1");
        client.send(&execute("creates")).await;
        assert_eq!(client.tags().await, "2CZ");
        let mut waiting = JoinSet::new();
        let config = proxy.client_config();
        waiting.spawn(async move { value(&connect(&config).await, "select 2").await });
        eventually("it is looked for", async || {
            (proxy.verifications(PoolVerification::InUse) >= round).then_some(())
        })
        .await;
        assert_eq!(client.value("select a from t").await, "42");
        client.send(&execute("drops")).await;
        assert_eq!(client.tags().await, "2CZ");
        within("the other client", waiting.join_next())
            .await
            .unwrap()
            .unwrap();
    }
}

/// What the query does not show.
#[tokio::test]
async fn a_client_with_another_reason_is_not_verified() {
    let (_emulator, proxy) = sharing(2).await;
    let (client, other) = (proxy.client().await, proxy.client().await);
    client.simple_query("listen temp").await.unwrap();
    let own = pid(&client).await;
    for _ in 0..5 {
        assert_ne!(pid(&other).await, own);
    }
    assert_eq!(proxy.pins(PinReason::Listen), 1);
    assert_eq!(
        proxy
            .metrics()
            .pool_verifications
            .values()
            .map(prometheus::IntCounter::get)
            .sum::<u64>(),
        0
    );
}

#[tokio::test]
async fn pinned_clients_are_listed_with_their_reasons() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 3);
        settings.admin_console = Some(true);
    })
    .await;
    let console = console(&proxy).await;
    let free = proxy.client().await;
    free.simple_query("select 1").await.unwrap();
    assert_eq!(rows(&console, "SHOW PINS").await.len(), 0);
    let client = proxy.client().await;
    client.simple_query("listen a").await.unwrap();
    let listed = eventually("it is listed", async || {
        let listed = rows(&console, "SHOW PINS").await;
        (listed.len() == 1).then_some(listed)
    })
    .await;
    assert_eq!(listed[0].get("reason"), Some("listen"));
    assert!(listed[0].get("advice").unwrap().contains("LISTEN"));
    let clients = rows(&console, "SHOW CLIENTS").await;
    let pins = clients
        .iter()
        .filter(|row| row.get("pin") == Some("listen"));
    assert_eq!(pins.count(), 1);
    drop(client);
    eventually("it is gone", async || {
        rows(&console, "SHOW PINS").await.is_empty().then_some(())
    })
    .await;
}

/// The statement that makes a temporary table need not name it.
#[tokio::test]
async fn a_path_of_the_temporary_schema_is_looked_at_again() {
    let superuser = harness::superuser().await;
    let table = "create table if not exists path_of_temp as select 'real' as a; grant all on path_of_temp to public";
    superuser.batch_execute(table).await.unwrap();
    let (emulator, proxy) = sharing(1).await;
    let mut by_options = proxy.dial().await;
    let options = [
        ("user", "anyone"),
        ("database", DATABASE),
        ("options", "-c search_path=pg_temp,public"),
    ];
    by_options.startup(&options).await;
    by_options.welcome().await;
    let mut by_set = proxy.session().await;
    by_set.query("set search_path = pg_temp, public").await;
    for mut one in [by_set, by_options] {
        let mut other = proxy.session().await;
        assert_eq!(other.value("select a from path_of_temp").await, "real");
        one.query("create table path_of_temp as select 'fake' as a")
            .await;
        assert_eq!(one.value("select a from path_of_temp").await, "fake");
        other.send(&text('Q', "select a from path_of_temp")).await;
        eventually("it waits", async || {
            (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
        })
        .await;
        drop(one);
        let replies = within("another connection", other.until('Z')).await;
        assert_eq!(replies[1].value(), "real");
    }
    assert!(emulator.counts().logins >= 2);
}

/// A deferrable transaction waits for others that write.
#[tokio::test]
async fn the_look_waits_for_no_other_transaction() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let writer = harness::superuser().await;
    let begin = "begin isolation level serializable; create table written_meanwhile (a int)";
    writer.batch_execute(begin).await.unwrap();
    one.query("select 'temp'; set session characteristics as transaction isolation level serializable, read only, deferrable")
        .await;
    assert_eq!(other.value("select 1").await, "1");
    writer.batch_execute("rollback").await.unwrap();
    assert_eq!(one.value("select 2").await, "2");
    assert_eq!(proxy.verifications(PoolVerification::Clean), 1);
}

/// The query is the same to a client that has operators of its own.
#[tokio::test]
async fn a_reported_setting_that_a_function_has_changed_keeps_its_connection() {
    let superuser = harness::superuser().await;
    let objects = "create schema if not exists own_operators; \
        create or replace function own_operators.never(text, text) returns boolean language sql as 'select false'; \
        drop operator if exists own_operators.= (text, text); \
        create operator own_operators.= (leftarg = text, rightarg = text, function = own_operators.never); \
        grant usage on schema own_operators to public; \
        create or replace function set_style() returns text language sql as \
        $$ select set_config('IntervalStyle', 'iso_8601', false) $$";
    superuser.batch_execute(objects).await.unwrap();
    for path in ["public", "own_operators, public, pg_catalog"] {
        let (_emulator, proxy) = sharing(2).await;
        let (mut one, mut other) = (proxy.session().await, proxy.session().await);
        let mut third = proxy.session().await;
        one.query(&format!("set search_path = {path}")).await;
        assert_eq!(one.value("select set_style()").await, "iso_8601");
        other.query("begin").await;
        third.send(&text('Q', "show intervalstyle")).await;
        eventually("it has been looked at", async || {
            (proxy.verifications(PoolVerification::InUse) == 1).then_some(())
        })
        .await;
        other.query("commit").await;
        let replies = within("another connection", third.until('Z')).await;
        assert_eq!(replies[1].value(), "postgres", "{path}");
        assert_eq!(one.value("show intervalstyle").await, "iso_8601");
    }
}

/// A backend that does not run until this is dropped, as on a compute that is out of processor time.
#[cfg(unix)]
struct Stopped(String);

#[cfg(unix)]
impl Stopped {
    fn new(pid: &str) -> Self {
        Self::signal("STOP", pid);
        Self(pid.to_owned())
    }

    fn signal(signal: &str, pid: &str) {
        let mut kill = std::process::Command::new("kill");
        let sent = kill.args([&format!("-{signal}"), pid]).status();
        assert!(sent.unwrap().success());
    }
}

#[cfg(unix)]
impl Drop for Stopped {
    fn drop(&mut self) {
        Self::signal("CONT", &self.0);
    }
}

/// A client with a temporary table whose server has not answered the look for five seconds, and another one that waits.
#[cfg(unix)]
async fn slow(proxy: &Proxy) -> (Wire, Wire, Stopped) {
    let (mut client, mut other) = (proxy.session().await, proxy.session().await);
    client.query("create temp table t as select 42 as a").await;
    let stopped = Stopped::new(&client.value("select pg_backend_pid()").await);
    other.send(&text('Q', "select 7")).await;
    sleep(Duration::from_secs(6)).await;
    (client, other, stopped)
}

#[cfg(unix)]
#[tokio::test]
async fn a_slow_verification_ends_no_session() {
    let answered = async {
        let (_emulator, proxy) = sharing(1).await;
        let (mut client, mut other, stopped) = slow(&proxy).await;
        client.send(&text('Q', "select a from t")).await;
        drop(stopped);
        assert_eq!(answers(&mut client, 1).await, ["42"]);
        client.query("drop table t").await;
        assert_eq!(answers(&mut other, 1).await, ["7"]);
    };
    // Another gets a new connection at once if the client leaves.
    let left = async {
        let (_emulator, proxy) = sharing(1).await;
        let (client, mut other, _stopped) = slow(&proxy).await;
        drop(client);
        assert_eq!(answers(&mut other, 1).await, ["7"]);
    };
    tokio::join!(answered, left);
}
