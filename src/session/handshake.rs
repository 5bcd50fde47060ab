//! The handshake: everything up to and including the StartupMessage or CancelRequest.

use std::{io, time::Duration};

use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};

use super::{
    Session,
    access::SessionRequest,
    cancel::CancelRequest,
    client::{CLOSE_TIMEOUT, Client},
    close::Closing,
    console::Probe,
    handshake_limit::HandshakePermit,
};
use crate::{
    net::socket::Transport,
    protocol::{
        error::{Report, sqlstate},
        startup::{
            CancelKey, InitialPacket, StartupError, StartupMessage, TLS_HANDSHAKE,
            take_initial_packet,
        },
    },
    status::Peer,
    telemetry::labels::Reason,
};

/// A client that has not completed its handshake.
pub(super) struct Handshake<'a> {
    pub(super) session: &'a Session<'a>,
    /// Held until the request is known and allowed.
    permit: HandshakePermit,
}

/// What a client requests.
pub(super) enum Request<'a> {
    Cancel(CancelRequest<'a>),
    Probe(Probe<'a>),
    Session(SessionRequest<'a>),
}

/// The outcome of the opening packets.
#[derive(Debug)]
enum Opening {
    Cancel(CancelKey),
    /// TLS from its first byte on, which is still buffered, or after an SSLRequest that was granted.
    Encrypt {
        direct: bool,
    },
    /// The client left, as port scanners and TCP health checks do; maybe because it was refused TLS.
    Gone {
        insisted_on_tls: bool,
    },
    Session(StartupMessage),
}

/// The answer to a client that requests TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    Offered,
    Established,
    Refused,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("the client's connection broke")]
    Io(#[from] io::Error),
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    #[error("no complete startup message in time")]
    Timeout,
    #[error("no complete startup message while other clients waited")]
    Evicted,
    /// The client is most likely waiting for something itself.
    #[error("the proxy is shutting down")]
    ShuttingDown,
    /// Direct TLS without ALPN may carry any protocol.
    #[error("direct TLS without the application protocol `postgresql`")]
    NoAlpn,
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// Bytes behind a request that must be answered first.
    #[error("received unencrypted data after {0}")]
    EarlyData(&'static str),
    #[error("{0} sent twice")]
    Repeated(&'static str),
}

impl<'a> Handshake<'a> {
    pub(super) fn new(session: &'a Session<'a>, permit: HandshakePermit) -> Self {
        Self { session, permit }
    }

    /// Receives the client's request, after a TLS handshake if it requests one.
    pub(super) async fn receive<S: Transport>(
        self,
        client: &mut Client<S>,
    ) -> Result<Request<'a>, Closing> {
        let tls = self.session.config.access.tls(self.session.peer);
        // The startup message mostly follows at once. Then it is found by this turn of the event loop, and no timer is
        // started, which would wake the loop.
        yield_now().await;
        let mut opening = self.in_time(receive_opening(client, tls)).await;
        if let Ok(Opening::Encrypt { direct }) = opening {
            // A box, as clients without TLS need no room for it.
            let accepted = Box::pin(self.accept_tls(client, direct)).await;
            opening = match accepted {
                Ok(()) => {
                    self.in_time(receive_opening(client, Tls::Established))
                        .await
                }
                Err(error) => Err(error),
            };
        }
        match opening {
            Ok(Opening::Cancel(key)) => Ok(Request::Cancel(CancelRequest {
                handshake: self,
                key,
            })),
            Ok(Opening::Session(startup)) if Probe::is_sent_by(&startup) => {
                Ok(Request::Probe(Probe {
                    handshake: self,
                    startup,
                }))
            }
            Ok(Opening::Session(startup)) => Ok(Request::Session(SessionRequest {
                handshake: self,
                startup,
            })),
            Ok(Opening::Gone {
                insisted_on_tls: true,
            }) => {
                self.session.count_refusal(Reason::ClientTls);
                // Over Unix sockets PostgreSQL offers no TLS either, so there is nothing to set.
                if matches!(self.session.peer, Peer::Tcp(_)) {
                    self.session.config.access.log_tls_required_by_client();
                }
                Err(Closing::Silent)
            }
            Ok(Opening::Gone { .. } | Opening::Encrypt { .. }) => Err(Closing::Silent),
            Err(error) => Err(self.failed(&error)),
        }
    }

    async fn accept_tls<S: Transport>(
        &self,
        client: &mut Client<S>,
        direct: bool,
    ) -> Result<(), HandshakeError> {
        let Some(certificate) = &self.session.config.access.certificate else {
            return Ok(());
        };
        let accepting = async {
            let config = certificate.config().await.map_err(io::Error::other);
            let accepted = client.accept_tls(config.map_err(HandshakeError::Tls)?);
            accepted.await.map_err(HandshakeError::Tls)
        };
        // In the middle of a TLS handshake the client cannot read an error message: it is closed silently.
        self.in_time(accepting).await.map_err(|error| match error {
            HandshakeError::Timeout | HandshakeError::Evicted => {
                HandshakeError::Tls(io::Error::new(io::ErrorKind::TimedOut, error))
            }
            error => error,
        })?;
        // As PostgreSQL 17: without ALPN the bytes may be meant for a server of another protocol.
        if direct && !client.has_alpn() {
            return Err(HandshakeError::NoAlpn);
        }
        Ok(())
    }

    /// Bounds a step by the login timeout, the eviction of this handshake and the shutdown, which a client that sends
    /// nothing must not delay.
    pub(super) async fn in_time<T>(
        &self,
        step: impl Future<Output = Result<T, HandshakeError>>,
    ) -> Result<T, HandshakeError> {
        let session = self.session;
        // One limit for all steps, as PostgreSQL's authentication_timeout.
        let left: Duration = session
            .config
            .client_login_timeout
            .saturating_sub(session.accepted_at.elapsed());
        let shutdown = async {
            session
                .endpoint
                .process
                .shutdown
                .draining()
                .cancelled()
                .await;
            // A startup message that is on its way is still answered, with the reason.
            sleep(CLOSE_TIMEOUT).await;
        };
        tokio::select! {
            // The step first: a client that has sent what it should is served.
            biased;
            done = timeout(left, step) => done.unwrap_or(Err(HandshakeError::Timeout)),
            () = self.permit.evicted_after_grace() => Err(HandshakeError::Evicted),
            () = shutdown => Err(HandshakeError::ShuttingDown),
        }
    }

    /// Logs and counts a failure, and decides what the client is sent.
    pub(super) fn failed(&self, error: &HandshakeError) -> Closing {
        let (id, access) = (self.session.id, &self.session.config.access);
        let reason = match error {
            HandshakeError::ShuttingDown => return Closing::Silent,
            HandshakeError::Io(error) => {
                tracing::debug!(session = id, %error, "client broke off in the handshake");
                return Closing::Silent;
            }
            HandshakeError::Tls(error) => {
                self.session.count_refusal(Reason::ClientTls);
                // Port scanners, mostly.
                let left = [io::ErrorKind::UnexpectedEof, io::ErrorKind::TimedOut];
                if left.contains(&error.kind()) {
                    tracing::debug!(session = id, %error, "client left in the TLS handshake");
                } else {
                    access.log_tls_handshake_failure(error);
                }
                return Closing::Silent;
            }
            // Direct TLS to a listener that offers none.
            HandshakeError::Startup(StartupError::TlsHandshake) => {
                access.log_tls_required_by_client();
                Reason::ClientTls
            }
            HandshakeError::NoAlpn => Reason::ClientTls,
            HandshakeError::Timeout | HandshakeError::Evicted => Reason::Timeout,
            _ => Reason::BadStartup,
        };
        let Some(report) = error.report() else {
            self.session.count_refusal(reason);
            tracing::debug!(session = id, %error, "not a Postgres client");
            return Closing::Silent;
        };
        if matches!(error, HandshakeError::Evicted) {
            self.session.count_refusal(reason);
            tracing::debug!(session = id, peer = %self.session.peer, %error, "client refused");
            return Closing::Evicted(report);
        }
        Closing::refused(report, reason)
    }
}

impl HandshakeError {
    /// The error for the client, where it may speak the protocol.
    fn report(&self) -> Option<Report> {
        let report = |sqlstate| Some(Report::new(sqlstate, self.to_string()));
        match self {
            // PostgreSQL closes silently, too: such a client does not read our protocol.
            Self::Io(_)
            | Self::Tls(_)
            | Self::ShuttingDown
            | Self::Startup(StartupError::InvalidLength | StartupError::TlsHandshake) => None,
            Self::Startup(StartupError::NotUtf8) => report(sqlstate::INVALID_ENCODING).map(|report| {
                report.with_hint("Send names and values of startup parameters in UTF-8.")
            }),
            Self::Startup(StartupError::UnsupportedVersion { .. }) => {
                report(sqlstate::FEATURE_NOT_SUPPORTED)
            }
            Self::Timeout
            | Self::Evicted
            | Self::Startup(StartupError::InvalidLayout | StartupError::InvalidRequest)
            | Self::Repeated(_) => report(sqlstate::PROTOCOL_VIOLATION),
            Self::NoAlpn => report(sqlstate::PROTOCOL_VIOLATION).map(|report| {
                report.with_hint(
                    "Connect with ALPN `postgresql`, as libpq's sslnegotiation=direct does.",
                )
            }),
            Self::EarlyData(_) => report(sqlstate::PROTOCOL_VIOLATION).map(|report| {
                report.with_detail(
                    "This is a defect of the client, or an attacker between it and the proxy injects data.",
                )
            }),
        }
    }
}

/// Receives packets up to the one that carries the request; bytes behind that stay buffered.
///
/// Not cancel safe. The caller sets the deadline.
async fn receive_opening<S: Transport>(
    client: &mut Client<S>,
    tls: Tls,
) -> Result<Opening, HandshakeError> {
    // Within TLS another SSLRequest is a repetition.
    let (mut ssl_requested, mut gss_requested) = (tls == Tls::Established, false);
    loop {
        // PostgreSQL 17's sslnegotiation=direct.
        if tls == Tls::Offered && client.received.first() == Some(&TLS_HANDSHAKE) {
            return Ok(Opening::Encrypt { direct: true });
        }
        let Some(packet) = take_initial_packet(&mut client.received)? else {
            if client.receive().await? == 0 {
                // After `N` a client with sslmode=require or stricter closes; others send their startup message.
                let insisted_on_tls = ssl_requested && tls == Tls::Refused;
                return Ok(Opening::Gone { insisted_on_tls });
            }
            continue;
        };
        let (requested, name) = match packet {
            InitialPacket::Cancel(key) => return Ok(Opening::Cancel(key)),
            InitialPacket::Startup(message) => return Ok(Opening::Session(message)),
            // After `N` libpq goes on with SSLRequest or its startup message, on the same connection.
            InitialPacket::GssEnc => (&mut gss_requested, "GSSENCRequest"),
            InitialPacket::Ssl => (&mut ssl_requested, "SSLRequest"),
        };
        // At most one of each, as PostgreSQL has it.
        if std::mem::replace(requested, true) {
            return Err(HandshakeError::Repeated(name));
        }
        // CVE-2021-23222: what follows in the clear must not pass for encrypted data.
        if !client.received.is_empty() {
            return Err(HandshakeError::EarlyData(name));
        }
        let encrypt = name == "SSLRequest" && tls == Tls::Offered;
        client.send(if encrypt { b"S" } else { b"N" }).await?;
        if encrypt {
            return Ok(Opening::Encrypt { direct: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::protocol::startup::{encode_startup, ssl_request};

    fn pair(capacity: usize) -> (DuplexStream, Client<DuplexStream>) {
        let (peer, stream) = duplex(capacity);
        (peer, Client::new(stream))
    }

    async fn next(peer: &mut DuplexStream) -> u8 {
        peer.read_u8().await.unwrap()
    }

    #[tokio::test]
    async fn a_client_may_request_both_kinds_of_encryption_and_continue_without() {
        let (mut peer, mut client) = pair(1024);
        let startup = encode_startup(&[("user", "me")]).unwrap();
        let conversation = async {
            peer.write_all(&[0, 0, 0, 8, 4, 210, 22, 48]).await.unwrap();
            assert_eq!(next(&mut peer).await, b'N');
            peer.write_all(&ssl_request()).await.unwrap();
            assert_eq!(next(&mut peer).await, b'N');
            peer.write_all(&[&startup[..], b"Q\0\0\0\x05\0"].concat())
                .await
                .unwrap();
        };
        let (opening, ()) = tokio::join!(receive_opening(&mut client, Tls::Refused), conversation);
        assert!(
            matches!(opening, Ok(Opening::Session(message)) if message.parameter("user") == Some("me"))
        );
        assert_eq!(
            &client.received[..],
            b"Q\0\0\0\x05\0",
            "a query sent along is kept"
        );
    }

    #[tokio::test]
    async fn a_startup_message_may_come_byte_by_byte() {
        let (mut peer, mut client) = pair(1);
        let startup = encode_startup(&[("user", "me"), ("database", "d")]).unwrap();
        let (opening, written) = tokio::join!(
            receive_opening(&mut client, Tls::Refused),
            peer.write_all(&startup)
        );
        written.unwrap();
        assert!(matches!(opening, Ok(Opening::Session(_))));
    }

    #[tokio::test]
    async fn bytes_behind_an_encryption_request_are_refused() {
        let (mut peer, mut client) = pair(1024);
        peer.write_all(&[&ssl_request()[..], b"x"].concat())
            .await
            .unwrap();
        let error = receive_opening(&mut client, Tls::Refused)
            .await
            .unwrap_err();
        assert!(matches!(error, HandshakeError::EarlyData("SSLRequest")));
        assert_eq!(error.report().unwrap().sqlstate, "08P01");
    }

    #[tokio::test]
    async fn a_repeated_encryption_request_is_refused() {
        let (mut peer, mut client) = pair(1024);
        let conversation = async {
            peer.write_all(&ssl_request()).await.unwrap();
            assert_eq!(next(&mut peer).await, b'N');
            peer.write_all(&ssl_request()).await.unwrap();
        };
        let (error, ()) = tokio::join!(receive_opening(&mut client, Tls::Refused), conversation);
        assert!(matches!(error, Err(HandshakeError::Repeated("SSLRequest"))));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_no_error() {
        let (peer, mut client) = pair(16);
        drop(peer);
        assert!(matches!(
            receive_opening(&mut client, Tls::Refused).await,
            Ok(Opening::Gone {
                insisted_on_tls: false
            })
        ));
    }

    #[tokio::test]
    async fn a_client_that_leaves_because_tls_is_refused_is_recognized() {
        let (mut peer, mut client) = pair(16);
        peer.write_all(&ssl_request()).await.unwrap();
        peer.shutdown().await.unwrap();
        let opening = receive_opening(&mut client, Tls::Refused).await;
        assert!(matches!(
            opening,
            Ok(Opening::Gone {
                insisted_on_tls: true
            })
        ));
    }

    #[tokio::test]
    async fn tls_starts_once_directly_or_after_a_request() {
        let hello = [0x16, 3, 1];
        let open = async |bytes: &[u8], tls| {
            let (mut peer, mut client) = pair(64);
            peer.write_all(bytes).await.unwrap();
            let opening = receive_opening(&mut client, tls).await;
            let received = client.received.to_vec();
            drop(client);
            let mut answer = Vec::new();
            peer.read_to_end(&mut answer).await.unwrap();
            (opening, received, answer)
        };
        let (opening, received, answer) = open(&hello, Tls::Offered).await;
        assert!(matches!(opening, Ok(Opening::Encrypt { direct: true })));
        assert_eq!((&received[..], &answer[..]), (&hello[..], &b""[..]));
        let (opening, _, answer) = open(&ssl_request(), Tls::Offered).await;
        assert!(matches!(opening, Ok(Opening::Encrypt { direct: false })));
        assert_eq!(answer, b"S");
        let early = [&ssl_request()[..], &hello].concat();
        let (opening, ..) = open(&early, Tls::Offered).await;
        assert!(matches!(opening, Err(HandshakeError::EarlyData(_))));
        let (opening, ..) = open(&ssl_request(), Tls::Established).await;
        assert!(matches!(
            opening,
            Err(HandshakeError::Repeated("SSLRequest"))
        ));
        for tls in [Tls::Established, Tls::Refused] {
            let (opening, ..) = open(&hello, tls).await;
            assert!(matches!(
                opening,
                Err(HandshakeError::Startup(StartupError::TlsHandshake))
            ));
        }
    }
}
