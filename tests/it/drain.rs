//! The end under pgbench: what has begun is finished, and what is finished is there.

use std::process::Stdio;

use tokio::process::Command;

use crate::{
    harness::{self, binary::Binary, eventually, within},
    process::Signal,
};

/// Clients at a time.
const CLIENTS: &str = "16";

/// One transaction: two rows with a pause between them, so that most clients are within one at any time.
fn script(table: &str) -> String {
    format!(
        "\\set id random(1, 1000000000)\n\
         BEGIN;\n\
         INSERT INTO {table} VALUES (:client_id, :id);\n\
         SELECT pg_sleep(0.01);\n\
         INSERT INTO {table} VALUES (:client_id, :id);\n\
         COMMIT;\n"
    )
}

#[tokio::test]
async fn no_transaction_of_pgbench_is_lost_within_the_grace_time() {
    let emulator = harness::emulator().await;
    let superuser = harness::superuser().await;
    let table = format!("drained_{}", std::process::id());
    superuser
        .batch_execute(&format!(
            "create table {table} (client int, id int); grant all on {table} to public"
        ))
        .await
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("transaction.sql");
    std::fs::write(&file, script(&table)).unwrap();
    let mut binary = Binary::serve(&emulator, &["--max-sigterm-delay", "60s"]).await;

    let mut bench = Command::new("pgbench");
    bench
        .args([
            "--no-vacuum",
            "--client",
            CLIENTS,
            "--jobs",
            "2",
            "--time",
            "120",
        ])
        .args(["--log", "--log-prefix"])
        .arg(directory.path().join("log"))
        .arg("--file")
        .arg(&file)
        .env("PATH", harness::path())
        .args(["--host", "127.0.0.1", "--username", "anyone", "--port"])
        .arg(binary.postgres.port().to_string())
        .arg("databricks_postgres")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG"))
    {
        bench.env_remove(name);
    }
    let bench = bench.spawn().unwrap();
    let count = format!("select count(*) from {table}");
    let rows = async || -> i64 { superuser.query_one(&count, &[]).await.unwrap().get(0) };
    eventually("the load is under way", async || {
        (rows().await > 400).then_some(())
    })
    .await;

    binary.signal(Signal::TERM);
    binary.until("shutting down").await;
    assert_eq!(binary.exit_code().await, Some(143));
    let output = within("pgbench ends", bench.wait_with_output())
        .await
        .unwrap();
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();

    // Each client was sent away between two transactions, by the server's word for that.
    let sent_away = errors
        .matches("terminating connection due to administrator command")
        .count()
        + errors.matches("shutting down").count();
    assert!(sent_away > 0, "{errors}\n{report}");
    let processed = report
        .lines()
        .find_map(|line| line.strip_prefix("number of transactions actually processed: "))
        .and_then(|number| number.parse::<i64>().ok())
        .unwrap_or_else(|| panic!("{report}\n{errors}"));
    let half = format!(
        "select count(*) from (select 1 from {table} group by client, id having count(*) % 2 <> 0) odd"
    );
    let halves: i64 = superuser.query_one(&half, &[]).await.unwrap().get(0);
    let committed = rows().await;
    superuser
        .batch_execute(&format!("drop table {table}"))
        .await
        .unwrap();
    assert_eq!(halves, 0, "a transaction is there as a whole or not at all");
    assert_eq!(
        committed,
        processed * 2,
        "what pgbench knows to be committed, and nothing else\n{report}\n{errors}"
    );
}
