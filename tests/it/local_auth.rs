//! A password between clients and the proxy.

use std::fs;

use lakebase_proxy::{config::LocalAuth, emulator::Emulator, telemetry::labels::Reason};
use tempfile::{NamedTempFile, TempDir};

use crate::process::Signal;
use crate::{
    harness::{
        self, Proxy,
        binary::{self, Binary},
        wire::{PROTOCOL_3_2, Wire, cancel_request, startup, text},
        within,
    },
    web,
};

const PASSWORD: &str = "sesame, öffne dich";

/// A proxy that requires it.
async fn proxy(emulator: &Emulator, file: &NamedTempFile) -> Proxy {
    fs::write(file, format!("{PASSWORD}\n")).unwrap();
    Proxy::with(emulator, |settings| {
        settings.local_auth = Some(LocalAuth::Password);
        settings.local_password_file = Some(file.path().to_owned());
    })
    .await
}

#[tokio::test]
async fn the_password_gives_a_session_under_any_user_name() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    let proxy = proxy(&emulator, &file).await;
    for user in ["anyone", "another user"] {
        let mut config = proxy.client_config();
        config.user(user).password(PASSWORD);
        let client = proxy.try_client(&config).await.unwrap();
        let row = client.query_one("select current_user::text", &[]).await;
        assert_eq!(
            row.unwrap().get::<_, String>(0),
            emulator.identities().app.name
        );
    }
    assert_eq!(proxy.metrics().clients_refused[Reason::LocalAuth].get(), 0);
}

#[tokio::test]
async fn a_wrong_password_reaches_neither_the_endpoint_nor_the_log() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, PASSWORD).unwrap();
    let path = file.path().to_str().unwrap();
    let flags = ["--local-password-file", path, "--log-filter", "trace"];
    let mut binary = Binary::serve(&emulator, &flags).await;
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(binary.postgres.port())
        .user("me")
        .password("wrong-guess");
    let refused = within("a refusal", config.connect(tokio_postgres::NoTls)).await;
    let error = refused.err().unwrap();
    let error = error.as_db_error().expect("our error");
    assert_eq!(error.code().code(), "28P01");
    assert_eq!(
        error.message(),
        "password authentication failed for user \"me\": lakebase-proxy has a password of its own"
    );
    assert!(error.hint().unwrap().contains("--local-password-file"));
    assert_eq!(emulator.counts().dials, 0);
    let line = binary
        .find("client refused: password authentication failed for user \"me\"")
        .await;
    assert_eq!(line["reason"], "local_auth");
    binary.signal(Signal::TERM);
    binary.until("shut down").await;
    for line in &binary.lines {
        let line = line.to_string();
        assert!(
            !line.contains(PASSWORD) && !line.contains("wrong-guess"),
            "{line}"
        );
    }
}

#[tokio::test]
async fn the_authentication_request_equals_that_of_postgres() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    let proxy = proxy(&emulator, &file).await;
    // A newer client gets the version negotiation before the authentication request.
    let mut wire = proxy.dial().await;
    wire.send(&startup(PROTOCOL_3_2, &[("user", "anyone")]))
        .await;
    assert_eq!(wire.next().await.tag, 'v');
    let requested = wire.next().await;
    assert_eq!(
        (requested.tag, &requested.body[..]),
        ('R', &b"\0\0\0\x0aSCRAM-SHA-256\0\0"[..])
    );
    // The password itself, or a query, is no answer.
    wire.send(&text('p', PASSWORD)).await;
    assert_eq!(wire.refusal().await.code, "08P01");
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone")]).await;
    assert_eq!(wire.next().await.tag, 'R');
    wire.send(&text('Q', "select 1")).await;
    assert_eq!(wire.refusal().await.code, "08P01");
    assert_eq!(emulator.counts().dials, 0);
}

#[tokio::test]
async fn a_key_is_password_enough_to_cancel_with() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    let proxy = proxy(&emulator, &file).await;
    let mut config = proxy.client_config();
    config.password(PASSWORD);
    let client = proxy.try_client(&config).await.unwrap();
    let token = client.cancel_token();
    let sleeping = client.simple_query("select pg_sleep(60)");
    let cancelling = async {
        harness::until_running(&emulator.identities().app.name, 1).await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    let (slept, ()) = tokio::join!(sleeping, cancelling);
    assert!(slept.is_err());
    // A guess is none.
    let mut wire = proxy.dial().await;
    wire.send(&cancel_request([7; 8])).await;
    wire.closed().await;
}

#[tokio::test]
async fn unix_sockets_the_child_and_the_notes_page_need_no_typed_password() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let mut command = binary::command(&["exec", "--notes", "--notes-port", "0"]);
    let script = "psql -XAtc 'select 6 * 7'; psql -XAtc 'select 7 * 7' \"$DATABASE_URL\"; psql -XAtc 'select 8 * 7' -h \"$SOCKETS\" -w; env | grep -c LOCAL_PASSWORD";
    command
        .arg("--unix-socket")
        .arg(directory.path())
        .args(["--", "sh", "-c", script])
        .envs(emulator.environment())
        .env("LAKEBASE_PROXY_LOCAL_PASSWORD", PASSWORD)
        .env("SOCKETS", directory.path())
        .stdout(std::process::Stdio::piped());
    let output = within("exec ends", command.output()).await.unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "42\n49\n56\n0\n",
        "{log}"
    );

    let file = NamedTempFile::new().unwrap();
    fs::write(&file, PASSWORD).unwrap();
    let path = file.path().to_str().unwrap();
    let flags = [
        "--local-password-file",
        path,
        "--notes",
        "--notes-port",
        "0",
    ];
    let mut binary = Binary::serve(&emulator, &flags).await;
    let notes = binary.logged("serving the notes page").await;
    let page = web::get(notes["address"].as_str().unwrap().parse().unwrap(), "/").await;
    assert!(page.body.contains("Recent Notes"), "{}", page.body);
}

#[tokio::test]
async fn listening_for_others_is_less_of_a_worry_with_a_password() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, PASSWORD).unwrap();
    let path = file.path().to_str().unwrap();
    let open = [
        "--address",
        "0.0.0.0",
        "--allow-remote",
        "--local-password-file",
        path,
    ];
    let warnings = async |more: &[&str]| {
        let mut binary = Binary::serve(&emulator, &[&open[..], more].concat()).await;
        binary.signal(Signal::TERM);
        binary.until("shut down").await;
        let warned = |line: &&serde_json::Value| line["level"] == "WARN";
        let warned = binary
            .lines
            .iter()
            .filter(warned)
            .map(|line| line["message"].to_string());
        warned.collect::<String>()
    };
    let plain = warnings(&[]).await;
    assert!(
        plain.contains("--client-tls") && !plain.contains("Lakebase identity"),
        "{plain}"
    );
    assert_eq!(warnings(&["--client-tls", "self-signed"]).await, "");
}

#[tokio::test]
async fn a_password_that_is_wanted_must_be_there() {
    let emulator = harness::emulator().await;
    let mut command = binary::command(&["serve", "--local-auth", "password"]);
    command.envs(emulator.environment());
    let output = within("it ends", command.output()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let reply = String::from_utf8(output.stderr).unwrap();
    assert!(reply.contains("LAKEBASE_PROXY_LOCAL_PASSWORD"), "{reply}");
}

/// psql connects without a password first, and returns with the one typed by its user: no warning is due. A program
/// without a password never returns, and its operator finds a line.
#[tokio::test]
async fn a_client_that_leaves_without_a_password_leaves_a_line() {
    let emulator = harness::emulator().await;
    let file = NamedTempFile::new().unwrap();
    fs::write(&file, PASSWORD).unwrap();
    let path = file.path().to_str().unwrap();
    let mut binary = Binary::serve(&emulator, &["--local-password-file", path]).await;
    let mut wire = Wire::dial(binary.postgres).await;
    wire.startup(&[("user", "anyone")]).await;
    assert_eq!(wire.next().await.tag, 'R');
    drop(wire);
    let line = binary.find("without giving the proxy's password").await;
    assert_eq!(line["level"], "INFO");
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
}
