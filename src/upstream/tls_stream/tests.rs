//! Both ends of a connection in memory, with a reader that gets its bytes in whatever pieces.

use std::{future::Future, sync::OnceLock};

use proptest::prelude::*;
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig, SupportedProtocolVersion,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    version,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream as ServerStream};

use super::*;
use crate::{
    net::{socket::Socket, tls::provider},
    upstream::Stream,
};

const ROOM: usize = 64 * 1024;

struct Certificates {
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

fn certificates() -> &'static Certificates {
    static MADE: OnceLock<Certificates> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        Certificates {
            authority: authority.der().clone(),
            certificate: certificate.der().clone(),
            key: key.serialize_der().into(),
        }
    })
}

fn client_config(version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(certificates().authority.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    Arc::new(config)
}

/// `fragment`: into what pieces the server cuts its messages, those of the handshake included.
fn acceptor(fragment: Option<usize>) -> TlsAcceptor {
    let Certificates {
        certificate, key, ..
    } = certificates();
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.clone()],
            PrivateKeyDer::from(key.clone_key()),
        )
        .unwrap();
    config.max_fragment_size = fragment;
    TlsAcceptor::from(Arc::new(config))
}

/// What lies between the two: partial reads, partial writes, and one byte that can be changed.
struct Wire {
    stream: DuplexStream,
    pieces: Vec<usize>,
    turn: usize,
    /// Spoils the last byte of the next read.
    spoil: bool,
}

impl Wire {
    fn piece(&mut self) -> usize {
        self.turn += 1;
        self.pieces
            .get(self.turn % self.pieces.len().max(1))
            .copied()
            .unwrap_or(ROOM)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut piece = vec![0; self.piece().min(buf.remaining())];
        let mut part = ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        piece.truncate(read);
        if let Some(last) = piece.last_mut()
            && mem::take(&mut self.spoil)
        {
            *last ^= 1;
        }
        buf.put_slice(&piece);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let piece = self.piece().min(buf.len());
        Pin::new(&mut self.stream).poll_write(cx, &buf[..piece])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Pair {
    client: TlsStream<Wire>,
    server: ServerStream<DuplexStream>,
}

async fn shake(
    config: Arc<ClientConfig>,
    acceptor: &TlsAcceptor,
    room: usize,
    pieces: &[usize],
) -> Pair {
    let (ours, theirs) = duplex(room);
    let wire = Wire {
        stream: ours,
        pieces: pieces.to_vec(),
        turn: 0,
        spoil: false,
    };
    let (client, server) = handshake(config, acceptor, wire, theirs).await;
    Pair { client, server }
}

async fn handshake<C, S>(
    config: Arc<ClientConfig>,
    acceptor: &TlsAcceptor,
    client: C,
    server: S,
) -> (TlsStream<C>, ServerStream<S>)
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from("localhost").unwrap();
    let connecting = TlsStream::connect(config, name, client);
    let (client, server) = tokio::join!(connecting, acceptor.accept(server));
    (client.unwrap(), server.unwrap())
}

/// A connection to the endpoint over `client`, and the endpoint's end of it over `server`.
pub(crate) async fn tls_pair(
    client: Socket,
    server: TcpStream,
) -> (Stream, ServerStream<TcpStream>) {
    let (client, server) = handshake(
        client_config(&version::TLS13),
        &acceptor(None),
        client,
        server,
    )
    .await;
    (Stream::Tls(client), server)
}

async fn pair(version: &'static SupportedProtocolVersion) -> Pair {
    shake(client_config(version), &acceptor(None), ROOM, &[]).await
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

impl Pair {
    /// The server sends `sent`, and the client receives it in reads of at most `read` bytes.
    async fn receive(&mut self, sent: &[u8], read: usize) {
        let Self { client, server } = self;
        let mut received = Vec::new();
        tokio::join!(
            async {
                server.write_all(sent).await.unwrap();
                server.flush().await.unwrap();
            },
            async {
                let mut buffer = vec![0; read];
                while received.len() < sent.len() {
                    let read = client.read(&mut buffer).await.unwrap();
                    assert!(read > 0, "the server has not closed");
                    received.extend_from_slice(&buffer[..read]);
                }
            }
        );
        assert!(received == sent, "{} bytes were changed", sent.len());
    }

    /// The client sends `sent`, and the server receives it.
    async fn send(&mut self, sent: &[u8]) {
        let Self { client, server } = self;
        let mut received = vec![0; sent.len()];
        tokio::join!(
            async {
                client.write_all(sent).await.unwrap();
                client.flush().await.unwrap();
            },
            async { server.read_exact(&mut received).await.unwrap() }
        );
        assert!(received == sent, "{} bytes were changed", sent.len());
    }
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect()
}

#[derive(Clone, Debug)]
enum Step {
    Receive(usize, usize),
    Send(usize),
    /// The server updates its keys and requests an update of the client's.
    Renew,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = || prop_oneof![4 => 1..300_usize, 1 => 1..150_000_usize];
    let step = prop_oneof![
        3 => (length(), prop_oneof![1..50_usize, 1..100_000_usize]).prop_map(|(length, read)| Step::Receive(length, read)),
        3 => length().prop_map(Step::Send),
        1 => Just(Step::Renew),
    ];
    prop::collection::vec(step, 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn records_may_come_in_any_pieces(
        steps in steps(),
        pieces in prop::collection::vec(prop_oneof![1..9_usize, 1..70_000_usize], 1..12),
        fragment in prop::option::of(32..16_384_usize),
        // The tickets must fit, which the server sends last and the client reads after the handshake.
        room in 512..70_000_usize,
        old in any::<bool>(),
    ) {
        let version = if old { &version::TLS12 } else { &version::TLS13 };
        run(async {
            let mut pair = shake(client_config(version), &acceptor(fragment), room, &pieces).await;
            for step in steps {
                match step {
                    Step::Receive(length, read) => pair.receive(&bytes(length), read).await,
                    Step::Send(length) => pair.send(&bytes(length)).await,
                    Step::Renew if old => {}
                    Step::Renew => pair.server.get_mut().1.refresh_traffic_keys().unwrap(),
                }
            }
        });
    }

    /// Any bytes in place of TLS end the handshake with an error, not a panic.
    #[test]
    fn bytes_other_than_tls_are_an_error(sent in prop::collection::vec(any::<u8>(), 0..3000), looks_right in any::<bool>()) {
        let mut sent = sent;
        if looks_right && sent.len() > 5 {
            let length = u16::try_from(sent.len() - 5).unwrap();
            sent[..3].copy_from_slice(&[22, 3, 3]);
            sent[3..5].copy_from_slice(&length.to_be_bytes());
        }
        run(async {
            let (ours, mut theirs) = duplex(ROOM);
            theirs.write_all(&sent).await.unwrap();
            theirs.shutdown().await.unwrap();
            let name = ServerName::try_from("localhost").unwrap();
            let config = client_config(&version::TLS13);
            assert!(TlsStream::connect(config, name, ours).await.is_err());
        });
    }
}

#[test]
fn records_may_be_cut_at_every_byte() {
    for version in [&version::TLS12, &version::TLS13] {
        run(async {
            let mut pair = shake(client_config(version), &acceptor(Some(32)), ROOM, &[1]).await;
            pair.receive(&bytes(3000), 7).await;
            pair.send(&bytes(3000)).await;
        });
    }
}

/// The connection holds half of a ticket when the client writes.
#[test]
fn a_client_may_speak_between_two_parts_of_a_message() {
    run(async {
        for cut in 1..400 {
            let mut pair = shake(
                client_config(&version::TLS13),
                &acceptor(Some(48)),
                ROOM,
                &[],
            )
            .await;
            // The tickets lie there unread: take so much of them, then speak.
            pair.client.socket.pieces = vec![cut];
            let mut nothing = [0; 1];
            let waits = poll_fn(|cx| {
                let mut space = ReadBuf::new(&mut nothing);
                Poll::Ready(
                    Pin::new(&mut pair.client)
                        .poll_read(cx, &mut space)
                        .is_pending(),
                )
            });
            assert!(waits.await, "there is nothing to read yet");
            pair.client.socket.pieces.clear();
            pair.send(b"hello").await;
            pair.receive(b"world", 100).await;
        }
    });
}

#[test]
fn a_stream_that_waits_holds_no_buffer() {
    run(async {
        for version in [&version::TLS12, &version::TLS13] {
            let mut pair = pair(version).await;
            pair.receive(&bytes(200_000), 1000).await;
            pair.send(&bytes(200_000)).await;
            let TlsStream {
                partial,
                plaintext,
                encrypted,
                ..
            } = &pair.client;
            assert_eq!(
                (
                    partial.capacity(),
                    plaintext.capacity(),
                    encrypted.capacity()
                ),
                (0, 0, 0)
            );
        }
    });
}

#[test]
fn a_peer_that_reads_nothing_is_not_written_to_without_end() {
    run(async {
        let mut pair = pair(&version::TLS13).await;
        let mut taken = 0;
        let waits = poll_fn(|cx| {
            loop {
                match Pin::new(&mut pair.client).poll_write(cx, &bytes(100_000)) {
                    Poll::Ready(written) => taken += written.unwrap(),
                    Poll::Pending => return Poll::Ready(()),
                }
            }
        });
        waits.await;
        assert!(taken <= ROOM + 2 * CHUNK_LEN, "{taken} bytes taken");
        let Pair { client, server } = &mut pair;
        let mut received = vec![0; taken];
        let (flushed, received_all) =
            tokio::join!(client.flush(), server.read_exact(&mut received));
        flushed.unwrap();
        received_all.unwrap();
    });
}

#[test]
fn each_side_may_close_its_half_first() {
    run(async {
        for version in [&version::TLS12, &version::TLS13] {
            let mut server_first = pair(version).await;
            server_first.server.shutdown().await.unwrap();
            assert_eq!(server_first.client.read(&mut [0; 9]).await.unwrap(), 0);
            server_first.send(b"still here").await;

            let mut client_first = pair(version).await;
            client_first.client.shutdown().await.unwrap();
            assert_eq!(
                client_first.server.read(&mut [0; 9]).await.unwrap(),
                0,
                "the alert was sent"
            );
            client_first.receive(b"still here", 100).await;
            assert!(
                client_first.client.write(b"x").await.is_err(),
                "it has closed"
            );
        }
    });
}

#[test]
fn an_end_without_close_notify_is_an_error() {
    run(async {
        let Pair { mut client, server } = pair(&version::TLS13).await;
        drop(server);
        let error = client.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(client.read(&mut [0; 9]).await.is_err(), "nor later");
    });
}

#[test]
fn a_changed_record_ends_the_connection_with_an_alert() {
    run(async {
        for version in [&version::TLS12, &version::TLS13] {
            let mut pair = pair(version).await;
            pair.receive(b"sound", 100).await;
            pair.client.socket.spoil = true;
            pair.server.write_all(b"broken").await.unwrap();
            let mut received = [0; 100];
            let error = pair.client.read(&mut received).await.unwrap_err();
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
            assert_eq!(inner, Some(&rustls::Error::DecryptError));
            assert!(pair.client.read(&mut received).await.is_err());
            assert!(pair.client.write(b"x").await.is_err());
            let alert = pair
                .server
                .read(&mut received)
                .await
                .unwrap_err()
                .to_string();
            assert!(alert.contains("BadRecordMac"), "{alert}");
            pair.client.shutdown().await.unwrap();
        }
    });
}

#[test]
fn a_certificate_that_is_not_trusted_is_refused() {
    run(async {
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let (ours, theirs) = duplex(ROOM);
        let name = ServerName::try_from("localhost").unwrap();
        let acceptor = acceptor(None);
        let (client, server) = tokio::join!(
            TlsStream::connect(Arc::new(config), name, ours),
            acceptor.accept(theirs)
        );
        let error = client.unwrap_err();
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        assert!(
            matches!(inner, Some(rustls::Error::InvalidCertificate(_))),
            "{error}"
        );
        assert!(
            server.err().unwrap().to_string().contains("UnknownCA"),
            "the alert names the reason"
        );
    });
}

#[test]
fn a_ticket_spares_the_next_connection_the_certificate() {
    run(async {
        for version in [&version::TLS12, &version::TLS13] {
            let (config, acceptor) = (client_config(version), acceptor(None));
            let mut first = shake(Arc::clone(&config), &acceptor, ROOM, &[]).await;
            assert!(!first.client.is_resumed());
            first.receive(b"with the tickets before it", 100).await;
            let second = shake(config, &acceptor, ROOM, &[]).await;
            assert!(second.client.is_resumed());
        }
    });
}
