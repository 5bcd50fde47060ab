//! CancelRequest: the right session, and no other.

use std::time::Duration;

use futures_util::future::join_all;
use lakebase_proxy::{
    config::ClientTlsSetting,
    emulator::{Action, Counts, Site},
    telemetry::labels::CancelOutcome,
};
use tokio::time::Instant;
use tokio_postgres::{NoTls, error::SqlState};

use crate::harness::{
    self, Proxy, TIMEOUT, until_running,
    wire::{SSL_REQUEST, Wire, cancel, cancel_request, text},
    within,
};

const SLEEP: &str = "select pg_sleep(60)";

/// A session, and the key it was given.
async fn session(proxy: &Proxy) -> (Wire, [u8; 8]) {
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone")]).await;
    let key = wire.welcome().await.key;
    (wire, key)
}

async fn expect_cancelled(wire: &mut Wire) {
    let reply = wire.until('Z').await;
    let error = reply
        .iter()
        .find(|reply| reply.tag == 'E')
        .expect("an error")
        .error();
    assert_eq!(error.code, "57014", "{error:?}");
    assert_eq!(wire.value("select 1").await, "1", "the session lives on");
}

#[tokio::test]
async fn a_cancel_reaches_its_session_and_no_other() {
    let emulator = harness::emulator().await;
    let role = emulator.identities().app.name.clone();
    // Two proxies in front of one endpoint: a key means nothing to the other.
    let one = Proxy::with(&emulator, |settings| {
        settings.client_tls = Some(ClientTlsSetting::Off);
    });
    let (one, two) = (one.await, Proxy::start(&emulator).await);
    let mut sessions = Vec::new();
    for n in 0..20 {
        let mut session = session(if n % 2 == 0 { &one } else { &two }).await;
        session.0.send(&text('Q', SLEEP)).await;
        sessions.push(session);
    }
    until_running(&role, 20).await;
    let mut keys: Vec<_> = sessions.iter().map(|(_, key)| *key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 20, "no two keys are the same");

    for (n, left) in [(7, 19), (12, 18), (0, 17), (19, 16)] {
        let (wire, key) = &mut sessions[n];
        let (ours, other) = if n % 2 == 0 {
            (&one, &two)
        } else {
            (&two, &one)
        };
        cancel(other.address(), *key).await;
        assert_eq!(
            emulator.counts().cancels,
            20 - left - 1,
            "not the other's to pass on"
        );
        cancel(ours.address(), *key).await;
        expect_cancelled(wire).await;
        until_running(&role, left.cast_signed()).await;
    }
    assert_eq!(emulator.counts().cancels_forwarded, 4);
    for proxy in [&one, &two] {
        let count = |outcome: CancelOutcome| proxy.metrics().cancels[outcome].get();
        assert_eq!(
            (
                count(CancelOutcome::Forwarded),
                count(CancelOutcome::Unknown),
                count(CancelOutcome::Failed)
            ),
            (2, 2, 0)
        );
    }
    // Over TLS-less negotiation as libpq 17 does it, too.
    let mut requester = one.dial().await;
    requester.send(&SSL_REQUEST).await;
    assert_eq!(requester.byte().await, 'N');
    requester.send(&cancel_request(sessions[2].1)).await;
    requester.closed().await;
    expect_cancelled(&mut sessions[2].0).await;
}

#[tokio::test]
async fn a_wrong_key_does_nothing_and_guessing_is_slow() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let role = emulator.identities().app.name.clone();
    let (mut wire, key) = session(&proxy).await;
    wire.send(&text('Q', SLEEP)).await;
    until_running(&role, 1).await;
    let wrong = |bit: usize| {
        let mut key = key;
        key[bit / 8] ^= 1 << (bit % 8);
        key
    };
    let began = Instant::now();
    join_all((0..64).map(|bit| cancel(proxy.address(), wrong(bit)))).await;
    assert!(
        began.elapsed() >= Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(emulator.counts().cancels, 0, "nothing is passed on");
    until_running(&role, 1).await;
    assert_eq!(proxy.metrics().cancels[CancelOutcome::Unknown].get(), 64);
    // The right one is not made to wait for the guesses.
    let began = Instant::now();
    cancel(proxy.address(), key).await;
    assert!(began.elapsed() < Duration::from_millis(900));
    expect_cancelled(&mut wire).await;
}

#[tokio::test]
async fn a_late_cancel_does_nothing() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let (wire, key) = session(&proxy).await;
    drop(wire);
    proxy.until_quiet().await;
    let (mut next, _) = session(&proxy).await;
    next.send(&text('Q', SLEEP)).await;
    until_running(&emulator.identities().app.name, 1).await;
    cancel(proxy.address(), key).await;
    assert_eq!(emulator.counts().cancels, 0);
    until_running(&emulator.identities().app.name, 1).await;
    assert_eq!(proxy.metrics().cancels[CancelOutcome::Unknown].get(), 1);
}

#[tokio::test]
async fn a_requester_that_hangs_up_at_once_is_served_all_the_same() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let role = emulator.identities().app.name.clone();
    for reset in [false, true] {
        let (mut wire, key) = session(&proxy).await;
        wire.send(&text('Q', SLEEP)).await;
        until_running(&role, 1).await;
        // It is gone long before the cancel is delivered.
        emulator.faults().once(Site::Tls, Action::Delay(400));
        let dials = emulator.counts().dials;
        let mut requester = proxy.dial().await;
        requester.send(&cancel_request(key)).await;
        if reset {
            // A reset takes back what has not been read.
            let on_its_way = |counts: &Counts| counts.dials > dials;
            emulator.wait_for(TIMEOUT, on_its_way).await.unwrap();
            requester.reset();
        } else {
            drop(requester);
        }
        expect_cancelled(&mut wire).await;
    }
    // As the driver does it.
    let client = proxy.client().await;
    let token = client.cancel_token();
    let cancelling = async {
        until_running(&role, 1).await;
        token.cancel_query(NoTls).await.unwrap();
    };
    let (result, ()) = tokio::join!(within("the query", client.simple_query(SLEEP)), cancelling);
    assert_eq!(result.unwrap_err().code(), Some(&SqlState::QUERY_CANCELED));
}

#[tokio::test]
async fn a_requester_waits_until_the_cancel_is_delivered() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let (mut wire, key) = session(&proxy).await;
    wire.send(&text('Q', SLEEP)).await;
    until_running(&emulator.identities().app.name, 1).await;
    emulator.faults().once(Site::Tls, Action::Delay(600));
    let began = Instant::now();
    cancel(proxy.address(), key).await;
    assert!(
        began.elapsed() >= Duration::from_millis(600),
        "closed before it was delivered"
    );
    assert_eq!(emulator.counts().cancels_forwarded, 1);
    expect_cancelled(&mut wire).await;
}

#[tokio::test]
async fn the_key_goes_only_to_a_server_that_is_trusted() {
    use lakebase_proxy::emulator::BadCertificate;

    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let (mut wire, key) = session(&proxy).await;
    wire.send(&text('Q', SLEEP)).await;
    until_running(&emulator.identities().app.name, 1).await;
    for action in [
        Action::Certificate(BadCertificate::OtherAuthority),
        Action::NoTls,
        Action::Reset,
    ] {
        emulator.faults().once(Site::SslRequest, action);
        cancel(proxy.address(), key).await;
    }
    assert_eq!(emulator.counts().cancels, 0);
    assert_eq!(proxy.metrics().cancels[CancelOutcome::Failed].get(), 3);
    cancel(proxy.address(), key).await;
    expect_cancelled(&mut wire).await;
}
