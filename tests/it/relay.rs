//! After ReadyForQuery: every kind of conversation passes, and each side's end becomes the other's.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, TryStreamExt, future::join_all, pin_mut};
use lakebase_proxy::{
    emulator::{Action, Disruption, Fault, OnSuspend, Site},
    telemetry::labels::Direction,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::Instant,
};
use tokio_postgres::{AsyncMessage, SimpleQueryMessage, error::SqlState};

use crate::harness::{
    self, Proxy, backends, eventually, superuser,
    wire::{Wire, extended, message, sync, terminate, text},
    within,
};

#[tokio::test]
async fn simple_queries_pass_with_rows_errors_and_empty_ones() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    wire.send(&text(
        'Q',
        "select 1; select 'two', 3; select from notes limit 0",
    ))
    .await;
    assert_eq!(wire.tags().await, "TDCTDCTCZ");
    wire.send(&text('Q', "select 1; select no_such_column; select 3"))
        .await;
    assert_eq!(wire.tags().await, "TDCEZ");
    wire.send(&text('Q', "")).await;
    assert_eq!(wire.tags().await, "IZ");
    wire.send(&text('Q', "begin; select 1/0")).await;
    let reply = wire.until('Z').await;
    assert_eq!(reply.last().unwrap().body[0], b'E', "a failed transaction");
    assert_eq!(wire.query("rollback").await.len(), 0);
    // Far more than any buffer, both ways.
    let long = "x".repeat(3_000_000);
    assert_eq!(
        wire.value(&format!("select length('{long}')")).await,
        "3000000"
    );
    assert_eq!(
        wire.value("select repeat('y', 5000000)").await.len(),
        5_000_000
    );
    assert_eq!(
        wire.query("select repeat('z', 100) from generate_series(1, 20000)")
            .await
            .len(),
        20_000
    );
}

#[tokio::test]
async fn the_extended_protocol_passes_and_a_pipeline_recovers_at_its_sync() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let client = proxy.client().await;
    let statement = client
        .prepare("select $1::int + 1, $2::text")
        .await
        .unwrap();
    // The driver pipelines what is awaited together.
    let rows = join_all((0..100).map(|n| {
        let (client, statement) = (&client, &statement);
        async move {
            client
                .query_one(statement, &[&n, &"text"])
                .await
                .unwrap()
                .get::<_, i32>(0)
        }
    }))
    .await;
    assert_eq!(rows, (1..=100).collect::<Vec<_>>());

    let mut wire = proxy.session().await;
    let pipeline = [
        extended("select 1"),
        extended("select 1 / (1 - n) from generate_series(1, 3) n"),
        extended("select 2"),
        sync(),
        extended("select 3"),
        sync(),
        text('Q', "select 4"),
    ];
    wire.send(&pipeline.concat()).await;
    assert_eq!(
        wire.tags().await,
        "12DC12EZ",
        "what follows the error is skipped up to the Sync"
    );
    assert_eq!(wire.tags().await, "12DCZ");
    assert_eq!(wire.tags().await, "TDCZ");

    // Flush brings answers without a ReadyForQuery.
    wire.send(&[extended("select 5"), message('H', b"")].concat())
        .await;
    for expected in ['1', '2', 'D', 'C'] {
        assert_eq!(wire.next().await.tag, expected);
    }
    wire.send(&sync()).await;
    assert_eq!(wire.tags().await, "Z");

    // A portal read in portions, a describe, a close.
    let portions = [
        message('P', b"s\0select * from generate_series(1,3)\0\0\0"),
        message('D', b"Ss\0"),
        message('B', b"\0s\0\0\0\0\0\0\0"),
        message('E', b"\0\0\0\0\x02"),
        message('E', b"\0\0\0\0\x02"),
        message('C', b"Ss\0"),
        sync(),
    ];
    wire.send(&portions.concat()).await;
    assert_eq!(wire.tags().await, "1tT2DDsDC3Z");
}

#[tokio::test]
async fn copy_passes_in_and_out_and_fails_cleanly() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let client = proxy.client().await;
    client
        .batch_execute("create temp table t (n int, filler text)")
        .await
        .unwrap();
    let sink = client.copy_in("copy t from stdin").await.unwrap();
    pin_mut!(sink);
    let row = format!("1\t{}\n", "x".repeat(500));
    let rows = row.repeat(1000);
    for _ in 0..10 {
        sink.send(Bytes::from(rows.clone())).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 10_000);
    let out: Vec<Bytes> = client
        .copy_out("copy t to stdout")
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(out.iter().map(Bytes::len).sum::<usize>(), rows.len() * 10);

    let mut wire = proxy.session().await;
    wire.query("create temp table t (n int)").await;
    // The client gives up; the client sends nonsense; the client goes on in the extended protocol.
    for (data, ending) in [
        ("1\n", text('f', "changed my mind")),
        ("one\n", message('c', b"")),
    ] {
        wire.send(&text('Q', "copy t from stdin")).await;
        assert_eq!(wire.next().await.tag, 'G');
        wire.send(&[message('d', data.as_bytes()), ending].concat())
            .await;
        assert_eq!(wire.tags().await, "EZ");
    }
    wire.send(&[extended("copy t from stdin"), sync()].concat())
        .await;
    assert_eq!(wire.next().await.tag, '1');
    assert_eq!(wire.next().await.tag, '2');
    assert_eq!(wire.next().await.tag, 'G');
    // The Sync was swallowed by the copy, so that another ends it.
    wire.send(&[message('d', b"1\n2\n"), message('c', b""), sync()].concat())
        .await;
    assert_eq!(wire.tags().await, "CZ");
    assert_eq!(wire.value("select count(*) from t").await, "2");
    wire.send(&text('Q', "copy t to stdout")).await;
    assert_eq!(wire.tags().await, "HddcCZ");
}

#[tokio::test]
async fn a_function_call_passes() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    let oid: u32 = wire
        .value("select 'length(text)'::regprocedure::oid")
        .await
        .parse()
        .unwrap();
    // One argument in text, the result in text.
    let call = [
        &oid.to_be_bytes()[..],
        b"\0\0",
        b"\0\x01",
        &5_u32.to_be_bytes(),
        b"hello",
        b"\0\0",
    ]
    .concat();
    wire.send(&message('F', &call)).await;
    let reply = wire.until('Z').await;
    assert_eq!(reply[0].tag, 'V');
    assert_eq!(&reply[0].body[..], b"\0\0\0\x015");
    assert_eq!(wire.value("select 1").await, "1");
}

#[tokio::test]
async fn notifications_and_notices_arrive_unasked() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let (listener, mut messages) = proxy.client_with_messages().await;
    let channel = format!("channel_{}", proxy.address().port());
    listener
        .batch_execute(&format!("listen {channel}"))
        .await
        .unwrap();
    let sender = proxy.client().await;
    sender
        .execute("select pg_notify($1, 'hello')", &[&channel])
        .await
        .unwrap();
    let got = within("a notification", messages.recv())
        .await
        .unwrap()
        .unwrap();
    let AsyncMessage::Notification(got) = got else {
        panic!("{got:?}")
    };
    assert_eq!((got.channel(), got.payload()), (channel.as_str(), "hello"));

    listener
        .batch_execute("do $$ begin raise notice 'look here'; end $$")
        .await
        .unwrap();
    let got = within("a notice", messages.recv()).await.unwrap().unwrap();
    assert!(matches!(got, AsyncMessage::Notice(notice) if notice.message() == "look here"));
}

#[tokio::test]
async fn a_client_that_closes_its_half_still_gets_its_replies() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    wire.send(
        &[
            text('Q', "select pg_sleep(0.3)"),
            text('Q', "select repeat('x', 1000000)"),
            terminate(),
        ]
        .concat(),
    )
    .await;
    wire.stream.shutdown().await.unwrap();
    assert_eq!(wire.tags().await, "TDCZ");
    assert_eq!(wire.until('Z').await[1].value().len(), 1_000_000);
    wire.closed().await;
    proxy.until_quiet().await;
    assert_eq!(emulator.counts().sessions, 0);
}

/// A client that has closed its half waits for its answer; one that is gone does not, nor does its query.
#[tokio::test]
async fn a_client_that_breaks_after_it_has_closed_its_half_ends_its_session() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    wire.send(&text('Q', "select pg_sleep(600)")).await;
    wire.stream.shutdown().await.unwrap();
    harness::until_running(&emulator.identities().app.name, 1).await;
    wire.reset();
    proxy.until_quiet().await;
}

/// How a client leaves in the middle of something.
#[derive(Clone, Copy, Debug)]
enum Leave {
    Close,
    Reset,
    Terminate,
}

async fn leave(mut wire: Wire, how: Leave) {
    match how {
        Leave::Close => drop(wire),
        Leave::Reset => wire.reset(),
        Leave::Terminate => wire.send(&terminate()).await,
    }
}

/// Brings a session into the middle of something that the server notices the end of.
async fn begin<S: AsyncRead + AsyncWrite + Unpin>(wire: &mut Wire<S>, what: usize) {
    match what {
        0 => drop(wire.query("select 1").await),
        1 => drop(wire.query("begin; select 1").await),
        2 => {
            wire.query("create temp table t (a text)").await;
            wire.send(&text('Q', "copy t from stdin")).await;
            assert_eq!(wire.next().await.tag, 'G');
            // Half a message.
            wire.send(&message('d', &[b'x'; 100])[..50]).await;
        }
        3 => {
            wire.send(&text(
                'Q',
                "copy (select repeat('x', 1000) from generate_series(1, 1000000)) to stdout",
            ))
            .await;
            assert_eq!(wire.next().await.tag, 'H');
        }
        _ => {
            wire.send(&extended("select 1")).await;
            wire.send(&message('H', b"")).await;
            assert_eq!(wire.next().await.tag, '1');
        }
    }
}

#[tokio::test]
async fn a_client_that_dies_takes_its_session_with_it_as_soon_as_a_direct_one_would() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let superuser = superuser().await;
    let role = emulator.identities().app.name.clone();
    for what in 0..5 {
        for how in [Leave::Close, Leave::Reset, Leave::Terminate] {
            if what == 2 && matches!(how, Leave::Terminate) {
                continue; // Inside half a message it would be data.
            }
            let mut wire = proxy.session().await;
            begin(&mut wire, what).await;
            assert_eq!(backends(&superuser, &role).await, 1);
            let began = Instant::now();
            leave(wire, how).await;
            eventually("the server's session ends", async || {
                (backends(&superuser, &role).await == 0).then_some(())
            })
            .await;
            let through = began.elapsed();
            proxy.until_quiet().await;

            let mut direct = Wire::direct(&emulator).await;
            begin(&mut direct, what).await;
            assert_eq!(backends(&superuser, &role).await, 1);
            let began = Instant::now();
            drop(direct);
            eventually("the direct session ends", async || {
                (backends(&superuser, &role).await == 0).then_some(())
            })
            .await;
            let limit = began.elapsed() + Duration::from_secs(1);
            assert!(
                through < limit,
                "{what} {how:?}: {through:?}, a direct one {:?}",
                began.elapsed()
            );
        }
    }
}

#[tokio::test]
async fn a_client_that_dies_in_a_transaction_leaves_no_lock_and_no_row() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let observer = proxy.client().await;
    let table = format!("orphans_{}", proxy.address().port());
    observer
        .batch_execute(&format!("create table {table} (n int)"))
        .await
        .unwrap();
    let mut wire = proxy.session().await;
    wire.query(&format!(
        "begin; insert into {table} values (1); lock table {table}"
    ))
    .await;
    wire.reset();
    // Waits for the lock, so that it ends when the transaction has.
    let count = within(
        "the lock",
        observer.query_one(&format!("select count(*) from {table}"), &[]),
    )
    .await;
    assert_eq!(count.unwrap().get::<_, i64>(0), 0);
    observer
        .batch_execute(&format!("drop table {table}"))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_servers_final_error_arrives_intact() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    // Idle, in a transaction, in a query, in the middle of a COPY both ways.
    for what in ["", "begin", "select pg_sleep(60)", "copy notes from stdin"] {
        let mut wire = proxy.session().await;
        match what {
            "" | "begin" => drop(wire.query(what).await),
            _ => wire.send(&text('Q', what)).await,
        }
        if what.starts_with("copy") {
            assert_eq!(wire.next().await.tag, 'G');
        } else if what.contains("sleep") {
            let superuser = superuser().await;
            let query = "select 1 from pg_stat_activity where usename = $1 and query like '%sleep%' and state = 'active'";
            let role = emulator.identities().app.name.clone();
            eventually("the query runs", async || {
                superuser.query_opt(query, &[&role]).await.unwrap()
            })
            .await;
        }
        emulator.terminate_sessions().await;
        if what.contains("sleep") {
            assert_eq!(wire.next().await.tag, 'T');
        }
        let error = wire.refusal().await;
        assert_eq!(error.code, "57P01", "{what}");
        assert_eq!(
            error.message, "terminating connection due to administrator command",
            "the server's own words"
        );
        assert_eq!(error.detail, None, "{what}");
    }
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_server_that_is_lost_without_a_word_is_explained_between_messages_only() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for disruption in [Disruption::Close, Disruption::Reset] {
        for what in ["select 1", "begin"] {
            let mut wire = proxy.session().await;
            wire.query(what).await;
            emulator.disrupt_sessions(disruption);
            let error = wire.refusal().await;
            assert_eq!(error.code, "08006", "{disruption:?}");
            assert!(error.message.contains("Lakebase endpoint"), "{error:?}");
            assert!(
                error.hint.as_deref().unwrap().contains("Connect again"),
                "{error:?}"
            );
        }
    }
    // In the middle of a row a message of ours would be taken for part of it.
    for action in [Action::Close, Action::Reset] {
        let fault = Fault::new(Site::Session, action);
        emulator
            .faults()
            .add(fault.times(1).after_bytes(50_000))
            .unwrap();
        let mut wire = proxy.session().await;
        wire.send(&text('Q', "select repeat('x', 1000000)")).await;
        let mut all = Vec::new();
        let read = within("the end", wire.stream.read_to_end(&mut all)).await;
        assert!(
            read.is_ok(),
            "not a reset, which would lose bytes that had arrived"
        );
        assert!(all.len() <= 50_000 && !all.contains(&0x5a), "{}", all.len());
        assert!(!all.windows(5).any(|window| window == b"FATAL"));
    }
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_suspended_endpoint_ends_sessions_and_serves_the_next() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    emulator.configure(|settings| settings.wake_delay = Duration::from_millis(200));
    for (on_suspend, code) in [
        (OnSuspend::Terminate, SqlState::ADMIN_SHUTDOWN),
        (OnSuspend::Reset, SqlState::CONNECTION_FAILURE),
        (OnSuspend::Close, SqlState::CONNECTION_FAILURE),
    ] {
        emulator.configure(|settings| settings.on_suspend = on_suspend);
        let (client, mut messages) = proxy.client_with_messages().await;
        client.simple_query("select 1").await.unwrap();
        emulator.suspend().await;
        let end = within("the end", messages.recv()).await.expect("an error");
        let error = end.unwrap_err();
        assert_eq!(error.code(), Some(&code), "{on_suspend:?}: {error:?}");
        let rows = proxy.client().await.simple_query("select 1").await.unwrap();
        assert!(
            rows.iter()
                .any(|row| matches!(row, SimpleQueryMessage::Row(_)))
        );
    }
}

#[tokio::test]
async fn a_slow_reader_slows_the_server_down() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    wire.send(&text(
        'Q',
        "copy (select repeat('x', 8000) from generate_series(1, 20000)) to stdout",
    ))
    .await;
    assert_eq!(wire.next().await.tag, 'H');
    let passed = || proxy.metrics().relay_bytes[Direction::FromServer].get();
    // Without a reader it stalls, long before all 160 MB have arrived.
    let mut before = passed();
    let stood = eventually("a stand-still", async || {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = passed();
        let stands = now == before && now > 100_000;
        before = now;
        stands.then_some(now)
    })
    .await;
    assert!(
        stood < 40_000_000,
        "{stood} bytes were taken from the server for a client that reads none"
    );
    // With a reader, all of it arrives.
    let reply = wire.until('Z').await;
    assert_eq!(
        reply.iter().filter(|reply| reply.tag == 'd').count(),
        20_000
    );
}

#[tokio::test]
async fn many_sessions_leave_nothing_behind() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for _ in 0..3 {
        join_all((0..60).map(async |n| {
            let mut wire = proxy.session().await;
            assert_eq!(wire.value(&format!("select {n}")).await, n.to_string());
            match n % 3 {
                0 => wire.send(&terminate()).await,
                1 => wire.reset(),
                _ => wire.send(&text('Q', "select pg_sleep(0.2)")).await,
            }
        }))
        .await;
    }
    proxy.until_quiet().await;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.connections == 0)
        .await
        .expect("no connection is left");
    assert_eq!(proxy.metrics().process.session_panics.get(), 0);
    assert_eq!(emulator.counts().logins, 180);
}
