//! The life of server connections: opened, idle, expired, lost, shut down.

use super::*;

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
