//! A day in the life of the credential, with a pool attached: no login is refused, as none uses an expired one.
//!
//! A credential lives for an hour, here for ten seconds, and a server connection for one: all the time some are opened.

use std::{net::SocketAddr, time::Duration};

use lakebase_proxy::emulator::Settings;
use rand::random_range;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{Stage, canary, measure::metric, wire::Wire};

const LIFETIME: Duration = Duration::from_secs(10);
/// Clients that stay, and clients that connect again and again.
const CLIENTS: (u32, u32) = (10, 10);

pub(crate) fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.token_ttl = LIFETIME;
    settings
}

pub(crate) fn arguments(mode: &str) -> Vec<&str> {
    [canary::arguments(mode), vec!["--server-lifetime", "1s"]].concat()
}

pub(crate) async fn day(stage: &Stage, duration: Duration) {
    let before = stage.emulator.counts();
    let until = Instant::now() + duration;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS.0 + CLIENTS.1 {
        clients.spawn(client_until(stage.postgres, client < CLIENTS.0, until));
    }
    let queries: u64 = clients.join_all().await.into_iter().sum();
    let counts = stage.emulator.counts();
    let logins = counts.logins - before.logins;
    let credentials = counts.credentials_issued - before.credentials_issued;
    println!("   {queries} queries, {logins} logins with {credentials} credentials");
    // A login with an expired credential is refused, and tried again with another one. The emulator also counts as refused those
    // that the pool gives up, since its client has got another connection.
    let retries = metric(stage.http, "upstream_retries_total").await;
    assert!(
        retries < 0.5,
        "{retries} logins were refused:\n{}",
        stage.proxy.reply()
    );
    let lifetimes = duration.as_secs() / LIFETIME.as_secs();
    assert!(credentials >= lifetimes, "{lifetimes} lifetimes");
    // Each is replaced at half of its lifetime, 10 % sooner at the soonest.
    assert!(credentials <= lifetimes * 5 / 2 + 2, "minted too often");
    assert!(logins >= duration.as_secs(), "connections are not replaced");
}

/// Returns how many queries were answered.
async fn client_until(address: SocketAddr, stays: bool, until: Instant) -> u64 {
    let mut queries = 0;
    while Instant::now() < until {
        let mut wire = Wire::connect(address).await.unwrap();
        let mut left = if stays { u32::MAX } else { random_range(1..20) };
        while left > 0 && Instant::now() < until {
            wire.query("select 1").await.unwrap().unwrap();
            queries += 1;
            left -= 1;
            sleep(Duration::from_millis(random_range(0..100))).await;
        }
        wire.terminate().await.unwrap();
    }
    queries
}
