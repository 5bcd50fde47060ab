//! Random programs do the same through a pool as on a connection of their own. The soak runs more of them.

use super::{transaction::shared, *};
use crate::differential::{self, Servers};

async fn differential(mode: PoolMode) {
    let server = harness::server().await;
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 3);
        settings.pool_mode = Some(mode);
    })
    .await;
    let servers = Servers {
        proxy: proxy.address(),
        postgres: server.directory().join("s"),
        superuser: "databricks_control_plane",
        role: emulator.identities().app.name.clone(),
    };
    differential::run(servers, 1, 60, None).await;
    let servers: i64 = proxy
        .metrics()
        .pool_servers
        .values()
        .map(prometheus::IntGauge::get)
        .sum();
    assert!(servers <= 3, "{servers} server connections");
    // Statements with errors, abandoned blocks and pins have cost no session.
    assert_eq!(proxy.metrics().pool_wait_timeouts.get(), 0);
    if mode != PoolMode::Session {
        let leases = proxy.metrics().pool_leases.values();
        // How often a client parts with its connection in `auto` depends on time.
        let leases: u64 = leases.map(prometheus::IntCounter::get).sum();
        assert!(leases > 60, "{leases} leases");
    }
}

#[tokio::test]
async fn random_programs_do_the_same_as_on_connections_of_their_own_in_mode_session() {
    differential(PoolMode::Session).await;
}

#[tokio::test]
async fn random_programs_do_the_same_as_on_connections_of_their_own_in_mode_transaction() {
    differential(PoolMode::Transaction).await;
}

#[tokio::test]
async fn random_programs_do_the_same_as_on_connections_of_their_own_in_mode_auto() {
    differential(PoolMode::Auto).await;
}
