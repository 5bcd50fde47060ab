//! Pools and a compute that suspends.

use std::time::Duration;

use lakebase_proxy::emulator::{Action, Site, WhileAsleep};
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
    clients(&proxy, 20, "select 1").join_all().await;
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

/// A compute that sleeps and takes five seconds to wake up, and a pool of five whose hundred clients wait for it longer than they
/// may wait for each other.
struct Hundred {
    emulator: Emulator,
    proxy: Proxy,
    /// The dials before.
    dials: u64,
    clients: JoinSet<String>,
}

impl Hundred {
    async fn start(while_asleep: WhileAsleep) -> Self {
        let emulator = harness::emulator::start_with(|settings| {
            settings.wake_delay = Duration::from_secs(5);
            settings.while_asleep = while_asleep;
        })
        .await;
        let proxy = Proxy::with(&emulator, |settings| {
            pooled(settings, 5);
            settings.query_wait_timeout = Some(millis(3000));
        })
        .await;
        emulator.suspend().await;
        Self {
            dials: emulator.counts().dials,
            clients: clients(&proxy, 100, "select 1"),
            emulator,
            proxy,
        }
    }

    /// The dials since, once all clients have been served.
    async fn served(self) -> u64 {
        let answers = within("all clients", self.clients.join_all()).await;
        assert!(answers.iter().all(|answer| answer == "1"));
        let counts = self.emulator.counts();
        assert!(counts.logins <= 5, "{counts:?}");
        assert_eq!(self.proxy.metrics().pool_wait_timeouts.get(), 0);
        counts.dials - self.dials
    }
}

/// The answers of so many clients that connect at the same time.
fn clients(proxy: &Proxy, count: usize, sql: &'static str) -> JoinSet<String> {
    (0..count)
        .map(|_| {
            let config = proxy.client_config();
            async move { value(&connect(&config).await, sql).await }
        })
        .collect()
}

#[tokio::test]
async fn a_hundred_clients_at_a_held_connection_outwait_the_queue_timeout() {
    let hundred = Hundred::start(WhileAsleep::Hold).await;
    sleep(Duration::from_secs(2)).await;
    let asleep = hundred.emulator.counts();
    assert_eq!(asleep.wakes, 0);
    // Until the endpoint has answered once, what wakes it may be any of the first logins.
    let dials = asleep.dials - hundred.dials;
    assert!(dials <= 5, "{dials} dials");
    hundred.served().await;
}

#[tokio::test]
async fn a_hundred_clients_at_a_sleeping_endpoint_dial_one_at_a_time_and_outwait_the_queue_timeout()
{
    let hundred = Hundred::start(WhileAsleep::default()).await;
    let dials = hundred.served().await;
    // The first five, a retry after each wait, and the logins that succeed.
    assert!(dials <= 5 + 10 + 5, "{dials} dials");
}

#[tokio::test]
async fn an_endpoint_that_has_just_woken_gets_one_login_then_two_then_four_then_eight() {
    let emulator = harness::emulator::start_with(|settings| {
        settings.wake_delay = Duration::from_secs(1);
    })
    .await;
    let proxy = Proxy::with(&emulator, |settings| pooled(settings, 20)).await;
    // Much longer than the rest of a login, so that those at the same time are seen.
    emulator.faults().always(Site::Password, Action::Delay(100));
    emulator.suspend().await;
    let clients = clients(&proxy, 100, "select pg_sleep(1)::text");
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.wakes == 1)
        .await
        .expect("it wakes");
    let mut most = 0;
    let mut growth = Vec::new();
    while emulator.counts().sessions < 20 {
        let counts = emulator.counts();
        let logging_in = counts.connections - counts.sessions;
        assert!(logging_in <= counts.logins + 1, "{counts:?} {growth:?}");
        if logging_in > most {
            most = logging_in;
            growth.push(logging_in);
        }
        sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(most, 8, "{growth:?}");
    within("all clients", clients.join_all()).await;
    assert_eq!(emulator.counts().logins, 20);
}
