//! Sessions by the thousand, in front of a scripted server: what the proxy itself takes, and gives back.

use std::{net::SocketAddr, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    measure::{descriptors, eventually, processor_time, status},
    support::{client::Client, process::written_memory, proxy::Proxy, upstream::Upstream},
};

const SESSIONS: usize = 8000;
/// What one may take: see benches/exact. Unoptimised tasks are larger.
const MOST_EACH_KB: f64 = if cfg!(debug_assertions) { 20.0 } else { 12.0 };
/// How much more memory there may be once all have left, in kB: their first 400 come and go before it is looked at.
const LEFT_OVER_KB: u64 = 4 * 1024;
const WATCH: Duration = Duration::from_mins(1);

const VISITS: u32 = 50_000;
const VISITORS: u32 = 16;
/// How far the memory at 10, 50 and 100 % of the visits may lie apart, in kB.
const DRIFT_KB: u64 = 2 * 1024;
/// Sockets close in their own time, and allocators give back with a delay.
const SETTLE: Duration = Duration::from_mins(1);

fn start(program: &Path, directory: &Path) -> (Upstream, Proxy) {
    let upstream = Upstream::start(directory);
    let proxy = Proxy::start(program, &[], &upstream);
    (upstream, proxy)
}

fn sessions(address: SocketAddr, count: usize) -> Vec<Client> {
    let open = |_| {
        let mut client = Client::connect(address).unwrap();
        client.select_1().unwrap();
        client
    };
    (0..count).map(open).collect()
}

/// 8,000 sessions that wait.
pub(crate) async fn thousands(program: &Path) {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let directory = tempfile::tempdir().unwrap();
    let (_upstream, proxy) = start(program, directory.path());
    let process = proxy.id();
    drop(sessions(proxy.address, 400));
    let idle = descriptors_settled(process).await;
    sleep(Duration::from_secs(2)).await;
    let before = written_memory(process);

    let all = sessions(proxy.address, SESSIONS);
    sleep(Duration::from_secs(2)).await;
    let full = written_memory(process);
    let used = processor_time(process);
    sleep(WATCH).await;
    let used = processor_time(process).saturating_sub(used);
    let each = full.saturating_sub(before) as f64 / SESSIONS as f64;
    println!(
        "   {SESSIONS} idle sessions: {each:.2} kB each ({before} to {full} kB), {used:?} of processor time in {WATCH:?}"
    );
    drop(all);
    eventually(SETTLE, async || {
        let open = descriptors(process);
        (open > idle).then(|| format!("{open} descriptors, {idle} before"))
    })
    .await;
    // Given back bit by bit: looked at until it is little and no more comes.
    let (mut after, mut earlier) = (written_memory(process), u64::MAX);
    let deadline = Instant::now() + SETTLE;
    while (after < earlier || after > before + LEFT_OVER_KB) && Instant::now() < deadline {
        sleep(Duration::from_secs(2)).await;
        (after, earlier) = (written_memory(process), after);
    }
    println!("   once they have left: {idle} descriptors as before, {after} kB");
    assert!(each <= MOST_EACH_KB, "{each:.2} kB for a session");
    // Helper tasks run once in a while; sessions need none.
    assert!(used <= WATCH / 200, "waiting costs {used:?}");
    assert!(
        after <= before + LEFT_OVER_KB,
        "{before} kB before, {after} kB after"
    );
}

/// 50,000 that connect, query and leave.
pub(crate) async fn visits(program: &Path) {
    let directory = tempfile::tempdir().unwrap();
    let (_upstream, proxy) = start(program, directory.path());
    let process = proxy.id();
    let idle = descriptors_settled(process).await;
    let mut resident = Vec::new();
    let mut done = 0;
    for share in [10, 50, 100] {
        let until = VISITS / 100 * share;
        visit(proxy.address, until - done).await;
        done = until;
        descriptors_settled(process).await;
        sleep(Duration::from_secs(2)).await;
        resident.push(status(process, "VmRSS"));
        println!(
            "   after {done} visits: {} kB resident",
            resident.last().unwrap()
        );
    }
    eventually(SETTLE, async || {
        let open = descriptors(process);
        (open > idle).then(|| format!("{open} descriptors, {idle} before"))
    })
    .await;
    let (least, most) = (
        resident.iter().min().unwrap(),
        resident.iter().max().unwrap(),
    );
    assert!(
        most - least <= DRIFT_KB,
        "memory drifts with those that have left: {resident:?} kB"
    );
}

async fn visit(address: SocketAddr, count: u32) {
    let mut visitors = tokio::task::JoinSet::new();
    for _ in 0..VISITORS {
        visitors.spawn_blocking(move || {
            for _ in 0..count / VISITORS {
                let mut client = Client::connect(address).unwrap();
                client.select_1().unwrap();
                client.select_1().unwrap();
                client.terminate().unwrap();
            }
        });
    }
    while let Some(visitor) = visitors.join_next().await {
        visitor.unwrap();
    }
}

/// The number of descriptors once no more of them close.
async fn descriptors_settled(process: u32) -> usize {
    let mut last = descriptors(process);
    loop {
        sleep(Duration::from_millis(500)).await;
        let now = descriptors(process);
        if now == last {
            return now;
        }
        last = now;
    }
}
