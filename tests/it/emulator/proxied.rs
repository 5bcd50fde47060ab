//! How the proxy behaves when the edge and the workspace misbehave.

use lakebase_proxy::{
    config::PoolMode,
    emulator::{Action, Emulator, Site},
    telemetry::labels::CancelOutcome,
};
use tokio_postgres::error::SqlState;

use crate::harness::{
    self, Proxy, TIMEOUT, until_running,
    wire::{Wire, cancel, text},
};

async fn pooled(emulator: &Emulator, mode: Option<PoolMode>) -> Proxy {
    Proxy::with(emulator, |settings| {
        settings.pool_mode = mode;
        settings.default_pool_size = Some(1.try_into().unwrap());
        settings.spare_pool_size = Some(0);
    })
    .await
}

async fn session(proxy: &Proxy) -> (Wire, [u8; 8]) {
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone")]).await;
    let key = wire.welcome().await.key;
    (wire, key)
}

/// As an edge does that passes cancels on by itself: the requester's connection closes before the signal is sent, which then
/// finds whatever the server process does by that time.
#[tokio::test]
async fn a_cancel_that_arrives_late_reaches_no_other_client() {
    for mode in [None, Some(PoolMode::Session), Some(PoolMode::Transaction)] {
        let emulator = harness::emulator().await;
        let role = emulator.identities().app.name.clone();
        let proxy = pooled(&emulator, mode).await;
        emulator.faults().once(Site::Cancel, Action::Defer(600));
        let (mut wire, key) = session(&proxy).await;
        wire.send(&text('Q', "select pg_sleep(0.2)")).await;
        until_running(&role, 1).await;
        cancel(proxy.address(), key).await;
        assert_eq!(emulator.counts().cancels_forwarded, 0, "{mode:?}: not yet");
        assert_eq!(
            proxy.metrics().cancels[CancelOutcome::Forwarded].get(),
            1,
            "{mode:?}"
        );
        // The query has ended before the signal, and so has the session.
        let replies = wire.until('Z').await;
        assert!(replies.iter().all(|reply| reply.tag != 'E'), "{mode:?}");
        drop(wire);
        let client = proxy.client().await;
        client
            .simple_query("select pg_sleep(1)")
            .await
            .unwrap_or_else(|error| panic!("{mode:?}: the late cancel hit it: {error:?}"));
        let arrived = emulator.wait_for(TIMEOUT, |counts| counts.cancels_forwarded == 1);
        assert!(arrived.await.is_some(), "{mode:?}");
    }
}

/// The proxy cannot know that the signal was not sent: the query goes on, and another request ends it.
#[tokio::test]
async fn a_cancel_that_the_edge_drops_can_be_repeated() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for action in [Action::Close, Action::Reset] {
        emulator.faults().once(Site::Cancel, action);
        let forwarded = emulator.counts().cancels_forwarded;
        let (mut wire, key) = session(&proxy).await;
        wire.send(&text('Q', "select pg_sleep(60)")).await;
        until_running(&emulator.identities().app.name, 1).await;
        cancel(proxy.address(), key).await;
        assert_eq!(emulator.counts().cancels_forwarded, forwarded);
        until_running(&emulator.identities().app.name, 1).await;
        cancel(proxy.address(), key).await;
        let replies = wire.until('Z').await;
        let error = replies.iter().find(|reply| reply.tag == 'E').unwrap();
        assert_eq!(error.error().code, SqlState::QUERY_CANCELED.code());
    }
    assert_eq!(emulator.counts().cancels, 4);
}
