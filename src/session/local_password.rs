//! The proxy's own password: SCRAM-SHA-256 (RFC 5802) with any user name.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use bytes::BytesMut;
use secrecy::SecretString;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};

use super::client::Client;
use crate::{
    net::{
        message::{ReadError, read_message},
        socket::Transport,
    },
    protocol::{
        backend,
        error::{Report, sqlstate},
        frame::{split_string, tag},
        scram::{Exchange, ScramError, Verifier},
        startup::StartupMessage,
    },
    telemetry::labels::Reason,
    upstream::Refusal,
};

/// PostgreSQL's `PG_MAX_SASL_MESSAGE_LENGTH`, in bytes, and a frame around it.
const MESSAGE_LIMIT: usize = 1024 + 5;
/// Attempts at a time that are verified or wait for their delayed refusal: the most guesses per second. A login beside a
/// flood of wrong passwords waits for one of these, so a lower limit would help the flood.
const ATTEMPTS: usize = 1024;
/// The delay of a wrong password in seconds; random, so that the time of a refusal reveals nothing.
const FAILURE_DELAY: std::ops::Range<f64> = 0.75..1.25;

/// The password that every TCP client must prove to know.
#[derive(Debug)]
pub(crate) struct LocalPassword {
    verifier: Verifier,
    attempts: Arc<Semaphore>,
}

/// The password in force, for clients of our own (the notes page) and for the program that `exec` runs; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct KnownPassword(Arc<ArcSwapOption<SecretString>>);

impl KnownPassword {
    /// The one in force, if there is one.
    pub fn now(&self) -> Option<SecretString> {
        self.0
            .load_full()
            .map(|password| SecretString::clone(&password))
    }

    /// Puts another in force.
    pub fn set(&self, password: Option<SecretString>) {
        self.0.store(password.map(Arc::new));
    }
}

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum PasswordFailure {
    /// The client left, most likely to prompt its user.
    Gone,
    Refused(Refusal),
    /// To be refused after a delay.
    Wrong(WrongPassword),
}

/// A failed attempt that has not been refused yet.
#[derive(Debug)]
pub(super) struct WrongPassword {
    refusal: Refusal,
    /// Held during the delay, whether the client waits for it or not.
    _attempt: Option<OwnedSemaphorePermit>,
}

impl WrongPassword {
    /// The refusal, after the delay that limits the rate of guesses.
    pub(super) async fn delayed(self) -> Refusal {
        let delay = rand::random_range(FAILURE_DELAY);
        sleep(Duration::from_secs_f64(delay)).await;
        self.refusal
    }
}

impl From<Refusal> for PasswordFailure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl LocalPassword {
    /// Takes some milliseconds. `None` only for a defect.
    pub(crate) fn new(password: &SecretString) -> Option<Self> {
        Some(Self {
            verifier: Verifier::new(password)?,
            attempts: Arc::new(Semaphore::new(ATTEMPTS)),
        })
    }

    /// Requests and verifies the client's proof. On success the client has received ours and awaits AuthenticationOk; a
    /// NegotiateProtocolVersion that it needed has been sent.
    ///
    /// Not cancel safe. The caller sets the deadline.
    pub(super) async fn verify<S: Transport>(
        &self,
        client: &mut Client<S>,
        startup: &StartupMessage,
    ) -> Result<(), PasswordFailure> {
        let mut request = backend::negotiation(startup);
        request.extend_from_slice(&backend::sasl_mechanisms());
        send(client, &request).await?;
        let first = receive(client).await?;
        let first = initial_response(&first).ok_or_else(|| out_of_order("SASLInitialResponse"))?;
        let (exchange, challenge) =
            Exchange::begin(&self.verifier, first).map_err(|error| refusal(error, startup))?;
        send(client, &backend::sasl_continue(challenge.as_bytes())).await?;
        // Not limited up to here, so that clients that send nothing hold no attempt.
        let last = receive(client).await?;

        // Never closed, so never an error.
        let attempt = Arc::clone(&self.attempts).acquire_owned().await.ok();
        // After the wait for an attempt, which right and wrong passwords share, so that its length reveals nothing.
        match exchange.finish(&last) {
            Ok(proof) => send(client, &backend::sasl_final(proof.as_bytes())).await,
            Err(error) => Err(PasswordFailure::Wrong(WrongPassword {
                refusal: refusal(error, startup),
                _attempt: attempt,
            })),
        }
    }
}

async fn send<S: Transport>(client: &mut Client<S>, bytes: &[u8]) -> Result<(), PasswordFailure> {
    let sent = client.send(bytes).await;
    sent.map_err(|_| PasswordFailure::Gone)
}

/// The body of the next message, which must be a SASL one.
async fn receive<S: Transport>(client: &mut Client<S>) -> Result<BytesMut, PasswordFailure> {
    let read = read_message(&mut client.stream, &mut client.received, MESSAGE_LIMIT).await;
    match read {
        Ok(message) if message.tag == tag::PASSWORD => Ok(BytesMut::from(message.body())),
        Ok(message) if message.tag == tag::TERMINATE => Err(PasswordFailure::Gone),
        Ok(_) => Err(out_of_order("SASL message").into()),
        Err(ReadError::Frame(error)) => {
            let report = Report::new(sqlstate::PROTOCOL_VIOLATION, error.to_string());
            Err(bad_startup(report).into())
        }
        Err(ReadError::Io(_)) => Err(PasswordFailure::Gone),
    }
}

/// The client's first SCRAM message, in the frame that names the mechanism.
fn initial_response(body: &[u8]) -> Option<&[u8]> {
    let (mechanism, rest) = split_string(body)?;
    let (length, data) = rest.split_first_chunk::<4>()?;
    // -1 stands for no response, but in SCRAM the client's message is the first.
    let fits = usize::try_from(i32::from_be_bytes(*length)) == Ok(data.len());
    (mechanism == backend::SCRAM_SHA_256.as_bytes() && fits).then_some(data)
}

fn refusal(error: ScramError, startup: &StartupMessage) -> Refusal {
    match error {
        ScramError::Wrong => {
            let user = startup.parameter("user").unwrap_or_default();
            Refusal {
                report: Report::new(
                    sqlstate::INVALID_PASSWORD,
                    format!(
                        "password authentication failed for user \"{user}\": lakebase-proxy has a password of its own"
                    ),
                )
                .with_detail("This password is required by lakebase-proxy itself, not by Lakebase.")
                .with_hint(
                    "It is the one in --local-password-file, or LAKEBASE_PROXY_LOCAL_PASSWORD; any user name will do.",
                ),
                reason: Reason::LocalAuth,
            }
        }
        ScramError::Malformed | ScramError::Unsupported => {
            bad_startup(Report::new(sqlstate::PROTOCOL_VIOLATION, error.to_string()))
        }
    }
}

fn out_of_order(expected: &str) -> Refusal {
    bad_startup(Report::new(
        sqlstate::PROTOCOL_VIOLATION,
        format!("the client sent no {expected} in the password exchange"),
    ))
}

fn bad_startup(report: Report) -> Refusal {
    Refusal {
        report,
        reason: Reason::BadStartup,
    }
}

#[cfg(test)]
mod tests {
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        time::Instant,
    };

    use super::*;
    use crate::protocol::frame::take_message;

    fn startup() -> StartupMessage {
        StartupMessage {
            minor: 0,
            parameters: vec![("user".to_owned(), "me".to_owned())],
            protocol_options: Vec::new(),
        }
    }

    fn password() -> LocalPassword {
        LocalPassword::new(&SecretString::from("sesame")).unwrap()
    }

    async fn send(client: &mut DuplexStream, body: &[u8]) {
        let length = u32::try_from(body.len() + 4).unwrap();
        let frame = [&b"p"[..], &length.to_be_bytes(), body].concat();
        client.write_all(&frame).await.unwrap();
    }

    /// The data of the next Authentication message.
    async fn receive(client: &mut DuplexStream, buffer: &mut BytesMut) -> Vec<u8> {
        loop {
            if let Some(message) = take_message(buffer, 1000).unwrap() {
                assert_eq!(message.tag, tag::AUTHENTICATION);
                return message.body()[4..].to_vec();
            }
            assert!(client.read_buf(buffer).await.unwrap() > 0);
        }
    }

    /// Logs in with a password; whether both sides accepted the other's proof.
    async fn log_in(client: &mut DuplexStream, known: &str) -> bool {
        let mut buffer = BytesMut::new();
        assert_eq!(receive(client, &mut buffer).await, b"SCRAM-SHA-256\0\0");
        let mut scram = ScramSha256::new(known.as_bytes(), ChannelBinding::unsupported());
        let first = scram.message();
        let length = u32::try_from(first.len()).unwrap().to_be_bytes();
        send(client, &[b"SCRAM-SHA-256\0", &length[..], first].concat()).await;
        scram.update(&receive(client, &mut buffer).await).unwrap();
        send(client, scram.message()).await;
        if client.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
            return false;
        }
        scram.finish(&receive(client, &mut buffer).await).is_ok()
    }

    #[tokio::test]
    async fn the_right_password_is_accepted() {
        let (mut peer, stream) = duplex(1024);
        let (password, startup, mut client) = (password(), startup(), Client::new(stream));
        let verified = password.verify(&mut client, &startup);
        let (verified, accepted) = tokio::join!(verified, log_in(&mut peer, "sesame"));
        assert!(verified.is_ok() && accepted);
        assert!(client.received.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_password_is_delayed_and_concurrent_delays_are_limited() {
        let (password, startup) = (password(), startup());
        let began = Instant::now();
        let attempt = async || {
            let (mut peer, stream) = duplex(1024);
            let mut client = Client::new(stream);
            let verified = async {
                let verified = password.verify(&mut client, &startup).await;
                drop(client);
                verified
            };
            let (verified, _) = tokio::join!(verified, log_in(&mut peer, "open"));
            let Err(PasswordFailure::Wrong(wrong)) = verified else {
                panic!("accepted");
            };
            let refusal = wrong.delayed().await;
            assert_eq!(refusal.report.sqlstate, "28P01");
            assert!(refusal.report.message.contains("\"me\""));
            assert!(refusal.report.hint.is_some());
        };
        let attempts: Vec<_> = (0..=ATTEMPTS).map(|_| attempt()).collect();
        futures_util::future::join_all(attempts).await;
        let took = began.elapsed().as_secs_f64();
        assert!(took >= 2.0 * FAILURE_DELAY.start, "{took}");
    }

    /// 1,500 guessers at a time once delayed a login by 18 s: it waited for their delays, 64 at a time.
    #[tokio::test(start_paused = true)]
    async fn delays_of_wrong_passwords_do_not_delay_the_right_one() {
        let (password, startup) = (password(), startup());
        let mut delayed = Vec::new();
        for known in std::iter::repeat_n("open", 100).chain(["sesame"]) {
            let (mut peer, stream) = duplex(1024);
            let mut client = Client::new(stream);
            let verified = async {
                let verified = password.verify(&mut client, &startup).await;
                drop(client);
                verified
            };
            let began = Instant::now();
            let (verified, accepted) = tokio::join!(verified, log_in(&mut peer, known));
            assert_eq!(began.elapsed(), Duration::ZERO);
            assert_eq!(accepted, known == "sesame");
            delayed.extend(verified.err());
        }
        assert_eq!(delayed.len(), 100);
    }

    #[tokio::test]
    async fn a_message_other_than_sasl_is_refused_and_a_client_without_a_password_may_leave() {
        let (password, startup) = (password(), startup());
        let answer = async |bytes: &[u8]| {
            let (mut peer, stream) = duplex(1024);
            peer.write_all(bytes).await.unwrap();
            peer.shutdown().await.unwrap();
            let verified = password.verify(&mut Client::new(stream), &startup).await;
            verified.unwrap_err()
        };
        for gone in [&b""[..], b"X\0\0\0\x04", b"p\0"] {
            assert!(
                matches!(answer(gone).await, PasswordFailure::Gone),
                "{gone:?}"
            );
        }
        for wrong in [
            &b"Q\0\0\0\x05\0"[..],
            b"p\0\0\0\x0bsesame\0",
            b"p\0\0\0\x03",
            b"p\0\xff\0\0",
            b"p\0\0\0\x16SCRAM-SHA-256\0\xff\xff\xff\xff",
        ] {
            let PasswordFailure::Refused(refusal) = answer(wrong).await else {
                panic!("{wrong:?}");
            };
            assert_eq!(refusal.report.sqlstate, "08P01", "{wrong:?}");
        }
    }
}
