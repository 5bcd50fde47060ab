//! The sockets clients connect to: bound together, accepted from for ever.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::sleep,
};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::{
    session::{Peer, Sessions},
    telemetry::Metrics,
    upstream::tune,
};

/// Clients that have not yet said what they want.
const UNFINISHED_HANDSHAKES: usize = 256;
/// As many as the kernel allows; a burst must not meet a full queue.
const BACKLOG: i32 = 4096;
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(5);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Bound sockets that have not been accepted from yet.
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<TcpListener>,
    address: SocketAddr,
}

impl Listener {
    /// Binds `address`; 127.0.0.1 brings ::1 with it where that exists, since `localhost` may mean either.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let first = bind(address)?;
        let address = first.local_addr()?;
        let mut sockets = vec![first];
        if address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) {
            // A machine without IPv6, or a port that somebody else has there: then `localhost` falls back to IPv4.
            sockets.extend(bind(SocketAddr::from((Ipv6Addr::LOCALHOST, address.port()))).ok());
        }
        Ok(Self { sockets, address })
    }

    /// The address bound; the first of them.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until the door is shut; sessions run on `clients`, the loops that accept them on `helpers`.
    pub fn spawn(self, sessions: &Arc<Sessions>, clients: &TaskTracker, helpers: &TaskTracker) {
        let handshakes = Arc::new(Semaphore::new(UNFINISHED_HANDSHAKES));
        for socket in self.sockets {
            let accepting = accept(
                socket,
                Arc::clone(sessions),
                Arc::clone(&handshakes),
                clients.clone(),
            );
            helpers.spawn(accepting);
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(
    socket: TcpListener,
    sessions: Arc<Sessions>,
    handshakes: Arc<Semaphore>,
    clients: TaskTracker,
) {
    let mut pause = ACCEPT_PAUSE_MIN;
    let shut = sessions.door.is_shut().clone();
    loop {
        let next = async {
            let permit = Arc::clone(&handshakes).acquire_owned().await;
            (permit, socket.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            next = next => next,
            () = shut.cancelled() => return,
        };
        // Never closed, so never an error.
        let Ok(permit) = permit else { return };
        match accepted {
            Ok((client, address)) => {
                pause = ACCEPT_PAUSE_MIN;
                let sessions = Arc::clone(&sessions);
                let id = sessions.next_id();
                let peer = Peer::Tcp(address);
                let span = tracing::debug_span!("session", id, %peer);
                sessions.metrics.clients_opened.inc();
                let serving = async move {
                    let _watch = PanicWatch(Arc::clone(&sessions.metrics));
                    tune(&client, &sessions.policies.now().terms.keepalive);
                    let client: TcpStream = client;
                    sessions.serve(id, peer, client, permit).await;
                };
                clients.spawn(serving.instrument(span));
            }
            Err(error) => {
                // Mostly a lack of descriptors, which passes when sessions end. Said once per spell.
                if pause == ACCEPT_PAUSE_MIN {
                    tracing::warn!(%error, "cannot accept a connection; hint: raise the limit of open files (ulimit -n)");
                }
                sleep(pause).await;
                pause = (pause * 2).min(ACCEPT_PAUSE_MAX);
            }
        }
    }
}

/// Counts a session that ends by a panic.
struct PanicWatch(Arc<Metrics>);

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.session_panics.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn localhost_means_both_families() {
        let listener = Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let port = listener.address().port();
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_ok());
        if std::net::UdpSocket::bind("[::1]:0").is_ok() {
            assert!(TcpStream::connect(("::1", port)).await.is_ok());
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error() {
        let listener = Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        assert_eq!(
            Listener::bind(listener.address()).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
    }
}
