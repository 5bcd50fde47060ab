//! Credentials expire and are replaced unnoticed, or cannot be, and all clients get the reason.

use std::time::Duration;

use lakebase_proxy::{
    credential::{Cause, CredentialState},
    emulator::{Action, Response, Site},
    telemetry::labels::RefreshOutcome,
};
use tokio::time::{Instant, sleep, timeout};

use crate::harness::{self, Proxy, TIMEOUT, eventually, millis};

#[tokio::test]
async fn lifetimes_pass_and_every_login_works() {
    let emulator = harness::emulator().await;
    // The least that leaves room for the five seconds between two mints.
    emulator.configure(|settings| settings.token_ttl = Duration::from_secs(8));
    let proxy = Proxy::start(&emulator).await;
    let mut old = proxy.session().await;
    let began = Instant::now();
    let mut logins = 1;
    while emulator.counts().credentials_issued < 4 || began.elapsed() < Duration::from_secs(17) {
        assert!(
            began.elapsed() < Duration::from_secs(40),
            "{:?}",
            emulator.counts()
        );
        let state = proxy.credentials().status().state;
        assert!(
            state.is_valid(),
            "no client has to wait for a refresh: {state:?}"
        );
        let mut wire = proxy.session().await;
        logins += 1;
        assert_eq!(wire.value("select 1").await, "1");
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(
        old.value("select 'still here'").await,
        "still here",
        "expiry is enforced at login only"
    );
    let counts = emulator.counts();
    assert_eq!(
        (counts.logins, counts.dials, counts.refusals),
        (logins, logins, 0),
        "no login was ever refused"
    );
    let lifetimes = began.elapsed().as_secs() / 5 + 2;
    assert!(
        counts.mint_requests <= lifetimes,
        "{} mints in {:?}",
        counts.mint_requests,
        began.elapsed()
    );
    assert_eq!(
        counts.token_requests, 1,
        "the workspace token lives for an hour"
    );
    assert_eq!(
        proxy.metrics().credential_refreshes[RefreshOutcome::Success].get(),
        counts.mint_requests
    );
}

#[tokio::test]
async fn an_outage_is_noticed_only_once_the_credential_has_expired_and_heals_by_itself() {
    let emulator = harness::emulator().await;
    // A login on a busy machine must fit between the refresh, at half of it, and its end.
    emulator.configure(|settings| settings.token_ttl = Duration::from_secs(14));
    let proxy = Proxy::with(&emulator, |settings| {
        settings.connect_timeout = Some(millis(1500));
    })
    .await;
    emulator
        .faults()
        .always(Site::Mint, Action::Respond(Response::status(500)));
    let mut old = proxy.session().await;

    // A refresh fails, and the credential that is valid goes on being used.
    emulator
        .wait_for(TIMEOUT, |counts| counts.mint_requests >= 2)
        .await
        .unwrap();
    let state = || proxy.credentials().status().state;
    assert!(state().is_valid());
    drop(proxy.session().await);

    eventually("it expires", async || {
        (state() == CredentialState::Expired).then_some(())
    })
    .await;
    let began = Instant::now();
    let refusal = proxy.refusal().await;
    assert!(
        began.elapsed() >= Duration::from_millis(1500),
        "held for the budget, not {:?}",
        began.elapsed()
    );
    assert_eq!(refusal.code, "28000");
    assert!(
        refusal.message.contains(emulator.endpoint_name()),
        "{refusal:?}"
    );
    assert!(
        refusal
            .message
            .contains("cannot obtain a database credential"),
        "{refusal:?}"
    );
    assert!(
        refusal.detail.is_some() && refusal.hint.is_some(),
        "{refusal:?}"
    );
    let dials = emulator.counts().dials;
    assert_eq!(dials, 2, "nothing is dialed without a credential");
    assert!(
        emulator.counts().mint_requests <= 10,
        "{:?}",
        emulator.counts()
    );
    assert_eq!(old.value("select 1").await, "1");

    // The workspace is back: clients are held until there is a credential.
    emulator.faults().clear();
    let healed = async {
        loop {
            let mut wire = proxy.dial().await;
            wire.startup(&[("user", "anyone"), ("database", harness::DATABASE)])
                .await;
            if wire.next().await.tag == 'R' {
                break;
            }
        }
    };
    timeout(TIMEOUT, healed).await.expect("it heals");
    assert_eq!(state(), CredentialState::Fresh);
}

#[tokio::test]
async fn a_refusal_by_the_workspace_does_not_cost_a_valid_credential() {
    let emulator = harness::emulator().await;
    emulator.configure(|settings| settings.token_ttl = Duration::from_secs(14));
    let proxy = Proxy::start(&emulator).await;
    let body = r#"{"error_code":"PERMISSION_DENIED","message":"no longer allowed"}"#;
    emulator
        .faults()
        .always(Site::Mint, Action::Respond(Response::body(403, body)));
    emulator
        .wait_for(TIMEOUT, |counts| counts.mint_requests >= 2)
        .await
        .unwrap();
    drop(proxy.session().await);
    eventually("it expires", async || {
        (proxy.credentials().status().state == CredentialState::Expired).then_some(())
    })
    .await;
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "28000");
    assert!(
        format!("{refusal:?}").contains("no longer allowed"),
        "{refusal:?}"
    );
    assert!(
        emulator.counts().mint_requests <= 4,
        "{:?}",
        emulator.counts()
    );
}

#[tokio::test]
async fn a_workspace_whose_clock_is_off_changes_nothing() {
    for skew in [-900, 900] {
        let emulator = harness::emulator().await;
        emulator.configure(|settings| {
            settings.token_ttl = Duration::from_mins(5);
            settings.clock_skew_seconds = skew;
        });
        let proxy = Proxy::start(&emulator).await;
        drop(proxy.session().await);
        let status = proxy.credentials().status();
        assert_eq!(status.state, CredentialState::Fresh, "{skew}");
        assert_eq!(emulator.counts().mint_requests, 1);
    }
}

/// A core dump once held every credential of the last hours.
#[tokio::test]
async fn an_old_credential_is_dropped_after_a_refresh_with_open_sessions() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.session().await;
    let cell = proxy.credentials();
    let old = std::sync::Arc::downgrade(&cell.get(Instant::now() + TIMEOUT).await.unwrap());
    let cause = Cause::login("app", "databricks_postgres", false);
    let new = cell
        .wait_for_newer(1, cause, Instant::now() + TIMEOUT)
        .await;
    assert_eq!(new.unwrap().generation, 2);
    // Dropped is wiped: the secret's type sees to that.
    eventually("the old credential is dropped", async || {
        old.upgrade().is_none().then_some(())
    })
    .await;
    assert_eq!(wire.value("select 'still here'").await, "still here");
}
