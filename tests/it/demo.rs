//! The demo: one command, and every address of its panel works.

use std::{
    net::{Ipv4Addr, TcpListener},
    process::Stdio,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use tokio_postgres::NoTls;

use crate::{
    harness::{
        binary::{PROGRAM, command},
        emulator::{TIMEOUT, http},
    },
    process::{Signal, signal},
};

struct Demo {
    program: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Demo {
    fn start(arguments: &[&str]) -> Self {
        let mut program = Command::new(PROGRAM)
            .arg("demo")
            .args(arguments)
            // A real workspace must not be met by accident.
            .env("DATABRICKS_HOST", "https://example.invalid")
            .env("PGHOST", "example.invalid")
            // It runs where no root certificates are installed.
            .env("SSL_CERT_FILE", "/nowhere")
            .env("SSL_CERT_DIR", "/nowhere")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap()).lines();
        Self { program, lines }
    }

    /// The next line that holds `text`.
    async fn line(&mut self, text: &str) -> String {
        let found = async {
            loop {
                let line = self.lines.next_line().await.unwrap();
                let line =
                    line.unwrap_or_else(|| panic!("the demo ended before it printed `{text}`"));
                if line.contains(text) {
                    return line;
                }
            }
        };
        timeout(TIMEOUT, found)
            .await
            .unwrap_or_else(|_| panic!("`{text}` in time"))
    }

    async fn interrupt(mut self) -> Option<i32> {
        signal(self.program.id().unwrap(), Signal::INT);
        timeout(TIMEOUT, self.program.wait())
            .await
            .expect("an end in time")
            .unwrap()
            .code()
    }
}

/// The first port number behind `localhost:`.
fn port_in(line: &str) -> u16 {
    let rest = line.split_once("localhost:").unwrap().1;
    let end = rest
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().unwrap()
}

async fn contents(port: u16, user: &str) -> Vec<String> {
    let settings = format!("host=localhost port={port} user={user}");
    let (client, connection) = tokio_postgres::connect(&settings, NoTls).await.unwrap();
    tokio_util::task::TaskTracker::new().spawn(async move {
        let _ = connection.await;
    });
    let rows = client
        .query("select content from notes order by created_at desc", &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn the_demo_serves_all_addresses_of_its_panel() {
    let arguments = [
        "--port",
        "0",
        "--http-port",
        "0",
        "--notes-port",
        "0",
        "--token-ttl",
        "8s",
    ];
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("demo.env");
    let mut demo = Demo::start(&[&arguments[..], &["--env-file", file.to_str().unwrap()]].concat());
    let postgres = port_in(&demo.line("Postgres").await);
    let notes = port_in(&demo.line("Notes page").await);
    let metrics = port_in(&demo.line("Status page").await);
    assert!(
        demo.line("Try")
            .await
            .contains(&format!("psql -h localhost -p {postgres} "))
    );
    demo.line("credential 1 minted").await;

    let rows = contents(postgres, "anyone").await;
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0], "Data fetched from your database");
    let page = http(notes, "GET /", "").await.unwrap();
    assert_eq!(page.status, 200);
    assert!(page.body.contains("Welcome to Lakebase Autoscaling!"));
    assert!(
        http(metrics, "GET /metrics", "")
            .await
            .unwrap()
            .body
            .contains("lakebase_proxy_")
    );

    // Its variables serve the other commands.
    let variables = std::fs::read_to_string(&file).unwrap();
    let variables = variables.lines().filter_map(|line| line.split_once('='));
    let mut token = command(&["token"]);
    token.envs(variables).stdout(Stdio::piped());
    let printed = timeout(TIMEOUT, token.output()).await.unwrap().unwrap();
    assert!(printed.stdout.starts_with(b"eyJ"), "{printed:?}");

    demo.line("credential 2 refreshed").await;
    assert_eq!(contents(postgres, "anyone").await.len(), 3);
    assert_eq!(demo.interrupt().await, Some(130));
    assert!(!file.exists());
}

#[tokio::test]
async fn a_requested_port_that_is_taken_ends_the_demo() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut program = Command::new(PROGRAM)
        .args([
            "demo",
            "--notes-port",
            "0",
            "--http-port",
            "0",
            "--port",
            &port,
        ])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(program.stderr.take().unwrap()).lines();
    let mut reply = String::new();
    while let Some(line) = timeout(TIMEOUT, lines.next_line())
        .await
        .expect("a word")
        .unwrap()
    {
        reply.push_str(&line);
    }
    assert!(reply.contains(&port) && reply.contains("--port"), "{reply}");
    assert_eq!(program.wait().await.unwrap().code(), Some(1));
}

#[tokio::test]
async fn a_demo_interrupted_while_it_starts_ends_at_once() {
    let demo = Demo::start(&["--port", "0", "--http-port", "0", "--notes-port", "0"]);
    // It catches signals first; the kernel shows when that is done.
    let caught = format!("/proc/{}/status", demo.program.id().unwrap());
    let ready = async {
        loop {
            let status = std::fs::read_to_string(&caught).unwrap();
            let mask = status
                .lines()
                .find_map(|line| line.strip_prefix("SigCgt:\t"))
                .unwrap();
            // SIGINT is signal 2, bit 1.
            if u64::from_str_radix(mask, 16).unwrap() & 0b10 != 0 {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(TIMEOUT, ready).await.expect("signals to be caught");
    assert_eq!(demo.interrupt().await, Some(130));
}
