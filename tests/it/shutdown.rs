//! SIGTERM and SIGINT, as the program itself takes them.

use std::time::Duration;

use lakebase_proxy::emulator::{Action, Emulator, ServerError, Site};
use tokio::time::Instant;

use crate::process::{Signal, signal};
use crate::{
    harness::{
        self, TIMEOUT,
        binary::{Binary, command},
        until_running,
        wire::{Wire, cancel, terminate, text},
        within,
    },
    web::get,
};

async fn session(binary: &Binary) -> Wire {
    let mut wire = Wire::dial(binary.postgres).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    wire
}

/// Waits until the endpoint has nothing of ours any more.
async fn until_gone(emulator: &Emulator) {
    emulator
        .wait_for(TIMEOUT, |counts| counts.connections == 0)
        .await
        .expect("every upstream connection is closed");
}

#[tokio::test]
async fn the_exit_code_shows_the_signal() {
    let emulator = harness::emulator().await;
    for (signal, flags, code) in [
        (Signal::TERM, &[][..], 143),
        (Signal::INT, &[], 130),
        (Signal::TERM, &["--exit-zero-on-sigterm"], 0),
        (Signal::INT, &["--exit-zero-on-sigterm"], 130),
    ] {
        let binary = Binary::serve(&emulator, flags).await;
        let began = Instant::now();
        binary.signal(signal);
        assert_eq!(binary.exit_code().await, Some(code), "{signal:?} {flags:?}");
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "nothing was left to wait for"
        );
    }
    until_gone(&emulator).await;
}

#[tokio::test]
async fn work_under_way_may_finish_while_new_clients_are_refused() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--max-sigterm-delay", "60s"]).await;
    let mut idle = session(&binary).await;
    let mut transaction = session(&binary).await;
    transaction
        .query("begin; create temp table t (n int) on commit drop")
        .await;
    let mut query = session(&binary).await;
    query
        .send(&text('Q', "select pg_sleep(0.5); select 'done'"))
        .await;
    let mut waiting = session(&binary).await;
    let waiting_key = {
        drop(waiting);
        waiting = Wire::dial(binary.postgres).await;
        waiting.startup(&[("user", "anyone")]).await;
        waiting.welcome().await.key
    };
    waiting.send(&text('Q', "select pg_sleep(60)")).await;
    assert_eq!(get(binary.http, "/readiness").await.status, 200);

    binary.signal(Signal::TERM);
    binary.until("shutting down").await;
    assert_eq!(get(binary.http, "/readiness").await.status, 503);
    assert_eq!(get(binary.http, "/liveness").await.status, 200);

    let error = idle.refusal().await;
    assert_eq!(error.code, "57P01");
    assert!(error.message.contains("shutting down"), "{error:?}");

    let mut late = Wire::dial(binary.postgres).await;
    late.startup(&[("user", "anyone")]).await;
    let refusal = late.refusal().await;
    assert_eq!(refusal.code, "57P03");
    assert!(refusal.hint.is_some(), "{refusal:?}");

    // A query runs to its end, then its session goes.
    assert_eq!(query.tags().await, "TDCTDCZ");
    assert_eq!(query.refusal().await.code, "57P01");
    // A transaction goes on until it is over.
    transaction.query("insert into t values (1)").await;
    assert_eq!(transaction.value("select count(*) from t").await, "1");
    transaction.query("commit").await;
    assert_eq!(transaction.refusal().await.code, "57P01");
    // Cancels are still passed on.
    until_running(&emulator.identities().app.name, 1).await;
    cancel(binary.postgres, waiting_key).await;
    let error = waiting.until('Z').await;
    assert!(
        error
            .iter()
            .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
    );
    assert_eq!(waiting.refusal().await.code, "57P01");

    assert_eq!(binary.exit_code().await, Some(143));
    until_gone(&emulator).await;
}

#[tokio::test]
async fn the_grace_time_is_the_end_of_it() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--max-sigterm-delay", "1s"]).await;
    let mut transaction = session(&binary).await;
    transaction.query("begin").await;
    let mut query = session(&binary).await;
    query.send(&text('Q', "select pg_sleep(60)")).await;
    let began = Instant::now();
    binary.signal(Signal::INT);
    binary.until("shutting down").await;
    assert_eq!(transaction.refusal().await.code, "57P01");
    assert!(
        began.elapsed() >= Duration::from_millis(900),
        "{:?}",
        began.elapsed()
    );
    // The server has sent the beginning of an answer, and then nothing.
    let reply = query.until('E').await;
    assert_eq!(reply.last().unwrap().error().code, "57P01");
    assert_eq!(binary.exit_code().await, Some(130));
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    // A server notices that its client is gone when it next reads: the query's session stays until then.
    emulator
        .wait_for(TIMEOUT, |counts| counts.sessions <= 1)
        .await
        .expect("the transaction's session ends");
    emulator.terminate_sessions().await;
    until_gone(&emulator).await;
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let emulator = harness::emulator().await;
    for second in [Signal::TERM, Signal::INT] {
        let mut binary = Binary::serve(&emulator, &["--max-sigterm-delay", "300s"]).await;
        let mut transaction = session(&binary).await;
        transaction.query("begin").await;
        binary.signal(Signal::TERM);
        binary.until("shutting down").await;
        assert_eq!(transaction.value("select 1").await, "1");
        let began = Instant::now();
        binary.signal(second);
        assert_eq!(transaction.refusal().await.code, "57P01");
        assert_eq!(binary.exit_code().await, Some(143), "the first decides");
        assert!(
            began.elapsed() < Duration::from_secs(6),
            "{:?}",
            began.elapsed()
        );
    }
    until_gone(&emulator).await;
}

#[tokio::test]
async fn clients_waiting_for_a_wake_are_refused() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    emulator.faults().always(
        Site::Startup,
        Action::Error(ServerError::external_authorization()),
    );
    let mut held = Wire::dial(binary.postgres).await;
    held.startup(&[("user", "anyone")]).await;
    emulator
        .wait_for(TIMEOUT, |counts| counts.dials >= 2)
        .await
        .unwrap();
    binary.signal(Signal::TERM);
    binary.until("shutting down").await;
    assert_eq!(held.refusal().await.code, "57P03");
    assert_eq!(binary.exit_code().await, Some(143));
}

#[tokio::test]
async fn a_client_that_leaves_in_time_spares_the_rest_of_the_grace() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--max-sigterm-delay", "300s"]).await;
    let mut transaction = session(&binary).await;
    transaction.query("begin").await;
    binary.signal(Signal::TERM);
    binary.until("shutting down").await;
    transaction.send(&terminate()).await;
    assert_eq!(binary.exit_code().await, Some(143));
    until_gone(&emulator).await;
}

#[tokio::test]
async fn a_signal_during_the_start_is_not_lost() {
    let emulator = harness::emulator().await;
    // Without PGHOST it has to look it up in the workspace, which does not answer.
    emulator.faults().always(Site::Lookup, Action::Stall);
    let mut child = command(&["--port", "0", "--http-port", "none"])
        .envs(
            emulator
                .environment()
                .into_iter()
                .filter(|(name, _)| *name != "PGHOST"),
        )
        .spawn()
        .unwrap();
    emulator
        .wait_for(TIMEOUT, |counts| counts.lookups > 0)
        .await
        .expect("it looks up the host");
    signal(child.id().unwrap(), Signal::TERM);
    assert_eq!(
        within("the end", child.wait()).await.unwrap().code(),
        Some(143)
    );
}
