//! smoke
use lakebase_proxy::emulator::{Emulator, EmulatorOptions};
use std::process::Command;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn smoke() {
    let t = std::time::SystemTime::now();
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    eprintln!("started in {:?}", t.elapsed());
    let id = emulator.identities().app.clone();
    let token = emulator
        .credential_for(&id, Duration::from_mins(1))
        .unwrap();
    let env = emulator.environment();
    let out = tokio::task::spawn_blocking(move || {
        Command::new("psql")
            .envs(env)
            .env("PGPASSWORD", token)
            .args([
                "-c",
                "select content from notes order by created_at desc",
                "-c",
                "create extension if not exists databricks_auth",
                "-c",
                "\\conninfo",
            ])
            .output()
            .unwrap()
    })
    .await
    .unwrap();
    eprintln!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    eprintln!("{:?}", emulator.counts());
    emulator.stop().await;
    eprintln!("{:?}", t.elapsed());
    assert!(out.status.success());
}
