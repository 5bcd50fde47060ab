//! The queue: order, limits, timeouts, and the growth of the pool.

use super::*;

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
