//! A connected TCP or Unix socket, and the byte streams on top of one.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::AsFd,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{bulk::BulkTcp, tcp, unix::UnixStream};
use crate::config::Keepalive;

/// A byte stream, usually on top of a socket.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket that carries the stream, for what no stream offers.
    fn socket(&self) -> Option<&Socket>;

    /// How far the peer has hung up, also behind bytes that have not been read. Takes a system call.
    fn hang_up_state(&self) -> HangUp {
        self.socket().map_or(HangUp::None, Socket::hang_up_state)
    }

    /// Whether a read would find bytes or the end, as far as the kernel knows. Takes a system call.
    fn has_input(&self) -> bool {
        let input = |socket: &Socket| !socket.poll(PollFlags::IN).is_empty();
        self.socket().is_some_and(input)
    }
}

/// How far a peer has hung up, as far as the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HangUp {
    /// The peer may go on sending.
    None,
    /// The peer sends no more, but may read.
    Half,
    /// The connection is broken.
    Full,
}

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(BulkTcp),
    /// Unix.
    Unix(UnixStream),
}

impl Socket {
    /// Registers the socket with the runtime that this is called in, instead of the one that it was accepted in.
    pub fn move_here(self) -> io::Result<Self> {
        Ok(match self {
            // `into_std` deregisters the socket from its first runtime.
            Self::Tcp(socket) => TcpStream::from_std(socket.into_inner().into_std()?)?.into(),
            Self::Unix(socket) => UnixStream::from_std(socket.into_std()?)?.into(),
        })
    }

    /// The peer's TCP address.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket.get_ref().peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Sets nodelay and keepalive, where they exist.
    pub(crate) fn tune(&self, keepalive: &Keepalive) {
        if let Self::Tcp(socket) = self {
            tcp::tune(socket.get_ref(), keepalive);
        }
    }

    /// Limits how long sent bytes may stay unacknowledged, where the system can (`TCP_USER_TIMEOUT`).
    pub fn limit_acknowledgement(&self, limit: Option<Duration>) {
        #[cfg(target_os = "linux")]
        if let Self::Tcp(socket) = self {
            // A failure is not worth losing a connection for.
            let _ = socket2::SockRef::from(socket.get_ref()).set_tcp_user_timeout(limit);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = limit;
    }

    fn hang_up_state(&self) -> HangUp {
        let found = self.poll(hang_up::REQUEST);
        if found.intersects(hang_up::FULL) {
            HangUp::Full
        } else if found.intersects(hang_up::HALF) {
            HangUp::Half
        } else {
            HangUp::None
        }
    }

    /// Which of `events` there are now, and errors.
    fn poll(&self, events: PollFlags) -> PollFlags {
        let socket = match self {
            Self::Tcp(socket) => socket.get_ref().as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        };
        let mut polled = [PollFd::from_borrowed_fd(socket, events)];
        // Zero: returns at once. A failure reveals nothing about the peer; the next read or write does.
        match poll(&mut polled, Some(&Timespec::default())) {
            Ok(_) => polled[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }
}

/// Linux reports that the peer has closed its half.
#[cfg(target_os = "linux")]
mod hang_up {
    use rustix::event::PollFlags;

    pub(super) const REQUEST: PollFlags = PollFlags::RDHUP;
    pub(super) const HALF: PollFlags = PollFlags::RDHUP;
    pub(super) const FULL: PollFlags = PollFlags::ERR.union(PollFlags::HUP);
}

/// Windows reports both with the same flag (WSAPoll): the next write finds out that the connection is broken.
#[cfg(windows)]
mod hang_up {
    use rustix::event::PollFlags;

    pub(super) const REQUEST: PollFlags = PollFlags::empty();
    pub(super) const HALF: PollFlags = PollFlags::HUP;
    pub(super) const FULL: PollFlags = PollFlags::ERR;
}

/// Others report that both halves are closed.
#[cfg(not(any(target_os = "linux", windows)))]
mod hang_up {
    use rustix::event::PollFlags;

    pub(super) const REQUEST: PollFlags = PollFlags::empty();
    pub(super) const HALF: PollFlags = PollFlags::empty();
    pub(super) const FULL: PollFlags = PollFlags::ERR.union(PollFlags::HUP);
}

impl From<TcpStream> for Socket {
    fn from(socket: TcpStream) -> Self {
        Self::Tcp(socket.into())
    }
}

impl From<UnixStream> for Socket {
    fn from(socket: UnixStream) -> Self {
        Self::Unix(socket)
    }
}

impl Transport for Socket {
    fn socket(&self) -> Option<&Socket> {
        Some(self)
    }
}

impl<S: Transport> Transport for tokio_rustls::server::TlsStream<S> {
    fn socket(&self) -> Option<&Socket> {
        self.get_ref().0.socket()
    }
}

#[cfg(test)]
impl Transport for tokio::io::DuplexStream {
    fn socket(&self) -> Option<&Socket> {
        None
    }
}

impl AsyncRead for Socket {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Unix(socket) => Pin::new(socket).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    #[inline]
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Self::Unix(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Sockets buffer nothing.
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Unix(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}
