//! The sockets that clients connect to: binding, accepting, and placing each client on a thread.
//!
//! Reads and writes nothing of the protocol: the session does, from the first byte on.

mod accept;
mod error;
mod inherited;
mod session_threads;
mod tcp;
#[cfg_attr(not(unix), path = "no_unix.rs")]
mod unix;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use socket2::SockRef;
use tokio_util::task::TaskTracker;

use self::{accept::Acceptor, tcp::ListeningTcp, unix::ListeningUnix};
pub(crate) use self::{
    accept::BoundSocket, error::Taken, session_threads::SessionThreads, unix::AbsentSockets,
};
pub use self::{error::ListenError, inherited::Inherited};
use crate::{
    config::{ListenAddresses, SOCKET_NAME, socket_path},
    session::{EndpointContext, HandshakeLimiter},
};

/// Changes the permissions of an endpoint's socket at `path`; other paths belong to inherited sockets and are left alone.
pub(crate) fn set_socket_mode(listen: &ListenAddresses, path: &Path, mode: u32) -> io::Result<()> {
    match &listen.unix {
        Some(socket) if path.parent() == Some(&socket.directory) => unix::set_mode(path, mode),
        _ => Ok(()),
    }
}

/// Whether every user of this machine may connect to the Unix socket at `path`.
pub(crate) fn is_open_to_all(path: &Path) -> bool {
    unix::is_open_to_all(path)
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
            let (directory, port) = self.unix.iter().find_map(|path| parse(path))?;
            Some(ClientAddress::Unix { directory, port })
        })
    }
}

/// Directory and port of a path that libpq finds.
fn parse(path: &Path) -> Option<(PathBuf, u16)> {
    let port = path
        .file_name()?
        .to_str()?
        .strip_prefix(SOCKET_NAME)?
        .parse()
        .ok()?;
    Some((path.parent()?.to_owned(), port))
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
    tcp: Vec<ListeningTcp>,
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
    pub(crate) fn inherit(sockets: Vec<BoundSocket>) -> Result<Self, ListenError> {
        Self::adopt(sockets).map_err(|source| {
            let message = "cannot listen on the sockets that the service manager passed";
            ListenError::new(message, "").caused_by(source)
        })
    }

    fn adopt(sockets: Vec<BoundSocket>) -> io::Result<Self> {
        let mut listener = Self {
            tcp: Vec::new(),
            unix: Vec::new(),
            bound: Bound::default(),
        };
        for socket in sockets {
            match socket {
                BoundSocket::Tcp(tcp) => {
                    let address = tcp.socket.local_addr()?;
                    listener.bound.tcp.push(address);
                    // Unlike ours, a service manager's `[::]` includes IPv4 by default (BindIPv6Only= of systemd.socket(5)).
                    if address.ip() == Ipv6Addr::UNSPECIFIED
                        && !SockRef::from(&tcp.socket).only_v6()?
                    {
                        let ipv4 = (Ipv4Addr::UNSPECIFIED, address.port());
                        listener.bound.tcp.push(ipv4.into());
                    }
                    listener.tcp.push(tcp);
                }
                BoundSocket::Unix(socket) => {
                    listener.bound.unix.extend(crate::net::unix::path(&socket)?);
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
    /// accept them are among `helpers`, and among `accepting`, which is empty once all sockets are closed.
    pub(crate) fn spawn(
        self,
        endpoint: &Arc<EndpointContext>,
        threads: &Arc<SessionThreads>,
        clients: &TaskTracker,
        helpers: &TaskTracker,
        accepting: &TaskTracker,
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
            let run = async move { acceptor.run(BoundSocket::Tcp(socket), closed).await };
            helpers.spawn(accepting.track_future(run));
        }
        for socket in self.unix {
            let (acceptor, absent) = (acceptor.clone(), absent.clone());
            let run = async move { acceptor.run_and_replace(socket, absent).await };
            helpers.spawn(accepting.track_future(run));
        }
        accepting.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
