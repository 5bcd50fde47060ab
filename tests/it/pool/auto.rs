//! `auto` mode: a client keeps its server connection until another one needs it.

use std::time::Duration;

use super::*;

async fn keeping(size: usize) -> (Emulator, Proxy) {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| auto(settings, size)).await;
    (emulator, proxy)
}

fn auto(settings: &mut Settings, size: usize) {
    pooled(settings, size);
    settings.pool_mode = Some(PoolMode::Auto);
}

#[tokio::test]
async fn clients_that_fit_keep_their_connections() {
    let (emulator, proxy) = keeping(3).await;
    let mut clients = Vec::new();
    for number in 0..3 {
        let mut client = proxy.session().await;
        let pid = client.value("select pg_backend_pid()").await;
        client.query(&format!("set app.number = '{number}'")).await;
        client
            .send(&[message('P', b"mine\0select 1\0\0\0"), sync()].concat())
            .await;
        client.until('Z').await;
        clients.push((client, pid));
    }
    for _ in 0..5 {
        for (number, (client, pid)) in clients.iter_mut().enumerate() {
            let look = "select concat_ws(' ', pg_backend_pid(), current_setting('app.number'), \
                (select string_agg(name, ',') from pg_prepared_statements))";
            let expected = format!("{pid} {number} mine");
            assert_eq!(client.value(look).await, expected);
        }
    }
    assert_eq!(emulator.counts().logins, 3);
}

#[tokio::test]
async fn more_clients_than_connections_share_them() {
    let (emulator, proxy) = keeping(2).await;
    let mut clients = Vec::new();
    for number in 0..6 {
        let client = proxy.client().await;
        let set = format!("set app.number = '{number}'");
        client.simple_query(&set).await.unwrap();
        clients.push(client);
    }
    let mut pids = BTreeSet::new();
    for _ in 0..5 {
        for (number, client) in clients.iter().enumerate() {
            let own = value(client, "show app.number").await;
            assert_eq!(own, number.to_string());
            let row = client.query_one("select pg_backend_pid()", &[]).await;
            pids.insert(row.unwrap().get::<_, i32>(0));
        }
    }
    assert_eq!(pids.len(), 2);
    assert_eq!(emulator.counts().logins, 2);
}

#[tokio::test]
async fn what_a_client_leaves_is_reset_for_the_next_one() {
    let (emulator, proxy) = keeping(1).await;
    let mut one = proxy.session().await;
    one.query("set work_mem = '123kB'").await;
    one.send(&[message('P', b"mine\0select 1\0\0\0"), sync()].concat())
        .await;
    one.until('Z').await;
    let pid = one.value("select pg_backend_pid()").await;
    one.send(&terminate()).await;
    one.closed().await;
    let mut other = proxy.session().await;
    let look = "select concat_ws(' ', pg_backend_pid(), current_setting('work_mem'), \
        (select count(*) from pg_prepared_statements))";
    assert_eq!(other.value(look).await, format!("{pid} 4MB 0"));
    // Under its own name again.
    other
        .send(&[message('P', b"mine\0select 2\0\0\0"), sync()].concat())
        .await;
    other.until('Z').await;
    let names = "select string_agg(name, ',') from pg_prepared_statements";
    assert_eq!(other.value(names).await, "mine");
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn a_compute_suspends_under_clients_that_are_at_rest() {
    let emulator = harness::emulator::start_with(|settings| {
        settings.suspend_after = Duration::from_millis(1500);
        settings.wake_delay = Duration::from_millis(300);
    })
    .await;
    let proxy = Proxy::with(&emulator, |settings| {
        auto(settings, 5);
        settings.server_idle_timeout = Some(millis(300));
    })
    .await;
    let mut clients = Vec::new();
    for number in 0..5 {
        let client = proxy.client().await;
        let set = format!("set app.number = '{number}'");
        client.simple_query(&set).await.unwrap();
        clients.push((client.prepare("select $1::int + 1").await.unwrap(), client));
    }
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.suspensions == 1)
        .await
        .expect("it suspends");
    for (number, (statement, client)) in clients.iter().enumerate() {
        let own = value(client, "show app.number").await;
        assert_eq!(own, number.to_string());
        let row = client.query_one(statement, &[&41]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), 42);
    }
    assert_eq!(emulator.counts().wakes, 1);
}

/// Each would otherwise wait until the other one has been at rest for a second.
#[tokio::test]
async fn a_client_that_waits_has_the_connection_of_one_at_rest_at_once() {
    let (emulator, proxy) = keeping(1).await;
    let clients = [proxy.client().await, proxy.client().await];
    let alternating = async {
        for turn in 0..200 {
            let sum = format!("select {turn} + 1");
            let expected = (turn + 1).to_string();
            assert_eq!(value(&clients[turn % 2], &sum).await, expected);
        }
    };
    within("200 turns", alternating).await;
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn a_client_at_rest_does_not_notice_that_its_server_ends() {
    let (emulator, proxy) = keeping(2).await;
    let superuser = harness::superuser().await;
    let mut client = proxy.session().await;
    client.query("set app.number = '7'").await;
    client
        .send(&[message('P', b"mine\0select 42\0\0\0"), sync()].concat())
        .await;
    client.until('Z').await;
    let mut pids = BTreeSet::new();
    for _ in 0..5 {
        let own = "select concat_ws(' ', pg_backend_pid(), current_setting('app.number'))";
        let own = client.value(own).await;
        let (pid, number) = own.split_once(' ').unwrap();
        assert_eq!(number, "7");
        let sql = format!("select pg_terminate_backend({pid}, 10000)");
        superuser.query_one(&sql, &[]).await.unwrap();
        pids.insert(pid.to_owned());
        // It has ended; what the proxy has received of that is not known.
        let closes = &proxy.metrics().pool_closes[PoolClose::Server];
        let ended = u64::try_from(pids.len()).unwrap();
        eventually("the proxy notices", async || {
            (closes.get() == ended).then_some(())
        })
        .await;
    }
    assert_eq!(pids.len(), 5);
    client
        .send(&[statements::execute("mine", &[]), sync()].concat())
        .await;
    let replies = client.until('Z').await;
    assert!(replies.iter().any(|reply| reply.tag == 'D'), "{replies:?}");
    assert_eq!(emulator.counts().logins, 6);
}

#[tokio::test]
async fn a_busy_client_that_no_other_waits_for_never_parts_with_its_connection() {
    let (_emulator, proxy) = keeping(2).await;
    let client = proxy.client().await;
    for _ in 0..100 {
        client.simple_query("select 1").await.unwrap();
    }
    let leases: u64 = proxy
        .metrics()
        .pool_leases
        .values()
        .map(prometheus::IntCounter::get)
        .sum();
    assert_eq!(leases, 1);
}

/// Its login may have been that of another client, as drivers reset whenever a connection returns to their own pool.
#[tokio::test]
async fn a_reset_restores_the_application_name_of_the_client() {
    let (emulator, proxy) = keeping(1).await;
    let named = async |name: &str| {
        let mut config = proxy.client_config();
        config.application_name(name);
        connect(&config).await
    };
    let first = named("first").await;
    assert_eq!(value(&first, "show application_name").await, "first");
    drop(first);
    let second = named("second").await;
    for reset in [
        "reset all",
        "discard all",
        "reset application_name",
        "begin; reset all; commit",
    ] {
        second.simple_query("set work_mem = '9MB'").await.unwrap();
        second.simple_query(reset).await.unwrap();
        let name = value(&second, "show application_name").await;
        assert_eq!(name, "second", "{reset}");
    }
    assert_eq!(emulator.counts().logins, 1);
}
