//! From accept to the session proper: what a client wants, in plain text or by TLS, and whether it may.

use std::{io, pin::Pin, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    FAREWELL, HandshakePermit, Policy, Sessions,
    handshake::{self, HandshakeError, Opening, Tls},
    linger,
    local_auth::Failure,
    rewind::Rewind,
    shutting_down,
    welcomed::Counted,
    write_all,
};
use crate::{
    console::{self, Console},
    net::{socket::Transport, tls::ALPN_POSTGRESQL},
    protocol::{
        backend::negotiation,
        error::{Report, sqlstate},
        frame::{tag, take_message},
        startup::{StartupError, StartupMessage},
    },
    shutdown::Phase,
    status::{Encrypted, Peer},
    telemetry::labels::{CancelOutcome, Reason},
    upstream::Refusal,
};

/// What is left of a session once its client has been welcomed.
pub(super) type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What the first reads are likely to fit into.
const FIRST_BUFFER: usize = 1024;

/// A client that has not got a session yet.
struct Arrival<'a> {
    id: u64,
    peer: Peer,
    encryption: Encrypted,
    began: Instant,
    policy: &'a Policy,
    /// Held until it is known what the client wants, and that it may.
    permit: HandshakePermit,
}

impl Sessions {
    /// Serves one client up to its welcome, or to its end where it comes to none; what is left then is the relay. It holds the `permit` until it has said what it wants.
    pub async fn serve<S>(
        &self,
        id: u64,
        peer: Peer,
        mut client: S,
        permit: HandshakePermit,
    ) -> Option<Job>
    where
        S: Transport + 'static,
    {
        tracing::trace!(%peer, "client accepted");
        let counted = Counted::new(&self.metrics);
        let policy = self.policies.now();
        let arrival = Arrival {
            id,
            peer,
            encryption: Encrypted::No,
            began: Instant::now(),
            policy: &policy,
            permit,
        };
        let mut buffer = BytesMut::with_capacity(FIRST_BUFFER);
        let receiving = handshake::receive(&mut client, &mut buffer, policy.entrance.tls(peer));
        match self.in_time(&arrival, receiving).await {
            Ok(Some(Opening::Encrypt { direct })) => {
                // Boxed, so that clients without TLS do not carry the room for it about.
                Box::pin(self.encrypt(arrival, client, buffer, (direct, counted))).await
            }
            opening => {
                self.proceed(arrival, client, buffer, (opening, counted))
                    .await
            }
        }
    }

    /// What `future` comes to within the time that an arrival may take; `None` when we end first: a client that says
    /// nothing must not hold that up.
    async fn in_time<T>(
        &self,
        arrival: &Arrival<'_>,
        future: impl Future<Output = Result<T, HandshakeError>>,
    ) -> Result<Option<T>, HandshakeError> {
        let patience = arrival.policy.client_login_timeout;
        let left: Duration = patience.saturating_sub(arrival.began.elapsed());
        let hurried = async {
            self.shutdown.draining().cancelled().await;
            sleep(FAREWELL).await;
        };
        tokio::select! {
            // First of all: a client that has sent what it should is served.
            biased;
            done = timeout(left, future) => match done {
                Ok(done) => done.map(Some),
                Err(_elapsed) => Err(HandshakeError::Late),
            },
            () = arrival.permit.evicted() => Err(HandshakeError::Evicted),
            () = hurried => Ok(None),
        }
    }

    /// Begins TLS and asks again what the client wants; `front` is what has been read of it.
    async fn encrypt<S>(
        &self,
        mut arrival: Arrival<'_>,
        client: S,
        front: BytesMut,
        (direct, counted): (bool, Counted),
    ) -> Option<Job>
    where
        S: Transport + 'static,
    {
        let encryption = arrival.policy.entrance.encryption.as_ref()?;
        let accepting = async {
            let acceptor = TlsAcceptor::from(encryption.config().await);
            let accepted = acceptor.accept(Rewind::new(front, client)).await;
            accepted.map_err(HandshakeError::Tls)
        };
        let mut client = match self.in_time(&arrival, accepting).await {
            Ok(Some(client)) => client,
            Ok(None) => return None,
            Err(error) => {
                self.no_encryption(&arrival, &error);
                return None;
            }
        };
        if direct && client.get_ref().1.alpn_protocol() != Some(ALPN_POSTGRESQL) {
            let error = HandshakeError::NoAlpn;
            self.reject(arrival, &mut client, &error).await;
            return None;
        }
        arrival.encryption = Encrypted::by(client.get_ref().1);
        let mut buffer = BytesMut::with_capacity(FIRST_BUFFER);
        let receiving = handshake::receive(&mut client, &mut buffer, Tls::Spoken);
        let opening = self.in_time(&arrival, receiving).await;
        self.proceed(arrival, client, buffer, (opening, counted))
            .await
    }

    fn no_encryption(&self, arrival: &Arrival<'_>, error: &HandshakeError) {
        let (id, entrance) = (arrival.id, &arrival.policy.entrance);
        self.count_refusal(Reason::ClientTls);
        match error {
            // Port scanners, mostly.
            HandshakeError::Tls(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                tracing::debug!(session = id, %error, "client left in the TLS handshake");
            }
            HandshakeError::Tls(error) => entrance.client_broke_off_tls(error),
            error => tracing::debug!(session = id, %error, "no TLS handshake"),
        }
    }

    /// Does what the client wants.
    async fn proceed<S>(
        &self,
        arrival: Arrival<'_>,
        mut client: S,
        mut buffer: BytesMut,
        (opening, counted): (Result<Option<Opening>, HandshakeError>, Counted),
    ) -> Option<Job>
    where
        S: Transport + 'static,
    {
        let Arrival {
            id,
            peer,
            encryption,
            policy,
            ..
        } = arrival;
        match opening {
            // The second cannot be: TLS is begun before.
            Ok(None | Some(Opening::Encrypt { .. } | Opening::Gone { insisted: false })) => {}
            Ok(Some(Opening::Gone { insisted: true })) => {
                self.count_refusal(Reason::ClientTls);
                if matches!(peer, Peer::Tcp(_)) {
                    policy.entrance.client_insists_on_tls();
                }
            }
            Ok(Some(Opening::Cancel(key))) => {
                match self.cancels.find(key) {
                    _ if policy.entrance.admit(peer).is_err() => {}
                    Some(target) => {
                        drop(arrival);
                        self.cancel(target, &policy.terms).await;
                    }
                    None => {
                        let delayed = async {
                            self.cancels.delay_guess().await;
                            Ok(())
                        };
                        let _ = self.in_time(&arrival, delayed).await;
                        self.count_cancel(CancelOutcome::Unknown);
                    }
                }
                // libpq 17 takes an end without TLS's own goodbye for a cancel that failed.
                let _ = timeout(FAREWELL, client.shutdown()).await;
            }
            Ok(Some(Opening::Session(startup))) if is_readiness_probe(&startup) => {
                Box::pin(self.answer_probe(id, &arrival, &mut client, buffer, &startup)).await;
            }
            Ok(Some(Opening::Session(startup))) => {
                let allowed = self
                    .check(&arrival, &mut client, &mut buffer, &startup)
                    .await;
                drop(arrival);
                let served = match allowed {
                    Ok(()) if self.console_for(peer, &startup).is_some() => {
                        // Boxed: rare, and none of the others should be as large.
                        Box::pin(self.answer((id, peer), policy, client, buffer, &startup)).await;
                        return None;
                    }
                    Ok(()) => {
                        self.run((id, peer, encryption), policy, &mut client, buffer, startup)
                            .await
                    }
                    Err(Failure::Refused(refusal)) => Err(refusal),
                    // Without a handshake permit: the delay is no reason to hold up others.
                    Err(Failure::Wrong(wrong)) => Err(wrong.delayed().await),
                    Err(Failure::Gone) => {
                        // Not a warning: psql does so before it asks its user.
                        tracing::info!(
                            session = id,
                            %peer,
                            "client left without giving the proxy's password; hint: a client that does not return needs the password of --local-password-file"
                        );
                        return None;
                    }
                };
                match served {
                    Ok(welcomed) => return Some(Box::pin(welcomed?.relay(client, counted))),
                    Err(refusal) => self.refuse(id, &mut client, refusal).await,
                }
            }
            Err(error) => self.reject(arrival, &mut client, &error).await,
        }
        None
    }

    /// Serves a client of the console.
    async fn answer<S>(
        &self,
        (id, peer): (u64, Peer),
        policy: &Policy,
        mut client: S,
        buffer: BytesMut,
        startup: &StartupMessage,
    ) where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(console) = self.console_for(peer, startup) else {
            return;
        };
        let hello = match policy.entrance.password(peer) {
            Some(_) => BytesMut::new(), // said before the password was asked for
            None => negotiation(startup),
        };
        let draining = self.shutdown.draining();
        let answered = console
            .serve(&mut client, (buffer, hello), startup, draining)
            .await;
        tracing::debug!(session = id, ?answered, "console closed");
        linger(&mut client).await;
    }

    /// Answers `pg_isready` by the proxy's readiness, before any password: its exit code tells acceptance from 57P03, and takes every
    /// other error for acceptance. Nothing is sent upstream, so that a health check wakes no endpoint.
    async fn answer_probe<S>(
        &self,
        id: u64,
        arrival: &Arrival<'_>,
        client: &mut S,
        mut buffer: BytesMut,
        startup: &StartupMessage,
    ) where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let readiness = match &self.console {
            _ if self.shutdown.phase() != Phase::Serving => {
                Err("proxy is shutting down".to_owned())
            }
            Some(console) => console.readiness(),
            None => Ok(()),
        };
        tracing::debug!(session = id, ?readiness, "answers pg_isready");
        let answering = async {
            if let Err(reasons) = readiness {
                let report =
                    Report::new(sqlstate::CANNOT_CONNECT_NOW, "lakebase-proxy is not ready")
                        .with_detail(reasons);
                write_all(client, &report.encode_fatal()).await?;
                return Ok(client.shutdown().await?);
            }
            let mut greeting = negotiation(startup);
            greeting.extend_from_slice(&console::greeting(startup));
            write_all(client, &greeting).await?;
            let (message, end) = loop {
                match take_message(&mut buffer, FIRST_BUFFER) {
                    Ok(Some(message)) => break (message.tag, false),
                    Err(_) => break (0, false),
                    Ok(None) => {}
                }
                if client.read_buf(&mut buffer).await? == 0 {
                    break (0, true);
                }
            };
            if message != tag::TERMINATE && !end {
                let report = Report::new(
                    sqlstate::FEATURE_NOT_SUPPORTED,
                    "lakebase-proxy answers a client with the application name `pg_isready` itself",
                )
                .with_hint("Connect with another application_name to send queries.");
                write_all(client, &report.encode_fatal()).await?;
            }
            Ok(client.shutdown().await?)
        };
        let _ = self.in_time(arrival, answering).await;
        linger(client).await;
    }

    fn console_for(&self, peer: Peer, startup: &StartupMessage) -> Option<&Console> {
        let console = self.console.as_deref()?;
        console.is_for(peer, startup).then_some(console)
    }

    /// Whether a client may have a session: by who it is, and by what it knows.
    async fn check<S>(
        &self,
        arrival: &Arrival<'_>,
        client: &mut S,
        buffer: &mut BytesMut,
        startup: &StartupMessage,
    ) -> Result<(), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let entrance = &arrival.policy.entrance;
        entrance.admit(arrival.peer)?;
        entrance.check_encryption(arrival.peer, arrival.encryption)?;
        let Some(password) = entrance.password(arrival.peer) else {
            return Ok(());
        };
        let asking = async { Ok(password.ask(client, buffer, startup).await) };
        match self.in_time(arrival, asking).await {
            Ok(Some(asked)) => asked,
            Ok(None) => Err(shutting_down().into()),
            Err(error) => Err(match error.report() {
                Some(report) => Failure::Refused(Refusal {
                    report,
                    reason: Reason::Timeout,
                }),
                None => Failure::Gone,
            }),
        }
    }

    async fn reject<S>(&self, arrival: Arrival<'_>, client: &mut S, error: &HandshakeError)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Arrival {
            id,
            peer,
            policy,
            permit,
            ..
        } = arrival;
        if let HandshakeError::Evicted = error {
            return self.evict(id, peer, client, error).await;
        }
        drop(permit);
        let reason = match error {
            HandshakeError::Startup(StartupError::TlsHandshake) => {
                policy.entrance.client_insists_on_tls();
                Reason::ClientTls
            }
            HandshakeError::NoAlpn => Reason::ClientTls,
            HandshakeError::Late => Reason::Timeout,
            HandshakeError::Io(error) => {
                tracing::debug!(session = id, error = %error, "client broke off in the handshake");
                return;
            }
            _ => Reason::BadStartup,
        };
        match error.report() {
            Some(report) => self.refuse(id, client, Refusal { report, reason }).await,
            None => {
                self.count_refusal(reason);
                tracing::debug!(session = id, error = %error, "not a Postgres client");
            }
        }
    }

    /// Ends a handshake in favor of newer ones. No waiting for the client: the descriptor is what is short, and a flood must not
    /// fill the log either, which [`Unfinished`](super::Unfinished) sees to.
    async fn evict<S>(&self, id: u64, peer: Peer, client: &mut S, error: &HandshakeError)
    where
        S: AsyncWrite + Unpin,
    {
        self.count_refusal(Reason::Timeout);
        tracing::debug!(session = id, %peer, %error, "client refused");
        if let Some(report) = error.report() {
            let farewell = async {
                write_all(client, &report.encode_fatal()).await?;
                client.shutdown().await
            };
            let _ = timeout(FAREWELL, farewell).await;
        }
    }

    fn count_refusal(&self, reason: Reason) {
        self.metrics.clients_refused[reason].inc();
    }
}

/// Whether this is libpq's `pg_isready`, which sends no query.
fn is_readiness_probe(startup: &StartupMessage) -> bool {
    startup.parameter("application_name") == Some("pg_isready")
        && startup.parameter("replication").is_none()
}
