//! The password between clients and us: SCRAM-SHA-256, any user name.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use bytes::BytesMut;
use secrecy::SecretString;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};

use super::write_all;
use crate::{
    protocol::{
        backend,
        error::{Report, sqlstate},
        frame::{tag, take_message},
        scram::{Exchange, ScramError, Verifier},
        startup::StartupMessage,
    },
    telemetry::labels::Reason,
    upstream::Refusal,
};

/// PostgreSQL's `PG_MAX_SASL_MESSAGE_LENGTH`, in bytes, and a frame around it.
const MESSAGE_LIMIT: usize = 1024 + 5;
/// Attempts that may be checked, or are being answered after they failed, at a time: the most guesses a second. A login
/// beside a flood of wrong passwords waits for its turn, so a lower limit would be the flood's best help.
const ATTEMPTS: usize = 1024;
/// What a wrong password costs, in seconds; not the same each time, so that it tells nothing.
const FAILURE_DELAY: std::ops::Range<f64> = 0.75..1.25;

/// What every TCP client must know.
#[derive(Debug)]
pub struct LocalPassword {
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

/// How an attempt came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The client left; most have no password to offer.
    Gone,
    /// It is told why.
    Refused(Refusal),
    /// It is told so after a delay.
    Wrong(WrongPassword),
}

/// A failed attempt that is still to be answered.
#[derive(Debug)]
pub(super) struct WrongPassword {
    refusal: Refusal,
    /// Held during the delay, whether the client waits for it or not.
    _attempt: Option<OwnedSemaphorePermit>,
}

impl WrongPassword {
    /// What the client is told, after the delay that limits the rate of guesses.
    pub(super) async fn delayed(self) -> Refusal {
        let delay = rand::random_range(FAILURE_DELAY);
        sleep(Duration::from_secs_f64(delay)).await;
        self.refusal
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl LocalPassword {
    /// Takes some milliseconds. `None` only for a defect.
    pub fn new(password: &SecretString) -> Option<Self> {
        Some(Self {
            verifier: Verifier::new(password)?,
            attempts: Arc::new(Semaphore::new(ATTEMPTS)),
        })
    }

    /// Asks the client for a proof that it knows the password. When this returns it has been given ours, and awaits
    /// AuthenticationOk; a NegotiateProtocolVersion that it needed has been sent.
    ///
    /// Not cancel safe. The caller sets the deadline.
    pub(super) async fn ask<S>(
        &self,
        client: &mut S,
        buffer: &mut BytesMut,
        startup: &StartupMessage,
    ) -> Result<(), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut question = backend::negotiation(startup);
        question.extend_from_slice(&backend::sasl_mechanisms());
        say(client, &question).await?;
        let first = hear(client, buffer).await?;
        let first = initial_response(&first).ok_or_else(|| out_of_order("SASLInitialResponse"))?;
        let (exchange, answer) =
            Exchange::begin(&self.verifier, first).map_err(|error| refusal(error, startup))?;
        say(client, &backend::sasl_continue(answer.as_bytes())).await?;
        let last = hear(client, buffer).await?;

        // Never closed, so never an error.
        let attempt = Arc::clone(&self.attempts).acquire_owned().await.ok();
        match exchange.finish(&last) {
            Ok(proof) => say(client, &backend::sasl_final(proof.as_bytes())).await,
            Err(error) => Err(Failure::Wrong(WrongPassword {
                refusal: refusal(error, startup),
                _attempt: attempt,
            })),
        }
    }
}

async fn say<S: AsyncWrite + Unpin>(client: &mut S, bytes: &[u8]) -> Result<(), Failure> {
    write_all(client, bytes).await.map_err(|_| Failure::Gone)
}

/// The body of the next message, which must be a SASL one.
async fn hear<S: AsyncRead + Unpin>(
    client: &mut S,
    buffer: &mut BytesMut,
) -> Result<BytesMut, Failure> {
    loop {
        match take_message(buffer, MESSAGE_LIMIT) {
            Ok(Some(message)) if message.tag == tag::PASSWORD => {
                return Ok(BytesMut::from(message.body()));
            }
            Ok(Some(message)) if message.tag == tag::TERMINATE => return Err(Failure::Gone),
            Ok(Some(_)) => return Err(out_of_order("SASL message").into()),
            Err(error) => {
                let report = Report::new(sqlstate::PROTOCOL_VIOLATION, error.to_string());
                return Err(bad_startup(report).into());
            }
            Ok(None) => {}
        }
        if !matches!(client.read_buf(buffer).await, Ok(1..)) {
            return Err(Failure::Gone);
        }
    }
}

/// The client's first SCRAM message, in the frame that names the mechanism.
fn initial_response(body: &[u8]) -> Option<&[u8]> {
    let end = body.iter().position(|&byte| byte == 0)?;
    let (mechanism, rest) = body.split_at(end);
    let (length, data) = rest.get(1..)?.split_first_chunk::<4>()?;
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
                .with_detail("lakebase-proxy itself asks for this password, not Lakebase.")
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
        format!("the client sent no {expected} when asked for its password"),
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
        io::{AsyncWriteExt, DuplexStream, duplex},
        time::Instant,
    };

    use super::*;

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

    /// A client that knows this password; whether it was believed, and believed us.
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
    async fn whoever_knows_it_is_let_in() {
        let (mut client, mut server) = duplex(1024);
        let (password, startup, mut buffer) = (password(), startup(), BytesMut::new());
        let asked = password.ask(&mut server, &mut buffer, &startup);
        let (asked, believed) = tokio::join!(asked, log_in(&mut client, "sesame"));
        assert!(asked.is_ok() && believed);
        assert!(buffer.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_one_costs_time_and_only_so_many_cost_it_at_once() {
        let (password, startup) = (password(), startup());
        let began = Instant::now();
        let attempt = async || {
            let (mut client, mut server) = duplex(1024);
            let mut buffer = BytesMut::new();
            let asked = async {
                let asked = password.ask(&mut server, &mut buffer, &startup).await;
                drop(server);
                asked
            };
            let (asked, _) = tokio::join!(asked, log_in(&mut client, "open"));
            let Err(Failure::Wrong(wrong)) = asked else {
                panic!("let in");
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
    async fn the_delays_of_wrong_passwords_delay_no_right_one() {
        let (password, startup) = (password(), startup());
        let mut delayed = Vec::new();
        for known in std::iter::repeat_n("open", 100).chain(["sesame"]) {
            let (mut client, mut server) = duplex(1024);
            let mut buffer = BytesMut::new();
            let asked = async {
                let asked = password.ask(&mut server, &mut buffer, &startup).await;
                drop(server);
                asked
            };
            let began = Instant::now();
            let (asked, believed) = tokio::join!(asked, log_in(&mut client, known));
            assert_eq!(began.elapsed(), Duration::ZERO);
            assert_eq!(believed, known == "sesame");
            delayed.extend(asked.err());
        }
        assert_eq!(delayed.len(), 100);
    }

    #[tokio::test]
    async fn what_is_no_sasl_message_is_refused_and_a_client_without_a_password_may_leave() {
        let (password, startup) = (password(), startup());
        let answer = async |said: &[u8]| {
            let (mut client, mut server) = duplex(1024);
            client.write_all(said).await.unwrap();
            client.shutdown().await.unwrap();
            password
                .ask(&mut server, &mut BytesMut::new(), &startup)
                .await
                .unwrap_err()
        };
        for gone in [&b""[..], b"X\0\0\0\x04", b"p\0"] {
            assert!(matches!(answer(gone).await, Failure::Gone), "{gone:?}");
        }
        for wrong in [
            &b"Q\0\0\0\x05\0"[..],
            b"p\0\0\0\x0bsesame\0",
            b"p\0\0\0\x03",
            b"p\0\xff\0\0",
            b"p\0\0\0\x16SCRAM-SHA-256\0\xff\xff\xff\xff",
        ] {
            let Failure::Refused(refusal) = answer(wrong).await else {
                panic!("{wrong:?}");
            };
            assert_eq!(refusal.report.sqlstate, "08P01", "{wrong:?}");
        }
    }
}
