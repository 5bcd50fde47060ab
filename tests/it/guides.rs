//! The Rust program of `deploy/guides/connect.md`; the other languages' are run by `tests/places/connect.py`.

use tokio_postgres::NoTls;
use tokio_util::task::TaskTracker;

use crate::harness::{Proxy, emulator};

const GUIDE: &str = include_str!("../../deploy/guides/connect.md");

#[tokio::test(flavor = "multi_thread")]
async fn the_rust_program_counts_the_notes() {
    let (_, rest) = GUIDE.split_once("```rust\n").unwrap();
    let (program, _) = rest.split_once("```").unwrap();
    let url = program.split('"').nth(1).unwrap();
    // What follows is the program but for the port, so the program must be it.
    assert!(
        program.contains("tokio_postgres::connect(") && program.contains("tokio_postgres::NoTls")
    );
    assert!(
        program.contains("client.query_one(\"select count(*) from notes\", &[]).await?.get(0)")
    );

    let emulator = emulator().await;
    let proxy = Proxy::start(&emulator).await;
    assert!(url.contains("@localhost:5432/"), "{url}");
    let address = proxy.address();
    let url = url.replace("localhost:5432", &address.to_string());
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    TaskTracker::new().spawn(connection);
    let count: i64 = client
        .query_one("select count(*) from notes", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 3);
}
