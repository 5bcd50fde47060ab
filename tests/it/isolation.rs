//! What one client can do to the others: nothing that its own settings, names or errors cause reaches them.

use std::time::Duration;

use lakebase_proxy::{config::Settings, emulator::Emulator};
use tokio::{task::JoinSet, time::Instant};

use crate::harness::{self, DATABASE, Proxy, wire::Wire, within};

/// Well beyond a login on a busy machine, well below any wait for an endpoint that wakes.
const PROMPT: Duration = Duration::from_secs(5);
const ORDINARY_CLIENTS: usize = 60;

fn short(settings: &mut Settings) {
    settings.server_connect_timeout = Some(harness::millis(1500));
}

/// Repeats a login with these parameters until the test ends.
async fn repeat(address: std::net::SocketAddr, parameters: [(&'static str, &'static str); 3]) {
    loop {
        let mut wire = Wire::dial(address).await;
        wire.startup(&parameters).await;
        // Up to the refusal, or to the session that is not wanted.
        while let Ok(Some(reply)) = wire.try_next().await {
            if matches!(reply.tag, 'E' | 'Z') {
                break;
            }
        }
    }
}

/// Logs in one ordinary client after another beside the attackers.
async fn log_in_beside(emulator: &Emulator, attacks: &[[(&'static str, &'static str); 3]]) {
    let proxy = Proxy::with(emulator, short).await;
    drop(proxy.client().await);
    let before = emulator.counts();
    let mut attackers = JoinSet::new();
    for &attack in attacks {
        attackers.spawn(repeat(proxy.address(), attack));
    }
    // Every attack has been met at least once.
    within(
        "the attacks",
        emulator.wait_for(harness::TIMEOUT, |now| {
            now.dials - before.dials >= attacks.len() as u64
        }),
    )
    .await
    .unwrap();
    for _ in 0..ORDINARY_CLIENTS {
        let began = Instant::now();
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "ordinary"), ("database", DATABASE)])
            .await;
        let welcome = wire.welcome().await;
        assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
        assert_eq!(welcome.notices, [], "nothing was waking");
    }
    assert_eq!(proxy.metrics().wake_seconds.get_sample_count(), 0);
    assert_eq!(
        emulator.counts().mint_requests,
        before.mint_requests,
        "no credential was replaced"
    );
}

/// The server repeats a refused value in its error, and the texts of failures were looked for there: a client could make
/// the proxy take the endpoint for asleep, and lead all others' attempts with its own settings.
#[tokio::test]
async fn an_error_that_quotes_the_client_does_not_classify_the_endpoint() {
    let emulator = harness::emulator().await;
    log_in_beside(
        &emulator,
        &[
            [
                ("user", "attacker"),
                ("database", DATABASE),
                ("options", "-c work_mem=endpoint\\ is\\ idle"),
            ],
            [
                ("user", "attacker"),
                ("database", DATABASE),
                ("options", "-c work_mem=token\\ x\\ has\\ expired"),
            ],
            [
                ("user", "attacker"),
                ("database", "couldn't connect to compute node"),
                ("application_name", "the database system is starting up"),
            ],
            [
                ("user", "token x has expired"),
                ("database", "token x has expired"),
                ("work_mem", "control plane request failed"),
            ],
        ],
    )
    .await;
}

/// A login that takes longer than `server_connect_timeout` looks like one at an endpoint that stalls while it wakes.
#[tokio::test]
async fn a_login_slow_by_its_own_settings_delays_no_other() {
    let emulator = harness::emulator().await;
    let slow = [
        ("user", "attacker"),
        ("database", DATABASE),
        ("options", "-c post_auth_delay=3"),
    ];
    log_in_beside(&emulator, &[slow; 8]).await;
}

/// While the endpoint wakes all wait; that it was disabled meanwhile is an answer for each of them.
#[tokio::test]
async fn two_hundred_clients_learn_at_once_that_the_endpoint_is_disabled_and_later_ones_are_served()
{
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    emulator.configure(|settings| settings.is_disabled = true);
    let refusals = within(
        "all refusals",
        futures_util::future::join_all((0..200).map(|_| proxy.refusal())),
    );
    for refusal in refusals.await {
        assert!(
            refusal.message.contains("endpoint is disabled"),
            "{refusal:?}"
        );
    }
    emulator.configure(|settings| settings.is_disabled = false);
    let began = Instant::now();
    drop(proxy.client().await);
    assert!(began.elapsed() < PROMPT, "{:?}", began.elapsed());
}
