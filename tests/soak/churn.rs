//! Thousands of clients that come and go in every manner leave nothing behind.

use std::{sync::Arc, time::Duration};

use lakebase_proxy::emulator::Emulator;
use tokio::{
    io::AsyncReadExt,
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    Stage,
    measure::{descriptors, eventually, metric, status},
    wire::{Wire, cancel_request, query, startup},
};

const CLIENTS: u32 = 5000;
const AT_ONCE: usize = 100;
/// Clients that are through before memory is first looked at.
const WARM_UP: u32 = 1000;
/// Five seconds of query, five of the relay's timeout, and a busy machine.
const SETTLE: Duration = Duration::from_mins(1);

/// How a client leaves.
#[derive(Clone, Copy)]
enum Manner {
    /// A query, then Terminate.
    Orderly,
    /// A query, then the socket is closed.
    Careless,
    /// Half a StartupMessage.
    Undecided,
    /// Inside a transaction, by a reset.
    Torn,
    /// A query cancelled by request, then Terminate.
    Cancelling,
    /// Killed while a query runs; `true`: by a reset, else by a FIN.
    Killed(bool),
}

impl Manner {
    /// One in ten is killed mid-query: 500 of them.
    fn of(client: u32) -> Self {
        match client % 20 {
            9 => Self::Killed(true),
            19 => Self::Killed(false),
            6 | 16 => Self::Careless,
            7 => Self::Undecided,
            8 => Self::Torn,
            18 => Self::Cancelling,
            _ => Self::Orderly,
        }
    }
}

/// With a `duration`, crowd after crowd, and the memory after each.
pub(crate) async fn churn(stage: &Stage, duration: Option<Duration>) {
    let process = stage.proxy.id();
    settled(stage, usize::MAX).await;
    let before = descriptors(process);
    crowd(stage, 0..WARM_UP).await;
    let warm = status(process, "VmRSS");
    let began = Instant::now();
    let mut crowds = 0;
    while crowds == 0 || duration.is_some_and(|duration| began.elapsed() < duration) {
        crowd(stage, WARM_UP..CLIENTS).await;
        crowds += 1;
        if duration.is_some() {
            println!(
                "   {:4} s: {} clients, resident {} kB, {} descriptors",
                began.elapsed().as_secs(),
                WARM_UP + crowds * (CLIENTS - WARM_UP),
                status(process, "VmRSS"),
                descriptors(process)
            );
        }
    }
    settled(stage, before).await;

    let opened = metric(stage.http, "client_connections_opened_total").await;
    let (after, now, peak) = (
        descriptors(process),
        status(process, "VmRSS"),
        status(process, "VmHWM"),
    );
    println!(
        "   {opened} connections (cancel requests included); descriptors {before} before, {after} after; \
         resident {warm} kB after {WARM_UP}, {now} kB after all, peak {peak} kB; {} threads",
        status(process, "Threads")
    );
    assert!(opened >= f64::from(CLIENTS));
    assert!(
        now < warm + 16 * 1024,
        "memory grows with clients that have left: {warm} to {now} kB"
    );
    assert!(metric(stage.http, "session_panics_total").await < 0.5);
    let unknown = metric(stage.http, "cancel_requests_total").await;
    assert!(
        unknown >= f64::from(CLIENTS / 20),
        "{unknown} cancel requests"
    );
}

async fn crowd(stage: &Stage, clients: std::ops::Range<u32>) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut crowd = JoinSet::new();
    for client in clients {
        let permit = Arc::clone(&room).acquire_owned().await.unwrap();
        let address = stage.postgres;
        crowd.spawn(async move {
            let visit = timeout(Duration::from_mins(1), visit(address, client));
            visit
                .await
                .unwrap_or_else(|_| panic!("client {client} is still there"))
                .unwrap_or_else(|error| panic!("client {client}: {error}"));
            drop(permit);
        });
        while let Some(ended) = crowd.try_join_next() {
            ended.unwrap();
        }
    }
    while let Some(ended) = crowd.join_next().await {
        ended.unwrap();
    }
}

async fn visit(address: std::net::SocketAddr, client: u32) -> std::io::Result<()> {
    let manner = Manner::of(client);
    if matches!(manner, Manner::Undecided) {
        let mut wire = Wire::open(address).await?;
        let startup = startup();
        return wire.send(&startup[..startup.len() / 2]).await;
    }
    let mut wire = Wire::connect(address).await?;
    match manner {
        Manner::Undecided => {}
        Manner::Orderly => {
            let answer = wire.query("SELECT 'here'").await?;
            assert!(answer.unwrap().ends_with(b"here"));
            wire.terminate().await?;
        }
        Manner::Careless => drop(wire.query("SELECT 1").await?),
        Manner::Torn => {
            wire.query("BEGIN; SELECT 1").await?.unwrap();
            wire.reset();
        }
        Manner::Cancelling => {
            // A request that overtakes the query would cancel nothing.
            wire.send(&query(
                "DO $$ BEGIN RAISE NOTICE 'begun'; PERFORM pg_sleep(30); END $$",
            ))
            .await?;
            let (begun, length) = wire.header().await?;
            assert_eq!(begun, b'N');
            wire.body(length).await?;
            let mut requester = Wire::open(address).await?;
            requester.send(&cancel_request(&wire.key)).await?;
            // Closed once the server has received it.
            while requester.stream.read(&mut [0; 16]).await? > 0 {}
            let answer = loop {
                let (tag, length) = wire.header().await?;
                let body = wire.body(length).await?;
                if tag == b'E' {
                    break String::from_utf8_lossy(&body).into_owned();
                }
            };
            assert!(answer.contains("57014"), "{answer}");
            let (_, length) = wire.header().await?;
            wire.body(length).await?;
            wire.terminate().await?;
        }
        Manner::Killed(by_reset) => {
            let tenths = client % 50;
            wire.send(&query(&format!(
                "SELECT pg_sleep({}.{})",
                tenths / 10,
                tenths % 10
            )))
            .await?;
            sleep(Duration::from_millis(u64::from(client % 30))).await;
            if by_reset {
                wire.reset();
            }
        }
    }
    Ok(())
}

/// Waits until neither the proxy, nor the edge, nor Postgres knows of any session.
async fn settled(stage: &Stage, most_descriptors: usize) {
    eventually(SETTLE, async || {
        for name in ["client_connections_active", "upstream_connections_active"] {
            let active = metric(stage.http, name).await;
            if active > 0.5 {
                return Some(format!("{name} is {active}"));
            }
        }
        let connections = stage.emulator.counts().connections;
        if connections > 0 {
            return Some(format!("{connections} connections at the edge"));
        }
        if let Some(complaint) = backends(&stage.emulator).await {
            return Some(complaint);
        }
        let open = descriptors(stage.proxy.id());
        (open > most_descriptors).then(|| format!("{open} descriptors, {most_descriptors} before"))
    })
    .await;
}

/// Sessions that Postgres itself has, but for the one that looks and the emulator's own.
async fn backends(emulator: &Emulator) -> Option<String> {
    let sql = "DO $$ BEGIN IF EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'soak') \
               THEN RAISE 'there are sessions'; END IF; END $$";
    emulator
        .execute(sql)
        .await
        .err()
        .map(|error| format!("{error} (pg_stat_activity)"))
}
