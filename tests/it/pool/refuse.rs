//! `pin_sessions = "refuse"`: what would keep a connection for longer than a transaction is an error.

use lakebase_proxy::{config::PinSessions, telemetry::labels::PinReason};

use super::{
    misuse::answers,
    statements::{execute, prepare, request},
    transaction::shared,
    *,
};
use crate::harness::wire::{Wire, extended};

async fn refusing(mode: PoolMode) -> (Emulator, Proxy) {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.pool_mode = Some(mode);
        settings.pin_sessions = Some(PinSessions::Refuse);
    })
    .await;
    (emulator, proxy)
}

#[tokio::test]
async fn what_would_pin_a_client_is_refused_and_its_session_goes_on() {
    let (_emulator, proxy) = refusing(PoolMode::Transaction).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for (sql, reason) in [
        ("listen a", PinReason::Listen),
        ("create temp table t (a int)", PinReason::Temp),
        ("select 5; prepare p as select 1", PinReason::SqlPrepare),
        ("declare c cursor with hold for select 1", PinReason::Cursor),
        ("select pg_advisory_lock(1)", PinReason::AdvisoryLock),
        (
            "select set_config('app.a', 'b', false)",
            PinReason::SetConfig,
        ),
        ("load 'auto_explain'", PinReason::Load),
        ("set session authorization default", PinReason::Role),
        (
            "do $$ begin execute 'select 1'; end $$",
            PinReason::UnknownState,
        ),
        ("select nextval('s')", PinReason::Sequence),
    ] {
        one.send(&text('Q', sql)).await;
        let replies = within("a refusal", one.until('Z')).await;
        let error = replies[0].error();
        assert_eq!(error.code, "0A000", "{sql}: {error:?}");
        assert!(error.message.ends_with(reason.feature()), "{error:?}");
        let detail = error.detail.unwrap();
        assert!(detail.contains(reason.as_str()), "{detail}");
        assert!(error.hint.unwrap().contains("pool_mode = \"auto\""));
        assert_eq!(replies.len(), 2, "{sql}");
        // One request of the extended protocol, and another one behind it.
        let pipeline = [
            prepare("s", sql),
            execute("s", &[]),
            sync(),
            extended("select 7"),
            sync(),
        ];
        one.send(&pipeline.concat()).await;
        assert_eq!(answers(&mut one, 2).await, ["0A000", "7"], "{sql}");
        assert_eq!(other.value("select 8").await, "8");
        assert_eq!(one.value("select 9").await, "9");
        let refused = proxy.metrics().pool_refused_pins[reason].get();
        assert_eq!(refused, 2, "{sql}");
    }
    // The name is free.
    let found = request(&mut one, &[prepare("s", "select 3"), execute("s", &[])]).await;
    assert_eq!(found, ["3"]);
    assert_eq!(proxy.all_pins(), 0);
}

#[tokio::test]
async fn a_refusal_fails_its_transaction() {
    let (_emulator, proxy) = refusing(PoolMode::Transaction).await;
    let mut client = proxy.session().await;
    client.query("begin").await;
    client.send(&text('Q', "listen a")).await;
    assert_eq!(answers(&mut client, 1).await, ["0A000"]);
    // As PostgreSQL refuses everything else from here on.
    for sql in ["select 1", "listen a"] {
        client.send(&text('Q', sql)).await;
        assert_eq!(answers(&mut client, 1).await, ["25P02"], "{sql}");
    }
    client.query("rollback").await;
    assert_eq!(client.value("select 1").await, "1");
}

#[tokio::test]
async fn messages_of_any_size_are_refused_without_a_trace() {
    let (_emulator, proxy) = refusing(PoolMode::Transaction).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let large = format!("select 'temp' /* {} */", "x".repeat(100_000));
    let call = message('F', &vec![0; 70_000]);
    one.send(&[prepare("large", &large), sync(), call].concat())
        .await;
    assert_eq!(answers(&mut one, 2).await, ["0A000", "0A000"]);
    for _ in 0..2 {
        assert_eq!(other.value("select 8").await, "8");
        assert_eq!(one.value("select 9").await, "9");
    }
    assert_eq!(proxy.all_pins(), 0);
}

#[tokio::test]
async fn what_only_resembles_it_is_not_refused() {
    let (_emulator, proxy) = refusing(PoolMode::Transaction).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    for sql in [
        "select 1 as temp",
        "with hold as (select 1) select * from hold",
        "select 1 as prepare",
        "begin; set local work_mem = '1MB'; commit; select 1",
    ] {
        assert_eq!(one.value(sql).await, "1", "{sql}");
        assert_eq!(other.value("select 8").await, "8", "{sql}");
    }
}

/// The server's answer shows it.
#[tokio::test]
async fn what_shows_after_the_fact_pins_as_without() {
    let (_emulator, proxy) = refusing(PoolMode::Transaction).await;
    let mut client = proxy.session().await;
    client.query("set standard_conforming_strings = off").await;
    assert_eq!(client.value("select 1").await, "1");
    assert_eq!(proxy.pins(PinReason::Unparsed), 1);
}

#[tokio::test]
async fn other_modes_refuse_nothing() {
    for mode in [PoolMode::Auto, PoolMode::Session] {
        let (_emulator, proxy) = refusing(mode).await;
        let mut client: Wire = proxy.session().await;
        client.query("listen a").await;
        client.query("create temp table t (a int)").await;
        assert_eq!(client.value("select 1").await, "1");
    }
}
