//! Pools and a compute that suspends.

use std::time::Duration;

use lakebase_proxy::emulator::WhileAsleep;
use tokio::time::sleep;

use super::*;

/// Whether a compute suspends behind a pool that has served, and what a pool does until the next client.
async fn suspends_and_is_left_asleep(server_idle_timeout: u64) {
    let emulator = harness::emulator::start_with(|settings| {
        settings.suspend_after = Duration::from_millis(1500);
        settings.wake_delay = Duration::from_millis(300);
    })
    .await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 5);
        settings.spare_pool_size = Some(1);
        settings.server_idle_timeout = Some(millis(server_idle_timeout));
    })
    .await;
    let clients: JoinSet<_> = (0..20)
        .map(|_| {
            let config = proxy.client_config();
            async move { value(&connect(&config).await, "select 1").await }
        })
        .collect();
    clients.join_all().await;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.suspensions == 1)
        .await
        .expect("it suspends");
    let asleep = emulator
        .wait_for(harness::TIMEOUT, |counts| counts.connections == 0)
        .await
        .expect("no connection is left");
    sleep(Duration::from_secs(3)).await;
    let now = emulator.counts();
    assert_eq!((now.dials, now.wakes), (asleep.dials, 0), "nothing dialed");
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    assert_eq!(emulator.counts().wakes, 1);
}

#[tokio::test]
async fn a_compute_suspends_once_the_idle_connections_are_closed_and_the_next_client_wakes_it() {
    suspends_and_is_left_asleep(300).await;
}

/// Idle connections do not keep it awake, and its end of them is not an occasion to open others.
#[tokio::test]
async fn a_compute_suspends_under_idle_connections_and_the_next_client_wakes_it() {
    suspends_and_is_left_asleep(60_000).await;
}

#[tokio::test]
async fn a_hundred_clients_at_a_held_connection_outwait_the_queue_timeout() {
    let emulator = harness::emulator::start_with(|settings| {
        settings.wake_delay = Duration::from_secs(5);
        settings.while_asleep = WhileAsleep::Hold;
    })
    .await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 5);
        settings.query_wait_timeout = Some(millis(3000));
    })
    .await;
    emulator.suspend().await;
    let before = emulator.counts().dials;
    let clients: JoinSet<_> = (0..100)
        .map(|_| {
            let config = proxy.client_config();
            async move { value(&connect(&config).await, "select 1").await }
        })
        .collect();
    sleep(Duration::from_secs(2)).await;
    let asleep = emulator.counts();
    assert_eq!(asleep.wakes, 0);
    // Until the endpoint has answered once, what wakes it may be any of the first logins.
    let dials = asleep.dials - before;
    assert!(dials <= 5, "{dials} dials");
    let answers = within("all clients", clients.join_all()).await;
    assert!(answers.iter().all(|answer| answer == "1"));
    assert!(emulator.counts().logins <= 5);
    assert_eq!(proxy.metrics().pool_wait_timeouts.get(), 0);
}

#[tokio::test]
async fn a_hundred_clients_at_a_sleeping_endpoint_dial_one_at_a_time_and_outwait_the_queue_timeout()
{
    let emulator = harness::emulator::start_with(|settings| {
        settings.wake_delay = Duration::from_secs(5);
    })
    .await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, 5);
        settings.query_wait_timeout = Some(millis(3000));
    })
    .await;
    emulator.suspend().await;
    let before = emulator.counts().dials;
    let clients: JoinSet<_> = (0..100)
        .map(|_| {
            let config = proxy.client_config();
            async move { value(&connect(&config).await, "select 1").await }
        })
        .collect();
    let answers = within("all clients", clients.join_all()).await;
    assert!(answers.iter().all(|answer| answer == "1"));
    let (now, dials) = (emulator.counts(), emulator.counts().dials - before);
    assert!(now.logins <= 5);
    // The first five, a retry after each wait, and the logins that succeed.
    assert!(dials <= 5 + 10 + 5, "{dials} dials");
    assert_eq!(proxy.metrics().pool_wait_timeouts.get(), 0);
}
