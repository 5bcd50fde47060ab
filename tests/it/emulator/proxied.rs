//! How the proxy behaves when the edge and the workspace misbehave.

use lakebase_proxy::{
    config::PoolMode,
    emulator::{Action, Emulator, Site},
    telemetry::labels::CancelOutcome,
};
use serde_json::{Value, json};
use tokio_postgres::error::{DbError, SqlState};

use super::workspace::port;
use crate::harness::{
    self, DATABASE, Proxy, TIMEOUT,
    emulator::http,
    until_running,
    wire::{Wire, cancel, text},
    within,
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
        emulator.faults().once(Site::Cancel, Action::Defer(1500));
        let (mut wire, key) = session(&proxy).await;
        // It ends with the superuser's session, however slow the test is.
        let superuser = harness::superuser().await;
        let held = "select pg_advisory_lock(81027)";
        superuser.batch_execute(held).await.unwrap();
        wire.send(&text(
            'Q',
            "select pg_advisory_xact_lock(81027) /* asleep */",
        ))
        .await;
        until_running(&role, 1).await;
        cancel(proxy.address(), key).await;
        assert_eq!(emulator.counts().cancels_forwarded, 0, "{mode:?}: not yet");
        assert_eq!(
            proxy.metrics().cancels[CancelOutcome::Forwarded].get(),
            1,
            "{mode:?}"
        );
        // The query has ended before the signal, and so has the session.
        drop(superuser);
        let replies = wire.until('Z').await;
        assert!(replies.iter().all(|reply| reply.tag != 'E'), "{mode:?}");
        drop(wire);
        let client = proxy.client().await;
        client
            .simple_query("select pg_sleep(2)")
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

async fn refusal(proxy: &Proxy, database: &str) -> DbError {
    let mut config = proxy.client_config();
    config.dbname(database);
    let refused = within("a refusal", proxy.try_client(&config)).await;
    let error = refused.map(|_| ()).unwrap_err();
    error
        .as_db_error()
        .unwrap_or_else(|| panic!("{error}"))
        .clone()
}

/// A request to the emulator's own interface, as other people's tests send it.
async fn control(emulator: &Emulator, head: &str, body: &Value) {
    let answer = http(port(emulator), head, &body.to_string()).await.unwrap();
    assert!((200..300).contains(&answer.status), "{answer:?}");
}

#[tokio::test]
async fn a_role_that_is_bound_to_another_identity_is_refused_with_the_statement_that_binds_it() {
    let emulator = harness::emulator().await;
    let app = emulator.identities().app.clone();
    let proxy = Proxy::start(&emulator).await;
    let event = async |label: Option<&str>| {
        let body = json!({ "event": "label_role", "role": app.name, "label": label });
        control(&emulator, "POST /emulator/events", &body).await;
    };
    for (label, text) in [
        (
            Some("id=1,type=USER"),
            "did not match the security label configured for role",
        ),
        (None, "no security label"),
    ] {
        event(label).await;
        let refusal = refusal(&proxy, DATABASE).await;
        assert_eq!(refusal.code(), &SqlState::INVALID_PASSWORD);
        assert!(refusal.detail().unwrap().contains(text), "{refusal:?}");
        let statement = format!("ON ROLE \"{}\" IS 'id=", app.name);
        assert!(refusal.hint().unwrap().contains(&statement), "{refusal:?}");
    }
    let right = format!("id={},type=SERVICE_PRINCIPAL", app.id);
    event(Some(&right)).await;
    proxy.client().await;
}

/// A plain `CREATE DATABASE` leaves the extension out, and nothing but the hint leads to it.
#[tokio::test]
async fn a_database_without_the_extension_is_refused_with_the_statement_that_adds_it() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let without = json!({ "databases_without_extension": ["postgres"] });
    control(&emulator, "PATCH /emulator/settings", &without).await;
    proxy.client().await;
    let refusal = refusal(&proxy, "postgres").await;
    assert_eq!(refusal.code(), &SqlState::INVALID_PASSWORD);
    let hint = refusal.hint().unwrap();
    assert!(
        hint.contains("run in `postgres`: CREATE EXTENSION IF NOT EXISTS databricks_auth"),
        "{hint}"
    );
}

/// Another credential would be refused for as long, so the same one is tried again.
#[tokio::test]
async fn a_credential_that_is_not_known_yet_costs_the_client_time_only() {
    let emulator = harness::emulator().await;
    let fault = json!({ "faults": [{
        "at": "password",
        "do": { "error": {
            "severity": "ERROR",
            "code": "XX000",
            "message": "password authentication failed for user 'x'",
        } },
        "credential_younger_than": 2,
    }] });
    control(&emulator, "PUT /emulator/faults", &fault).await;
    let proxy = Proxy::start(&emulator).await;
    proxy.client().await;
    assert_ne!(emulator.faults().statuses()[0].struck, 0);
    assert_eq!(emulator.counts().credentials_issued, 1);
}
