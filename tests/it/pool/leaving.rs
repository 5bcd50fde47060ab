//! Clients that leave at any point: their connection returns clean or is closed, and their work ends.

use lakebase_proxy::telemetry::labels::Direction;

use super::*;
use crate::harness::wire::{Wire, extended};

const MODES: [PoolMode; 2] = [PoolMode::Session, PoolMode::Transaction];

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_request_leaves_no_connection_behind() {
    let (_emulator, proxy) = proxy(1).await;
    let parts: [&[u8]; 4] = [
        b"Q\0\0\0\x20select",
        b"P\0\0\0\x10\0select 1\0\0\0", // and no Sync
        b"Q\0\0\0\x12select 1;",
        b"X\0\0",
    ];
    for part in parts {
        let mut wire = proxy.session().await;
        wire.send(part).await;
        drop(wire);
        assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    }
    proxy.until_idle(1).await;
    assert_eq!(proxy.closes(PoolClose::Abandoned), 4);
}

#[tokio::test]
async fn an_abandoned_query_is_cancelled_and_its_locks_are_released() {
    for mode in MODES {
        an_abandoned_query_is_cancelled_and_its_locks_are_released_in(mode).await;
    }
}

async fn an_abandoned_query_is_cancelled_and_its_locks_are_released_in(mode: PoolMode) {
    let (emulator, proxy) = proxy_in(mode, 2).await;
    let role = emulator.identities().app.name.clone();
    let mut wire = proxy.session().await;
    wire.send(&text('Q', "select pg_advisory_lock(77), pg_sleep(60)"))
        .await;
    harness::until_running(&role, 1).await;
    // A reset, as of a process that is killed.
    wire.reset();
    let client = proxy.client().await;
    within(
        "the lock",
        client.batch_execute("select pg_advisory_lock(77)"),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn a_cancelled_connection_is_not_given_to_another_client() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let client = proxy.client().await;
    let token = client.cancel_token();
    let query =
        TaskTracker::new().spawn(async move { client.batch_execute("select pg_sleep(60)").await });
    harness::until_running(&role, 1).await;
    token.cancel_query(NoTls).await.unwrap();
    let error = query.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    assert_eq!(proxy.closes(PoolClose::Cancelled), 1);
    assert_eq!(emulator.counts().logins, 2);
}

/// How a client leaves.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Terminate,
    Fin,
    Reset,
}

impl Leave {
    const ALL: [Self; 3] = [Self::Terminate, Self::Fin, Self::Reset];

    async fn leave(self, mut wire: Wire) {
        match self {
            Self::Terminate => wire.send(&terminate()).await,
            Self::Fin => {}
            Self::Reset => wire.reset(),
        }
    }
}

#[tokio::test]
async fn a_row_lock_of_a_client_that_left_is_released_at_once_and_the_connection_is_kept() {
    for mode in MODES {
        a_row_lock_of_a_client_that_left_is_released_at_once_and_the_connection_is_kept_in(mode)
            .await;
    }
}

async fn a_row_lock_of_a_client_that_left_is_released_at_once_and_the_connection_is_kept_in(
    mode: PoolMode,
) {
    let (emulator, proxy) = proxy_in(mode, 1).await;
    let role = emulator.identities().app.name.clone();
    let table = "pool_row_lock";
    let mut wire = proxy.session().await;
    wire.query(&format!(
        "create table {table} (a int); insert into {table} values (1)"
    ))
    .await;
    let first = wire.value("select pg_backend_pid()").await;
    drop(wire);
    let superuser = harness::superuser().await;
    for leave in Leave::ALL {
        for is_failed in [false, true] {
            let mut wire = proxy.session().await;
            wire.query(&format!("begin; update {table} set a = a + 1"))
                .await;
            if is_failed {
                wire.send(&text('Q', "select 1/0")).await;
                wire.until('Z').await;
            }
            leave.leave(wire).await;
            let look = format!(
                "set lock_timeout = '1s'; select a from {table} for update; reset lock_timeout"
            );
            superuser.batch_execute(&look).await.unwrap();
            let client = proxy.client().await;
            assert_eq!(
                pid(&client).await,
                first,
                "{leave:?}, {is_failed}: {}",
                proxy.close_reasons()
            );
            let value = value(&client, &format!("select a from {table}")).await;
            assert_eq!(value, "1", "rolled back");
        }
    }
    let client = proxy.client().await;
    client
        .batch_execute(&format!("drop table {table}"))
        .await
        .unwrap();
    assert_eq!(emulator.counts().logins, 1);
    assert_eq!(harness::backends(&superuser, &role).await, 1);
}

/// Every one of them would leave the server in the middle of something.
#[tokio::test]
async fn leaving_anywhere_leaves_the_full_capacity_and_nothing_of_the_work() {
    for mode in MODES {
        leaving_anywhere_leaves_the_full_capacity_and_nothing_of_the_work_in(mode).await;
    }
}

async fn leaving_anywhere_leaves_the_full_capacity_and_nothing_of_the_work_in(mode: PoolMode) {
    const SIZE: usize = 2;
    let (emulator, proxy) = proxy_in(mode, SIZE).await;
    let role = emulator.identities().app.name.clone();
    let mut wire = proxy.session().await;
    wire.query("create table pool_left (a text)").await;
    drop(wire);
    let copy = text('Q', "copy pool_left from stdin");
    let insert = "insert into pool_left values ('left')";
    let points: [(&str, Vec<u8>, Vec<u8>); 8] = [
        ("COPY IN", copy.clone(), Vec::new()),
        ("after CopyData", copy.clone(), message('d', b"left\n")),
        ("in CopyData", copy.clone(), b"d\0\0\0\x20left".to_vec()),
        (
            "COPY IN by extended query",
            [extended("copy pool_left from stdin"), message('H', b"")].concat(),
            message('d', b"left\n"),
        ),
        ("in Query", Vec::new(), b"Q\0\0\0\x60insert into".to_vec()),
        ("without Sync", Vec::new(), extended(insert)),
        (
            "after Flush",
            Vec::new(),
            [extended(insert), message('H', b"")].concat(),
        ),
        (
            "in an error before Sync",
            Vec::new(),
            [extended("select 1/0"), message('H', b"")].concat(),
        ),
    ];
    for round in 0..3 * SIZE {
        for (what, first, then) in &points {
            let leave = Leave::ALL[round % Leave::ALL.len()];
            let mut wire = proxy.session().await;
            if !first.is_empty() {
                wire.send(first).await;
                wire.until('G').await;
            }
            wire.send(then).await;
            leave.leave(wire).await;
            let left = within(what, async {
                let client = proxy.client().await;
                value(&client, "select count(*) from pool_left").await
            })
            .await;
            assert_eq!(left, "0", "{what}, {leave:?}");
        }
    }
    let clients = [proxy.client().await, proxy.client().await];
    for client in &clients {
        client.batch_execute("begin").await.unwrap();
    }
    assert_ne!(pid(&clients[0]).await, pid(&clients[1]).await);
    clients[0].batch_execute("commit").await.unwrap();
    clients[0]
        .batch_execute("drop table pool_left")
        .await
        .unwrap();
    drop(clients);
    proxy.until_idle(2).await;
    // What the metrics, the edge and the server count agrees.
    assert_eq!(proxy.metrics().pool_clients_waiting.get(), 0);
    eventually("no other connection", async || {
        let active = proxy.metrics().upstream_active.get();
        (active == 2 && emulator.counts().sessions == 2).then_some(())
    })
    .await;
    let superuser = harness::superuser().await;
    eventually("no other backend", async || {
        (harness::backends(&superuser, &role).await == 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_result_that_is_not_read_is_cancelled_and_not_drained() {
    for mode in MODES {
        a_result_that_is_not_read_is_cancelled_and_not_drained_in(mode).await;
    }
}

async fn a_result_that_is_not_read_is_cancelled_and_not_drained_in(mode: PoolMode) {
    let (emulator, proxy) = proxy_in(mode, 1).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    for leave in [Leave::Fin, Leave::Reset] {
        let mut wire = proxy.session().await;
        let before = proxy.metrics().relay_bytes[Direction::FromServer].get();
        let query = "select repeat('x', 100000) from generate_series(1, 500)";
        wire.send(&text('Q', query)).await;
        wire.next().await;
        let closes = proxy.closes(PoolClose::Abandoned);
        leave.leave(wire).await;
        eventually("it is closed", async || {
            (proxy.closes(PoolClose::Abandoned) == closes + 1).then_some(())
        })
        .await;
        let relayed = proxy.metrics().relay_bytes[Direction::FromServer].get() - before;
        assert!(relayed < 40_000_000, "{relayed} of 50,000,000 bytes");
        eventually("the backend ends", async || {
            (harness::backends(&superuser, &role).await == 0).then_some(())
        })
        .await;
    }
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
}

/// A client that leaves before it has its welcome costs no connection.
#[tokio::test]
async fn a_client_that_leaves_at_its_login_leaves_the_connection_to_the_next_one() {
    for mode in MODES {
        let (emulator, proxy) = proxy_in(mode, 1).await;
        drop(proxy.session().await);
        proxy.until_idle(1).await;
        for _ in 0..100 {
            let mut wire = proxy.dial().await;
            wire.startup(&[("user", "anyone"), ("database", DATABASE)])
                .await;
            wire.reset();
        }
        assert_eq!(value(&proxy.client().await, "select 1").await, "1");
        proxy.until_at_rest().await;
        assert_eq!(emulator.counts().logins, 1, "{}", proxy.close_reasons());
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_delays_no_other_client_and_fills_no_memory() {
    for mode in MODES {
        a_client_that_does_not_read_delays_no_other_client_and_fills_no_memory_in(mode).await;
    }
}

async fn a_client_that_does_not_read_delays_no_other_client_and_fills_no_memory_in(mode: PoolMode) {
    let (_emulator, proxy) = proxy_in(mode, 4).await;
    let mut stalled = proxy.session().await;
    let copy = "copy (select repeat('x', 1000) from generate_series(1, 200000)) to stdout";
    stalled.send(&text('Q', copy)).await;
    stalled.next().await;
    let relayed = || proxy.metrics().relay_bytes[Direction::FromServer].get();
    // Until the pipe is full: the others receive less than 1 kB each.
    loop {
        let before = relayed();
        for _ in 0..20 {
            let clients = [
                proxy.client().await,
                proxy.client().await,
                proxy.client().await,
            ];
            for client in &clients {
                assert_eq!(value(client, "select 1").await, "1");
            }
        }
        if relayed() - before < 100_000 {
            break;
        }
    }
    let unread = relayed();
    assert!(unread < 20_000_000, "{unread} bytes in buffers");
    // It is served to the end once it reads.
    let rows = stalled.until('Z').await;
    assert_eq!(rows.iter().filter(|row| row.tag == 'd').count(), 200_000);
    drop(stalled);
    proxy.until_at_rest().await;
}

/// Its next request waits for another connection, as another client waits for its own.
#[tokio::test]
async fn a_client_that_leaves_while_its_next_request_gives_way_leaves_no_connection_behind() {
    for mode in [PoolMode::Transaction, PoolMode::Auto] {
        for leave in [Leave::Terminate, Leave::Fin] {
            let (_emulator, proxy) = proxy_in(mode, 1).await;
            let (mut one, mut other) = (proxy.session().await, proxy.session().await);
            one.query("begin").await;
            other.send(&text('Q', "select 'served'")).await;
            eventually("it waits", async || {
                (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
            })
            .await;
            let mut requests = [text('Q', "commit"), text('Q', "select 2")].concat();
            if matches!(leave, Leave::Terminate) {
                requests.extend(terminate());
            }
            one.send(&requests).await;
            drop(one);
            let replies = within("the client that waits", other.until('Z')).await;
            assert_eq!(replies[1].value(), "served", "{mode:?}, {leave:?}");
            let mut next = proxy.session().await;
            assert_eq!(next.value("select 1").await, "1", "{mode:?}, {leave:?}");
        }
    }
}
