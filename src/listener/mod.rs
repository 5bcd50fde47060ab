//! The sockets that clients connect to: binding, accepting, and placing each client on a runtime.
//!
//! Reads and writes nothing of the protocol: the session does, from the first byte on.

mod error;
mod inherited;
mod session_threads;
mod tcp;
mod unix;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    net::{TcpListener, UnixListener},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span, field::Empty};

pub use self::{error::ListenError, inherited::Inherited};
pub(crate) use self::{error::Taken, session_threads::SessionThreads, unix::AbsentSockets};
use self::{inherited::InheritedSocket, unix::ListeningUnix};
use crate::{
    config::{ListenAddresses, socket_path},
    net::{backoff::Backoff, socket::Socket},
    session::{self, Accepted, EndpointContext, HandshakeLimiter},
    status::Peer,
    telemetry::Metrics,
};

/// Between attempts to accept, mostly for lack of descriptors: short at first, so that a freed one is used soon.
const ACCEPT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));

/// Changes the permissions of an endpoint's socket at `path`; other paths belong to inherited sockets and are left alone.
pub(crate) fn set_socket_mode(listen: &ListenAddresses, path: &Path, mode: u32) -> io::Result<()> {
    match &listen.unix {
        Some(socket) if path.parent() == Some(&socket.directory) => unix::set_mode(path, mode),
        _ => Ok(()),
    }
}

/// The addresses that one endpoint listens on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// TCP addresses, in the order of the settings; without the ::1 that accompanies 127.0.0.1.
    pub tcp: Vec<SocketAddr>,
    /// Paths of Unix sockets.
    pub unix: Vec<PathBuf>,
}

/// Host and port for a Postgres client on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAddress {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix {
        /// Its directory.
        directory: PathBuf,
        /// The port in its name.
        port: u16,
    },
}

impl From<SocketAddr> for ClientAddress {
    fn from(listener: SocketAddr) -> Self {
        Self::Tcp(reachable(listener))
    }
}

impl ClientAddress {
    /// The value for `PGHOST`.
    pub fn host(&self) -> String {
        match self {
            Self::Tcp(address) => address.ip().to_string(),
            Self::Unix { directory, .. } => directory.display().to_string(),
        }
    }

    /// The value for `PGPORT`.
    pub fn port(&self) -> u16 {
        match self {
            Self::Tcp(address) => address.port(),
            Self::Unix { port, .. } => *port,
        }
    }
}

impl Bound {
    /// The addresses as text.
    pub(crate) fn to_strings(&self) -> Vec<String> {
        let unix = self.unix.iter().map(|path| path.display().to_string());
        self.tcp
            .iter()
            .map(ToString::to_string)
            .chain(unix)
            .collect()
    }

    /// The address for a client on this machine: TCP if possible, else a Unix socket that libpq finds.
    pub(crate) fn client_address(&self) -> Option<ClientAddress> {
        let tcp = self.tcp.first().copied().map(ClientAddress::from);
        tcp.or_else(|| {
            let (directory, port) = self.unix.iter().find_map(|path| unix::parse(path))?;
            Some(ClientAddress::Unix { directory, port })
        })
    }
}

/// The address at which a client on this machine reaches a listener, also one on all addresses.
fn reachable(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}

/// Bound sockets, not accepting yet.
#[derive(Debug)]
pub(crate) struct Listener {
    tcp: Vec<TcpListener>,
    unix: Vec<ListeningUnix>,
    bound: Bound,
}

impl Listener {
    /// Binds all addresses.
    pub(crate) fn bind(listen: &ListenAddresses) -> Result<Self, ListenError> {
        let (tcp, addresses) = tcp::bind_all(&listen.tcp)?;
        let mut bound = Bound {
            tcp: addresses,
            unix: Vec::new(),
        };
        let mut unix_sockets = Vec::new();
        if let Some(place) = &listen.unix {
            // With port 0 the system has chosen the TCP port; a client uses the same PGPORT for both.
            let port = bound.tcp.first().map_or(listen.port, SocketAddr::port);
            let socket = unix::bind(place, port)?;
            bound.unix = vec![socket_path(&place.directory, port)];
            unix_sockets.push(socket);
        }
        Ok(Self {
            tcp,
            unix: unix_sockets,
            bound,
        })
    }

    /// Takes over inherited sockets.
    pub(crate) fn inherit(sockets: Vec<InheritedSocket>) -> Result<Self, ListenError> {
        Self::adopt(sockets).map_err(|source| {
            let message = "cannot listen on the sockets that the service manager passed";
            ListenError::new(message, "").caused_by(source)
        })
    }

    fn adopt(sockets: Vec<InheritedSocket>) -> io::Result<Self> {
        let mut listener = Self {
            tcp: Vec::new(),
            unix: Vec::new(),
            bound: Bound::default(),
        };
        for socket in sockets {
            match socket {
                InheritedSocket::Tcp(socket) => {
                    let address = socket.local_addr()?;
                    listener.bound.tcp.push(address);
                    // Unlike ours, a service manager's `[::]` includes IPv4 by default (BindIPv6Only= of systemd.socket(5)).
                    if address.ip() == Ipv6Addr::UNSPECIFIED && !SockRef::from(&socket).only_v6()? {
                        let ipv4 = (Ipv4Addr::UNSPECIFIED, address.port());
                        listener.bound.tcp.push(ipv4.into());
                    }
                    listener.tcp.push(TcpListener::from_std(socket)?);
                }
                InheritedSocket::Unix(socket) => {
                    let address = socket.local_addr()?;
                    let path = address.as_pathname().map(PathBuf::from);
                    // A socket in Linux's abstract namespace has no path.
                    listener.bound.unix.extend(path);
                    let socket = UnixListener::from_std(socket)?;
                    // The file stays: the service manager listens on it while the proxy restarts.
                    listener.unix.push(ListeningUnix { socket, file: None });
                }
            }
        }
        Ok(listener)
    }

    /// The addresses bound.
    pub(crate) fn bound(&self) -> &Bound {
        &self.bound
    }

    /// Accepts until the endpoint closes. Sessions are among `clients` to their end and run on `threads`; the loops that
    /// accept them are among `helpers`.
    pub(crate) fn spawn(
        self,
        endpoint: &Arc<EndpointContext>,
        threads: &Arc<SessionThreads>,
        clients: &TaskTracker,
        helpers: &TaskTracker,
        absent: &AbsentSockets,
    ) {
        let acceptor = Acceptor {
            endpoint: Arc::clone(endpoint),
            threads: Arc::clone(threads),
            clients: clients.clone(),
            handshakes: HandshakeLimiter::new(endpoint.process.max_handshakes),
        };
        for socket in self.tcp {
            let (acceptor, closed) = (acceptor.clone(), endpoint.registry.closed().clone());
            helpers.spawn(async move { acceptor.run(ListeningSocket::Tcp(socket), closed).await });
        }
        for socket in self.unix {
            let (acceptor, absent) = (acceptor.clone(), absent.clone());
            helpers.spawn(async move { acceptor.run_and_replace(socket, absent).await });
        }
    }
}

/// A socket that clients connect to.
#[derive(Debug)]
enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ListeningSocket {
    /// The next client. Cancel safe.
    async fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(socket) => {
                let (client, address) = socket.accept().await?;
                Ok((client.into(), Peer::Tcp(address)))
            }
            Self::Unix(socket) => {
                let (client, _) = socket.accept().await?;
                // The kernel's record of connect(2) (SO_PEERCRED, unix(7)): the client cannot choose it.
                let credentials = client.peer_cred()?;
                let peer = Peer::Unix {
                    uid: credentials.uid(),
                    pid: credentials.pid(),
                };
                Ok((client.into(), peer))
            }
        }
    }
}

/// Accepts the clients of one endpoint and places their sessions on threads.
#[derive(Clone)]
struct Acceptor {
    endpoint: Arc<EndpointContext>,
    threads: Arc<SessionThreads>,
    clients: TaskTracker,
    handshakes: HandshakeLimiter,
}

impl Acceptor {
    /// Accepts until `end`.
    async fn run(&self, socket: ListeningSocket, end: CancellationToken) {
        let mut backoff = ACCEPT_BACKOFF;
        loop {
            let next = async {
                let (client, peer) = socket.accept().await?;
                // Clients that find no permit stay in the kernel's queue, where they take no descriptor.
                let permit = self.handshakes.enter(peer).await;
                Ok::<_, io::Error>((client, peer, permit))
            };
            // Cancel safe: a client that waits for its permit is closed with the listener.
            let accepted = tokio::select! {
                accepted = next => accepted,
                () = end.cancelled() => return,
            };
            match accepted {
                Ok((client, peer, permit)) => {
                    backoff.reset();
                    self.endpoint.metrics.clients_opened.inc();
                    let config = self.endpoint.process.config.load();
                    client.tune(&config.connect.keepalive);
                    self.spawn_session(Box::new(Accepted {
                        id: self.endpoint.registry.registry().next_id(),
                        peer,
                        stream: client,
                        permit,
                    }));
                }
                Err(error) if concerns_one_connection(&error) => {
                    tracing::debug!(%error, "a connection broke before it was accepted");
                }
                Err(error) => {
                    // Mostly a lack of descriptors, which passes when sessions end. Logged once until it does.
                    if backoff.is_fresh() {
                        tracing::warn!(%error, "cannot accept a connection; hint: raise the limit of open files (ulimit -n)");
                    }
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    /// Accepts on a Unix socket, and on another in its place when its file has been removed.
    async fn run_and_replace(&self, mut listening: ListeningUnix, absent: AbsentSockets) {
        let closed = self.endpoint.registry.closed();
        loop {
            let ListeningUnix { socket, file } = listening;
            // A child, so that a replacement ends this loop and not the endpoint.
            let end = closed.child_token();
            let accepting = self.run(ListeningSocket::Unix(socket), end.clone());
            // An inherited socket is not replaced: only the service manager can make it again.
            let Some(file) = file else {
                return accepting.await;
            };
            let mut accepting = std::pin::pin!(accepting);
            tokio::select! {
                () = &mut accepting => return,
                replacement = file.replacement(&absent) => listening = replacement,
            }
            end.cancel();
            accepting.await;
        }
    }

    /// Serves a client on the thread with the fewest tasks.
    fn spawn_session(&self, mut accepted: Box<Accepted<Socket>>) {
        let span = session_span(&accepted);
        let endpoint = Arc::clone(&self.endpoint);
        let session = async move {
            let _counter = PanicCounter(Arc::clone(&endpoint.metrics));
            // Accepted in the main runtime: without this its epoll set would wake this thread for every message.
            match accepted.stream.move_here() {
                Ok(stream) => accepted.stream = stream,
                Err(error) => {
                    return tracing::error!(session = accepted.id, %error, "session lost its socket");
                }
            }
            session::serve(endpoint, accepted).await;
        };
        self.threads
            .spawn(self.clients.track_future(session.instrument(span)));
    }
}

/// Whether an error of `accept` belongs to one connection, so that the next is accepted at once: aborted, refused by a
/// firewall, or a network error that Linux passes on, see accept(2).
fn concerns_one_connection(error: &io::Error) -> bool {
    use rustix::io::Errno;
    const OF_ONE: [Errno; 11] = [
        Errno::CONNABORTED,
        Errno::CONNRESET,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::INTR,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::NOPROTOOPT,
        Errno::OPNOTSUPP,
        Errno::PERM,
        Errno::PROTO,
    ];
    Errno::from_io_error(error).is_some_and(|errno| OF_ONE.contains(&errno))
}

/// The span of a session's log lines; the durations of its login are recorded once it is logged in.
fn session_span(accepted: &Accepted<Socket>) -> Span {
    tracing::debug_span!(
        "session",
        id = accepted.id,
        peer = %accepted.peer,
        queue = Empty,
        credential = Empty,
        resolve = Empty,
        dial = Empty,
        tls = Empty,
        login = Empty,
    )
}

/// Counts a session that ends by a panic.
struct PanicCounter(Arc<Metrics>);

impl Drop for PanicCounter {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.process.session_panics.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_one_connection_are_distinguished_from_a_lack_of_descriptors() {
        use rustix::io::Errno;
        let concerns_one = |errno: Errno| concerns_one_connection(&io::Error::from(errno));
        for errno in [
            Errno::CONNABORTED,
            Errno::PERM,
            Errno::PROTO,
            Errno::NETDOWN,
        ] {
            assert!(concerns_one(errno), "{errno:?}");
        }
        for errno in [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOBUFS,
            Errno::NOMEM,
            Errno::BADF,
        ] {
            assert!(!concerns_one(errno), "{errno:?}");
        }
        assert!(!concerns_one_connection(&io::Error::other("no code")));
    }

    #[test]
    fn local_clients_use_tcp_if_possible() {
        let tcp = |address: &str| Bound {
            tcp: vec![address.parse().unwrap()],
            unix: vec!["/run/.s.PGSQL.7".into()],
        };
        let address = tcp("0.0.0.0:7").client_address().unwrap();
        assert_eq!(
            (address.host(), address.port()),
            ("127.0.0.1".to_owned(), 7)
        );
        assert_eq!(tcp("[::]:7").client_address().unwrap().host(), "::1");
        let unix = |path: &str| Bound {
            tcp: Vec::new(),
            unix: vec![path.into()],
        };
        let address = unix("/run/x/.s.PGSQL.6000").client_address().unwrap();
        assert_eq!(
            (address.host(), address.port()),
            ("/run/x".to_owned(), 6000)
        );
        assert_eq!(unix("/run/x/socket").client_address(), None);
    }
}
