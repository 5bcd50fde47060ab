//! The queue: order, limits, timeouts, and the growth of the pool.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use lakebase_proxy::emulator::{Action, Fault, Site};
use tokio::time::{Instant, sleep};

use super::{
    misuse::{answers, parse, plain_bound},
    *,
};
use crate::harness::wire::extended;

#[tokio::test]
async fn clients_wait_for_a_connection_and_are_served_in_the_order_of_their_coming() {
    let (emulator, proxy) = proxy(1).await;
    let first = proxy.client().await;
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiting = JoinSet::new();
    for number in 0..10 {
        let (config, served) = (proxy.client_config(), Arc::clone(&served));
        waiting.spawn(async move {
            let client = connect(&config).await;
            served.lock().unwrap().push(number);
            value(&client, "select 1").await;
        });
        eventually("it waits", async || {
            (proxy.metrics().pool_clients_waiting.get() == number + 1).then_some(())
        })
        .await;
    }
    drop(first);
    within("the queue", waiting.join_all()).await;
    assert_eq!(*served.lock().unwrap(), (0..10).collect::<Vec<_>>());
    assert_eq!(emulator.counts().logins, 1);
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
    eventually("the other one closes", async || {
        (proxy.closes(PoolClose::Surplus) == 1).then_some(())
    })
    .await;
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
        let metrics = Arc::clone(proxy.metrics());
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

/// Watches the states of the connections until `future` is done: the most being opened at once, and the most in all.
async fn watched<T>(proxy: &Proxy, future: impl Future<Output = T>) -> (T, i64, i64) {
    let (mut opening, mut open) = (0, 0);
    let watching = async {
        loop {
            let servers = &proxy.metrics().pool_servers;
            opening = opening.max(servers[PoolServer::Opening].get());
            open = open.max(servers.values().map(prometheus::IntGauge::get).sum());
            sleep(Duration::from_millis(1)).await;
        }
    };
    let done = tokio::select! {
        done = within("the clients", future) => done,
        () = watching => unreachable!("it never ends"),
    };
    (done, opening, open)
}

/// Clients that stay: no connection that returns serves the others.
#[tokio::test]
async fn a_burst_opens_eight_connections_at_once_and_the_next_as_soon_as_one_is_open() {
    let (emulator, proxy) = proxy(20).await;
    emulator.faults().always(Site::Password, Action::Delay(100));
    let burst: JoinSet<_> = (0..20)
        .map(|_| {
            let config = proxy.client_config();
            async move { connect(&config).await }
        })
        .collect();
    let began = Instant::now();
    let (clients, opening, open) = watched(&proxy, burst.join_all()).await;
    let took = began.elapsed();
    assert_eq!((opening, open), (8, 20));
    assert_eq!((clients.len(), emulator.counts().logins), (20, 20));
    // Three rounds of logins; well below `reserve_pool_timeout`, when the queue is looked at again.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn a_burst_of_200_clients_opens_no_more_than_the_pool_has_and_serves_all() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        a_burst_of_200_clients(mode).await;
    }
}

async fn a_burst_of_200_clients(mode: PoolMode) {
    let (emulator, proxy) = proxy_in(mode, 20).await;
    let burst: JoinSet<_> = (0..200)
        .map(|_| {
            let config = proxy.client_config();
            async move { value(&connect(&config).await, "select 1").await }
        })
        .collect();
    let (answers, opening, open) = watched(&proxy, burst.join_all()).await;
    assert!(answers.iter().all(|answer| answer == "1"));
    assert!(opening <= 8 && open <= 20, "{opening} of {open}");
    assert!(emulator.counts().logins <= 20);
    assert_eq!(proxy.metrics().pool_clients_waiting.get(), 0);
}

/// Clients that are connected already, after all server connections have ended.
#[tokio::test]
async fn a_burst_of_200_requests_is_served_in_its_order_by_no_more_logins_than_connections() {
    let (emulator, proxy) = proxy_in(PoolMode::Transaction, 20).await;
    let mut clients = Vec::new();
    for _ in 0..200 {
        clients.push(proxy.session().await);
    }
    proxy.until_at_rest().await;
    emulator.suspend().await;
    proxy.until_idle(0).await;
    let before = emulator.counts().logins;
    let burst: JoinSet<_> = clients
        .into_iter()
        .map(|mut client| async move { client.value("select 1").await })
        .collect();
    let (answers, opening, open) = watched(&proxy, burst.join_all()).await;
    assert_eq!(answers, ["1"; 200]);
    assert!(opening <= 8 && open <= 20, "{opening} of {open}");
    assert!(emulator.counts().logins <= before + 20);
    // In their order, once there is one connection.
    proxy.until_at_rest().await;
    let (_emulator, proxy) = proxy_in(PoolMode::Transaction, 1).await;
    let first = proxy.client().await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(proxy.session().await);
    }
    first.batch_execute("begin").await.unwrap();
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiting = JoinSet::new();
    for (number, mut client) in (0..).zip(clients) {
        let served = Arc::clone(&served);
        waiting.spawn(async move {
            client.query("select 1").await;
            served.lock().unwrap().push(number);
        });
        eventually("it waits", async || {
            (proxy.metrics().pool_clients_waiting.get() == number + 1).then_some(())
        })
        .await;
    }
    first.batch_execute("commit").await.unwrap();
    within("the queue", waiting.join_all()).await;
    assert_eq!(*served.lock().unwrap(), (0..20).collect::<Vec<_>>());
}

/// Now and then one waits, and seldom for longer than it takes another to notice.
#[tokio::test]
async fn of_one_client_more_than_connections_each_gets_its_own_answers() {
    for mode in [PoolMode::Transaction, PoolMode::Auto] {
        let (_emulator, proxy) = proxy_in(mode, 7).await;
        let clients: JoinSet<()> = (0..8)
            .map(|client| {
                let config = proxy.client_config();
                async move {
                    let session = connect(&config).await;
                    for query in 0..500 {
                        let own = format!("{client}: {query}");
                        let answer = value(&session, &format!("select '{own}'")).await;
                        assert_eq!(answer, own, "{mode:?}");
                    }
                }
            })
            .collect();
        within("their queries", clients.join_all()).await;
    }
}

#[tokio::test]
async fn clients_in_a_loop_get_equal_shares_of_one_connection() {
    const CLIENTS: usize = 50;
    let (emulator, proxy) = proxy(1).await;
    let total = Arc::new(Mutex::new(0));
    let clients: JoinSet<usize> = (0..CLIENTS)
        .map(|_| {
            let (config, total) = (proxy.client_config(), Arc::clone(&total));
            async move {
                let mut served = 0;
                while *total.lock().unwrap() < CLIENTS * 20 {
                    value(&connect(&config).await, "select 1").await;
                    served += 1;
                    *total.lock().unwrap() += 1;
                }
                served
            }
        })
        .collect();
    let served = within("the clients", clients.join_all()).await;
    let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
    assert!(most * 10 <= least * 13, "{least} to {most}: {served:?}");
    assert_eq!(emulator.counts().logins, 1);
}

/// The settings of a client are set on a new connection, too, and the server may end it meanwhile.
#[tokio::test]
async fn a_client_waits_for_another_connection_once_if_its_new_one_is_lost_at_once() {
    let (emulator, proxy) = proxy_in(PoolMode::Transaction, 1).await;
    let mut client = proxy.session().await;
    client.query("set app.owner = 'a'").await;
    let close = Fault::new(Site::Session, Action::Close).after_bytes(1);
    for (times, expected) in [(1, "a"), (2, "08006"), (0, "a")] {
        proxy.until_at_rest().await;
        emulator.suspend().await;
        proxy.until_idle(0).await;
        let before = emulator.counts().logins;
        if times > 0 {
            emulator.faults().add(close.clone().times(times)).unwrap();
        }
        client.send(&text('Q', "show app.owner")).await;
        assert_eq!(answers(&mut client, 1).await, [expected], "{times}");
        let logins = emulator.counts().logins - before;
        assert_eq!(logins, [1, 2, 2][usize::try_from(times).unwrap()]);
    }
}

/// A client that has sent the first part of a request is refused at once, and then sends the rest.
#[tokio::test]
async fn a_request_that_is_refused_before_its_end_leaves_the_session() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 1);
        settings.pool_mode = Some(PoolMode::Transaction);
        settings.query_wait_timeout = Some(millis(200));
    })
    .await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let flush = || message('H', b"");
    let large = format!("select '{}'", "x".repeat(1 << 20));
    let parse = parse(&large);
    let (query, call) = (text('Q', &large), message('F', &vec![0; 1 << 20]));
    let half = |message: &[u8]| {
        let (first, rest) = message.split_at(message.len() / 2);
        (first.to_vec(), rest.to_vec())
    };
    let ignored = [
        message('d', &vec![b'd'; 100_000]),
        message('c', b""),
        text('f', "failed"),
        text('Q', "select 'skipped'"),
        extended("select 'skipped'"),
        flush(),
        sync(),
    ];
    let (begun_parse, rest_of_parse) = half(&parse);
    for (name, first, rest) in [
        (
            "without its Sync",
            [extended("select 1"), flush()].concat(),
            sync(),
        ),
        ("late", extended("select 1"), sync()),
        (
            "with what a server skips",
            extended("select 1"),
            ignored.concat(),
        ),
        (
            "in its second message",
            [extended("select 1"), begun_parse.clone()].concat(),
            [rest_of_parse.clone(), sync()].concat(),
        ),
        (
            "in a large Parse",
            begun_parse,
            [rest_of_parse, plain_bound(), sync()].concat(),
        ),
        ("in a large Query", half(&query).0, half(&query).1),
        ("in a large FunctionCall", half(&call).0, half(&call).1),
    ] {
        other.query("begin").await;
        one.send(&first).await;
        let error = one.next().await.error();
        assert_eq!(error.severity, "ERROR", "{name}: {error:?}");
        assert_eq!(error.code, "53300", "{name}");
        other.query("commit").await;
        // Nothing of it reaches a server.
        let mut pieces = rest.chunks(rest.len().div_ceil(3));
        for piece in pieces.by_ref() {
            sleep(Duration::from_millis(5)).await;
            one.send(piece).await;
        }
        assert_eq!(one.tags().await, "Z", "{name}");
        assert_eq!(one.value("select 2").await, "2", "{name}");
    }
    // The end of a COPY that has failed is no request.
    other.query("begin").await;
    let (first, rest) = half(&message('d', &vec![b'd'; 100_000]));
    one.send(&first).await;
    sleep(Duration::from_millis(400)).await;
    one.send(&[rest, sync()].concat()).await;
    assert_eq!(one.tags().await, "Z");
    // One that leaves.
    one.send(&[extended("select 1"), flush()].concat()).await;
    assert_eq!(one.next().await.error().code, "53300");
    one.send(&[plain_bound(), terminate()].concat()).await;
    one.closed().await;
    other.query("commit").await;
}
