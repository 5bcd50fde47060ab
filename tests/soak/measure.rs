//! Measurements of the kernel and of the proxy's own metrics.

use std::{fs, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};

/// A line of `/proc/PID/status` in its own unit (kB for memory).
pub(crate) fn status(process: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Open descriptors.
pub(crate) fn descriptors(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

/// Processor time used, user and system.
pub(crate) fn processor_time(process: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let (_, fields) = text.rsplit_once(')').unwrap();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum();
    // Linux counts in hundredths (USER_HZ) on every architecture that we run on.
    Duration::from_millis(ticks * 10)
}

/// What else the machine was doing.
pub(crate) fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let average = load.split(' ').next().unwrap_or_default().to_owned();
    format!("load {average} on {processors} processors")
}

/// The sum over all label values of one of the proxy's metrics.
pub(crate) async fn metric(http: SocketAddr, name: &str) -> f64 {
    let mut stream = TcpStream::connect(http).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let name = format!("lakebase_proxy_{name}");
    let values: Vec<f64> = answer
        .lines()
        .filter(|line| {
            line.strip_prefix(&name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        })
        .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
        .collect();
    assert!(!values.is_empty(), "no metric {name}");
    values.iter().sum()
}

/// Waits until `reached` has no objection left.
pub(crate) async fn eventually(within: Duration, mut against: impl AsyncFnMut() -> Option<String>) {
    let deadline = Instant::now() + within;
    while let Some(complaint) = against().await {
        assert!(
            Instant::now() < deadline,
            "after {within:?} still: {complaint}"
        );
        sleep(Duration::from_millis(100)).await;
    }
}
