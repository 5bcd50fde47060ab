//! What a session does to its connection is undone before the next client gets it.

use super::*;

/// Each statement leaves something that the second query shows; a connection that was never reset shows it to the next.
#[tokio::test]
async fn nothing_of_a_session_reaches_the_next_one() {
    let (_emulator, proxy) = proxy(1).await;
    for (leave, look, clean) in [
        ("set work_mem = '7MB'", "show work_mem", "4MB"),
        (
            "set statement_timeout = '50ms'",
            "show statement_timeout",
            "0",
        ),
        (
            "select set_config('search_path', '', false)",
            "show search_path",
            "\"$user\", public",
        ),
        (
            "set app.user = 'one'",
            "select coalesce(nullif(current_setting('app.user', true), ''), 'none')",
            "none",
        ),
        ("set timezone = 'Asia/Tokyo'", "show timezone", ""),
        (
            "set client_encoding = 'LATIN1'",
            "show client_encoding",
            "UTF8",
        ),
        ("set application_name = 'left'", "show application_name", ""),
        (
            "select pg_advisory_lock(4711)",
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
            "0",
        ),
        (
            "listen left_over",
            "select count(*) from pg_listening_channels()",
            "0",
        ),
        (
            "prepare left_over as select 1",
            "select count(*) from pg_prepared_statements",
            "0",
        ),
        (
            "declare left_over cursor with hold for select generate_series(1, 3)",
            "select count(*) from pg_cursors",
            "0",
        ),
        (
            "begin; set local work_mem = '9MB'; select 1",
            "show transaction_read_only",
            "off",
        ),
        (
            "begin; select 1/0",
            "select 'a transaction'",
            "a transaction",
        ),
        (
            "begin isolation level serializable read only",
            "show transaction_read_only",
            "off",
        ),
        (
            "set session characteristics as transaction read only",
            "show transaction_read_only",
            "off",
        ),
        (
            "set role pg_read_all_stats",
            "select current_user = session_user",
            "t",
        ),
        (
            "create temporary sequence s; select nextval('s')",
            "select to_regclass('pg_temp.s') is null",
            "t",
        ),
        (
            "create temporary table left_over (a int)",
            "select to_regclass('left_over') is null",
            "t",
        ),
    ] {
        let clean = if clean.is_empty() {
            value(&proxy.client().await, look).await
        } else {
            clean.to_owned()
        };
        let client = proxy.client().await;
        // Some end in an error, by intention.
        let _ = client.batch_execute(leave).await;
        drop(client);
        let client = proxy.client().await;
        assert_eq!(value(&client, look).await, clean, "{leave}");
        drop(client);
        proxy.until_idle(1).await;
    }
    assert_eq!(
        proxy.closes(PoolClose::Unresettable),
        2,
        "the temporary objects"
    );
    assert_eq!(proxy.closes(PoolClose::ResetFailed), 0);
}

#[tokio::test]
async fn setseed_and_currval_reach_no_other_session() {
    let (_emulator, proxy) = proxy(1).await;
    let mut randoms = BTreeSet::new();
    for _ in 0..3 {
        let client = proxy.client().await;
        randoms.insert(value(&client, "select random()").await);
        value(&client, "select setseed(0.5)").await;
    }
    assert_eq!(randoms.len(), 3, "{randoms:?}");
    let client = proxy.client().await;
    client
        .batch_execute("create sequence pool_left_over; select nextval('pool_left_over')")
        .await
        .unwrap();
    drop(client);
    let client = proxy.client().await;
    let error = client.simple_query("select lastval()").await.unwrap_err();
    assert_eq!(
        error.code(),
        Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
    );
    client
        .batch_execute("drop sequence pool_left_over")
        .await
        .unwrap();
    assert_eq!(proxy.metrics().upstream_connects.ok.get(), 1);
}

/// The unnamed statement outlives a Sync and a client, if nothing destroys it.
#[tokio::test]
async fn the_unnamed_statement_of_a_session_is_unknown_to_the_next() {
    let (_emulator, proxy) = proxy(1).await;
    let mut wire = proxy.session().await;
    let parse = [message('P', b"\0select 'secret'\0\0\0"), sync()].concat();
    wire.send(&parse).await;
    wire.until('Z').await;
    wire.send(&terminate()).await;
    drop(wire);
    let mut wire = proxy.session().await;
    let bind = b"B\0\0\0\x0c\0\0\0\0\0\0\0\0E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04";
    wire.send(bind).await;
    let replies = wire.until('Z').await;
    let error = replies.iter().find(|reply| reply.tag == 'E');
    assert_eq!(error.expect("no such statement").error().code, "26000");
    assert_eq!(proxy.metrics().upstream_connects.ok.get(), 1);
}

#[tokio::test]
async fn a_notice_or_notification_of_an_earlier_session_reaches_no_client() {
    let (_emulator, proxy) = proxy(1).await;
    let client = proxy.client().await;
    client.batch_execute("listen news").await.unwrap();
    drop(client);
    proxy.until_idle(1).await;
    let (client, mut messages) = proxy.client_with_messages().await;
    client
        .batch_execute("notify news, 'for no client'; select 1")
        .await
        .unwrap();
    let got = messages.try_recv();
    assert!(
        !matches!(got, Ok(Ok(AsyncMessage::Notification(_)))),
        "a notification"
    );
}
