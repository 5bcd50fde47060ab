//! The log of a running program: what it leaves out, and how to see more.

use lakebase_proxy::emulator::Emulator;

use crate::harness::{self, binary::Binary, emulator::http, within};

async fn connect(proxy: &Binary, database: &str) -> Result<(), tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(proxy.postgres.port())
        .user("anyone")
        .dbname(database);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    let asked = async {
        client.simple_query("select 1").await?;
        drop(client);
        Ok(())
    };
    let (asked, _ended) = tokio::join!(asked, connection);
    asked
}

async fn proxy() -> (Emulator, Binary) {
    let emulator = harness::emulator().await;
    let proxy = Binary::serve(&emulator, &[]).await;
    (emulator, proxy)
}

#[tokio::test]
async fn a_flood_of_refusals_is_a_few_lines() {
    let (_emulator, mut proxy) = proxy().await;
    for _ in 0..40 {
        let refused = within("a refusal", connect(&proxy, "no_such_database")).await;
        assert!(refused.is_err());
    }
    assert!(
        within("another one", connect(&proxy, "nor_this_one"))
            .await
            .is_err()
    );
    proxy.until("nor_this_one").await;
    let about = |name: &str| {
        let said = proxy.lines.iter().map(ToString::to_string);
        said.filter(|line| line.contains("client refused") && line.contains(name))
            .count()
    };
    assert_eq!(about("no_such_database"), 10);
    assert_eq!(about("nor_this_one"), 1);
}

#[tokio::test]
async fn what_is_logged_can_be_changed_while_it_runs() {
    let (_emulator, mut proxy) = proxy().await;
    let port = proxy.http.port();
    let now = http(port, "GET /log-filter", "").await.unwrap();
    assert_eq!(
        (now.status, now.body.trim()),
        (200, "lakebase_proxy=info,warn")
    );

    let wrong = http(port, "PUT /log-filter", "lakebase_proxy=loud")
        .await
        .unwrap();
    assert_eq!(wrong.status, 400);
    assert!(
        wrong
            .body
            .contains("invalid log filter directive `lakebase_proxy=loud`"),
        "{}",
        wrong.body
    );
    assert_eq!(
        http(port, "PUT /log-filter", " ").await.unwrap().status,
        400
    );
    let foreign = http(
        port,
        "PUT /log-filter\norigin: https://evil.example",
        "trace",
    )
    .await
    .unwrap();
    assert_eq!(foreign.status, 403, "a web page must not change it");

    connect(&proxy, "databricks_postgres").await.unwrap();
    let changed = http(port, "PUT /log-filter", "warn,lakebase_proxy=debug\n")
        .await
        .unwrap();
    assert_eq!(
        (changed.status, changed.body.trim()),
        (200, "lakebase_proxy=debug,warn")
    );
    connect(&proxy, "databricks_postgres").await.unwrap();
    proxy.until("what is logged has been changed").await;
    assert!(
        !proxy
            .lines
            .iter()
            .any(|line| line["message"] == "session begins")
    );
    let begins = proxy.until("session begins").await;
    for part in [
        "peer",
        "queue",
        "credential",
        "resolve",
        "dial",
        "tls",
        "login",
    ] {
        assert!(begins["span"][part].is_string(), "{part}: {begins}");
    }
    proxy.until("session ends").await;
}
