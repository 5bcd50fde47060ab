//! What it costs to do nothing, and to do the least.

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
    time::{Instant, sleep},
};

use crate::{
    Stage,
    measure::{processor_time, status},
    process::{Signal, signal},
    wire::Wire,
};

const SESSIONS: u32 = 200;
const WATCH: Duration = Duration::from_secs(5);
const QUERIES: u32 = 1000;

pub(crate) async fn sessions(stage: &Stage) {
    let process = stage.proxy.id();
    let before = status(process, "VmRSS");
    let mut clients = Vec::new();
    for _ in 0..SESSIONS {
        let mut client = Wire::connect(stage.postgres).await.unwrap();
        client.query("SELECT 1").await.unwrap().unwrap();
        clients.push(client);
    }
    let after = status(process, "VmRSS");
    let used = processor_time(process);
    sleep(WATCH).await;
    let used = processor_time(process).saturating_sub(used);
    println!(
        "   {SESSIONS} idle sessions: {used:?} of processor time in {WATCH:?}; {:.1} kB each ({before} to {after} kB)",
        f64::from(u32::try_from(after.saturating_sub(before)).unwrap()) / f64::from(SESSIONS)
    );
    assert!(
        used < WATCH / 50,
        "idle sessions cost {used:?} in {WATCH:?}"
    );
    for client in clients {
        client.terminate().await.unwrap();
    }
}

pub(crate) async fn calls(stage: &Stage) {
    let mut client = Wire::connect(stage.postgres).await.unwrap();
    let round_trips = async |client: &mut Wire| {
        for _ in 0..QUERIES {
            client.query("SELECT 1").await.unwrap().unwrap();
        }
    };
    round_trips(&mut client).await;
    let (used, began) = (processor_time(stage.proxy.id()), Instant::now());
    round_trips(&mut client).await;
    println!(
        "   {QUERIES} x SELECT 1: {:.0} us each, of which {:.0} us the proxy's processor time",
        began.elapsed().as_secs_f64() * 1e6 / f64::from(QUERIES),
        processor_time(stage.proxy.id())
            .saturating_sub(used)
            .as_secs_f64()
            * 1e6
            / f64::from(QUERIES)
    );

    let tracer = Command::new("strace")
        .args(["-c", "-f", "-p", &stage.proxy.id().to_string()])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let Ok(mut tracer) = tracer else {
        println!("   system calls: not counted, strace is not installed");
        return client.terminate().await.unwrap();
    };
    let mut lines = BufReader::new(tracer.stderr.take().unwrap());
    let mut attached = String::new();
    lines.read_line(&mut attached).await.unwrap();
    if !attached.contains("attached") {
        println!(
            "   system calls: not counted, strace reports: {}",
            attached.trim()
        );
        return client.terminate().await.unwrap();
    }
    round_trips(&mut client).await;
    signal(tracer.id().unwrap(), Signal::INT);
    let mut table = String::new();
    lines.read_to_string(&mut table).await.unwrap();
    tracer.wait().await.unwrap();
    println!("   system calls for {QUERIES} x SELECT 1:");
    for line in table
        .lines()
        .filter(|line| line.split_whitespace().count() >= 5)
        .take(10)
    {
        println!("   {line}");
    }
    client.terminate().await.unwrap();
}
