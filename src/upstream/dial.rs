//! Opens a byte stream to the endpoint: resolution, TCP, TLS.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpStream, lookup_host},
};

use super::{
    endpoint::{Endpoint, Security},
    failure::{Class, Failure},
    phases::Phases,
    tls_stream::TlsStream,
};
use crate::{
    config::Keepalive,
    net::{
        message::read_message,
        socket::{Socket, Transport},
        tcp,
    },
    protocol::{error::ErrorFields, frame::SMALL_MESSAGE_LIMIT, startup::ssl_request},
    telemetry::{
        Metrics,
        labels::{LoginPhase, TlsHandshake},
    },
};

/// A byte stream to the endpoint.
#[derive(Debug)]
pub enum Stream {
    /// TCP, to a server on this machine.
    Plain(Socket),
    /// Verified TLS.
    Tls(TlsStream<Socket>),
}

impl Stream {
    /// Registers the socket with the runtime that this is called in, instead of its former one.
    pub(crate) fn move_here(self) -> io::Result<Self> {
        Ok(match self {
            Self::Plain(socket) => Self::Plain(socket.move_here()?),
            Self::Tls(stream) => Self::Tls(stream.try_map(Socket::move_here)?),
        })
    }

    /// Whether a password may be sent in cleartext.
    pub(super) fn may_send_cleartext(&self) -> bool {
        match self {
            Self::Plain(socket) => {
                // The address in use, not the configured host: a name may lead elsewhere.
                let peer = socket.peer_addr();
                peer.is_some_and(|address| tcp::is_loopback(address.ip()))
            }
            Self::Tls(_) => true,
        }
    }
}

impl Transport for Stream {
    fn socket(&self) -> Option<&Socket> {
        Some(match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_ref(),
        })
    }
}

/// Resolves, connects and negotiates TLS; returns the server's address too.
///
/// Not cancel safe, and need not be: dropping it drops the connection.
pub(super) async fn dial(
    endpoint: &Endpoint,
    keepalive: &Keepalive,
    phases: &Phases<'_>,
) -> Result<(Stream, SocketAddr), Failure> {
    let looking_up = resolve(&endpoint.host, endpoint.port);
    let looking_up = endpoint.addresses.get(looking_up);
    let addresses = phases.run(LoginPhase::Resolve, looking_up).await?;
    // Stale addresses may be the cause of a failure: the next attempt resolves anew.
    let connected = phases.run(LoginPhase::Dial, connect(addresses)).await;
    let (tcp, address) = connected.inspect_err(|_| endpoint.addresses.forget())?;
    let securing = secure(tcp, endpoint, keepalive, phases.metrics);
    let stream = match endpoint.security {
        Security::Plain => securing.await?,
        Security::Tls { .. } => phases.run(LoginPhase::Tls, securing).await?,
    };
    Ok((stream, address))
}

/// The addresses of a host, in the resolver's order.
pub(crate) async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
    // Cancel safe: getaddrinfo goes on on its blocking thread, and its result is dropped.
    match lookup_host((host, port)).await {
        Ok(addresses) => Ok(addresses.collect()),
        // Not every resolver knows these names, least of all without /etc/hosts.
        Err(_) if is_localhost(host) => Ok(vec![
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
        ]),
        Err(error) => Err(Failure::resolve(host, &error)),
    }
}

/// Whether RFC 6761, section 6.3, reserves the name for the loopback address.
fn is_localhost(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next();
    last.is_some_and(|label| label.eq_ignore_ascii_case("localhost"))
}

/// Connects to the first address that accepts.
pub(super) async fn connect(
    addresses: Vec<SocketAddr>,
) -> Result<(TcpStream, SocketAddr), Failure> {
    let connected = tcp::connect_any(addresses).await;
    connected.map_err(|error| Failure::dial(&error))
}

/// Connects to the address of an earlier connection, as a CancelRequest must.
pub(super) async fn redial(
    address: SocketAddr,
    endpoint: &Endpoint,
    keepalive: &Keepalive,
    metrics: &Metrics,
) -> Result<Stream, Failure> {
    let tcp = tcp::connect(address)
        .await
        .map_err(|error| Failure::dial(&error))?;
    secure(tcp, endpoint, keepalive, metrics).await
}

/// Negotiates TLS, unless the endpoint is configured without.
pub(super) async fn secure(
    tcp: TcpStream,
    endpoint: &Endpoint,
    keepalive: &Keepalive,
    metrics: &Metrics,
) -> Result<Stream, Failure> {
    tcp::tune(&tcp, keepalive);
    let mut tcp = Socket::from(tcp);
    if let Some(limit) = keepalive.loss_timeout() {
        tcp.limit_acknowledgement(Some(limit));
    }
    let Security::Tls { config, name } = &endpoint.security else {
        return Ok(Stream::Plain(tcp));
    };
    // No direct TLS: the edge takes a ClientHello for a long packet and never answers it.
    // The ClientHello follows the answer only: the edge refuses bytes that are sent with an SSLRequest.
    tcp.write_all(&ssl_request())
        .await
        .map_err(|error| Failure::broken(&error))?;
    // Exactly one byte is read, so that no cleartext bytes behind it count as part of the TLS stream.
    let answer = tcp
        .read_u8()
        .await
        .map_err(|error| Failure::broken(&error))?;
    match answer {
        b'S' => {}
        // No fallback to plaintext: the credential would be readable on the network.
        b'N' => return Err(Failure::protocol("the server does not offer TLS")),
        b'E' => return Err(read_plain_error(tcp).await),
        other => {
            return Err(Failure::protocol(format!(
                "the server answered the TLS request with byte {other:#04x}: is it Postgres?"
            )));
        }
    }
    // The name also for a configured address: the edge finds the endpoint by SNI.
    let stream = TlsStream::connect(Arc::clone(config), name.clone(), tcp)
        .await
        .map_err(|error| Failure::tls(&error))?;
    let kind = if stream.is_resumed() {
        TlsHandshake::Resumed
    } else {
        TlsHandshake::Full
    };
    metrics.tls_handshakes[kind].inc();
    Ok(Stream::Tls(stream))
}

/// An error in place of the response to SSLRequest. It is not authenticated, so it may cause a wait and nothing else.
async fn read_plain_error(mut tcp: Socket) -> Failure {
    let mut buffer = BytesMut::from(&b"E"[..]);
    match read_message(&mut tcp, &mut buffer, SMALL_MESSAGE_LIMIT).await {
        Ok(message) => {
            let failure = Failure::server(ErrorFields::parse(message.body()), []);
            match failure.class {
                Class::Capacity | Class::Waking => failure,
                _ => Failure::protocol(format!("the server refused TLS: {failure}")),
            }
        }
        Err(error) => error.into(),
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The failure for this cleartext response to SSLRequest.
    async fn refused_with(answer: &[u8]) -> Failure {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; 8]).await.unwrap();
            stream.write_all(answer).await.unwrap();
            stream.shutdown().await.unwrap();
            stream
                .read_to_end(&mut Vec::new())
                .await
                .unwrap_or_default();
        };
        let config = rustls::ClientConfig::builder_with_provider(crate::net::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let address = listener.local_addr().unwrap();
        let endpoint = Endpoint {
            label: crate::status::Label::new("e"),
            host: "localhost".to_owned(),
            port: address.port(),
            addresses: crate::upstream::Addresses::default(),
            user: "me".to_owned(),
            database: "db".to_owned(),
            security: Security::Tls {
                config: Arc::new(config),
                name: "localhost".try_into().unwrap(),
            },
            dropped: crate::upstream::DroppedParameters::default(),
        };
        let metrics = Metrics::new().unwrap();
        let keepalive = Keepalive::default();
        let dialed = async {
            redial(address, &endpoint, &keepalive, &metrics)
                .await
                .unwrap_err()
        };
        tokio::join!(dialed, server).0
    }

    #[test]
    fn localhost_and_its_subdomains_are_the_loopback_address() {
        for host in ["localhost", "LocalHost", "localhost.", "ep-1.localhost"] {
            assert!(is_localhost(host), "{host}");
        }
        for host in ["", ".", "localhost.example", "notlocalhost", "localhost4"] {
            assert!(!is_localhost(host), "{host}");
        }
    }

    #[tokio::test]
    async fn a_cleartext_error_can_cause_a_wait_and_nothing_else() {
        let starting = b"E\0\0\0\x20SFATAL\0C57P03\0Mstarting up\0\0";
        assert_eq!(refused_with(starting).await.class, Class::Waking);
        let expired = b"E\0\0\0\x26SFATAL\0C28P01\0Mtoken has expired\0\0";
        let failure = refused_with(expired).await;
        assert_eq!(
            failure.class,
            Class::Protocol,
            "else anyone on the path could force a mint"
        );
        assert!(failure.to_string().contains("token has expired"));
        assert_eq!(refused_with(b"N").await.class, Class::Protocol);
        assert_eq!(refused_with(b"HTTP/1.1 400").await.class, Class::Protocol);
        assert_eq!(refused_with(b"").await.class, Class::Waking);
    }
}
