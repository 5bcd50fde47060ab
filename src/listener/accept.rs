//! Accepts clients and places each on a thread for its session.

use std::{io, sync::Arc, time::Duration};

use tokio::{net::TcpListener, runtime::Handle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, Span, field::Empty};

use super::{AbsentSockets, SessionThreads, tcp::ListeningTcp, unix::ListeningUnix};
use crate::{
    net::{
        backoff::Backoff,
        socket::Socket,
        unix::{self, BoundUnix, UnixListener},
    },
    session::{self, Accepted, EndpointContext, HandshakeLimiter},
    status::Peer,
    telemetry::Metrics,
};

/// Between attempts to accept, mostly for lack of descriptors: short at first, so that a freed one is used soon.
const ACCEPT_BACKOFF: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));

/// A socket that clients connect to, without a runtime.
#[derive(Debug)]
pub(crate) enum BoundSocket {
    /// TCP.
    Tcp(ListeningTcp),
    /// Unix.
    Unix(BoundUnix),
}

/// The same, registered with a runtime.
#[derive(Debug)]
pub(super) enum ListeningSocket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ListeningSocket {
    /// Registers another descriptor of `bound` with the runtime that this is called in.
    pub(super) fn register(bound: &BoundSocket) -> io::Result<Self> {
        Ok(match bound {
            BoundSocket::Tcp(ListeningTcp { socket, .. }) => {
                Self::Tcp(TcpListener::from_std(socket.try_clone()?)?)
            }
            BoundSocket::Unix(socket) => Self::Unix(UnixListener::from_std(socket.try_clone()?)?),
        })
    }

    /// The next client. Cancel safe.
    pub(super) async fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(socket) => {
                let (client, address) = socket.accept().await?;
                Ok((client.into(), Peer::Tcp(address)))
            }
            Self::Unix(socket) => {
                let (client, _) = socket.accept().await?;
                let unix::PeerProcess { uid, pid } = unix::peer(&client)?;
                Ok((client.into(), Peer::Unix { uid, pid }))
            }
        }
    }
}

/// Accepts the clients of one endpoint and places their sessions on threads.
#[derive(Clone)]
pub(super) struct Acceptor {
    pub(super) endpoint: Arc<EndpointContext>,
    pub(super) threads: Arc<SessionThreads>,
    pub(super) clients: TaskTracker,
    pub(super) handshakes: HandshakeLimiter,
}

impl Acceptor {
    /// Accepts until `end`, on the first thread: its sessions, the only ones as long as no two run at the same time, then
    /// start without another thread. Cancel safe: the socket is closed.
    pub(super) async fn run(&self, bound: BoundSocket, end: CancellationToken) {
        let bound = Arc::new(bound);
        let job = || {
            let (acceptor, bound, end) = (self.clone(), Arc::clone(&bound), end.clone());
            async move { acceptor.accept(&bound, &end).await }
        };
        self.threads.run_on_first(job).await;
    }

    async fn accept(&self, bound: &BoundSocket, end: &CancellationToken) {
        let mut backoff = ACCEPT_BACKOFF;
        let socket = loop {
            match ListeningSocket::register(bound) {
                Ok(socket) => break socket,
                Err(error) => {
                    tracing::warn!(%error, "cannot wait for clients; hint: raise the limit of open files (ulimit -n)");
                    if end
                        .run_until_cancelled(sleep(backoff.next()))
                        .await
                        .is_none()
                    {
                        return;
                    }
                }
            }
        };
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
                    if end
                        .run_until_cancelled(sleep(backoff.next()))
                        .await
                        .is_none()
                    {
                        return;
                    }
                }
            }
        }
    }

    /// Accepts on a Unix socket, and on another in its place when its file has been removed.
    pub(super) async fn run_and_replace(
        &self,
        mut listening: ListeningUnix,
        absent: AbsentSockets,
    ) {
        let closed = self.endpoint.registry.closed();
        loop {
            let ListeningUnix { socket, file } = listening;
            // A child, so that a replacement ends this loop and not the endpoint.
            let end = closed.child_token();
            let accepting = self.run(BoundSocket::Unix(socket), end.clone());
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

    /// Serves a client on the thread with the fewest sessions.
    fn spawn_session(&self, mut accepted: Box<Accepted<Socket>>) {
        let span = session_span(&accepted);
        let endpoint = Arc::clone(&self.endpoint);
        let accepted_in = Handle::current().id();
        let session = async move {
            let _counter = PanicCounter(Arc::clone(&endpoint.metrics));
            // Without this the epoll set of the accepting thread would wake this one for every message.
            if Handle::current().id() != accepted_in {
                match accepted.stream.move_here() {
                    Ok(stream) => accepted.stream = stream,
                    Err(error) => {
                        return tracing::error!(session = accepted.id, %error, "session lost its socket");
                    }
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
    const OF_ONE: &[Errno] = &[
        Errno::CONNABORTED,
        Errno::CONNRESET,
        Errno::HOSTDOWN,
        Errno::HOSTUNREACH,
        Errno::INTR,
        Errno::NETDOWN,
        Errno::NETUNREACH,
        Errno::NOPROTOOPT,
        Errno::OPNOTSUPP,
        #[cfg(unix)]
        Errno::PERM,
        #[cfg(unix)]
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
            #[cfg(unix)]
            Errno::PERM,
            #[cfg(unix)]
            Errno::PROTO,
            Errno::NETDOWN,
        ] {
            assert!(concerns_one(errno), "{errno:?}");
        }
        for errno in [
            Errno::MFILE,
            #[cfg(unix)]
            Errno::NFILE,
            Errno::NOBUFS,
            #[cfg(unix)]
            Errno::NOMEM,
            Errno::BADF,
        ] {
            assert!(!concerns_one(errno), "{errno:?}");
        }
        assert!(!concerns_one_connection(&io::Error::other("no code")));
    }
}
