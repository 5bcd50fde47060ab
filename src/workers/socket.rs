//! A socket of the runtime's at first, and of one relay thread's later.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{Shutdown, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll as poll_now};
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::{reactor::Source, watermark::wake_for};

/// What can go from the runtime to a relay thread, with the socket under it.
pub trait Settle {
    /// Moves to this thread, for the job whose turn it is; nothing that has been read or written is lost.
    ///
    /// # Errors
    /// When the thread has no room, or is no relay thread; it cannot be used any more then.
    fn settle(&mut self) -> io::Result<()>;

    /// Whether there is nothing to read for certain, until the job is woken again.
    fn is_quiet(&self) -> bool {
        false
    }

    /// How far the other end has hung up, also behind bytes that have not been read. Takes a system call.
    fn hang_up(&self) -> HangUp {
        HangUp::None
    }

    /// Limits how long sent bytes may stay unacknowledged, where the system can (`TCP_USER_TIMEOUT`).
    fn limit_acknowledgement(&mut self, _limit: Option<Duration>) {}
}

/// How far a peer has hung up, as far as the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HangUp {
    /// It may go on sending.
    None,
    /// It sends no more, but may read.
    Half,
    /// The connection is broken.
    Full,
}

/// Of a client's, which we are the server of.
impl<S: Settle> Settle for tokio_rustls::server::TlsStream<S> {
    fn settle(&mut self) -> io::Result<()> {
        self.get_mut().0.settle()
    }

    fn hang_up(&self) -> HangUp {
        self.get_ref().0.hang_up()
    }
}

/// Of tests: nothing under it belongs to any thread.
#[cfg(test)]
impl Settle for tokio::io::DuplexStream {
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connected socket.
#[derive(Debug)]
pub struct Socket(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream),
    Unix(UnixStream),
    SettledTcp(mio::net::TcpStream, Source),
    SettledUnix(mio::net::UnixStream, Source),
    /// It could not be moved.
    Lost,
}

impl Socket {
    /// The other end's address, of TCP before it has settled.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        match &self.0 {
            Kind::Tcp(socket) => socket.peer_addr().ok(),
            _ => None,
        }
    }
}

impl From<TcpStream> for Socket {
    fn from(socket: TcpStream) -> Self {
        Self(Kind::Tcp(socket))
    }
}

impl From<UnixStream> for Socket {
    fn from(socket: UnixStream) -> Self {
        Self(Kind::Unix(socket))
    }
}

impl Settle for Socket {
    fn settle(&mut self) -> io::Result<()> {
        self.0 = match std::mem::replace(&mut self.0, Kind::Lost) {
            Kind::Tcp(socket) => {
                let mut socket = mio::net::TcpStream::from_std(socket.into_std()?);
                let source = Source::new(&mut socket)?;
                Kind::SettledTcp(socket, source)
            }
            Kind::Unix(socket) => {
                let mut socket = mio::net::UnixStream::from_std(socket.into_std()?);
                let source = Source::new(&mut socket)?;
                Kind::SettledUnix(socket, source)
            }
            settled => settled,
        };
        Ok(())
    }

    #[inline]
    fn is_quiet(&self) -> bool {
        match &self.0 {
            Kind::SettledTcp(_, source) | Kind::SettledUnix(_, source) => source.is_quiet(),
            _ => false,
        }
    }

    fn hang_up(&self) -> HangUp {
        match &self.0 {
            Kind::Tcp(socket) => hang_up(socket.as_fd()),
            Kind::Unix(socket) => hang_up(socket.as_fd()),
            Kind::SettledTcp(socket, _) => hang_up(socket.as_fd()),
            Kind::SettledUnix(socket, _) => hang_up(socket.as_fd()),
            Kind::Lost => HangUp::Full,
        }
    }

    #[cfg(target_os = "linux")]
    fn limit_acknowledgement(&mut self, limit: Option<Duration>) {
        // A failure is not worth losing a connection for.
        let _ = match &self.0 {
            Kind::Tcp(socket) => SockRef::from(socket).set_tcp_user_timeout(limit),
            Kind::SettledTcp(socket, _) => SockRef::from(socket).set_tcp_user_timeout(limit),
            Kind::Unix(_) | Kind::SettledUnix(..) | Kind::Lost => Ok(()),
        };
    }
}

fn hang_up(socket: BorrowedFd<'_>) -> HangUp {
    // Linux alone reports the end of the peer's half; the others report that both are closed.
    #[cfg(target_os = "linux")]
    let half = PollFlags::RDHUP;
    #[cfg(not(target_os = "linux"))]
    let half = PollFlags::empty();
    let mut looked = [PollFd::from_borrowed_fd(socket, half)];
    // A failure says nothing about the peer; the next read or write will.
    if poll_now(&mut looked, Some(&Timespec::default())).is_err() {
        return HangUp::None;
    }
    let found = looked[0].revents();
    if found.intersects(PollFlags::ERR | PollFlags::HUP) {
        HangUp::Full
    } else if found.intersects(half) {
        HangUp::Half
    } else {
        HangUp::None
    }
}

fn lost() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

/// What is not ready is waited for by the thread, which knows whose socket it is.
#[inline]
fn poll<T>(done: Option<io::Result<T>>) -> Poll<io::Result<T>> {
    done.map_or(Poll::Pending, Poll::Ready)
}

#[inline]
fn read(
    socket: &mut impl Read,
    source: &mut Source,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let room = buffer.remaining();
    let done = source.read(room, || {
        let read = socket.read(buffer.initialize_unfilled())?;
        buffer.advance(read);
        Ok(read)
    });
    poll(done.map(|done| done.map(drop)))
}

/// The same, and bulk is read in batches.
#[inline]
fn read_tcp(
    socket: &mut mio::net::TcpStream,
    source: &mut Source,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    wake_for(socket, source.end_of_batches());
    let done = read(socket, source, buffer);
    wake_for(socket, source.beginning_of_batches());
    done
}

#[inline]
fn write(socket: &mut impl Write, source: &mut Source, bytes: &[u8]) -> Poll<io::Result<usize>> {
    poll(source.write(bytes.len(), || socket.write(bytes)))
}

fn write_vectored(
    socket: &mut impl Write,
    source: &mut Source,
    slices: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let length = slices.iter().map(|slice| slice.len()).sum();
    poll(source.write(length, || socket.write_vectored(slices)))
}

impl AsyncRead for Socket {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Kind::SettledTcp(socket, source) => read_tcp(socket, source, buffer),
            Kind::SettledUnix(socket, source) => read(socket, source, buffer),
            Kind::Tcp(socket) => Pin::new(socket).poll_read(cx, buffer),
            Kind::Unix(socket) => Pin::new(socket).poll_read(cx, buffer),
            Kind::Lost => Poll::Ready(Err(lost())),
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
        match &mut self.get_mut().0 {
            Kind::SettledTcp(socket, source) => {
                let done = write(socket, source, bytes);
                wake_for(socket, source.end_of_flow());
                done
            }
            Kind::SettledUnix(socket, source) => write(socket, source, bytes),
            Kind::Tcp(socket) => Pin::new(socket).poll_write(cx, bytes),
            Kind::Unix(socket) => Pin::new(socket).poll_write(cx, bytes),
            Kind::Lost => Poll::Ready(Err(lost())),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Kind::SettledTcp(socket, source) => {
                let done = write_vectored(socket, source, slices);
                wake_for(socket, source.end_of_flow());
                done
            }
            Kind::SettledUnix(socket, source) => write_vectored(socket, source, slices),
            Kind::Tcp(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Kind::Unix(socket) => Pin::new(socket).poll_write_vectored(cx, slices),
            Kind::Lost => Poll::Ready(Err(lost())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Sockets keep nothing back.
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = match &mut self.get_mut().0 {
            Kind::SettledTcp(socket, _) => socket.shutdown(Shutdown::Write),
            Kind::SettledUnix(socket, _) => socket.shutdown(Shutdown::Write),
            Kind::Tcp(socket) => return Pin::new(socket).poll_shutdown(cx),
            Kind::Unix(socket) => return Pin::new(socket).poll_shutdown(cx),
            Kind::Lost => Err(lost()),
        };
        // As tokio has it: a peer that is gone already needs no telling.
        Poll::Ready(match done {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        })
    }
}
