//! A foreign page, open in a browser on this machine, gets nothing from any HTTP port.
//!
//! What a browser lets a page send is in the headers here; what a page may read is decided by the answer's. So a request
//! that is not refused must at least carry no permission to read it.

use std::net::SocketAddr;

use lakebase_proxy::emulator::{Emulator, EmulatorOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    harness::binary::PROGRAM,
    process::Process,
    web::{Answer, get, request},
};

struct Port {
    name: &'static str,
    address: SocketAddr,
    /// What answers 200 to a tool on this machine.
    paths: &'static [&'static str],
}

/// How a request of another site's page differs from one of ours; `{host}` stands for the address.
const FOREIGN: &[(&str, &[(&str, &str)])] = &[
    ("a rebound name", &[("Host", "evil.example")]),
    (
        "a rebound name with our port",
        &[("Host", "evil.example:{port}")],
    ),
    (
        "a name that begins like ours",
        &[("Host", "localhost.evil.example")],
    ),
    (
        "a name that begins like our address",
        &[("Host", "127.0.0.1.evil.example:{port}")],
    ),
    (
        "a name that hides behind a user",
        &[("Host", "127.0.0.1:{port}@evil.example")],
    ),
    ("an empty name", &[("Host", "")]),
    (
        "a foreign origin",
        &[("Host", "{host}"), ("Origin", "https://evil.example")],
    ),
    (
        "a sandboxed frame or a file",
        &[("Host", "{host}"), ("Origin", "null")],
    ),
    (
        "another port of this machine",
        &[("Host", "{host}"), ("Origin", "http://127.0.0.1:1")],
    ),
    (
        "an origin that begins like ours",
        &[("Host", "{host}"), ("Origin", "http://{host}.evil.example")],
    ),
    (
        "an address that leads to any interface",
        &[("Host", "0.0.0.0:{port}")],
    ),
    ("another address", &[("Host", "8.8.8.8:{port}")]),
    (
        "an image or a script of another site",
        &[
            ("Host", "{host}"),
            ("Sec-Fetch-Site", "cross-site"),
            ("Sec-Fetch-Mode", "no-cors"),
            ("Sec-Fetch-Dest", "image"),
        ],
    ),
    (
        "a script of another port",
        &[
            ("Host", "{host}"),
            ("Sec-Fetch-Site", "same-site"),
            ("Sec-Fetch-Mode", "no-cors"),
            ("Sec-Fetch-Dest", "script"),
        ],
    ),
    (
        "a frame in another site's page",
        &[
            ("Host", "{host}"),
            ("Sec-Fetch-Site", "cross-site"),
            ("Sec-Fetch-Mode", "navigate"),
            ("Sec-Fetch-Dest", "iframe"),
        ],
    ),
    (
        "a web socket",
        &[
            ("Host", "{host}"),
            ("Origin", "https://evil.example"),
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_page_gets_nothing_from_any_port() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let flags = [
        "--port=0",
        "--http-port=0",
        "--notes=true",
        "--notes-port=0",
    ];
    let proxy = Process::spawn(PROGRAM, emulator.environment(), &flags);
    let workspace = emulator.workspace_url().strip_prefix("http://").unwrap();
    let ports = [
        Port {
            name: "health and metrics",
            address: proxy.address("serving health and metrics").await,
            paths: &["/", "/metrics", "/startup", "/liveness", "/healthz"],
        },
        Port {
            name: "the notes page",
            address: proxy.address("serving the notes page").await,
            paths: &["/", "/healthz"],
        },
        Port {
            name: "the emulated workspace",
            address: workspace.parse().unwrap(),
            paths: &[
                "/oidc/.well-known/oauth-authorization-server",
                "/oidc/jwks.json",
                "/emulator",
                "/emulator/faults",
            ],
        },
    ];
    for Port {
        name,
        address,
        paths,
    } in ports
    {
        for path in paths {
            let ours = get(address, path).await;
            assert_eq!(
                ours.status, 200,
                "{name}, {path}, requested by a tool: {}",
                ours.body
            );
            assert_unreadable(&ours, name);
            for &(what, headers) in FOREIGN {
                for method in ["GET", "POST", "OPTIONS"] {
                    let filled: Vec<(&str, String)> = headers
                        .iter()
                        .map(|(name, value)| (*name, fill(value, address)))
                        .collect();
                    let headers: Vec<(&str, &str)> = filled
                        .iter()
                        .map(|(name, value)| (*name, value.as_str()))
                        .collect();
                    let answer = request(address, method, path, &headers).await;
                    let case = format!("{name}, {method} {path}, {what}");
                    assert!(
                        matches!(answer.status, 400 | 403 | 421),
                        "{case}: {}",
                        answer.status
                    );
                    assert!(
                        answer.body.len() < 100,
                        "{case} discloses too much: {}",
                        answer.body
                    );
                    assert_unreadable(&answer, &case);
                }
            }
        }
    }
    emulator.stop().await;
}

/// Requests that a page can send without a preflight, and that would have an effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_page_changes_nothing_in_the_emulator() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let address: SocketAddr = emulator
        .workspace_url()
        .strip_prefix("http://")
        .unwrap()
        .parse()
        .unwrap();
    let before = emulator.settings();
    let faults = r#"{"faults":[{"at":"mint","do":"stall"}]}"#;
    let bodies = [
        ("POST", "/emulator/faults", faults),
        ("PUT", "/emulator/faults", faults),
        ("POST", "/emulator/events", r#"{"event":"suspend"}"#),
        ("PATCH", "/emulator/settings", r#"{"token_ttl":1}"#),
        (
            "POST",
            "/oidc/v1/token",
            "grant_type=client_credentials&scope=all-apis",
        ),
    ];
    for (method, path, body) in bodies {
        for page in [
            "Origin: https://evil.example",
            "Origin: null",
            "Sec-Fetch-Site: cross-site",
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let length = body.len();
            let head = format!(
                "{method} {path} HTTP/1.1\r\nHost: {address}\r\n{page}\r\nContent-Type: text/plain\r\n\
                 Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(
                answer.starts_with("HTTP/1.1 403 "),
                "{method} {path} with {page}: {answer}"
            );
        }
    }
    assert!(emulator.faults().pending().is_empty());
    assert!(emulator.is_active());
    assert_eq!(emulator.settings(), before);
    assert_eq!(
        emulator.counts().token_requests,
        0,
        "refused before it is looked at"
    );
    emulator.stop().await;
}

fn fill(value: &str, address: SocketAddr) -> String {
    value
        .replace("{host}", &address.to_string())
        .replace("{port}", &address.port().to_string())
}

/// No answer allows another origin to read it.
fn assert_unreadable(answer: &Answer, case: &str) {
    let permission = answer.header("access-control-allow-origin");
    assert_eq!(permission, None, "{case}");
}
