//! The log of a running program: what it leaves out, how to see more, and what becomes of it when nothing reads it.

use std::{
    io::{ErrorKind, Write, pipe},
    net::SocketAddr,
};

use lakebase_proxy::emulator::{Action, Emulator, Response, ServerError, Site};
use rustix::io::ioctl_fionbio;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    harness::{
        self,
        binary::{self, Binary},
        emulator::http,
        wire::{self, Wire},
        within,
    },
    process::{Signal, signal},
};

async fn connect(proxy: &Binary, database: &str) -> Result<(), tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(proxy.postgres.port())
        .user("anyone")
        .dbname(database);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    let requested = async {
        client.simple_query("select 1").await?;
        drop(client);
        Ok(())
    };
    let (requested, _ended) = tokio::join!(requested, connection);
    requested
}

async fn proxy() -> (Emulator, Binary) {
    let emulator = harness::emulator().await;
    let proxy = Binary::serve(&emulator, &[]).await;
    (emulator, proxy)
}

#[tokio::test]
async fn a_flood_of_refusals_is_a_few_lines() {
    let (_emulator, mut proxy) = proxy().await;
    for _ in 0..40 {
        let refused = within("a refusal", connect(&proxy, "no_such_database")).await;
        assert!(refused.is_err());
    }
    assert!(
        within("another one", connect(&proxy, "nor_this_one"))
            .await
            .is_err()
    );
    proxy.until("nor_this_one").await;
    let about = |name: &str| {
        let reply = proxy.lines.iter().map(ToString::to_string);
        reply
            .filter(|line| line.contains("client refused") && line.contains(name))
            .count()
    };
    assert_eq!(about("no_such_database"), 10);
    assert_eq!(about("nor_this_one"), 1);
}

#[tokio::test]
async fn the_log_filter_can_change_at_runtime() {
    let (_emulator, mut proxy) = proxy().await;
    let port = proxy.http.port();
    let now = http(port, "GET /log-filter", "").await.unwrap();
    assert_eq!(
        (now.status, now.body.trim()),
        (200, "lakebase_proxy=info,warn")
    );

    let wrong = http(port, "PUT /log-filter", "lakebase_proxy=loud")
        .await
        .unwrap();
    assert_eq!(wrong.status, 400);
    assert!(
        wrong
            .body
            .contains("invalid log filter directive `lakebase_proxy=loud`"),
        "{}",
        wrong.body
    );
    assert_eq!(
        http(port, "PUT /log-filter", " ").await.unwrap().status,
        400
    );
    let foreign = http(
        port,
        "PUT /log-filter\norigin: https://evil.example",
        "trace",
    )
    .await
    .unwrap();
    assert_eq!(foreign.status, 403, "a web page must not change it");

    connect(&proxy, "databricks_postgres").await.unwrap();
    let changed = http(port, "PUT /log-filter", "warn,lakebase_proxy=debug\n")
        .await
        .unwrap();
    assert_eq!(
        (changed.status, changed.body.trim()),
        (200, "lakebase_proxy=debug,warn")
    );
    connect(&proxy, "databricks_postgres").await.unwrap();
    proxy.until("log filter changed").await;
    assert!(
        !proxy
            .lines
            .iter()
            .any(|line| line["message"] == "session begins")
    );
    let begins = proxy.until("session begins").await;
    for part in [
        "peer",
        "queue",
        "credential",
        "resolve",
        "dial",
        "tls",
        "login",
    ] {
        assert!(begins["span"][part].is_string(), "{part}: {begins}");
    }
    proxy.until("session ends").await;
}

async fn dropped(proxy: &Binary) -> u64 {
    let metrics = http(proxy.http.port(), "GET /metrics", "").await.unwrap();
    let count = metrics
        .body
        .lines()
        .find_map(|line| line.strip_prefix("lakebase_proxy_log_lines_dropped_total "));
    count.expect("the metric").parse().unwrap()
}

/// Makes it log more than the pipe and its buffer hold, and returns how many lines it has dropped.
async fn clog(proxy: &Binary) -> u64 {
    let set_filter = async |filter| {
        let set = http(proxy.http.port(), "PUT /log-filter", filter).await;
        assert_eq!(set.unwrap().status, 200);
    };
    set_filter("trace").await;
    within("lines are dropped", async {
        while dropped(proxy).await == 0 {
            let refused = (0..100).map(|_| async {
                let mut client = TcpStream::connect(proxy.postgres).await.unwrap();
                // Protocol 2.0, which is refused with a line.
                client.write_all(&[0, 0, 0, 8, 0, 2, 0, 0]).await.unwrap();
                client.read_to_end(&mut Vec::new()).await.unwrap();
            });
            futures_util::future::join_all(refused).await;
        }
    })
    .await;
    set_filter("warn,lakebase_proxy=info").await;
    dropped(proxy).await
}

/// Line ends that forge lines in either format, what a terminal obeys, and what reorders text.
const WORDS: &str = concat!(
    "x\n2026-01-01T00:00:00.000000Z ERROR lakebase_proxy: FORGED\r\n",
    r#"{"level":"ERROR","message":"FORGED"}"#,
    "\t\u{8}\u{1b}[31m\u{7f}\u{85}\u{9b}2K\u{61c}\u{200e}\u{2028}\u{2029}\u{202e}\u{2066}",
);

fn is_hidden(character: char) -> bool {
    character.is_control() || "\u{61c}\u{200e}\u{2028}\u{2029}\u{202e}\u{2066}".contains(character)
}

/// The whole log of a proxy whose clients, workspace and server send [`WORDS`] wherever they can.
async fn log_of_an_injection(flags: &[&str]) -> String {
    let emulator = harness::emulator().await;
    let unavailable = serde_json::json!({ "error_code": WORDS, "message": WORDS }).to_string();
    let faults = emulator.faults();
    faults.times(
        1,
        Site::Mint,
        Action::Respond(Response::body(503, unavailable)),
    );
    let base = ["serve", "--port", "0", "--http-port", "0"];
    let mut child = binary::command(&[&base[..], flags].concat())
        .envs(emulator.environment())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let mut log = String::new();
    let listens = async {
        loop {
            let mut some = [0; 4096];
            let read = stderr.read(&mut some).await.unwrap();
            assert!(read > 0, "it ended: {log}");
            log.push_str(str::from_utf8(&some[..read]).unwrap());
            let has = |message| log.contains(message);
            if has("database credential obtained") && has("listening for Postgres clients") {
                let (_, address) = log
                    .lines()
                    .find(|line| line.contains("listening for Postgres clients"))
                    .and_then(|line| line.split_once("127.0.0.1:"))
                    .unwrap();
                let port: String = address.chars().take_while(char::is_ascii_digit).collect();
                break SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()));
            }
        }
    };
    let address = within("it listens", listens).await;

    let try_login = async |parameters: &[(&str, &str)]| {
        let mut wire = Wire::dial(address).await;
        wire.startup(parameters).await;
        while let Ok(Some(reply)) = wire.try_next().await {
            if reply.tag == 'Z' {
                wire.send(&wire::terminate()).await;
            }
        }
    };
    let options = format!("-c work_mem={}", WORDS.replace(' ', "\\ "));
    for parameters in [
        &[("user", WORDS)][..],
        &[("user", "a"), ("database", WORDS)],
        &[("user", "a"), ("application_name", WORDS)],
        &[("user", "a"), (WORDS, "on")],
        &[("user", "a"), ("work_mem", WORDS)],
        &[("user", "a"), ("replication", WORDS)],
        &[("user", "a"), ("options", &options)],
    ] {
        within("a login", try_login(parameters)).await;
    }
    let mut words = ServerError::fatal("42501", WORDS).detail(WORDS);
    words.hint = Some(WORDS.to_owned());
    for (site, action) in [
        (Site::Startup, Action::Error(words.clone())),
        (Site::Password, Action::Error(words)),
        (Site::SslRequest, Action::Answer(WORDS.to_owned())),
    ] {
        faults.times(1, site, action);
        within("a login", try_login(&[("user", "a")])).await;
    }
    signal(child.id().unwrap(), Signal::TERM);
    let mut rest = String::new();
    within("the end", stderr.read_to_string(&mut rest))
        .await
        .unwrap();
    log + &rest
}

/// A client can put a line end into any of its names, and a server into any of its words: each made lines of its own.
#[tokio::test]
async fn each_line_of_text_is_one_event_whatever_others_send() {
    let log = log_of_an_injection(&["--log-filter", "debug"]).await;
    let mut injected = 0;
    for line in log.strip_suffix('\n').unwrap().split('\n') {
        let (time, rest) = line.split_once(' ').unwrap();
        let (level, rest) = rest.trim_start().split_once(' ').unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{line:?}");
        assert!(
            ["ERROR", "WARN", "INFO", "DEBUG"].contains(&level),
            "{line:?}"
        );
        assert!(!line.contains(is_hidden), "{line:?}");
        assert!(!time.starts_with("2026-01-01"), "forged: {line:?}");
        injected += usize::from(rest.contains("x\\n2026-01-01T00:00:00.000000Z ERROR"));
    }
    assert!(injected >= 6, "of {injected} lines: {log}");
}

#[tokio::test]
async fn each_line_of_json_is_one_event_whatever_others_send() {
    let flags = ["--structured-logs", "--log-filter", "debug"];
    let log = log_of_an_injection(&flags).await;
    let mut injected = 0;
    for line in log.strip_suffix('\n').unwrap().split('\n') {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(event["timestamp"].is_string(), "{line:?}");
        assert!(!line.contains(is_hidden), "{line:?}");
        // The values are what was sent, for programs.
        injected += usize::from(event["message"].as_str().unwrap().contains(WORDS));
    }
    assert!(injected >= 3, "of {injected} lines: {log}");
}

/// A container runtime, or a supervisor, whose pipe is full: every write to standard error waited for it, in the end the
/// task that handles signals too.
#[tokio::test]
async fn an_unread_log_blocks_neither_sessions_nor_the_exit() {
    let (_emulator, proxy) = proxy().await;
    clog(&proxy).await;
    for _ in 0..3 {
        within("a query", connect(&proxy, "databricks_postgres"))
            .await
            .unwrap();
        let refused = within("a refusal", connect(&proxy, "no_such_database")).await;
        assert!(refused.is_err());
    }
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.unread_exit_code().await, Some(143));
}

#[tokio::test]
async fn the_number_of_dropped_lines_is_logged_when_reading_resumes() {
    let (_emulator, mut proxy) = proxy().await;
    let dropped = clog(&proxy).await;
    let reply = proxy.until("log lines were dropped").await;
    assert_eq!(
        (reply["level"].as_str(), reply["lines"].as_u64()),
        (Some("WARN"), Some(dropped))
    );
    proxy.signal(Signal::TERM);
    // The last lines are there.
    proxy.until("shut down").await;
}

#[tokio::test]
async fn a_failing_command_exits_even_if_its_output_is_not_read() {
    let (_reader, mut writer) = pipe().unwrap();
    ioctl_fionbio(&writer, true).unwrap();
    let full = loop {
        if let Err(error) = writer.write(&[b'x'; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    ioctl_fionbio(&writer, false).unwrap();
    let mut command = binary::command(&["serve", "--config-file", "/nowhere"]);
    let mut child = command.stderr(writer).spawn().unwrap();
    let ended = within("the command ends", child.wait()).await.unwrap();
    assert_eq!(ended.code(), Some(1));
}

/// 90 sessions that ended in one moment left nothing in the default log.
#[tokio::test]
async fn sessions_ended_together_by_the_endpoint_cause_one_line() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    let mut sessions = Vec::new();
    for _ in 0..20 {
        let mut wire = Wire::dial(binary.postgres).await;
        wire.startup(&[("user", "anyone")]).await;
        wire.welcome().await;
        sessions.push(wire);
    }
    let role = &emulator.identities().app.name;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where usename = $1";
    harness::superuser()
        .await
        .execute(end, &[role])
        .await
        .unwrap();
    let line = binary.find("the endpoint ended sessions").await;
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["sessions"], 20);
    let words = "terminating connection due to administrator command";
    assert_eq!(line["server"], words);
}
