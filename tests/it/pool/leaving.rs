//! Clients that leave at any point: their connection returns clean or is closed, and their work ends.

use super::*;

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_a_request_leaves_no_connection_behind() {
    let (_emulator, proxy) = proxy(1).await;
    let parts: [&[u8]; 4] = [
        b"Q\0\0\0\x20select",
        b"P\0\0\0\x10\0select 1\0\0\0", // and no Sync
        b"Q\0\0\0\x12select 1;",
        b"X\0\0",
    ];
    for part in parts {
        let mut wire = proxy.session().await;
        wire.send(part).await;
        drop(wire);
        assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    }
    proxy.until_idle(1).await;
    assert_eq!(proxy.closes(PoolClose::Abandoned), 4);
}

#[tokio::test]
async fn an_abandoned_query_is_cancelled_and_its_locks_are_released() {
    let (emulator, proxy) = proxy(2).await;
    let role = emulator.identities().app.name.clone();
    let mut wire = proxy.session().await;
    wire.send(&text('Q', "select pg_advisory_lock(77), pg_sleep(60)"))
        .await;
    harness::until_running(&role, 1).await;
    // A reset, as of a process that is killed.
    wire.reset();
    let client = proxy.client().await;
    within(
        "the lock",
        client.batch_execute("select pg_advisory_lock(77)"),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn a_cancelled_connection_is_not_given_to_another_client() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let client = proxy.client().await;
    let token = client.cancel_token();
    let query =
        TaskTracker::new().spawn(async move { client.batch_execute("select pg_sleep(60)").await });
    harness::until_running(&role, 1).await;
    token.cancel_query(NoTls).await.unwrap();
    let error = query.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
    assert_eq!(value(&proxy.client().await, "select 1").await, "1");
    assert_eq!(proxy.closes(PoolClose::Cancelled), 1);
    assert_eq!(emulator.counts().logins, 2);
}
