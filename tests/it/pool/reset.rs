//! What a session does to its connection is undone before the next client gets it.

use tokio_postgres::SimpleQueryMessage;

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

/// Superusers only, so that the proxy's own role is made one.
#[tokio::test]
async fn another_role_or_session_authorization_does_not_reach_the_next_session() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let alter = async |what: &str| {
        let alter = format!("alter role \"{role}\" {what}");
        superuser.batch_execute(&alter).await.unwrap();
    };
    alter("superuser").await;
    for leave in [
        "set session authorization pg_monitor",
        "set role pg_monitor",
    ] {
        let mut wire = proxy.session().await;
        wire.query(leave).await;
        drop(wire);
        let mut wire = proxy.session().await;
        let look = "select session_user || ' ' || current_user || ' ' || current_setting('role')";
        assert_eq!(
            wire.value(look).await,
            format!("{role} {role} none"),
            "{leave}"
        );
    }
    alter("nosuperuser").await;
    assert_eq!(emulator.counts().logins, 1);
}

/// As set for the role itself; without it the next session would have more rights.
#[tokio::test]
async fn the_role_of_a_login_is_that_of_the_next_session() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let alter = format!(
        "grant pg_read_all_stats to \"{role}\"; alter role \"{role}\" set role = pg_read_all_stats"
    );
    superuser.batch_execute(&alter).await.unwrap();
    for _ in 0..2 {
        let mut wire = proxy.session().await;
        assert_eq!(wire.value("select current_user").await, "pg_read_all_stats");
        wire.query("set role none").await;
    }
    assert_eq!(emulator.counts().logins, 1);
}

/// A cursor without `WITH HOLD` ends with its transaction; one of a failed transaction is not there either.
#[tokio::test]
async fn cursors_and_named_statements_of_the_protocol_do_not_reach_the_next_session() {
    let (emulator, proxy) = proxy(1).await;
    let mut wire = proxy.session().await;
    let parse = [message('P', b"named\0select 1\0\0\0"), sync()].concat();
    wire.send(&parse).await;
    wire.until('Z').await;
    wire.query("declare held cursor with hold for select 1")
        .await;
    wire.query("begin; declare open cursor for select 1").await;
    drop(wire);
    let mut wire = proxy.session().await;
    let look =
        "select (select count(*) from pg_cursors) + (select count(*) from pg_prepared_statements)";
    assert_eq!(wire.value(look).await, "0");
    // The names are free.
    wire.send(&parse).await;
    assert_eq!(wire.tags().await, "1Z");
    assert_eq!(emulator.counts().logins, 1);
}

/// The notifications of a transaction are sent when it commits, and those of a session that has left never arrive.
#[tokio::test]
async fn notices_and_notifications_reach_their_own_client_only() {
    let (_emulator, proxy) = proxy(3).await;
    let raise = |token: u32| {
        format!(
            "do $$ begin for i in 1..20 loop raise notice 'token {token}'; perform pg_sleep(0.001); end loop; end $$"
        )
    };
    let mut clients = JoinSet::new();
    for token in 0..12 {
        let (client, mut messages) = proxy.client_with_messages().await;
        clients.spawn(async move {
            for _ in 0..3 {
                client.batch_execute(&raise(token)).await.unwrap();
            }
            let listen = format!("listen channel_{token}; notify channel_{token}, '{token}'");
            client.batch_execute(&listen).await.unwrap();
            drop(client);
            let (mut notices, mut notifications) = (0, 0);
            while let Some(Ok(message)) = messages.recv().await {
                match message {
                    AsyncMessage::Notice(notice) => {
                        assert_eq!(notice.message(), format!("token {token}"));
                        notices += 1;
                    }
                    AsyncMessage::Notification(notification) => {
                        assert_eq!(notification.payload(), token.to_string());
                        notifications += 1;
                    }
                    _ => {}
                }
            }
            assert_eq!((notices, notifications), (60, 1));
        });
        if token >= 2 {
            clients.join_next().await.unwrap().unwrap();
        }
    }
    clients.join_all().await;
    proxy.until_idle(3).await;
}

/// What a client sets may make a statement of the reset fail or wait; then the connection is closed, and not given away.
#[tokio::test]
async fn no_setting_of_a_session_keeps_its_state_from_the_reset() {
    let (_emulator, proxy) = proxy(1).await;
    for hostile in [
        "set search_path = hostile, pg_catalog",
        "set statement_timeout = 1",
        "set lock_timeout = 1",
        "set default_transaction_read_only = on",
        "set default_transaction_isolation = 'serializable'; set default_transaction_deferrable = on; set default_transaction_read_only = on",
        "set standard_conforming_strings = off; set backslash_quote = off",
        "set client_encoding = 'SJIS'",
        "set row_security = off",
        "set session_replication_role = default",
        "set client_min_messages = debug5",
        "set extra_float_digits = 3; set intervalstyle = iso_8601; set datestyle = german",
        "set idle_session_timeout = 1000; set idle_in_transaction_session_timeout = 1",
        "set plan_cache_mode = force_generic_plan; set enable_seqscan = off",
    ] {
        let client = proxy.client().await;
        client
            .batch_execute("create schema if not exists hostile; create or replace function hostile.pg_advisory_unlock_all() returns void language sql as 'select'; select pg_advisory_lock(4712)")
            .await
            .unwrap();
        // Some are not permitted.
        let _ = client.simple_query(hostile).await;
        drop(client);
        let client = proxy.client().await;
        let look =
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()";
        assert_eq!(value(&client, look).await, "0", "{hostile}");
        let changed = client
            .simple_query(
                "select name || ' = ' || setting from pg_settings where source = 'session'",
            )
            .await
            .unwrap();
        let changed: Vec<_> = changed
            .iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            })
            .filter(|setting| !setting.starts_with("application_name"))
            .collect();
        assert_eq!(changed, [""; 0], "{hostile}");
    }
    let client = proxy.client().await;
    client
        .batch_execute("drop schema hostile cascade")
        .await
        .unwrap();
}

/// Superusers only, so that the proxy's own role is made one.
#[tokio::test]
async fn a_connection_with_what_no_reset_undoes_is_closed() {
    let (emulator, proxy) = proxy(1).await;
    let role = &emulator.identities().app.name;
    let superuser = harness::superuser().await;
    let alter = format!("alter role \"{role}\" superuser");
    superuser.batch_execute(&alter).await.unwrap();
    let loaded = "select count(*) > 0 from pg_settings where name like 'auto_explain.%'";
    for (closed, leave, look) in [
        (1, "load 'auto_explain'", loaded),
        (
            2,
            "do $$ begin execute 'lo' || 'ad ''auto_explain'''; end $$",
            loaded,
        ),
        (
            3,
            "select pg_replication_origin_create('pool'); select pg_replication_origin_session_setup('pool')",
            "select pg_replication_origin_session_is_setup()",
        ),
    ] {
        let mut wire = proxy.session().await;
        wire.query(leave).await;
        drop(wire);
        let mut wire = proxy.session().await;
        assert_eq!(wire.value(look).await, "f", "{leave}");
        assert_eq!(proxy.closes(PoolClose::Unresettable), closed, "{leave}");
    }
    // Its backend may still be ending.
    eventually("the origin is unused", async || {
        let drop = "select pg_replication_origin_drop('pool')";
        superuser.batch_execute(drop).await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_connection_with_nothing_but_plain_statements_needs_no_reset() {
    let (emulator, proxy) = proxy(1).await;
    for (statement, resets) in [
        ("select 1", 0),
        ("begin; select 'a' as b; commit", 0),
        ("show work_mem", 0),
        // Rolled back.
        ("begin", 1),
        ("select now()", 2),
    ] {
        let mut wire = proxy.session().await;
        wire.query(statement).await;
        drop(wire);
        proxy.until_idle(1).await;
        let done = &proxy.metrics().pool_resets[PoolReset::Done];
        assert_eq!(done.get(), resets, "{statement}");
        let mut wire = proxy.session().await;
        wire.send(&text('Q', "")).await;
        assert_eq!(wire.until('Z').await.pop().unwrap().body[..], *b"I");
        drop(wire);
        proxy.until_idle(1).await;
    }
    assert_eq!(emulator.counts().logins, 1);
}
