//! `pg_isready` as a container's health check.

use std::net::SocketAddr;

use lakebase_proxy::emulator::{Action, Response, Site};

use crate::harness::{self, Proxy, wire::text, within};

/// The exit code of the real `pg_isready`.
async fn pg_isready(address: SocketAddr) -> Option<i32> {
    let port = address.port().to_string();
    let ran = tokio::process::Command::new("pg_isready")
        .args(["-q", "-h", "127.0.0.1", "-p", &port, "-t", "20"])
        .env("PATH", harness::path())
        .status();
    within("pg_isready", ran).await.unwrap().code()
}

/// As a container's health check it logged in, which woke a suspended compute and kept it awake.
#[tokio::test]
async fn pg_isready_gets_the_readiness_of_the_proxy_and_wakes_nothing() {
    let emulator = harness::emulator().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "sesame").unwrap();
    for password in [None, Some(file.path().to_owned())] {
        emulator.suspend().await;
        let before = emulator.counts();
        let proxy = Proxy::with(&emulator, |settings| {
            settings.local_password_file.clone_from(&password);
        })
        .await;
        assert_eq!(pg_isready(proxy.address()).await, Some(0));
        let counts = emulator.counts();
        assert_eq!((counts.dials, counts.wakes), (before.dials, before.wakes));
        proxy.until_quiet().await;

        // Without a credential it is not ready.
        emulator
            .faults()
            .always(Site::Mint, Action::Respond(Response::status(500)));
        let cold = Proxy::cold(&emulator, &[], |settings| {
            settings.local_password_file.clone_from(&password);
        })
        .await
        .unwrap();
        assert_eq!(pg_isready(cold.address()).await, Some(1));
        assert_eq!(emulator.counts().dials, before.dials);
        emulator.faults().clear();
    }
}

/// Only `pg_isready` itself has that name: another client gets an explanation.
#[tokio::test]
async fn a_query_under_the_name_of_pg_isready_is_refused() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.dial().await;
    let parameters = [("user", "anyone"), ("application_name", "pg_isready")];
    wire.startup(&parameters).await;
    wire.welcome().await;
    wire.send(&text('Q', "select 1")).await;
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "0A000");
    assert!(refusal.hint.unwrap().contains("application_name"));
    assert_eq!(emulator.counts().dials, 0);
}
