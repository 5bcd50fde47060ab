//! Health and metrics, as a probe, Prometheus and a hostile web page see them.

use std::{
    io::Write as _,
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lakebase_proxy::{
    admin::{Admin, AdminState},
    net::http::{self, Limits},
    shutdown::Phase,
    status::{Health, Registry, Snapshot},
    telemetry::Metrics,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    harness::port::ReservedPort,
    web::{get, request},
};

struct Running {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    has_credential: Arc<AtomicBool>,
    stop: CancellationToken,
    admin: Admin,
    _stop: DropGuard,
}

async fn start() -> Running {
    start_on(TcpListener::bind("127.0.0.1:0").await.unwrap())
}

fn start_on(listener: TcpListener) -> Running {
    let address = listener.local_addr().unwrap();
    let has_credential = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&has_credential);
    let health = Arc::new(Health::new(move || {
        seen.load(Ordering::Relaxed)
            .then_some(())
            .ok_or_else(|| "no valid credential".to_owned())
    }));
    let metrics = Metrics::new().unwrap();
    let stop = CancellationToken::new();
    let state = AdminState {
        metrics: Arc::clone(&metrics),
        health: Arc::clone(&health),
        snapshot: Arc::new({
            let health = Arc::clone(&health);
            move || Snapshot {
                started: jiff::Timestamp::now(),
                uptime: Duration::ZERO,
                phase: Phase::Serving,
                is_started: true,
                readiness: health.readiness(),
                max_connections: 100,
                settings: Vec::new(),
                http: Vec::new(),
                registry: Registry::default(),
                endpoints: Vec::new(),
            }
        }),
        logins: Arc::new(Vec::new),
        log: None,
    };
    let admin = Admin::spawn(listener, state, stop.clone()).unwrap();
    Running {
        address,
        metrics,
        health,
        has_credential,
        admin,
        _stop: stop.clone().drop_guard(),
        stop,
    }
}

#[tokio::test]
async fn probes_follow_the_proxy_from_start_to_drain() {
    let proxy = start().await;
    let statuses = async |paths: &[&str]| {
        let mut statuses = Vec::new();
        for path in paths {
            statuses.push(get(proxy.address, path).await.status);
        }
        statuses
    };
    let startup = ["/startup", "/startupz"];
    let liveness = ["/liveness", "/livez", "/healthz"];
    let readiness = ["/readiness", "/readyz"];

    assert_eq!(statuses(&startup).await, [503, 503]);
    assert_eq!(statuses(&readiness).await, [503, 503]);
    assert_eq!(statuses(&liveness).await, [200, 200, 200]);

    proxy.health.set_started();
    assert_eq!(statuses(&startup).await, [200, 200]);
    assert_eq!(statuses(&readiness).await, [503, 503]);

    proxy.has_credential.store(true, Ordering::Relaxed);
    assert_eq!(statuses(&readiness).await, [200, 200]);

    proxy.health.set_draining();
    assert_eq!(statuses(&readiness).await, [503, 503]);
    assert_eq!(statuses(&startup).await, [200, 200]);
    assert_eq!(statuses(&liveness).await, [200, 200, 200]);
}

#[tokio::test]
async fn a_failing_probe_reports_the_reason_in_the_requested_format() {
    let proxy = start().await;
    let text = get(proxy.address, "/readiness").await;
    assert_eq!(
        text.body,
        "error\nproxy is not started\nno valid credential\n"
    );

    let host = proxy.address.to_string();
    let headers = [
        ("Host", host.as_str()),
        ("Accept", "text/html;q=0.5, application/json;q=0.9"),
    ];
    let json = request(proxy.address, "GET", "/readiness", &headers).await;
    assert_eq!(json.header("content-type"), Some("application/json"));
    let body: serde_json::Value = serde_json::from_str(&json.body).unwrap();
    assert_eq!(
        body,
        serde_json::json!({ "status": "error", "reasons": ["proxy is not started", "no valid credential"] })
    );
}

#[tokio::test]
async fn metrics_show_the_counts_and_pass_promtool() {
    let proxy = start().await;
    proxy.metrics.clients_opened.inc_by(3);
    let answer = get(proxy.address, "/metrics").await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    assert!(
        answer
            .body
            .contains("\nlakebase_proxy_client_connections_opened_total 3\n")
    );
    assert!(answer.body.contains(concat!(
        "build_info{version=\"",
        env!("CARGO_PKG_VERSION"),
        "\"} 1\n"
    )));
    #[cfg(target_os = "linux")]
    assert!(answer.body.contains("\nprocess_start_time_seconds "));

    let Ok(mut promtool) = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    else {
        return; // Debian's prometheus package is not installed here.
    };
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(answer.body.as_bytes())
        .unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    assert_eq!(
        String::from_utf8_lossy(&checked.stderr),
        "",
        "promtool warns"
    );
}

#[tokio::test]
async fn a_page_of_another_origin_gets_nothing() {
    let proxy = start().await;
    let own = proxy.address.to_string();
    let own_origin = format!("http://{own}");
    let cases: [(&[(&str, &str)], u16); 8] = [
        (&[("Host", "rebound.example")], 421),
        (&[("Host", "localhost.rebound.example:9090")], 421),
        (&[], 400),
        (&[("Host", &own), ("Origin", "https://evil.example")], 403),
        (&[("Host", &own), ("Origin", "null")], 403),
        (
            &[
                ("Host", &own),
                ("Sec-Fetch-Site", "cross-site"),
                ("Sec-Fetch-Mode", "no-cors"),
            ],
            403,
        ),
        (
            &[
                ("Host", &own),
                ("Origin", &own_origin),
                ("Sec-Fetch-Site", "same-origin"),
            ],
            200,
        ),
        (&[("Host", "localhost")], 200),
    ];
    for (headers, status) in cases {
        let answer = request(proxy.address, "GET", "/metrics", headers).await;
        assert_eq!(answer.status, status, "{headers:?}");
        assert_eq!(
            answer.body.contains("lakebase_proxy_"),
            status == 200,
            "{headers:?}"
        );
        assert_eq!(
            answer.header("access-control-allow-origin"),
            None,
            "{headers:?}"
        );
        assert_eq!(
            answer.header("cross-origin-resource-policy"),
            Some("same-origin"),
            "{headers:?}"
        );
        assert_eq!(
            answer.header("x-content-type-options"),
            Some("nosniff"),
            "{headers:?}"
        );
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_plainly() {
    let proxy = start().await;
    let own = proxy.address.to_string();
    let own = [("Host", own.as_str())];
    let missing = get(proxy.address, "/nowhere").await;
    assert_eq!(
        (missing.status, missing.body.as_str()),
        (404, "not found\n")
    );
    let posted = request(proxy.address, "POST", "/metrics", &own).await;
    assert_eq!(
        (posted.status, posted.header("allow")),
        (405, Some("GET,HEAD"))
    );
    let head = request(proxy.address, "HEAD", "/metrics", &own).await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let index = get(proxy.address, "/").await;
    assert!(index.body.contains("/readiness") && index.body.contains("/metrics"));
}

#[tokio::test]
async fn the_server_ends_on_request_and_frees_its_port() {
    // Or another test's server may answer there afterwards.
    let port = ReservedPort::new();
    let Running {
        address,
        stop,
        admin,
        _stop,
        ..
    } = start_on(TcpListener::bind(port.address()).await.unwrap());
    // A silent connection does not delay it.
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(get(address, "/liveness").await.status, 200);
    stop.cancel();
    timeout(Duration::from_secs(10), admin.ended())
        .await
        .expect("it ends");
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);
    port.until_refused().await;
}

/// Serves a plain page within `limits`.
async fn bounded(limits: Limits) -> (SocketAddr, TaskTracker, DropGuard) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let app = axum::Router::new().route("/", axum::routing::get(async || "here\n"));
    let tracker = TaskTracker::new();
    tracker.spawn(http::serve(listener, app, limits, stop.clone()));
    (address, tracker, stop.drop_guard())
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut_off() {
    let limits = Limits {
        header_read_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let (address, _tracker, _stop) = bounded(limits).await;
    for sent in [
        "",
        "GET / HTTP/1.1\r\nHost: local",
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(5), stream.read_to_string(&mut answer))
            .await
            .expect("it is closed")
            .unwrap();
        assert_eq!(
            answer.starts_with("HTTP/1.1 200"),
            sent.ends_with("\r\n\r\n"),
            "{sent:?}: {answer:?}"
        );
    }
}

#[tokio::test]
async fn a_head_too_large_is_refused() {
    let (address, _tracker, _stop) = bounded(Limits::default()).await;
    let filler = "x".repeat(32 * 1024);
    let answer = request(
        address,
        "GET",
        "/",
        &[("Host", "localhost"), ("X-Filler", &filler)],
    )
    .await;
    assert_eq!(answer.status, 431);
}

#[tokio::test]
async fn silent_connections_do_not_block_others() {
    let limits = Limits {
        max_connections: 2,
        header_read_timeout: Duration::from_mins(5),
        ..Limits::default()
    };
    let (address, _tracker, _stop) = bounded(limits).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    first
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    first.read_u8().await.unwrap();
    let mut others = Vec::new();
    for _ in 0..5 {
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET / HT").await.unwrap();
        others.push(silent);
    }
    // The oldest give way.
    let second = timeout(Duration::from_secs(5), get(address, "/"))
        .await
        .expect("served in turn");
    assert_eq!(second.body, "here\n");
    let mut rest = Vec::new();
    first.read_to_end(&mut rest).await.unwrap();
}

#[tokio::test]
async fn a_connection_does_not_live_for_ever() {
    let limits = Limits {
        connection_lifetime: Duration::from_millis(100),
        ..Limits::default()
    };
    let (address, _tracker, _stop) = bounded(limits).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(5), stream.read_to_string(&mut answer))
        .await
        .expect("it is closed")
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"));
}
