//! Before login: TLS, server name, protocol version, sizes, timers, cancels.

use std::{io, sync::Arc, time::Duration};

use lakebase_proxy::emulator::Emulator;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::harness::emulator::{TIMEOUT, connect, credential, start, start_with};

pub(super) const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const CANCEL_REQUEST: u32 = 80_877_102;
pub(super) const PROTOCOL_3_0: u32 = 196_608;

/// An `ErrorResponse`, its fields by letter.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal(Vec<(char, String)>);

impl Refusal {
    /// The fields of an `ErrorResponse`'s body.
    pub(super) fn parse(body: &[u8]) -> Self {
        let fields = body
            .split(|byte| *byte == 0)
            .filter(|field| !field.is_empty());
        let parts = fields.map(|field| {
            let text = String::from_utf8_lossy(&field[1..]).into_owned();
            (char::from(field[0]), text)
        });
        Self(parts.collect())
    }

    pub(super) fn field(&self, letter: char) -> &str {
        self.0
            .iter()
            .find(|(found, _)| *found == letter)
            .map_or("", |(_, text)| text)
    }
}

/// Reads to the end and takes the last message for an `ErrorResponse`; `None` without a message.
pub(super) async fn refusal<S: AsyncRead + Unpin>(stream: &mut S) -> Option<Refusal> {
    let mut bytes = Vec::new();
    let _ = timeout(TIMEOUT, stream.read_to_end(&mut bytes))
        .await
        .expect("an end in time");
    let start = bytes.iter().position(|byte| *byte == b'E')?;
    Some(Refusal::parse(&bytes[start + 5..]))
}

pub(super) async fn dial(emulator: &Emulator) -> TcpStream {
    TcpStream::connect(("127.0.0.1", emulator.pg_port()))
        .await
        .unwrap()
}

pub(super) async fn dial_tls(
    emulator: &Emulator,
    server_name: Option<&str>,
) -> TlsStream<TcpStream> {
    let mut tcp = dial(emulator).await;
    tcp.write_all(SSL_REQUEST).await.unwrap();
    assert_eq!(tcp.read_u8().await.unwrap(), b'S');
    let mut config: ClientConfig = (*lakebase_proxy::net::tls::client_config(
        &lakebase_proxy::config::Roots::File(emulator.ca_file().to_owned()),
        b"postgresql",
    )
    .unwrap())
    .clone();
    config.enable_sni = server_name.is_some();
    if server_name.is_some_and(|name| name != "localhost") {
        // The name is not on the certificate, which is not what is tested.
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(trusting::Anything));
    }
    let name = ServerName::try_from(server_name.unwrap_or("localhost").to_owned()).unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .unwrap()
}

pub(super) fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 8).unwrap();
    [&length.to_be_bytes()[..], &code.to_be_bytes(), body].concat()
}

pub(super) fn startup(emulator: &Emulator) -> Vec<u8> {
    let user = &emulator.identities().app.name;
    packet(
        PROTOCOL_3_0,
        format!("user\0{user}\0database\0databricks_postgres\0\0").as_bytes(),
    )
}

#[tokio::test]
async fn a_startup_without_tls_is_refused_with_the_advice_to_use_it() {
    let emulator = start().await;
    let mut tcp = dial(&emulator).await;
    tcp.write_all(&startup(&emulator)).await.unwrap();
    let refusal = refusal(&mut tcp).await.unwrap();
    assert_eq!(refusal.field('C'), "08P01");
    assert_eq!(
        refusal.field('M'),
        "Invalid protocol version. Protocol version: 196608"
    );
    assert!(refusal.field('D').contains("`sslmode=require`"));
}

#[tokio::test]
async fn a_gssapi_request_is_refused() {
    let emulator = start().await;
    let mut tcp = dial(&emulator).await;
    tcp.write_all(&packet(80_877_104, b"")).await.unwrap();
    assert!(
        refusal(&mut tcp)
            .await
            .unwrap()
            .field('M')
            .ends_with("80877104")
    );
}

#[tokio::test]
async fn data_behind_the_ssl_request_is_refused() {
    let emulator = start().await;
    let mut tcp = dial(&emulator).await;
    tcp.write_all(&[SSL_REQUEST, b"\x16\x03\x01"].concat())
        .await
        .unwrap();
    assert_eq!(tcp.read_u8().await.unwrap(), b'S');
    let refusal = refusal(&mut tcp).await.unwrap();
    assert_eq!(refusal.field('C'), "08P01");
    assert_eq!(
        refusal.field('M'),
        "Received unencrypted data after SSL request."
    );
}

#[tokio::test]
async fn an_ssl_request_may_come_in_pieces() {
    let emulator = start().await;
    let mut tcp = dial(&emulator).await;
    tcp.set_nodelay(true).unwrap();
    for piece in SSL_REQUEST.chunks(3) {
        tcp.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(tcp.read_u8().await.unwrap(), b'S');
}

#[tokio::test]
async fn direct_tls_is_never_answered_and_ends_with_the_timer() {
    let emulator =
        start_with(|settings| settings.handshake_timeout = Duration::from_millis(300)).await;
    let mut tcp = dial(&emulator).await;
    let before = tokio::time::Instant::now();
    tcp.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3])
        .await
        .unwrap();
    assert_eq!(refusal(&mut tcp).await, None);
    assert!(before.elapsed() >= Duration::from_millis(290));
}

#[tokio::test]
async fn a_client_without_a_startup_message_times_out_with_an_error() {
    let emulator = start_with(|settings| settings.handshake_timeout = Duration::from_secs(1)).await;
    let mut tls = dial_tls(&emulator, Some("localhost")).await;
    let refusal = refusal(&mut tls).await.unwrap();
    assert_eq!(
        (refusal.field('C'), refusal.field('M')),
        ("08006", "Client handshake timeout.")
    );
}

#[tokio::test]
async fn a_client_without_a_server_name_is_refused() {
    let emulator = start().await;
    let mut tls = dial_tls(&emulator, None).await;
    tls.write_all(&startup(&emulator)).await.unwrap();
    let refusal = refusal(&mut tls).await.unwrap();
    assert_eq!(
        (refusal.field('C'), refusal.field('M')),
        ("08006", "Connection does not have SNI.")
    );
    assert_eq!(
        refusal.field('D'),
        "Please upgrade your client to support SNI."
    );
}

#[tokio::test]
async fn a_host_that_is_not_the_endpoint_is_not_authorized() {
    let emulator = start().await;
    let mut tls = dial_tls(&emulator, Some("ep-elsewhere.localhost")).await;
    tls.write_all(&startup(&emulator)).await.unwrap();
    let refusal = refusal(&mut tls).await.unwrap();
    assert_eq!(
        (refusal.field('C'), refusal.field('M')),
        ("28000", "External authorization failed.")
    );
    assert!(
        refusal
            .field('D')
            .starts_with("This could be due to paused instances")
    );
}

#[tokio::test]
async fn only_protocol_3_0_is_spoken() {
    let emulator = start().await;
    for (version, text) in [(196_610, "3.2"), (131_072, "2.0"), (196_609, "3.1")] {
        let mut tls = dial_tls(&emulator, Some("localhost")).await;
        tls.write_all(&packet(version, b"user\0ada\0\0"))
            .await
            .unwrap();
        let refusal = refusal(&mut tls).await.unwrap();
        assert_eq!(refusal.field('C'), "0A000");
        assert_eq!(
            refusal.field('M'),
            format!("Unsupported frontend protocol {text}. Server supports 3.0 to 3.0")
        );
    }
}

#[tokio::test]
async fn a_startup_packet_must_be_shorter_than_ten_thousand_bytes() {
    let emulator = start().await;
    let sized = |length: usize| {
        let user = format!(
            "user\0{}\0application_name\0",
            emulator.identities().app.name
        );
        let name = "x".repeat(length - 8 - user.len() - 2);
        packet(PROTOCOL_3_0, format!("{user}{name}\0\0").as_bytes())
    };
    let mut tls = dial_tls(&emulator, Some("localhost")).await;
    tls.write_all(&sized(9_999)).await.unwrap();
    assert_eq!(tls.read_u8().await.unwrap(), b'R');

    let mut tls = dial_tls(&emulator, Some("localhost")).await;
    tls.write_all(&sized(10_000)).await.unwrap();
    assert_eq!(
        refusal(&mut tls).await.unwrap().field('M'),
        "Invalid length of startup packet."
    );
}

/// Sends a startup message with more parameters and the password; what comes back is unread.
async fn authenticate(emulator: &Emulator, more: &str) -> TlsStream<TcpStream> {
    let mut tls = dial_tls(emulator, Some("localhost")).await;
    let mut body = startup(emulator)[8..].to_vec();
    body.pop();
    tls.write_all(&packet(
        PROTOCOL_3_0,
        &[&body, more.as_bytes(), b"\0"].concat(),
    ))
    .await
    .unwrap();
    assert_eq!(
        message(&mut tls).await.unwrap(),
        (b'R', 3_u32.to_be_bytes().to_vec())
    );
    let token = credential(emulator);
    let length = u32::try_from(token.len() + 5).unwrap().to_be_bytes();
    tls.write_all(&[b"p", &length[..], token.as_bytes(), b"\0"].concat())
        .await
        .unwrap();
    tls
}

/// Logs in over a raw connection; returns it, Postgres's process id and the key the edge gave.
pub(super) async fn log_in(
    emulator: &Emulator,
    more: &str,
) -> (TlsStream<TcpStream>, i32, [u8; 8]) {
    let mut tls = authenticate(emulator, more).await;
    let mut key = [0; 8];
    loop {
        let (kind, body) = message(&mut tls).await.unwrap();
        match kind {
            b'K' => key = body.try_into().unwrap(),
            b'Z' => break,
            b'E' => panic!("{}", String::from_utf8_lossy(&body)),
            _ => {}
        }
    }
    let pid = query(&mut tls, "select pg_backend_pid()").await.unwrap();
    (tls, pid.parse().unwrap(), key)
}

pub(super) async fn message<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<(u8, Vec<u8>)> {
    let kind = stream.read_u8().await?;
    let mut body = vec![0; usize::try_from(stream.read_u32().await?).unwrap() - 4];
    stream.read_exact(&mut body).await?;
    Ok((kind, body))
}

/// Runs a query; returns its one value, or the SQLSTATE of its error.
async fn query(tls: &mut TlsStream<TcpStream>, sql: &str) -> Result<String, String> {
    send_query(tls, sql).await;
    answer(tls).await
}

async fn send_query(tls: &mut TlsStream<TcpStream>, sql: &str) {
    let length = u32::try_from(sql.len() + 5).unwrap().to_be_bytes();
    tls.write_all(&[b"Q", &length[..], sql.as_bytes(), b"\0"].concat())
        .await
        .unwrap();
}

async fn answer(tls: &mut TlsStream<TcpStream>) -> Result<String, String> {
    let mut result = Ok(String::new());
    loop {
        let (kind, body) = timeout(TIMEOUT, message(tls))
            .await
            .expect("an answer")
            .unwrap();
        match kind {
            b'D' => result = Ok(String::from_utf8_lossy(&body[6..]).into_owned()),
            b'E' => {
                let code = body
                    .split(|byte| *byte == 0)
                    .find(|field| field.first() == Some(&b'C'));
                result = Err(String::from_utf8_lossy(&code.unwrap()[1..]).into_owned());
            }
            b'Z' => return result,
            _ => {}
        }
    }
}

#[tokio::test]
async fn startup_parameters_that_are_not_forwarded_are_not_in_force() {
    let emulator = start().await;
    let more = "search_path\0elsewhere\0client_encoding\0LATIN1\0application_name\0kept\0";
    let (mut session, ..) = log_in(&emulator, more).await;
    assert_eq!(
        query(&mut session, "show search_path").await.unwrap(),
        "\"$user\", public"
    );
    assert_eq!(
        query(&mut session, "show client_encoding").await.unwrap(),
        "UTF8"
    );
    assert_eq!(
        query(&mut session, "show application_name").await.unwrap(),
        "kept"
    );
}

#[tokio::test]
async fn replication_is_passed_on_and_refused_by_postgres_itself() {
    let emulator = start().await;
    let mut tls = authenticate(&emulator, "replication\0database\0").await;
    // An AuthenticationOk comes before it.
    assert_eq!(message(&mut tls).await.unwrap().0, b'R');
    let refusal = refusal(&mut tls).await.unwrap();
    assert_eq!(refusal.field('C'), "42501");
    // In the words of Postgres 15, and of later ones.
    let reply = refusal.field('M');
    assert!(reply.contains("walsender") || reply.contains("WAL sender"));
}

#[tokio::test]
async fn cancel_keys_are_the_edges_own_and_work_in_plain_text_and_inside_tls() {
    let emulator = start().await;
    let (mut session, pid, key) = log_in(&emulator, "").await;
    let (mut bystander, _, other_key) = log_in(&emulator, "").await;
    assert_ne!(key[..4], pid.to_be_bytes());
    assert_ne!(key, other_key);
    send_query(&mut bystander, "select pg_sleep(0.8)").await;
    for inside_tls in [false, true] {
        send_query(&mut session, "select pg_sleep(60)").await;
        emulator.wait_until_running(pid).await;
        if inside_tls {
            let mut tls = dial_tls(&emulator, Some("localhost")).await;
            tls.write_all(&packet(CANCEL_REQUEST, &key)).await.unwrap();
            let _ = tls.read_to_end(&mut Vec::new()).await;
        } else {
            let mut tcp = dial(&emulator).await;
            tcp.write_all(&packet(CANCEL_REQUEST, &key)).await.unwrap();
            assert_eq!(tcp.read(&mut [0]).await.unwrap(), 0);
        }
        assert_eq!(answer(&mut session).await, Err("57014".to_owned()));
    }
    assert!(
        answer(&mut bystander).await.is_ok(),
        "another session's query was cancelled"
    );
    assert_eq!(emulator.counts().cancels_forwarded, 2);
}

#[tokio::test]
async fn an_unknown_cancel_key_is_met_with_silence() {
    let emulator = start().await;
    let client = connect(&emulator).await.unwrap();
    let mut tcp = dial(&emulator).await;
    tcp.write_all(&packet(CANCEL_REQUEST, b"whatever"))
        .await
        .unwrap();
    assert_eq!(refusal(&mut tcp).await, None);
    assert_eq!(emulator.counts().cancels, 1);
    assert_eq!(emulator.counts().cancels_forwarded, 0);
    client.simple_query("select 1").await.unwrap();
}

#[tokio::test]
async fn a_cancel_of_the_wrong_length_is_refused() {
    let emulator = start().await;
    let mut tcp = dial(&emulator).await;
    tcp.write_all(&packet(CANCEL_REQUEST, b"0123456789ab"))
        .await
        .unwrap();
    assert_eq!(
        refusal(&mut tcp).await.unwrap().field('M'),
        "Invalid cancel request message length."
    );
}

/// Polls Postgres, past the edge, until a query of this session runs.
trait Watch {
    async fn wait_until_running(&self, pid: i32);
}

impl Watch for Emulator {
    async fn wait_until_running(&self, pid: i32) {
        let client = connect(self).await.unwrap();
        let running = async {
            loop {
                let row = client
                    .query_one(
                        "select state = 'active' from pg_stat_get_activity($1)",
                        &[&pid],
                    )
                    .await
                    .unwrap();
                if row.get(0) {
                    return;
                }
            }
        };
        timeout(TIMEOUT, running).await.expect("the query to run");
    }
}

mod trusting {
    use rustls::{
        DigitallySignedStruct, Error, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        pki_types::{CertificateDer, ServerName, UnixTime},
    };

    #[derive(Debug)]
    pub(super) struct Anything;

    impl ServerCertVerifier for Anything {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
}
