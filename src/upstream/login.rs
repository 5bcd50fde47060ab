//! The login at the server: startup, the credential as password, up to the first ReadyForQuery.

use std::net::SocketAddr;

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    runtime::Handle,
    sync::SetOnce,
    time::Instant,
};

use super::{
    dial::{self, Stream},
    endpoint::Endpoint,
    failure::Failure,
    phases::Phases,
};
use crate::{
    config::Keepalive,
    credential::Credential,
    net::{
        blocking,
        message::{read_message, write_and_flush},
    },
    protocol::{
        auth::{AuthError, AuthenticationRequest, Authenticator, Derivation, Derived},
        error::ErrorFields,
        frame::{Message, SMALL_MESSAGE_LIMIT, tag},
        options::{LoginParameters, is_same_encoding, set},
        startup::{CancelKey, query},
    },
    telemetry::{GaugeGuard, labels::LoginPhase},
};

/// Upper limit of all messages at login, in bytes: parameters and notices are buffered until the client's welcome.
const LOGIN_LIMIT: usize = 1024 * 1024;
/// How often a login is repeated because the server refuses a parameter.
const MAX_DROPS: usize = 8;

/// A logged-in connection, independent of the client that caused it.
#[derive(Debug)]
pub struct Connection {
    /// The byte stream.
    pub stream: Stream,
    /// The server's messages for the client's welcome.
    pub greeting: Greeting,
    /// The server's address, where a CancelRequest must go.
    pub address: SocketAddr,
    /// Counts the connection as active.
    pub gauge: GaugeGuard,
}

/// The server's messages at login.
#[derive(Debug, Default)]
pub struct Greeting {
    /// ParameterStatus frames.
    pub parameter_status: BytesMut,
    /// NoticeResponse frames.
    pub notices: BytesMut,
    /// The server's cancel key, if it sent one.
    pub key: Option<CancelKey>,
    /// Bytes that the server sent behind its ReadyForQuery.
    pub leftover: BytesMut,
    client_encoding: Option<String>,
}

/// One login: who logs in, with which parameters.
pub(super) struct Login<'a> {
    pub(super) user: &'a str,
    pub(super) credential: &'a Credential,
    pub(super) parameters: &'a LoginParameters,
    /// Set when the server has requested the password.
    pub(super) password_requested: SetOnce<()>,
}

impl<'a> Login<'a> {
    pub(super) fn new(
        user: &'a str,
        credential: &'a Credential,
        parameters: &'a LoginParameters,
    ) -> Self {
        Self {
            user,
            credential,
            parameters,
            password_requested: SetOnce::new(),
        }
    }

    /// Dials and logs in, without the parameters that the server refuses by name. `startup` is the first startup message,
    /// where that has been encoded. Not cancel safe, and need not be: dropping it drops the connection.
    pub(super) async fn run(
        &self,
        endpoint: &Endpoint,
        mut startup: Option<BytesMut>,
        keepalive: &Keepalive,
        phases: &Phases<'_>,
    ) -> Result<Connection, Failure> {
        for name in &self.parameters.unusable {
            endpoint.dropped.insert(name, "it cannot be a setting");
        }
        // Besides the shared list, from which other clients' names may push out this client's.
        let mut dropped: Vec<&str> = Vec::new();
        loop {
            let is_dropped =
                |name: &str| dropped.contains(&name) || endpoint.dropped.contains(name);
            let startup = match startup.take() {
                Some(startup) => startup,
                None => self.parameters.startup(self.user, is_dropped)?,
            };
            let began = Instant::now();
            let attempt = async {
                // Anew for each try: the server closes the connection with its error.
                let (mut stream, address) = dial::dial(endpoint, keepalive, phases).await?;
                let may_send_cleartext = stream.may_send_cleartext();
                let exchange = self.exchange(&mut stream, &startup, may_send_cleartext);
                let greeting = phases.run(LoginPhase::Login, exchange).await?;
                Ok(Connection {
                    stream,
                    greeting,
                    address,
                    gauge: GaugeGuard::new(&phases.metrics.upstream_active),
                })
            };
            let failure: Failure = match attempt.await {
                Ok(connection) => {
                    phases.observe(LoginPhase::Total, began.elapsed());
                    return Ok(connection);
                }
                Err(failure) => failure,
            };
            match failure.refused_parameter(&self.parameters.folded) {
                Some(name) if dropped.len() < MAX_DROPS && !dropped.contains(&name) => {
                    endpoint.dropped.insert(name, &failure.to_string());
                    dropped.push(name);
                }
                _ => return Err(failure.explain(endpoint, self.credential, self.parameters)),
            }
        }
    }

    /// All messages between TLS and ReadyForQuery.
    pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        startup: &[u8],
        may_send_cleartext: bool,
    ) -> Result<Greeting, Failure> {
        let parameters = self.parameters;
        let mut wire = Wire {
            stream,
            parameters,
            buffer: BytesMut::with_capacity(2048),
            read: 0,
        };
        wire.send(startup).await?;
        self.authenticate(&mut wire, may_send_cleartext).await?;
        let mut greeting = Greeting::default();
        wire.until_ready(&mut greeting, Until::LoggedIn).await?;
        if let Some(wanted) = &parameters.client_encoding
            && !parameters.replication
            && !greeting
                .client_encoding
                .as_ref()
                .is_some_and(|is| is_same_encoding(is, wanted))
            // A startup parameter holds no zero byte.
            && let Some(query) = query(&set("client_encoding", wanted))
        {
            // The edge forces an encoding of its own.
            wire.send(&query).await?;
            wire.until_ready(&mut greeting, Until::Queried).await?;
        }
        greeting.leftover = wire.buffer;
        Ok(greeting)
    }

    /// Proves the credential, up to AuthenticationOk.
    async fn authenticate<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        wire: &mut Wire<'_, S>,
        may_send_cleartext: bool,
    ) -> Result<(), Failure> {
        // Lakebase's documentation: a token is a plaintext password, hence TLS only; native roles use SCRAM-SHA-256.
        let mut authenticator = Authenticator::new(self.user, &self.credential.secret);
        loop {
            let message = wire.message().await?;
            match message.tag {
                tag::AUTHENTICATION => {}
                tag::ERROR_RESPONSE => return Err(wire.refused(&message)),
                // Not authenticated yet, so the client does not get it.
                tag::NOTICE_RESPONSE => continue,
                // NegotiateProtocolVersion cannot follow a 3.0 startup.
                other => return Err(unexpected(other)),
            }
            let request = AuthenticationRequest::parse(message.body())
                .ok_or_else(|| Failure::protocol("malformed authentication request"))?;
            let response = match request {
                AuthenticationRequest::Cleartext if !may_send_cleartext => {
                    return Err(Failure::protocol(
                        "the server requests the password in cleartext without TLS",
                    ));
                }
                AuthenticationRequest::Ok => {
                    authenticator.answer(request)?;
                    return Ok(());
                }
                AuthenticationRequest::SaslContinue(data) => {
                    let derivation = authenticator.derivation(data)?;
                    Some(authenticator.derived(off_runtime(derivation).await?)?)
                }
                request => authenticator.answer(request)?,
            };
            if let Some(response) = response {
                // Already set when the exchange takes more than one message.
                let _ = self.password_requested.set(());
                wire.send(&response).await?;
            }
        }
    }
}

/// [`Login::exchange`] with a fixed credential, for tests and fuzzing.
#[cfg(any(test, fuzzing))]
pub(super) async fn exchange_with<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    secret: &str,
    parameters: &LoginParameters,
    may_send_cleartext: bool,
) -> Result<Greeting, Failure> {
    let credential = Credential {
        secret: secret.into(),
        expires_at: None,
        minted_at: jiff::Timestamp::UNIX_EPOCH,
        generation: 1,
    };
    let startup = parameters.startup("me", |_| false).unwrap_or_default();
    let login = Login::new("me", &credential, parameters);
    login.exchange(stream, &startup, may_send_cleartext).await
}

/// Derives a key on a blocking thread: a server may request up to 100,000 iterations.
async fn off_runtime(derivation: Derivation) -> Result<Derived, AuthError> {
    // The fuzzer has no runtime.
    if Handle::try_current().is_err() {
        return derivation.run();
    }
    blocking(move || derivation.run()).await
}

fn unexpected(tag: u8) -> Failure {
    Failure::protocol(format!(
        "unexpected message type {tag:#04x} from the server at login"
    ))
}

struct Wire<'a, S> {
    stream: &'a mut S,
    /// The client's texts, which the server may repeat in an error.
    parameters: &'a LoginParameters,
    buffer: BytesMut,
    read: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<'_, S> {
    async fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        write_and_flush(self.stream, bytes)
            .await
            .map_err(|error| Failure::broken(&error))
    }

    fn refused(&self, error: &Message) -> Failure {
        let error = ErrorFields::parse(error.body());
        Failure::server(error, self.parameters.texts())
    }

    async fn message(&mut self) -> Result<Message, Failure> {
        let message = read_message(self.stream, &mut self.buffer, SMALL_MESSAGE_LIMIT).await?;
        self.read = self.read.saturating_add(message.frame.len());
        if self.read > LOGIN_LIMIT {
            return Err(Failure::protocol(
                "the server sent more than 1 MiB before ReadyForQuery",
            ));
        }
        Ok(message)
    }

    async fn until_ready(&mut self, greeting: &mut Greeting, until: Until) -> Result<(), Failure> {
        let mut error = None;
        loop {
            let message = match self.message().await {
                Ok(message) => message,
                // The server's own error explains the end of the stream.
                Err(broken) => return Err(error.unwrap_or(broken)),
            };
            match message.tag {
                tag::PARAMETER_STATUS => {
                    if let Some(encoding) = value_of(message.body(), "client_encoding") {
                        greeting.client_encoding = Some(encoding);
                    }
                    greeting.parameter_status.extend_from_slice(&message.frame);
                }
                // Protocol 3.0 keys have four bytes; any other length is of no use to a 3.0 client.
                tag::BACKEND_KEY_DATA => greeting.key = cancel_key(message.body()),
                tag::NOTICE_RESPONSE => greeting.notices.extend_from_slice(&message.frame),
                tag::ERROR_RESPONSE => {
                    let failure = self.refused(&message);
                    if until == Until::LoggedIn {
                        return Err(failure);
                    }
                    // ReadyForQuery still follows the error of a query.
                    error = Some(failure);
                }
                tag::COMMAND_COMPLETE if until == Until::Queried => {}
                tag::READY_FOR_QUERY => return error.map_or(Ok(()), Err),
                other => return Err(unexpected(other)),
            }
        }
    }
}

/// What the next ReadyForQuery completes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The proxy's own query.
    Queried,
    /// The login: an error is final, whatever severity the edge gives it.
    LoggedIn,
}

fn cancel_key(body: &[u8]) -> Option<CancelKey> {
    let (process_id, rest) = body.split_first_chunk::<4>()?;
    let secret: &[u8; 4] = rest.try_into().ok()?;
    Some(CancelKey {
        process_id: u32::from_be_bytes(*process_id),
        secret: u32::from_be_bytes(*secret),
    })
}

fn value_of(parameter_status: &[u8], wanted: &str) -> Option<String> {
    let mut strings = parameter_status.split(|&byte| byte == 0);
    let name = strings.next()?;
    let value = strings.next()?;
    (name == wanted.as_bytes()).then(|| String::from_utf8_lossy(value).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        pin::Pin,
        task::{Context, Poll},
    };

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadBuf, duplex};

    use super::*;
    use crate::{protocol::frame::frame, upstream::Class};

    fn parameters(client_encoding: Option<&str>, replication: bool) -> LoginParameters {
        LoginParameters {
            database: "db".to_owned(),
            fallback_database: None,
            parameters: Vec::new(),
            client_encoding: client_encoding.map(str::to_owned),
            replication,
            ..LoginParameters::default()
        }
    }

    /// Logs in at a server that sends `answers` one by one, each after whatever the client sent before it.
    async fn against(
        answers: &[&[u8]],
        parameters: LoginParameters,
    ) -> (Result<Greeting, Failure>, Vec<u8>) {
        let (mut ours, mut theirs) = duplex(1 << 16);
        let script: Vec<Vec<u8>> = answers.iter().map(|answer| answer.to_vec()).collect();
        let server = async move {
            let mut received = Vec::with_capacity(4096);
            for answer in script {
                theirs.read_buf(&mut received).await.unwrap();
                theirs.write_all(&answer).await.unwrap();
            }
            drop(theirs);
            received
        };
        let login = exchange_with(&mut ours, "token", &parameters, true);
        let (result, received) = tokio::join!(login, server);
        (result, received)
    }

    fn password_request() -> Vec<u8> {
        frame(b'R', &[0, 0, 0, 3])
    }

    fn welcome() -> Vec<u8> {
        [
            frame(b'R', &[0, 0, 0, 0]),
            frame(b'S', b"client_encoding\0UTF8\0"),
            frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]),
            frame(b'Z', b"I"),
        ]
        .concat()
    }

    #[tokio::test]
    async fn a_cleartext_login_returns_the_messages_for_the_client() {
        let (greeting, received) = against(
            &[&password_request(), &welcome()],
            parameters(Some("utf-8"), false),
        )
        .await;
        let greeting = greeting.unwrap();
        assert_eq!(
            greeting.key,
            Some(CancelKey {
                process_id: 7,
                secret: 9
            })
        );
        assert!(greeting.parameter_status.starts_with(b"S"));
        assert!(
            received.ends_with(b"p\0\0\0\x0atoken\0"),
            "no SET where the encoding is right"
        );
    }

    #[tokio::test]
    async fn a_forced_encoding_is_corrected() {
        let set = [
            frame(b'S', b"client_encoding\0LATIN1\0"),
            frame(b'C', b"SET\0"),
            frame(b'Z', b"I"),
        ]
        .concat();
        let (greeting, received) = against(
            &[&password_request(), &welcome(), &set],
            parameters(Some("LATIN1"), false),
        )
        .await;
        assert!(received.ends_with(b"SET client_encoding TO E'LATIN1'\0"));
        assert_eq!(greeting.unwrap().client_encoding.as_deref(), Some("LATIN1"));
    }

    #[tokio::test]
    async fn a_replication_session_gets_no_query_of_ours() {
        let (greeting, received) = against(
            &[&password_request(), &welcome()],
            parameters(Some("LATIN1"), true),
        )
        .await;
        assert!(greeting.is_ok());
        assert!(received.ends_with(b"token\0"));
    }

    #[tokio::test]
    async fn an_encoding_the_server_refuses_ends_the_login_with_its_words() {
        let refused = [
            frame(b'E', b"SERROR\0C22023\0Minvalid value\0\0"),
            frame(b'Z', b"I"),
        ]
        .concat();
        let (result, _) = against(
            &[&password_request(), &welcome(), &refused],
            parameters(Some("nonsense"), false),
        )
        .await;
        let failure = result.unwrap_err();
        assert_eq!(failure.class, Class::Other);
        assert!(failure.to_string().contains("22023"));
    }

    #[tokio::test]
    async fn an_error_without_fatal_is_final_at_login() {
        let refused = frame(
            b'E',
            b"SERROR\0CXX000\0Mpassword authentication failed for user\0\0",
        );
        let (result, _) = against(&[&password_request(), &refused], parameters(None, false)).await;
        assert_eq!(result.unwrap_err().class, Class::Identity);
    }

    #[tokio::test]
    async fn an_early_end_and_another_protocol_are_different_failures() {
        let (result, _) = against(&[&password_request()], parameters(None, false)).await;
        assert_eq!(result.unwrap_err().class, Class::Waking);
        let (result, _) =
            against(&[b"HTTP/1.1 400 Bad Request\r\n"], parameters(None, false)).await;
        assert_eq!(result.unwrap_err().class, Class::Protocol);
    }

    /// A server that sends these bytes in pieces of this size, and takes anything.
    struct Pieces<'a> {
        data: &'a [u8],
        size: usize,
    }

    impl AsyncRead for Pieces<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let now = self.size.min(buf.remaining()).min(self.data.len());
            let (piece, rest) = self.data.split_at(now);
            buf.put_slice(piece);
            self.data = rest;
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Pieces<'_> {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// What a login at this server comes to, and what is left of what it sent.
    fn outcome(data: &[u8], size: usize) -> Result<(Greeting, Vec<u8>), String> {
        let parameters = parameters(Some("LATIN1"), false);
        let mut server = Pieces { data, size };
        let login = exchange_with(&mut server, "token", &parameters, true);
        let done = login.now_or_never().expect("the server never waits");
        let left = server.data;
        done.map(|greeting| {
            let left = [&greeting.leftover[..], left].concat();
            (greeting, left)
        })
        .map_err(|failure| format!("{failure:?}"))
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        let known = prop::sample::select(vec![
            password_request(),
            welcome(),
            frame(b'R', &[0, 0, 0, 0]),
            frame(b'S', b"client_encoding\0LATIN1\0"),
            frame(b'N', b"SNOTICE\0Mhello\0\0"),
            frame(b'C', b"SET\0"),
            frame(b'Z', b"I"),
            frame(b'E', b"SFATAL\0C28000\0Mno\0\0"),
        ]);
        let other = (any::<u8>(), prop::collection::vec(any::<u8>(), 0..20));
        prop_oneof![6 => known, 1 => other.prop_map(|(tag, body)| frame(tag, &body)), 1 => prop::collection::vec(any::<u8>(), 0..9)]
    }

    proptest! {
        /// The same whatever the pieces, and nothing panics.
        #[test]
        fn a_login_does_not_depend_on_how_it_is_split(messages in prop::collection::vec(message(), 0..9), size in 1_usize..40) {
            let data = messages.concat();
            let (whole, split) = (outcome(&data, usize::MAX), outcome(&data, size));
            match (whole, split) {
                (Ok((one, left)), Ok((other, also_left))) => {
                    prop_assert_eq!(one.parameter_status, other.parameter_status);
                    prop_assert_eq!(one.notices, other.notices);
                    prop_assert_eq!(one.key, other.key);
                    prop_assert_eq!(left, also_left);
                }
                (Err(one), Err(other)) => prop_assert_eq!(one, other),
                (one, other) => prop_assert!(false, "{:?}, {:?}", one, other),
            }
        }
    }

    /// A server that requested many iterations once stopped every session for as long as they took.
    #[tokio::test]
    async fn other_tasks_run_while_a_key_is_derived_in_many_rounds() {
        let (mut ours, mut theirs) = duplex(1 << 16);
        let ticks = std::cell::Cell::new(0_u32);
        let server = async {
            let mut received = Vec::with_capacity(4096);
            theirs.read_buf(&mut received).await.unwrap();
            let sasl = [&[0, 0, 0, 10][..], b"SCRAM-SHA-256\0\0"].concat();
            theirs.write_all(&frame(b'R', &sasl)).await.unwrap();
            received.clear();
            theirs.read_buf(&mut received).await.unwrap();
            let text = String::from_utf8_lossy(&received).into_owned();
            let (_, nonce) = text.split_once("r=").unwrap();
            let first = format!("r={nonce}x,s=c2FsdHNhbHQ=,i=100000");
            let turn = [&[0, 0, 0, 11][..], first.as_bytes()].concat();
            let before = ticks.get();
            theirs.write_all(&frame(b'R', &turn)).await.unwrap();
            received.clear();
            theirs.read_buf(&mut received).await.unwrap();
            drop(theirs);
            ticks.get() - before
        };
        let parameters = parameters(None, false);
        let login = exchange_with(&mut ours, "token", &parameters, true);
        let ticking = async {
            loop {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                ticks.set(ticks.get() + 1);
            }
        };
        let exchange = async { tokio::join!(login, server) };
        let (result, meanwhile) = tokio::select! {
            done = exchange => done,
            () = ticking => unreachable!("it never ends"),
        };
        assert!(result.is_err(), "the server left");
        assert!(meanwhile >= 3, "{meanwhile} ticks");
    }
}
