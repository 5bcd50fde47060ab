//! The metrics of sessions, logins and wakes.

use std::time::Duration;

use futures_util::future::join_all;

use crate::harness::{self, Proxy, eventually};

/// The values of one metric in the text, summed over all children whose labels contain `labels`.
fn value(text: &str, name: &str, labels: &str) -> f64 {
    let name = format!("lakebase_proxy_{name}");
    let children = text.lines().filter(|line| {
        line.strip_prefix(&name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(labels))
    });
    children
        .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        .sum()
}

#[tokio::test]
async fn a_session_is_counted_from_accept_to_close() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let look = |name: &str, labels: &str| value(&proxy.metrics().render(), name, labels);
    assert!((look("client_connections_limit", "") - 1000.0).abs() < 0.5);

    let client = proxy.client().await;
    let number: i32 = client.query_one("select 1", &[]).await.unwrap().get(0);
    assert_eq!(number, 1);
    assert!((look("client_connections_active", "") - 1.0).abs() < 0.5);
    assert!(look("client_connections_waiting", "").abs() < 0.5);
    assert!(look("client_connections_closed_total", "").abs() < 0.5);
    for phase in [
        "queue",
        "credential",
        "resolve",
        "dial",
        "tls",
        "login",
        "total",
    ] {
        let seen = look(
            "upstream_connect_duration_seconds_count",
            &format!("phase=\"{phase}\""),
        );
        assert!((seen - 1.0).abs() < 0.5, "{phase}: {seen}");
    }
    drop(client);
    eventually("the session's end", async || {
        (look("client_connections_closed_total", "") > 0.5).then_some(())
    })
    .await;
    let ended = look("session_duration_seconds_count", "end=\"client\"");
    assert!((ended - 1.0).abs() < 0.5, "{ended}");
    assert!(look("session_duration_seconds_count", "end=\"server\"").abs() < 0.5);
}

#[tokio::test]
async fn a_wake_is_counted_once_however_many_wait_for_it_and_retries_by_their_cause() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let look = |name: &str, labels: &str| value(&proxy.metrics().render(), name, labels);
    let delay = Duration::from_millis(400);
    emulator.configure(|settings| settings.wake_delay = delay);
    emulator.suspend().await;

    let clients = join_all((0..5).map(|_| proxy.client())).await;
    let wakes = look("endpoint_wake_duration_seconds_count", "");
    assert!((wakes - 1.0).abs() < 0.5, "{wakes}");
    let took = look("endpoint_wake_duration_seconds_sum", "");
    assert!(took > 0.1, "{took}");
    assert!(look("upstream_retries_total", "class=\"waking\"") > 0.5);
    assert!(look("upstream_retries_total", "class=\"identity\"").abs() < 0.5);
    drop(clients);
}

#[tokio::test]
async fn every_handshake_is_either_full_or_resumed() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for _ in 0..3 {
        drop(proxy.client().await);
    }
    let text = proxy.metrics().render();
    let kinds = ["full", "resumed"].map(|kind| {
        value(
            &text,
            "upstream_tls_handshakes_total",
            &format!("kind=\"{kind}\""),
        )
    });
    assert!((kinds[0] + kinds[1] - 3.0).abs() < 0.5, "{kinds:?}");
    assert!(kinds[0] > 0.5, "the first has no ticket: {kinds:?}");
}

#[tokio::test]
async fn the_next_refresh_lies_between_now_and_the_expiry() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let (minted, next, expiry) = eventually("a plan", async || {
        let text = proxy.metrics().render();
        let look = |name| value(&text, name, "");
        let next = look("credential_next_refresh_timestamp_seconds");
        (next > 0.5).then(|| {
            (
                look("credential_minted_timestamp_seconds"),
                next,
                look("credential_expiry_timestamp_seconds"),
            )
        })
    })
    .await;
    assert!(minted < next && next < expiry, "{minted} {next} {expiry}");
}
