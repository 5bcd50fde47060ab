//! Pooling in `session` mode: connections go from client to client, and nothing else does.

use std::collections::BTreeSet;

use lakebase_proxy::{
    config::{PoolMode, Settings},
    emulator::Emulator,
    telemetry::labels::{PoolClose, PoolLease, PoolServer},
};
use tokio::task::JoinSet;
use tokio_postgres::{AsyncMessage, Client, NoTls, error::SqlState};
use tokio_util::task::TaskTracker;

use crate::harness::{
    self, DATABASE, Proxy, eventually, millis,
    wire::{message, sync, terminate, text},
    within,
};

/// One connection, so that every client gets the same one.
fn one(settings: &mut Settings) {
    pooled(settings, 1);
}

fn pooled(settings: &mut Settings, size: usize) {
    settings.pool_mode = Some(PoolMode::Session);
    settings.default_pool_size = Some(size.try_into().unwrap());
    settings.spare_pool_size = Some(0);
}

async fn proxy(size: usize) -> (Emulator, Proxy) {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| pooled(settings, size)).await;
    (emulator, proxy)
}

async fn connect(config: &tokio_postgres::Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    TaskTracker::new().spawn(connection);
    client
}

async fn value(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap();
    let row = rows.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.unwrap().get(0).unwrap_or("NULL").to_owned()
}

async fn pid(client: &Client) -> String {
    value(client, "select pg_backend_pid()").await
}

impl Proxy {
    fn servers(&self, state: PoolServer) -> i64 {
        self.metrics().pool_servers[state].get()
    }

    async fn until_idle(&self, count: i64) {
        eventually("connections return", async || {
            let busy = [
                PoolServer::Leased,
                PoolServer::Resetting,
                PoolServer::Opening,
            ];
            let busy: i64 = busy.iter().map(|state| self.servers(*state)).sum();
            (busy == 0 && self.servers(PoolServer::Idle) == count).then_some(())
        })
        .await;
    }

    fn closes(&self, reason: PoolClose) -> u64 {
        self.metrics().pool_closes[reason].get()
    }
}

#[tokio::test]
async fn a_connection_goes_from_one_client_to_the_next() {
    let (emulator, proxy) = proxy(1).await;
    let mut pids = BTreeSet::new();
    for _ in 0..20 {
        pids.insert(pid(&proxy.client().await).await);
    }
    assert_eq!(pids.len(), 1);
    assert_eq!(emulator.counts().logins, 1);
    proxy.until_idle(1).await;
    assert_eq!(proxy.metrics().pool_leases[PoolLease::Opened].get(), 1);
    assert_eq!(proxy.metrics().clients_active.get(), 0);
}

#[tokio::test]
async fn clients_wait_for_a_connection_and_are_served_in_the_order_of_their_coming() {
    let (emulator, proxy) = proxy(2).await;
    let (one, two) = (proxy.client().await, proxy.client().await);
    let mut waiting = JoinSet::new();
    for number in 0..10 {
        let config = proxy.client_config();
        waiting.spawn(async move {
            let client = connect(&config).await;
            value(&client, "select 1").await;
            number
        });
        eventually("it waits", async || {
            (proxy.metrics().pool_clients_waiting.get() == number + 1).then_some(())
        })
        .await;
    }
    drop((one, two));
    let mut served = Vec::new();
    while let Some(number) = within("the queue", waiting.join_next()).await {
        served.push(number.unwrap());
    }
    // Two connections serve at the same time.
    for (place, number) in served.iter().enumerate() {
        assert!(
            place.abs_diff(usize::try_from(*number).unwrap()) <= 1,
            "{served:?}"
        );
    }
    assert_eq!(emulator.counts().logins, 2);
}

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
async fn a_client_gets_its_own_application_name_and_encoding() {
    let (emulator, proxy) = proxy(1).await;
    for (name, encoding) in [("one", "UTF8"), ("two", "LATIN1"), ("it's \\ 3", "UTF8")] {
        let mut wire = proxy.dial().await;
        wire.startup(&[
            ("user", "anyone"),
            ("database", DATABASE),
            ("application_name", name),
            ("client_encoding", encoding),
        ])
        .await;
        let welcome = wire.welcome().await;
        assert_eq!(welcome.parameters["application_name"], name);
        assert_eq!(welcome.parameters["client_encoding"], encoding);
        assert_eq!(wire.value("show application_name").await, name);
        assert_eq!(wire.value("show client_encoding").await, encoding);
    }
    let client = proxy.client().await;
    assert_eq!(value(&client, "show client_encoding").await, "UTF8");
    let metrics = proxy.metrics().render();
    let closes = metrics
        .lines()
        .filter(|line| line.contains("pool_server_closes"));
    assert_eq!(
        emulator.counts().logins,
        1,
        "{:#?}",
        closes.collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn other_startup_parameters_have_connections_of_their_own() {
    let (emulator, proxy) = proxy(1).await;
    let with = async |options: &str| {
        let mut config = proxy.client_config();
        config.options(options);
        proxy.try_client(&config).await.unwrap()
    };
    for (options, work_mem) in [("-c work_mem=5MB", "5MB"), ("-c work_mem=6MB", "6MB")] {
        for _ in 0..2 {
            let client = with(options).await;
            assert_eq!(value(&client, "show work_mem").await, work_mem);
            client
                .batch_execute("set work_mem = '9MB'; reset work_mem")
                .await
                .unwrap();
            assert_eq!(value(&client, "show work_mem").await, work_mem);
        }
    }
    assert_eq!(emulator.counts().logins, 2, "one for each");
    assert_eq!(proxy.closes(PoolClose::Surplus), 1, "the first gave way");
}

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
    let (emulator, proxy) = proxy(2).await;
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

#[tokio::test]
async fn a_client_that_waits_too_long_is_refused_with_the_counts() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        one(settings);
        settings.query_wait_timeout = Some(millis(300));
    })
    .await;
    let client = proxy.client().await;
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "53300");
    assert!(
        refusal.message.contains("query_wait_timeout"),
        "{refusal:?}"
    );
    let detail = refusal.detail.unwrap();
    assert!(
        detail.contains("1 server connections of 1 in use"),
        "{detail}"
    );
    assert!(refusal.hint.unwrap().contains("--default-pool-size"));
    assert_eq!(proxy.metrics().pool_wait_timeouts.get(), 1);
    drop(client);
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
}

#[tokio::test]
async fn the_reserve_serves_clients_that_have_waited() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        one(settings);
        settings.reserve_pool_size = Some(1);
        settings.reserve_pool_timeout = Some(millis(200));
    })
    .await;
    let one = proxy.client().await;
    let two = proxy.client().await;
    assert_ne!(pid(&one).await, pid(&two).await);
    drop((one, two));
    proxy.until_idle(1).await;
    assert_eq!(proxy.closes(PoolClose::Surplus), 1);
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_its_time_and_not_replaced() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 5);
        settings.server_idle_timeout = Some(millis(500));
    })
    .await;
    let clients = [proxy.client().await, proxy.client().await];
    drop(clients);
    eventually("they close", async || {
        (proxy.closes(PoolClose::IdleTimeout) == 2).then_some(())
    })
    .await;
    proxy.until_quiet().await;
    assert_eq!(emulator.counts().logins, 2);
}

#[tokio::test]
async fn a_connection_that_the_server_closes_while_idle_reaches_no_client() {
    let (emulator, proxy) = proxy(3).await;
    let role = emulator.identities().app.name.clone();
    drop([proxy.client().await, proxy.client().await]);
    proxy.until_idle(2).await;
    let superuser = harness::superuser().await;
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1 and backend_type = 'client backend'";
    superuser.query(terminate, &[&role]).await.unwrap();
    eventually("both are closed", async || {
        (proxy.closes(PoolClose::Server) == 2).then_some(())
    })
    .await;
    assert_eq!(
        emulator.counts().logins,
        2,
        "not replaced before a client needs one"
    );
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
}

#[tokio::test]
async fn a_spare_connection_is_opened_ahead_of_the_next_client() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 10);
        settings.spare_pool_size = Some(2);
    })
    .await;
    let one = proxy.client().await;
    eventually("the spares", async || {
        (proxy.servers(PoolServer::Idle) == 2).then_some(())
    })
    .await;
    let two = proxy.client().await;
    assert_eq!(proxy.metrics().pool_leases[PoolLease::Idle].get(), 1);
    drop((one, two));
}

/// The server of a pool of 20 accepts 7 connections.
#[tokio::test]
async fn a_pool_settles_at_what_the_server_accepts_and_serves_all_clients() {
    let emulator = harness::emulator().await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let limit = format!("alter role \"{role}\" connection limit 7");
    superuser.batch_execute(&limit).await.unwrap();
    let proxy = Proxy::with(&emulator, |settings| pooled(settings, 20)).await;
    let mut clients = JoinSet::new();
    for _ in 0..40 {
        let config = proxy.client_config();
        clients.spawn(async move {
            let client = connect(&config).await;
            client.batch_execute("select pg_sleep(0.05)").await.unwrap();
        });
    }
    within("all clients", async {
        while let Some(served) = clients.join_next().await {
            served.unwrap();
        }
    })
    .await;
    proxy.until_idle(7).await;
    let no_limit = format!("alter role \"{role}\" connection limit -1");
    superuser.batch_execute(&no_limit).await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_gives_up_its_place() {
    let (emulator, proxy) = proxy(1).await;
    let client = proxy.client().await;
    let mut left = proxy.dial().await;
    left.startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    let waiting = |count| {
        let metrics = std::sync::Arc::clone(proxy.metrics());
        async move {
            eventually("the queue", async || {
                (metrics.pool_clients_waiting.get() == count).then_some(())
            })
            .await;
        }
    };
    waiting(1).await;
    drop(left);
    waiting(0).await;
    drop(client);
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn replication_and_other_databases_never_share_a_connection() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let replicates = format!("alter role \"{role}\" replication");
    let superuser = harness::superuser().await;
    superuser.batch_execute(&replicates).await.unwrap();
    let one = proxy.client().await;
    let mut config = proxy.client_config();
    config.dbname("postgres");
    let other = proxy.try_client(&config).await.unwrap();
    assert_eq!(value(&other, "select current_database()").await, "postgres");
    assert_eq!(value(&one, "select current_database()").await, DATABASE);
    let mut wire = proxy.dial().await;
    wire.startup(&[
        ("user", "anyone"),
        ("replication", "database"),
        ("database", DATABASE),
    ])
    .await;
    wire.welcome().await;
    assert_eq!(proxy.servers(PoolServer::Leased), 2, "replication has none");
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

#[tokio::test]
async fn a_shutdown_leaves_no_backend_behind() {
    let (emulator, proxy) = proxy(5).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let busy = proxy.client().await;
    drop([proxy.client().await, proxy.client().await]);
    within("the shutdown", proxy.end(std::future::pending())).await;
    eventually("all backends end", async || {
        (harness::backends(&superuser, &role).await == 0).then_some(())
    })
    .await;
    drop(busy);
}

#[tokio::test]
async fn many_clients_share_few_connections() {
    let (emulator, proxy) = proxy(5).await;
    let mut clients = JoinSet::new();
    for number in 0..200_u32 {
        let config = proxy.client_config();
        clients.spawn(async move {
            for _ in 0..5 {
                let client = connect(&config).await;
                let answer: i32 = client
                    .query_one("select $1::int4", &[&number.cast_signed()])
                    .await
                    .unwrap()
                    .get(0);
                assert_eq!(answer, number.cast_signed());
            }
        });
    }
    within("all clients", async {
        while let Some(served) = clients.join_next().await {
            served.unwrap();
        }
    })
    .await;
    proxy.until_idle(5).await;
    assert_eq!(emulator.counts().logins, 5);
}
