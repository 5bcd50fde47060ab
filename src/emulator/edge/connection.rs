//! One connection from accept to close: the front's rules, in the front's order.

use std::{io, sync::Arc, time::Duration};

use rustls::server::Acceptor;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{
    error::ServerError,
    login, relay,
    wire::{self, CANCEL_REQUEST, MAX_STARTUP_LENGTH, PROTOCOL_3_0, Parameters, SSL_REQUEST},
};
use crate::emulator::{
    counts::Counters,
    endpoint::Endpoint,
    faults::{Action, BadCertificate, Cleared, Login, Site, Struck},
    loss,
    postgres::Database,
    sessions::BackendKey,
    settings::WhileAsleep,
    shared::{Names, Shared},
};

/// What the inspector keeps of a first message; a longer one is never complete, so it waits for the timer.
const INSPECTOR_BUFFER: usize = 16 * 1024;
/// Time for a client to read the final error before the socket closes.
pub(super) const LINGER: Duration = Duration::from_secs(2);
/// How long Postgres may take over a cancel.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How a connection ends before it is a session.
#[derive(Debug)]
pub(super) enum Ending {
    /// Without a message.
    Close,
    /// With a reset.
    Reset,
    /// After these bytes.
    Send(Vec<u8>),
    /// Never, until the client leaves or the faults are cleared.
    Stall(Cleared),
    /// With a reset once the faults are cleared; until then as a lost network path.
    Blackhole(Cleared),
}

impl From<ServerError> for Ending {
    fn from(error: ServerError) -> Self {
        Self::Send(error.encode())
    }
}

impl From<io::Error> for Ending {
    fn from(_: io::Error) -> Self {
        Self::Close
    }
}

/// Serves one connection. Ends with it.
pub(super) async fn serve(mut tcp: TcpStream, shared: Arc<Shared>) {
    let _gauge = shared.counters.gauge(|counts| &mut counts.connections);
    shared.counters.change(|counts| counts.dials += 1);
    let _ = tcp.set_nodelay(true);
    let deadline = Instant::now() + shared.settings.borrow().handshake_timeout;
    let certificate = match timeout_at(deadline, inspect(&mut tcp, &shared)).await {
        Ok(Ok(Some(certificate))) => certificate,
        Ok(Err(ending)) => return end_plain(tcp, ending).await,
        // A cancel, served; or the listener's own timer, which closes without a word.
        Ok(Ok(None)) | Err(_) => return,
    };
    let Ok(Ok((mut tls, host))) = timeout_at(deadline, handshake(tcp, certificate, &shared)).await
    else {
        return;
    };
    shared.counters.change(|counts| counts.tls_handshakes += 1);
    match converse(&mut tls, &host, deadline, &shared).await {
        Ok(Some((server, running))) => relay::run(tls, server, running).await,
        // The cancel is done. libpq 17 reports a close without TLS's close_notify as a failed cancel.
        Ok(None) => {
            let _ = timeout(LINGER, tls.shutdown()).await;
        }
        Err(ending) => end_tls(tls, ending).await,
    }
}

/// The certificate to go on with.
struct Certificate(Option<BadCertificate>);

/// What a client means by its TLS server name.
struct Host {
    /// As sent.
    name: Option<String>,
    /// `None`: nothing answers there.
    endpoint: Option<Arc<Endpoint>>,
}

impl Host {
    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
}

/// TLS, with the certificate of the endpoint that the client names. Not cancel safe.
async fn handshake(
    tcp: TcpStream,
    certificate: Certificate,
    shared: &Shared,
) -> io::Result<(TlsStream<TcpStream>, Host)> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let name = hello.client_hello().server_name().map(str::to_owned);
    let by_host = |name: &String| shared.endpoints.by_host(name);
    let endpoint = name.as_ref().and_then(by_host);
    let shown = &endpoint.as_ref().unwrap_or(&shared.main).certificates;
    let tls = hello.into_stream(shown.server(certificate.0)).await?;
    Ok((tls, Host { name, endpoint }))
}

/// In plain text: `SSLRequest` or `CancelRequest`, nothing else. `None`: it was a cancel. Not cancel safe.
async fn inspect(tcp: &mut TcpStream, shared: &Arc<Shared>) -> Result<Option<Certificate>, Ending> {
    strike(shared, Site::Accept).await?;
    if shared.settings.borrow().while_asleep == WhileAsleep::Reset && !shared.main.compute.admit() {
        return Err(Ending::Reset);
    }
    let mut buffer = vec![0; INSPECTOR_BUFFER];
    let mut filled = 0;
    let (length, code) = loop {
        let read = match buffer.get_mut(filled..) {
            Some(free) if !free.is_empty() => tcp.read(free).await?,
            _ => std::future::pending().await,
        };
        if read == 0 {
            return Err(Ending::Close);
        }
        filled += read;
        let seen = buffer.get(..filled).unwrap_or_default();
        if let (Some(length), Some(code)) = (
            wire::word(seen),
            wire::word(seen.get(4..).unwrap_or_default()),
        ) && filled >= usize::try_from(length).unwrap_or(usize::MAX)
        {
            break (length, code);
        }
    };
    match code {
        CANCEL_REQUEST if length != 16 => Err(ServerError::cancel_request_length().into()),
        CANCEL_REQUEST => {
            cancel(buffer.get(8..16).unwrap_or_default(), shared).await?;
            Ok(None)
        }
        SSL_REQUEST if length != 8 => Err(ServerError::ssl_request_length().into()),
        SSL_REQUEST => {
            let mut certificate = Certificate(None);
            match shared.faults.strike(Site::SslRequest).await {
                None => {}
                Some(Struck {
                    action: Action::Certificate(bad),
                    ..
                }) => certificate = Certificate(Some(bad)),
                Some(Struck {
                    action: Action::NoTls,
                    ..
                }) => {
                    tcp.write_all(b"N").await?;
                    // The client may continue in plain text, which is not read, or disconnect.
                    return Err(Ending::Close);
                }
                Some(struck) => return Err(ending(struck)),
            }
            tcp.write_all(b"S").await?;
            if filled > 8 {
                return Err(ServerError::unencrypted_data().into());
            }
            Ok(Some(certificate))
        }
        other => Err(ServerError::protocol_version(other).into()),
    }
}

type Logged = (Box<dyn crate::emulator::postgres::Stream>, relay::Running);

/// Inside TLS, up to the end of login. `None`: it was a cancel. Not cancel safe.
async fn converse(
    tls: &mut TlsStream<TcpStream>,
    host: &Host,
    deadline: Instant,
    shared: &Arc<Shared>,
) -> Result<Option<Logged>, Ending> {
    strike(shared, Site::Tls).await?;
    let packet = match timeout_at(deadline, read_startup(tls)).await {
        Ok(packet) => packet?,
        Err(_) => return Err(ServerError::handshake_timeout().into()),
    };
    if host.name.is_none() {
        return Err(ServerError::no_sni().into());
    }
    if packet.code == CANCEL_REQUEST {
        cancel(packet.body.get(..8).unwrap_or_default(), shared).await?;
        return Ok(None);
    }
    if packet.code != PROTOCOL_3_0 {
        return Err(ServerError::unsupported_protocol(packet.code).into());
    }
    shared.counters.change(|counts| counts.startups += 1);
    let parameters = Parameters::parse(&packet.body);
    let logged = log_in(host, parameters.as_ref(), tls, shared).await;
    if logged.is_err() {
        let login = parameters.as_ref().map(Parameters::login);
        let login = login.unwrap_or_default();
        shared.tally.refused(host.name(), &login);
        shared.counters.change(|counts| counts.refusals += 1);
    }
    logged.map(Some)
}

async fn log_in(
    host: &Host,
    parameters: Option<&Parameters>,
    tls: &mut TlsStream<TcpStream>,
    shared: &Arc<Shared>,
) -> Result<Logged, Ending> {
    let login = parameters.map(Parameters::login).unwrap_or_default();
    strike_login(shared, Site::Startup, &login).await?;
    let endpoint = authorize(host, shared).await?;
    let Some(parameters) = parameters else {
        return Err(ServerError::proxy("malformed startup packet").into());
    };
    if Names::is_pooler(host.name()) && !shared.settings.borrow().pooler_oauth {
        return Err(login::refuse_at_pooler(tls).await);
    }
    login::run(tls, host.name(), endpoint, parameters, shared).await
}

/// The front's question to its control plane: may anybody connect to this host now?
async fn authorize<'a>(host: &'a Host, shared: &Shared) -> Result<&'a Arc<Endpoint>, Ending> {
    let Some(endpoint) = &host.endpoint else {
        return Err(ServerError::external_authorization().into());
    };
    if endpoint.is_disabled() {
        return Err(
            ServerError::proxy("Control plane request failed: endpoint is disabled").into(),
        );
    }
    if endpoint.compute.admit() {
        return Ok(endpoint);
    }
    let while_asleep = shared.settings.borrow().while_asleep;
    match while_asleep {
        WhileAsleep::ExternalAuthorization => Err(ServerError::external_authorization().into()),
        WhileAsleep::Reset => Err(Ending::Reset),
        WhileAsleep::Close => Err(Ending::Close),
        // Sent after the password.
        WhileAsleep::StartingUp => Ok(endpoint),
        WhileAsleep::Hold => {
            endpoint.compute.until_active().await;
            Ok(endpoint)
        }
    }
}

struct Startup {
    code: u32,
    body: Vec<u8>,
}

/// Not cancel safe.
async fn read_startup<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Startup, Ending> {
    let length = usize::try_from(stream.read_u32().await?).unwrap_or(usize::MAX);
    if !(8..MAX_STARTUP_LENGTH).contains(&length) {
        return Err(ServerError::startup_length().into());
    }
    let code = stream.read_u32().await?;
    let mut body = vec![0; length - 8];
    stream.read_exact(&mut body).await?;
    Ok(Startup { code, body })
}

/// Passes a cancel on with Postgres's own key; an unknown key is ignored, as Postgres does.
async fn cancel(key: &[u8], shared: &Arc<Shared>) -> Result<(), Ending> {
    shared.counters.change(|counts| counts.cancels += 1);
    let deferred = match shared.faults.strike(Site::Cancel).await {
        None => None,
        Some(Struck {
            action: Action::Defer(millis),
            ..
        }) => Some(Duration::from_millis(millis)),
        Some(struck) => return Err(ending(struck)),
    };
    let Ok(key) = key.try_into() else {
        return Ok(());
    };
    // A request in plain text names no host.
    let Some((backend, database)) = shared.endpoints.by_key(key) else {
        return Ok(());
    };
    let signal = signal(backend, database, shared.counters.clone());
    match deferred {
        None => signal.await,
        Some(time) => {
            let late = async move {
                sleep(time).await;
                signal.await;
            };
            let late = shared.stop.clone().run_until_cancelled_owned(late);
            shared.tracker.spawn(late);
        }
    }
    Ok(())
}

/// Sends the signal to the server process, whichever client uses it by then.
async fn signal(backend: BackendKey, database: Database, counters: Counters) {
    let request = wire::cancel_request(backend.process_id, &backend.secret);
    let pass_on = async {
        let mut stream = database.dial().await?;
        stream.write_all(&request).await?;
        counters.change(|counts| counts.cancels_forwarded += 1);
        // Postgres closes when the signal is sent.
        stream.read(&mut [0]).await
    };
    let _ = timeout(CANCEL_TIMEOUT, pass_on).await;
}

/// Applies the fault of this site.
async fn strike(shared: &Shared, site: Site) -> Result<(), Ending> {
    strike_login(shared, site, &Login::default()).await
}

/// Applies the fault of this site and login.
pub(super) async fn strike_login(
    shared: &Shared,
    site: Site,
    login: &Login<'_>,
) -> Result<(), Ending> {
    let struck = shared.faults.strike_login(site, login).await;
    struck.map_or(Ok(()), |struck| Err(ending(struck)))
}

fn ending(struck: Struck) -> Ending {
    match struck.action {
        Action::Error(error) => error.into(),
        Action::Answer(text) => Ending::Send(text.into_bytes()),
        Action::Reset => Ending::Reset,
        Action::Stall => Ending::Stall(struck.cleared),
        Action::Blackhole => Ending::Blackhole(struck.cleared),
        // The others were refused when they were set.
        _ => Ending::Close,
    }
}

async fn end_plain(mut tcp: TcpStream, ending: Ending) {
    match ending {
        Ending::Reset => reset(&tcp),
        Ending::Blackhole(cleared) => blackhole(&tcp, cleared).await,
        ending => finish(&mut tcp, ending).await,
    }
}

async fn end_tls(mut tls: TlsStream<TcpStream>, ending: Ending) {
    match ending {
        Ending::Reset => reset(tls.get_ref().0),
        Ending::Blackhole(cleared) => blackhole(tls.get_ref().0, cleared).await,
        ending => finish(&mut tls, ending).await,
    }
}

/// Makes the coming close a reset.
pub(super) fn reset(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

/// Loses the connection's packets until the faults are cleared; then it is reset.
async fn blackhole(tcp: &TcpStream, mut cleared: Cleared) {
    loss::begin(&SockRef::from(tcp));
    cleared.wait().await;
}

async fn finish<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, ending: Ending) {
    match ending {
        Ending::Close | Ending::Reset | Ending::Blackhole(_) => {}
        Ending::Send(bytes) => {
            let _ = timeout(LINGER, async {
                stream.write_all(&bytes).await?;
                stream.flush().await
            })
            .await;
        }
        Ending::Stall(mut cleared) => {
            tokio::select! {
                () = cleared.wait() => {}
                () = drain(stream) => {}
            }
        }
    }
    linger(stream).await;
}

/// Closes the sending side and reads on for a moment: unread bytes would turn the close into a reset, which loses the final
/// error.
pub(super) async fn linger<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    let _ = timeout(LINGER, async {
        let _ = stream.shutdown().await;
        drain(stream).await;
    })
    .await;
}

async fn drain<S: AsyncRead + Unpin>(stream: &mut S) {
    let mut scrap = [0; 1024];
    while matches!(stream.read(&mut scrap).await, Ok(read) if read > 0) {}
}
