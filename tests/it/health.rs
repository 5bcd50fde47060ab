//! Probes when they matter: while no worker of the proxy can run, and a login on demand.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Barrier, mpsc},
    time::Duration,
};

use lakebase_proxy::config::{PortSetting, Settings};
use serde_json::Value;
use tokio::time::Instant;

use crate::{
    harness::{Proxy, TIMEOUT, emulator, within},
    web::{Answer, get, request},
};

const WORKERS: usize = 2;
const PROBES: usize = 51;
/// What a probe may take; half of them must be faster, as a busy machine may hold up any of them.
const PROMPT: Duration = Duration::from_millis(100);

fn with_http(settings: &mut Settings) {
    settings.http_port = Some(PortSetting::Port(0));
}

/// One probe, by a thread of its own as a kubelet's would be.
fn probe(address: SocketAddr, path: &str) -> (String, Duration) {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer, began.elapsed())
}

#[test]
fn probes_are_answered_while_every_worker_is_blocked() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .unwrap();
    // The emulator must go on: it shares no worker with the proxy.
    let theirs = tokio::runtime::Runtime::new().unwrap();
    let emulator = theirs.block_on(emulator());
    let proxy = runtime.block_on(Proxy::with(&emulator, with_http));
    let address = proxy.http();

    let all_blocked = Arc::new(Barrier::new(WORKERS + 1));
    let mut senders = Vec::new();
    for _ in 0..WORKERS {
        let (sender, released) = mpsc::channel::<()>();
        let all_blocked = Arc::clone(&all_blocked);
        runtime.spawn(async move {
            all_blocked.wait();
            released.recv().ok();
        });
        senders.push(sender);
    }
    all_blocked.wait();

    let mut took: Vec<Duration> = (0..PROBES)
        .map(|_| {
            let (answer, took) = probe(address, "/liveness");
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            took
        })
        .collect();
    took.sort();
    for path in ["/startup", "/readiness", "/metrics", "/"] {
        let (answer, _) = probe(address, path);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    }
    // So are clients, on threads of their own.
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    client
        .write_all(&crate::harness::wire::SSL_REQUEST)
        .unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 1);

    let median = took[PROBES / 2];
    assert!(
        median < PROMPT,
        "half of the probes took {median:?} or more: {took:?}"
    );
    drop(senders);
}

async fn post(address: SocketAddr, path: &str) -> Answer {
    let host = address.to_string();
    let headers = [("Host", host.as_str()), ("Content-Length", "0")];
    within("an answer", request(address, "POST", path, &headers)).await
}

async fn json(address: SocketAddr, path: &str) -> (u16, Value) {
    let answer = post(address, path).await;
    let body = serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{}", answer.body));
    (answer.status, body)
}

#[tokio::test]
async fn a_deep_probe_logs_in_once_in_a_while_and_a_plain_one_never() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, with_http).await;
    let http = proxy.http();
    for _ in 0..5 {
        assert_eq!(get(http, "/readiness").await.status, 200);
    }
    assert_eq!(
        emulator.counts().logins,
        0,
        "no probe of its own accord reaches the endpoint"
    );

    let (status, body) = json(http, "/readiness?deep=1&format=json").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["deep"][0]["ok"], true, "{body}");
    assert_eq!(body["deep"][0]["endpoint"], emulator.endpoint_name());
    let (_, again) = json(http, "/readyz?deep=1&format=json").await;
    assert_eq!(
        again["deep"][0]["took_ms"], body["deep"][0]["took_ms"],
        "the same login"
    );
    assert_eq!(emulator.counts().logins, 1);

    let unknown = post(http, "/readiness?deep=1&endpoint=nowhere").await;
    assert_eq!(
        (unknown.status, unknown.body.as_str()),
        (404, "no endpoint has this name\n")
    );
    let text = post(
        http,
        &format!("/readiness?deep=1&endpoint={}", emulator.endpoint_name()),
    )
    .await;
    assert!(
        text.body.starts_with("ok\n") && text.body.contains("logged in within"),
        "{}",
        text.body
    );
}

/// A page can make a browser of this machine request any address, and so wake an endpoint again and again.
#[tokio::test]
async fn no_page_of_another_site_wakes_an_endpoint() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        with_http(settings);
        settings.notes = Some(true);
        settings.notes_port = Some(PortSetting::Port(0));
    })
    .await;
    let (http, notes) = (proxy.http(), proxy.notes());
    let deep = "/readiness?deep=1";
    let own = http.to_string();
    let host = ("Host", own.as_str());
    let origin = format!("http://{own}");
    let link = [
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Mode", "navigate"),
        ("Sec-Fetch-Dest", "document"),
    ];
    let any = format!("0.0.0.0:{}", http.port());
    for (what, method, headers, status) in [
        ("an image", "GET", vec![host], 405),
        ("a look", "HEAD", vec![host], 405),
        ("a link", "GET", [&[host][..], &link].concat(), 403),
        (
            "a form",
            "POST",
            vec![host, ("Origin", "http://evil.example")],
            403,
        ),
        (
            "a form of a sandbox",
            "POST",
            vec![host, ("Origin", "null")],
            403,
        ),
        (
            "an image by another address",
            "GET",
            vec![("Host", any.as_str())],
            421,
        ),
        (
            "a form by another address",
            "POST",
            vec![("Host", any.as_str()), ("Origin", &origin)],
            421,
        ),
    ] {
        let answer = within(what, request(http, method, deep, &headers)).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.body);
    }
    let notes_host = notes.to_string();
    let led = [&[("Host", notes_host.as_str())][..], &link].concat();
    let answer = within("a link to the notes", request(notes, "GET", "/", &led)).await;
    assert_eq!(answer.status, 403);
    assert_eq!(emulator.counts().logins, 0, "none of them reached it");

    let meant = [host, ("X-Requested-With", "curl")];
    let answer = within("a check", request(http, "GET", deep, &meant)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(emulator.counts().logins, 1);
}

#[tokio::test]
async fn a_deep_probe_finds_what_a_plain_one_cannot() {
    let emulator = emulator().await;
    let proxy = Proxy::cold(&emulator, &[("PGDATABASE", "no_such_database")], with_http)
        .await
        .unwrap();
    proxy.warm().await;
    let http = proxy.http();
    assert_eq!(get(http, "/readiness").await.status, 200);
    let (status, body) = json(http, "/readiness?deep=1&format=json").await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(body["deep"][0]["sqlstate"], "3D000", "{body}");
    assert!(
        body["reasons"][0]
            .as_str()
            .unwrap()
            .contains("no_such_database"),
        "{body}"
    );
}

#[tokio::test]
async fn the_status_page_is_local_and_shows_failures() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, with_http).await;
    let http = proxy.http();
    let host = http.to_string();
    let html = [("Host", host.as_str()), ("Accept", "text/html,*/*;q=0.8")];
    let page = request(http, "GET", "/", &html).await;
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.contains("script-src 'self'") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert!(
        page.body.contains("Ready") && page.body.contains(emulator.endpoint_name()),
        "{}",
        page.body
    );
    assert!(!page.body.contains("eyJ"), "a token is on the page");
    // A script, or curl.
    let index = get(http, "/").await;
    assert!(index.body.starts_with("lakebase-proxy\n"), "{}", index.body);
    for file in ["/status.css", "/status.js", "/icon.svg"] {
        assert_eq!(get(http, file).await.status, 200, "{file}");
    }
}

#[tokio::test]
async fn on_an_address_that_others_reach_the_page_is_not_for_them() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        with_http(settings);
        settings.http_address = Some("0.0.0.0".parse().unwrap());
    })
    .await;
    let port = proxy.http().port();
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    // From this machine, but by a name that a hostile page had rebound to it.
    let rebound = [("Host", "rebound.example"), ("Accept", "text/html")];
    let page = request(here, "GET", "/", &rebound).await;
    assert_eq!(
        (page.status, page.body.as_str()),
        (403, "only this machine may request this\n")
    );
    assert_eq!(
        request(here, "GET", "/liveness", &[("Host", "rebound.example")])
            .await
            .status,
        200
    );
    assert_eq!(get(here, "/").await.status, 200);
    // From elsewhere, as far as a test on one machine can be.
    let outside = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    if let Ok(outside) = outside
        && !outside.ip().is_loopback()
    {
        let address = SocketAddr::new(outside.ip(), port);
        assert_eq!(get(address, "/").await.status, 403);
        assert_eq!(get(address, "/status.js").await.status, 403);
        assert_eq!(get(address, "/readiness").await.status, 200);
    }
}
