//! The client's side of the beginning: which of the opening packets it sends, and what we answer.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::protocol::{
    error::{Report, sqlstate},
    startup::{
        CancelKey, InitialPacket, StartupError, StartupMessage, TLS_HANDSHAKE, take_initial_packet,
    },
};

/// What a client turned out to want.
#[derive(Debug)]
pub(super) enum Opening {
    /// Cancel another session's query.
    Cancel(CancelKey),
    /// TLS first.
    Encrypt {
        /// From its first byte on, which is still in the buffer; else it has been told to go ahead.
        direct: bool,
    },
    /// Nothing: it left, as port scanners and TCP health checks do.
    Gone {
        /// Whether that was after it had been refused TLS.
        insisted: bool,
    },
    /// A session.
    Session(StartupMessage),
}

/// What a client is answered that wants TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    /// Yes.
    Offered,
    /// It has it.
    Spoken,
    /// No.
    Refused,
}

/// Why a client could not even begin.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The connection broke.
    #[error("the client's connection broke")]
    Io(#[from] io::Error),
    /// TLS came to nothing.
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    /// It took too long.
    #[error("no complete startup message in time")]
    Late,
    /// It took long while many others connected.
    #[error("no complete startup message while other clients waited")]
    Evicted,
    /// TLS from the first byte on, for what may be any protocol.
    #[error("direct TLS without the application protocol `postgresql`")]
    NoAlpn,
    /// The first packet makes no sense.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// Bytes behind a request that must be answered first.
    #[error("received unencrypted data after {0}")]
    Stuffed(&'static str),
    /// The same request twice.
    #[error("{0} sent twice")]
    Twice(&'static str),
}

impl HandshakeError {
    /// What the client is told, where there is a Postgres client to tell it to.
    pub(super) fn report(&self) -> Option<Report> {
        match self {
            // PostgreSQL closes without a word, too: whoever sends this does not read our protocol.
            Self::Io(_) | Self::Tls(_) | Self::Startup(StartupError::InvalidLength | StartupError::TlsHandshake) => None,
            Self::Startup(StartupError::NotUtf8) => Some(
                Report::new(sqlstate::INVALID_ENCODING, self.to_string())
                    .with_hint("Send names and values of startup parameters in UTF-8."),
            ),
            Self::Startup(StartupError::UnsupportedVersion { .. }) => {
                Some(Report::new(sqlstate::FEATURE_NOT_SUPPORTED, self.to_string()))
            }
            Self::Late
            | Self::Evicted
            | Self::Startup(StartupError::InvalidLayout | StartupError::InvalidRequest)
            | Self::Twice(_) => {
                Some(Report::new(sqlstate::PROTOCOL_VIOLATION, self.to_string()))
            }
            Self::NoAlpn => Some(
                Report::new(sqlstate::PROTOCOL_VIOLATION, self.to_string())
                    .with_hint("Connect with ALPN `postgresql`, as libpq's sslnegotiation=direct does."),
            ),
            Self::Stuffed(_) => Some(
                Report::new(sqlstate::PROTOCOL_VIOLATION, self.to_string()).with_detail(
                    "This is a defect of the client, or somebody between it and us who injects data.",
                ),
            ),
        }
    }
}

/// Reads up to the packet that says what the client wants. What it sent behind that stays in `buffer`.
///
/// Not cancel safe. The caller sets the deadline.
pub(super) async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    buffer: &mut BytesMut,
    tls: Tls,
) -> Result<Opening, HandshakeError> {
    let (mut ssl, mut gss) = (tls == Tls::Spoken, false);
    loop {
        if tls == Tls::Offered && buffer.first() == Some(&TLS_HANDSHAKE) {
            return Ok(Opening::Encrypt { direct: true });
        }
        let Some(packet) = take_initial_packet(buffer)? else {
            if stream.read_buf(buffer).await? == 0 {
                let insisted = ssl && tls == Tls::Refused;
                return Ok(Opening::Gone { insisted });
            }
            continue;
        };
        let (asked, name) = match packet {
            InitialPacket::Cancel(key) => return Ok(Opening::Cancel(key)),
            InitialPacket::Startup(message) => return Ok(Opening::Session(message)),
            InitialPacket::GssEnc => (&mut gss, "GSSENCRequest"),
            InitialPacket::Ssl => (&mut ssl, "SSLRequest"),
        };
        if std::mem::replace(asked, true) {
            return Err(HandshakeError::Twice(name));
        }
        if !buffer.is_empty() {
            return Err(HandshakeError::Stuffed(name));
        }
        let encrypt = name == "SSLRequest" && tls == Tls::Offered;
        stream.write_all(if encrypt { b"S" } else { b"N" }).await?;
        stream.flush().await?;
        if encrypt {
            return Ok(Opening::Encrypt { direct: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};

    use super::*;
    use crate::protocol::startup::{encode_startup, ssl_request};

    async fn next(client: &mut DuplexStream) -> u8 {
        client.read_u8().await.unwrap()
    }

    #[tokio::test]
    async fn a_client_may_ask_for_both_kinds_of_encryption_and_go_on_without() {
        let (mut client, mut server) = duplex(1024);
        let startup = encode_startup(&[("user", "me")]).unwrap();
        let conversation = async {
            client
                .write_all(&[0, 0, 0, 8, 4, 210, 22, 48])
                .await
                .unwrap();
            assert_eq!(next(&mut client).await, b'N');
            client.write_all(&ssl_request()).await.unwrap();
            assert_eq!(next(&mut client).await, b'N');
            client
                .write_all(&[&startup[..], b"Q\0\0\0\x05\0"].concat())
                .await
                .unwrap();
        };
        let mut buffer = BytesMut::new();
        let (opening, ()) = tokio::join!(
            receive(&mut server, &mut buffer, Tls::Refused),
            conversation
        );
        assert!(
            matches!(opening, Ok(Opening::Session(message)) if message.parameter("user") == Some("me"))
        );
        assert_eq!(&buffer[..], b"Q\0\0\0\x05\0", "a query sent along is kept");
    }

    #[tokio::test]
    async fn a_startup_message_may_come_byte_by_byte() {
        let (mut client, mut server) = duplex(1);
        let startup = encode_startup(&[("user", "me"), ("database", "d")]).unwrap();
        let mut buffer = BytesMut::new();
        let (opening, written) = tokio::join!(
            receive(&mut server, &mut buffer, Tls::Refused),
            client.write_all(&startup)
        );
        written.unwrap();
        assert!(matches!(opening, Ok(Opening::Session(_))));
    }

    #[tokio::test]
    async fn bytes_stuffed_behind_a_request_are_refused() {
        let (mut client, mut server) = duplex(1024);
        client
            .write_all(&[&ssl_request()[..], b"x"].concat())
            .await
            .unwrap();
        let error = receive(&mut server, &mut BytesMut::new(), Tls::Refused)
            .await
            .unwrap_err();
        assert!(matches!(error, HandshakeError::Stuffed("SSLRequest")));
        assert_eq!(error.report().unwrap().sqlstate, "08P01");
    }

    #[tokio::test]
    async fn asking_twice_is_refused() {
        let (mut client, mut server) = duplex(1024);
        let conversation = async {
            client.write_all(&ssl_request()).await.unwrap();
            assert_eq!(next(&mut client).await, b'N');
            client.write_all(&ssl_request()).await.unwrap();
        };
        let mut buffer = BytesMut::new();
        let (error, ()) = tokio::join!(
            receive(&mut server, &mut buffer, Tls::Refused),
            conversation
        );
        assert!(matches!(error, Err(HandshakeError::Twice("SSLRequest"))));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_no_error() {
        let (client, mut server) = duplex(16);
        drop(client);
        assert!(matches!(
            receive(&mut server, &mut BytesMut::new(), Tls::Refused).await,
            Ok(Opening::Gone { insisted: false })
        ));
    }

    #[tokio::test]
    async fn a_client_that_leaves_for_want_of_tls_is_noticed() {
        let (mut client, mut server) = duplex(16);
        client.write_all(&ssl_request()).await.unwrap();
        client.shutdown().await.unwrap();
        let opening = receive(&mut server, &mut BytesMut::new(), Tls::Refused).await;
        assert!(matches!(opening, Ok(Opening::Gone { insisted: true })));
    }

    #[tokio::test]
    async fn tls_is_begun_once_either_way() {
        let hello = [0x16, 3, 1];
        let open = async |said: &[u8], tls| {
            let (mut client, mut server) = duplex(64);
            client.write_all(said).await.unwrap();
            let mut buffer = BytesMut::new();
            let opening = receive(&mut server, &mut buffer, tls).await;
            drop(server);
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).await.unwrap();
            (opening, buffer, heard)
        };
        let (opening, buffer, heard) = open(&hello, Tls::Offered).await;
        assert!(matches!(opening, Ok(Opening::Encrypt { direct: true })));
        assert_eq!((&buffer[..], &heard[..]), (&hello[..], &b""[..]));
        let (opening, _, heard) = open(&ssl_request(), Tls::Offered).await;
        assert!(matches!(opening, Ok(Opening::Encrypt { direct: false })));
        assert_eq!(heard, b"S");
        let stuffed = [&ssl_request()[..], &hello].concat();
        let (opening, ..) = open(&stuffed, Tls::Offered).await;
        assert!(matches!(opening, Err(HandshakeError::Stuffed(_))));
        let (opening, ..) = open(&ssl_request(), Tls::Spoken).await;
        assert!(matches!(opening, Err(HandshakeError::Twice("SSLRequest"))));
        for tls in [Tls::Spoken, Tls::Refused] {
            let (opening, ..) = open(&hello, tls).await;
            assert!(matches!(
                opening,
                Err(HandshakeError::Startup(StartupError::TlsHandshake))
            ));
        }
    }
}
