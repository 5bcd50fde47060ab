//! `transaction` mode: a client has a server connection for a transaction, and keeps it for state that outlives one.

use std::time::Duration;

use lakebase_proxy::{
    emulator::{Action, Site},
    telemetry::labels::{CancelOutcome, PinReason},
};
use tokio::time::Instant;
use tokio_postgres::SimpleQueryMessage;

use super::*;
use crate::harness::wire::{Wire, cancel, extended};

pub(super) fn shared(settings: &mut Settings, size: usize) {
    pooled(settings, size);
    settings.pool_mode = Some(PoolMode::Transaction);
}

pub(super) async fn sharing(size: usize) -> (Emulator, Proxy) {
    proxy_in(PoolMode::Transaction, size).await
}

impl Proxy {
    pub(super) fn pins(&self, reason: PinReason) -> u64 {
        self.metrics().pool_pins[reason].get()
    }

    /// Until no client has a server connection.
    pub(super) async fn until_at_rest(&self) {
        eventually("all clients are at rest", async || {
            let busy = [
                PoolServer::Closing,
                PoolServer::Leased,
                PoolServer::Opening,
                PoolServer::Resetting,
            ];
            let busy: i64 = busy.iter().map(|state| self.servers(*state)).sum();
            (busy == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn many_clients_share_two_connections() {
    let (emulator, proxy) = sharing(2).await;
    let mut clients = JoinSet::new();
    for number in 0..40 {
        let config = proxy.client_config();
        clients.spawn(async move {
            let client = connect(&config).await;
            let mut pids = BTreeSet::new();
            for round in 0..20 {
                let sum = format!("select {number} + {round}");
                assert_eq!(value(&client, &sum).await, (number + round).to_string());
                pids.insert(pid(&client).await);
            }
            pids
        });
    }
    let pids: BTreeSet<String> = within("the clients", clients.join_all())
        .await
        .into_iter()
        .flatten()
        .collect();
    assert!(pids.len() <= 2, "{pids:?}");
    assert!(emulator.counts().logins <= 2);
    proxy.until_idle(i64::try_from(pids.len()).unwrap()).await;
}

#[tokio::test]
async fn clients_at_rest_stay_connected_without_a_connection() {
    let (_emulator, proxy) = sharing(1).await;
    let mut clients = Vec::new();
    for _ in 0..10 {
        clients.push(proxy.client().await);
    }
    proxy.until_idle(1).await;
    assert_eq!(proxy.metrics().clients_active.get(), 10);
    for client in &clients {
        assert_eq!(value(client, "select 1").await, "1");
    }
}

#[tokio::test]
async fn a_transaction_keeps_its_connection_and_others_wait_for_its_end() {
    let (_emulator, proxy) = sharing(1).await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    one.simple_query("begin").await.unwrap();
    let held = pid(&one).await;
    let waiting = pid(&other);
    tokio::pin!(waiting);
    eventually("the other waits", async || {
        let waiting = tokio::time::timeout(Duration::from_millis(10), &mut waiting).await;
        assert!(waiting.is_err());
        (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
    })
    .await;
    assert_eq!(pid(&one).await, held);
    // A failed block is no rest either.
    one.simple_query("select 1 / 0").await.unwrap_err();
    let failed = one.simple_query("select 1").await.unwrap_err();
    assert_eq!(failed.code().unwrap().code(), "25P02");
    one.simple_query("rollback and chain").await.unwrap();
    assert_eq!(pid(&one).await, held);
    one.simple_query("commit").await.unwrap();
    assert_eq!(within("the other", waiting).await, held);
}

/// Statements with what they leave in the session, and the reason why it is the client's alone from then on.
#[tokio::test]
async fn state_that_outlives_a_transaction_stays_the_clients_own() {
    for (statement, look, expected, reason) in [
        (
            "do 'begin set work_mem = ''124kB''; end'",
            "show work_mem",
            "124kB",
            PinReason::Settings,
        ),
        (
            "select set_config('app.user', 'a', false)",
            "select current_setting('app.user')",
            "a",
            PinReason::SetConfig,
        ),
        (
            "listen x",
            "select pg_listening_channels()",
            "x",
            PinReason::Listen,
        ),
        (
            "create temp table t as select 7 as a",
            "select a from t",
            "7",
            PinReason::Temp,
        ),
        (
            "select pg_advisory_lock(77)",
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
            "1",
            PinReason::AdvisoryLock,
        ),
        (
            "prepare p as select 8",
            "execute p",
            "8",
            PinReason::SqlPrepare,
        ),
        (
            "begin; declare c cursor with hold for select 9; commit",
            "fetch c",
            "9",
            PinReason::Cursor,
        ),
    ] {
        let (_emulator, proxy) = sharing(2).await;
        let client = proxy.client().await;
        client.simple_query(statement).await.unwrap();
        let own = pid(&client).await;
        for _ in 0..5 {
            let other = proxy.client().await;
            assert_ne!(pid(&other).await, own, "{statement}");
        }
        assert_eq!(value(&client, look).await, expected, "{statement}");
        assert_eq!(proxy.pins(reason), 1, "{statement}");
        // The reset after it has gone gives the connection to the others again.
        drop(client);
        proxy.until_at_rest().await;
        let mut others = Vec::new();
        for _ in 0..2 {
            let other = proxy.client().await;
            other.simple_query("begin").await.unwrap();
            let seen = other.simple_query(look).await;
            let seen = seen.map(|rows| {
                rows.iter().find_map(|row| match row {
                    SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                    _ => None,
                })
            });
            assert!(
                !matches!(&seen, Ok(Some(value)) if value == expected),
                "{statement}: {seen:?}"
            );
            others.push(other);
        }
    }
}

#[tokio::test]
async fn settings_of_a_transaction_pin_nothing() {
    let (_emulator, proxy) = sharing(1).await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    for statement in [
        "begin; set local work_mem = '1MB'; commit",
        "begin; set transaction read only; commit",
        "begin; select set_config('app.user', 'a', true); commit",
        "create table if not exists transaction_mode (a int); update transaction_mode set a = 1",
        "select pg_advisory_xact_lock(1)",
        // Before a block that sets nothing.
        "set app.before = 'a'",
        "do $$ begin perform 1; end $$",
        "do $$ begin update transaction_mode set a = 2; end $$",
    ] {
        one.simple_query(statement).await.unwrap();
        assert_eq!(value(&other, "select 1").await, "1", "{statement}");
    }
    let pins = proxy.metrics().pool_pins.values();
    assert_eq!(pins.map(prometheus::IntCounter::get).sum::<u64>(), 0);
}

#[tokio::test]
async fn settings_follow_their_client() {
    let (_emulator, proxy) = sharing(1).await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    let show = "select concat_ws(' ', current_setting('work_mem'), current_setting('search_path'), current_setting('TimeZone'), current_setting('app.name', true))";
    let new = value(&other, show).await;
    one.simple_query("set work_mem = '123kB'; set search_path = mine; set time zone 'Asia/Tokyo'")
        .await
        .unwrap();
    one.simple_query("begin; set app.name = 'one'; commit")
        .await
        .unwrap();
    one.simple_query("begin; set work_mem = '1MB'; rollback")
        .await
        .unwrap();
    // By the extended protocol.
    let prepared = other.prepare("set work_mem = '321kB'").await.unwrap();
    other.execute(&prepared, &[]).await.unwrap();
    for _ in 0..3 {
        assert_eq!(value(&one, show).await, "123kB mine Asia/Tokyo one");
        assert_eq!(
            value(&other, show).await.trim_end(),
            new.replace("4MB", "321kB").trim_end()
        );
    }
    other.simple_query("reset work_mem").await.unwrap();
    one.simple_query("discard all").await.unwrap();
    assert_eq!(value(&one, show).await.trim_end(), new.trim_end());
    assert_eq!(value(&other, show).await.trim_end(), new.trim_end());
    let pins = proxy.metrics().pool_pins.values();
    assert_eq!(pins.map(prometheus::IntCounter::get).sum::<u64>(), 0);
}

#[tokio::test]
async fn a_setting_that_the_server_refuses_later_fails_the_request_alone() {
    let (_emulator, proxy) = sharing(1).await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    let superuser = harness::superuser().await;
    let user = value(&one, "select current_user").await;
    let grant = format!("create role for_a_while; grant for_a_while to \"{user}\"");
    superuser.batch_execute(&grant).await.unwrap();
    one.simple_query("set role for_a_while").await.unwrap();
    assert_eq!(value(&other, "select current_user").await, user);
    assert_eq!(value(&one, "select current_user").await, "for_a_while");
    assert_eq!(value(&other, "select current_user").await, user);
    let revoke = format!("revoke for_a_while from \"{user}\"");
    superuser.batch_execute(&revoke).await.unwrap();
    for _ in 0..2 {
        let error = one.simple_query("select 1").await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
        assert_eq!(value(&other, "select current_user").await, user);
    }
    let drop = "drop role for_a_while";
    superuser.batch_execute(drop).await.unwrap();
}

#[tokio::test]
async fn prepared_statements_stay_with_their_client() {
    let (_emulator, proxy) = sharing(2).await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    let named = one.prepare("select $1::int + 1").await.unwrap();
    for round in 0..10 {
        let row = one.query_one(&named, &[&round]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), round + 1);
        assert_eq!(value(&other, "select 1").await, "1");
    }
    let pins = proxy.metrics().pool_pins.values();
    assert_eq!(pins.map(prometheus::IntCounter::get).sum::<u64>(), 0);
}

#[tokio::test]
async fn the_unnamed_statement_is_never_another_clients() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    let mut other = proxy.session().await;
    one.send(&[extended("select 'one'"), sync()].concat()).await;
    one.until('Z').await;
    // Without a Parse of its own in this pipeline.
    let bind = [
        message('B', b"\0\0\0\0\0\0\0\0"),
        message('E', b"\0\0\0\0\0"),
    ]
    .concat();
    other.send(&[bind, sync()].concat()).await;
    let replies = other.until('Z').await;
    assert_eq!(replies[0].error().code, "26000");
    assert_eq!(other.value("select 1").await, "1");
    // Drivers that describe first bind in their next request.
    let parse = message('P', b"\0select 'mine'\0\0\0");
    one.send(&[parse, message('D', b"S\0"), sync()].concat())
        .await;
    one.until('Z').await;
    assert_eq!(other.value("select 2").await, "2");
    let bind = [
        message('B', b"\0\0\0\0\0\0\0\0"),
        message('E', b"\0\0\0\0\0"),
    ]
    .concat();
    one.send(&[bind, sync()].concat()).await;
    let replies = one.until('Z').await;
    let row = replies.iter().find(|reply| reply.tag == 'D').unwrap();
    assert_eq!(row.value(), "mine");
}

#[tokio::test]
async fn half_a_request_holds_no_connection() {
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let query = text('Q', "select 'whole'");
    one.send(&query[..query.len() - 3]).await;
    for _ in 0..3 {
        assert_eq!(other.value("select 1").await, "1");
    }
    one.send(&query[query.len() - 3..]).await;
    let replies = one.until('Z').await;
    assert_eq!(replies[1].value(), "whole");
    // A Sync alone needs none, and an error is due before its Sync.
    other.send(&text('Q', "begin")).await;
    other.until('Z').await;
    one.send(&sync()).await;
    assert_eq!(one.tags().await, "Z");
    other.send(&text('Q', "commit")).await;
    other.until('Z').await;
    one.send(&message('P', b"\0select broken from nowhere\0\0\0"))
        .await;
    assert_eq!(one.until('E').await.len(), 1);
    one.send(&sync()).await;
    assert_eq!(one.tags().await, "Z");
}

#[tokio::test]
async fn a_request_that_waits_too_long_fails_and_the_session_goes_on() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.query_wait_timeout = Some(millis(200));
    })
    .await;
    let (one, other) = (proxy.client().await, proxy.client().await);
    one.simple_query("begin").await.unwrap();
    let refused = other.simple_query("select 1").await.unwrap_err();
    let error = refused.as_db_error().unwrap();
    assert_eq!(error.code(), &SqlState::TOO_MANY_CONNECTIONS);
    assert_eq!(error.severity(), "ERROR");
    assert!(error.message().contains("query_wait_timeout"), "{error:?}");
    let refused = other.query("select 1", &[]).await.unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::TOO_MANY_CONNECTIONS));
    one.simple_query("commit").await.unwrap();
    assert_eq!(value(&other, "select 2").await, "2");
}

#[tokio::test]
async fn a_cancel_reaches_its_own_request_or_its_place_in_the_queue() {
    let (emulator, proxy) = sharing(1).await;
    let mut one = Wire::dial(proxy.address()).await;
    one.startup(&[("user", "anyone")]).await;
    let key = one.welcome().await.key;
    let other = proxy.client().await;
    // At rest there is nothing to cancel.
    cancel(proxy.address(), key).await;
    eventually("the cancel", async || {
        (proxy.metrics().cancels[CancelOutcome::AtRest].get() == 1).then_some(())
    })
    .await;
    assert_eq!(one.value("select 1").await, "1");
    assert_eq!(value(&other, "select 1").await, "1");
    // In the queue.
    other.simple_query("begin").await.unwrap();
    one.send(&text('Q', "select 1")).await;
    eventually("it waits", async || {
        (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
    })
    .await;
    cancel(proxy.address(), key).await;
    let replies = one.until('Z').await;
    assert_eq!(replies[0].error().code, "57014");
    assert_eq!(proxy.metrics().pool_clients_waiting.get(), 0);
    other.simple_query("commit").await.unwrap();
    // At work. The other client gets another connection, as PostgreSQL up to 17 signals twice.
    one.send(&text('Q', "select pg_sleep(60)")).await;
    harness::until_running(&emulator.identities().app.name, 1).await;
    cancel(proxy.address(), key).await;
    let replies = one.until('Z').await;
    assert_eq!(
        replies
            .iter()
            .find(|reply| reply.tag == 'E')
            .unwrap()
            .error()
            .code,
        "57014"
    );
    assert_eq!(one.value("select 3").await, "3");
    assert_eq!(value(&other, "select 3").await, "3");
    assert_eq!(proxy.metrics().pool_closes[PoolClose::Cancelled].get(), 1);
}

/// A client with its cancel key.
async fn logged_in(proxy: &Proxy) -> (Wire, [u8; 8]) {
    let mut client = Wire::dial(proxy.address()).await;
    client
        .startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    let key = client.welcome().await.key;
    (client, key)
}

/// The request of another client than `one`, whose cancel is still on its way, is not canceled.
async fn another_is_served(proxy: &Proxy, mode: PoolMode, one: Wire) {
    // In session mode a client leaves before another gets its connection; else it stays.
    let _one = (mode != PoolMode::Session).then_some(one);
    let (mut other, _) = logged_in(proxy).await;
    other.send(&text('Q', "select pg_sleep(0.6)")).await;
    assert_eq!(other.tags().await, "TDCZ", "{mode:?}");
}

/// The error of a canceled request does not prove that the cancel has arrived: another may have ended the request.
#[tokio::test]
async fn a_late_cancel_reaches_no_other_client_although_another_has_ended_its_request() {
    for mode in [PoolMode::Session, PoolMode::Transaction, PoolMode::Auto] {
        let (emulator, proxy) = proxy_in(mode, 1).await;
        emulator.faults().once(Site::Cancel, Action::Defer(300));
        let (mut one, key) = logged_in(&proxy).await;
        one.send(&text('Q', "select pg_sleep(60)")).await;
        let role = &emulator.identities().app.name;
        harness::until_running(role, 1).await;
        cancel(proxy.address(), key).await;
        let sql = "select pg_cancel_backend(pid) from pg_stat_activity where usename = $1";
        let superuser = harness::superuser().await;
        superuser.query_one(sql, &[role]).await.unwrap();
        assert_eq!(one.tags().await, "TEZ");
        another_is_served(&proxy, mode, one).await;
        assert_eq!(proxy.metrics().pool_closes[PoolClose::Cancelled].get(), 1);
    }
}

/// The edge closes the connection of a cancel request before the server has the signal.
#[tokio::test]
async fn a_connection_that_a_cancel_may_still_reach_is_closed_at_rest() {
    let (emulator, proxy) = sharing(1).await;
    let mut one = Wire::dial(proxy.address()).await;
    one.startup(&[("user", "anyone")]).await;
    let key = one.welcome().await.key;
    let other = proxy.client().await;
    let quiet = "do 'begin perform pg_sleep(60); exception when query_canceled then null; end'";
    one.send(&text('Q', quiet)).await;
    harness::until_running(&emulator.identities().app.name, 1).await;
    cancel(proxy.address(), key).await;
    one.until('Z').await;
    assert_eq!(value(&other, "select 1").await, "1");
    assert_eq!(one.value("select 2").await, "2");
    assert_eq!(proxy.metrics().pool_closes[PoolClose::Cancelled].get(), 1);
}

/// The edge closes the connection of the cancel request long before it signals the server, which is at another client's request
/// by then if the connection is given away.
#[tokio::test]
async fn a_late_cancel_reaches_no_other_client_although_its_own_stays() {
    for mode in [PoolMode::Session, PoolMode::Transaction, PoolMode::Auto] {
        let (emulator, proxy) = proxy_in(mode, 1).await;
        let mut late = 0;
        while late < 3 {
            emulator.faults().once(Site::Cancel, Action::Defer(300));
            let (mut one, key) = logged_in(&proxy).await;
            one.send(&text('Q', "select pg_sleep(0.1)")).await;
            cancel(proxy.address(), key).await;
            match one.tags().await.as_str() {
                "TDCZ" => late += 1,
                // The machine is busy: the query took until the cancel came.
                tags => assert_eq!(tags, "TEZ"),
            }
            another_is_served(&proxy, mode, one).await;
        }
    }
}

#[tokio::test]
async fn clients_at_rest_do_not_notice_that_their_servers_end() {
    let (emulator, proxy) = sharing(2).await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        let client = proxy.client().await;
        assert_eq!(value(&client, "select 1").await, "1");
        clients.push(client);
    }
    proxy.until_at_rest().await;
    let superuser = harness::superuser().await;
    let sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = $1";
    let role = emulator.identities().app.name.clone();
    superuser.query_one(sql, &[&role]).await.unwrap();
    proxy.until_idle(0).await;
    for client in &clients {
        assert_eq!(value(client, "select 2").await, "2");
    }
}

#[tokio::test]
async fn a_client_that_leaves_in_a_transaction_leaves_nothing() {
    let (_emulator, proxy) = sharing(1).await;
    let one = proxy.client().await;
    one.simple_query("create table if not exists left_behind (a int)")
        .await
        .unwrap();
    one.simple_query("begin; lock table left_behind")
        .await
        .unwrap();
    drop(one);
    let other = proxy.client().await;
    assert_eq!(value(&other, "select count(*) from left_behind").await, "0");
}

#[tokio::test]
async fn a_shutdown_ends_clients_at_rest_at_once() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    proxy.until_idle(1).await;
    let began = Instant::now();
    let ended = proxy.end(async {
        let error = one.until('E').await;
        assert_eq!(error[0].error().code, "57P01");
        one.closed().await;
    });
    within("the end", ended).await;
    assert!(began.elapsed() < Duration::from_secs(5));
}

/// Its messages pass as they are on a connection that no other client has had, which still has what the reset ends.
#[tokio::test]
async fn a_reset_without_a_server_ends_statements_of_the_clients_own_connection() {
    let (_emulator, proxy) = sharing(1).await;
    let mut one = proxy.session().await;
    let prepare = |name| [statements::prepare(name, "select 1"), sync()].concat();
    let execute = |name| [statements::execute(name, &[]), sync()].concat();
    for (reset, tags) in [
        ("DISCARD ALL", "CZ"),
        ("DEALLOCATE ALL", "CZ"),
        ("CLOSE ALL; UNLISTEN *", "CCZ"),
    ] {
        for name in ["mine", ""] {
            one.send(&prepare(name)).await;
            assert_eq!(one.tags().await, "1Z", "{name:?} before {reset}");
            one.send(&text('Q', reset)).await;
            assert_eq!(one.tags().await, tags);
            one.send(&execute(name)).await;
            let replies = one.until('Z').await;
            if name.is_empty() || tags == "CZ" {
                assert_eq!(replies[0].error().code, "26000", "{name:?} after {reset}");
            } else {
                assert_eq!(replies[0].tag, '2', "{name:?} after {reset}");
            }
        }
    }
    assert_eq!(proxy.metrics().pool_local_answers.get(), 6);
}

/// By Npgsql, asyncpg and others, whenever a connection returns to the application's own pool.
#[tokio::test]
async fn a_reset_by_a_driver_needs_no_server_if_there_is_nothing_to_reset() {
    let (_emulator, proxy) = sharing(1).await;
    let local = || proxy.metrics().pool_local_answers.get();
    let mut one = proxy.session().await;
    let mut other = proxy.session().await;
    for client in [&mut one, &mut other] {
        let prepare = [message('P', b"mine\0select 1\0\0\0"), sync()].concat();
        client.send(&prepare).await;
        client.until('Z').await;
    }
    let asyncpg = "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;";
    one.send(&text('Q', asyncpg)).await;
    assert_eq!(one.tags().await, "TDCCCCZ");
    one.send(&text('Q', "DISCARD ALL")).await;
    let replies = one.until('Z').await;
    assert_eq!(&replies[0].body[..], b"DISCARD ALL\0");
    assert_eq!(local(), 2);
    // Its own statement is gone, and not that of the other client on the same connection.
    let execute = |name| [statements::execute(name, &[]), sync()].concat();
    one.send(&execute("mine")).await;
    assert_eq!(one.until('Z').await[0].error().code, "26000");
    let names = "select count(*) from pg_prepared_statements";
    assert_eq!(other.value(names).await, "1");
    other.send(&execute("mine")).await;
    assert_eq!(other.tags().await, "2TDCZ");
    // With something to reset, and within a transaction, it is the server's.
    one.query("set app.owner = 'mine'").await;
    one.query("reset all").await;
    assert_eq!(one.value("select current_setting('app.owner')").await, "");
    one.query("begin").await;
    one.send(&text('Q', "discard all")).await;
    assert_eq!(one.until('Z').await[0].error().code, "25001");
    one.query("rollback").await;
    assert_eq!(local(), 2);
}

/// DISCARD ALL commits at once, and the error behind it undoes nothing of that.
#[tokio::test]
async fn settings_are_discarded_although_the_pipeline_fails_behind_that() {
    let (_emulator, proxy) = sharing(1).await;
    let superuser = harness::superuser().await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let user = one.value("select current_user").await;
    let role = "discarded_role";
    let grant =
        format!("drop role if exists {role}; create role {role}; grant {role} to \"{user}\"");
    superuser.batch_execute(&grant).await.unwrap();
    for client in [&mut one, &mut other] {
        client
            .query(&format!("set role {role}; set work_mem = '123kB'"))
            .await;
    }
    let pipeline = [extended("discard all"), extended("select 1/0"), sync()];
    one.send(&pipeline.concat()).await;
    one.until('Z').await;
    let look = "select current_user || ' ' || current_setting('work_mem')";
    for _ in 0..2 {
        assert_eq!(other.value(look).await, format!("{role} 123kB"));
        assert_eq!(one.value(look).await, format!("{user} 4MB"));
    }
    superuser
        .batch_execute(&format!("drop role {role}"))
        .await
        .unwrap();
}

/// Postgres removes a setting of a prefix that an extension claims later, and then there is none to reset.
#[tokio::test]
async fn a_setting_that_cannot_be_reset_is_no_other_clients_concern() {
    let (emulator, proxy) = sharing(1).await;
    let superuser = harness::superuser().await;
    let function = "create or replace function in_plpgsql() returns int language plpgsql as 'begin return 1; end'";
    superuser.batch_execute(function).await.unwrap();
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("set plpgsql.unknown = '1'").await;
    assert_eq!(one.value("select in_plpgsql()").await, "1");
    assert_eq!(other.value("select 7").await, "7");
    let mut new = proxy.session().await;
    assert_eq!(new.value("select 8").await, "8");
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn the_name_of_an_application_is_what_its_login_sets_wherever_that_stands() {
    let (_emulator, proxy) = sharing(1).await;
    let mut clients = Vec::new();
    for (parameter, value, name) in [
        ("options", "-c application_name=jobs", "jobs"),
        ("application_name", "web", "web"),
        ("client_encoding", "UTF8", ""),
        // Longer than the server keeps.
        ("application_name", &"x".repeat(70), &"x".repeat(63)),
    ] {
        let mut wire = proxy.dial().await;
        let parameters = [
            ("user", "anyone"),
            ("database", DATABASE),
            (parameter, value),
        ];
        wire.startup(&parameters).await;
        wire.welcome().await;
        clients.push((wire, name.to_owned()));
    }
    for _ in 0..2 {
        for (client, name) in &mut clients {
            assert_eq!(client.value("show application_name").await, *name);
        }
        let (client, name) = &mut clients[0];
        client
            .query("set application_name = 'other'; reset all")
            .await;
        assert_eq!(client.value("show application_name").await, *name);
    }
}

/// Strings are read differently from then on, so that what is set is not known.
#[tokio::test]
async fn strings_of_another_standard_pin_from_their_first_statement_on() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    one.query("begin").await;
    one.query("set local standard_conforming_strings = off; set local escape_string_warning = off")
        .await;
    one.query(r"set app.token = '\'secret'").await;
    one.query("commit").await;
    for _ in 0..2 {
        assert_eq!(other.value("select 1").await, "1");
        assert_eq!(one.value("show app.token").await, "'secret");
    }
    assert_eq!(proxy.pins(PinReason::Unparsed), 1);
}
