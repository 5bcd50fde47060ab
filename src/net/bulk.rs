//! A TCP socket that reads bulk transfers in batches.
//!
//! A sender that keeps sending wakes its reader for each segment, here 8 kB of a COPY: the reader takes it, finds nothing
//! more and goes back to sleep, and most of its processor time goes into that. So a socket that has received much without
//! being written to is woken only for a batch (`SO_RCVLOWAT`, socket(7)), or once nothing has arrived for a moment.
//! That saves 34 to 41 % of the processor time of a COPY. Request and response traffic, and a trickle, are never delayed.

use std::{
    future::Future,
    io::{self, IoSlice, Read},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

/// Bytes received since the last write that make a bulk transfer: they take tens of milliseconds, of which the pause at
/// the end is a small part.
const BULK: usize = 4 << 20;
/// The same after a pause: the sender may have paused, and be no slower than before.
const BULK_AGAIN: usize = 512 * 1024;
/// Bytes that wake the reader of a bulk transfer. Half of it takes 30 % more processor time, twice as much no less.
const BATCH: usize = 128 * 1024;
/// Bytes that wake any other reader.
const ANYTHING: usize = 1;
/// How long less than a batch may stay unread: the least that epoll can wait, rounded up.
const MAX_PAUSE: Duration = Duration::from_millis(1);

/// A TCP socket that reads bulk transfers in batches.
#[derive(Debug)]
pub struct BulkTcp {
    socket: TcpStream,
    flow: Flow,
    /// When to read although no batch has arrived.
    // A box, as most sessions never need the timer.
    batch_deadline: Option<Pin<Box<Sleep>>>,
}

impl From<TcpStream> for BulkTcp {
    fn from(socket: TcpStream) -> Self {
        Self {
            socket,
            flow: Flow::default(),
            batch_deadline: None,
        }
    }
}

impl BulkTcp {
    pub(super) fn get_ref(&self) -> &TcpStream {
        &self.socket
    }

    pub(super) fn into_inner(self) -> TcpStream {
        self.socket
    }

    #[cold]
    fn await_batch(&mut self, cx: &mut Context<'_>) {
        wake_for(&self.socket, self.flow.begin_batches());
        let deadline = self
            .batch_deadline
            .get_or_insert_with(|| Box::pin(sleep(MAX_PAUSE)));
        deadline.as_mut().reset(Instant::now() + MAX_PAUSE);
        // A timer that is due already has not kept the waker.
        if deadline.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// Reads what has arrived once the deadline of a batch has passed.
    #[cold]
    fn read_after_pause(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Option<io::Result<()>> {
        if self.batch_deadline.as_mut()?.as_mut().poll(cx).is_pending() {
            return None;
        }
        self.batch_deadline = None;
        wake_for(&self.socket, self.flow.paused());
        // Past the runtime, which takes the socket for empty: not every kernel reports again what was below the mark.
        match (&*SockRef::from(&self.socket)).read(buffer.initialize_unfilled()) {
            Ok(read) => {
                buffer.advance(read);
                self.flow.received(read);
                Some(Ok(()))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => Some(Err(error)),
        }
    }

    #[inline]
    fn note_write(&mut self) {
        if let Some(bytes) = self.flow.written() {
            self.batch_deadline = None;
            wake_for(&self.socket, Some(bytes));
        }
    }
}

impl AsyncRead for BulkTcp {
    #[expect(
        clippy::inline_always,
        reason = "three times for each message, each time the same few instructions"
    )]
    #[inline(always)]
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.batch_deadline.is_some()
            && let Some(read) = this.read_after_pause(cx, buffer)
        {
            return Poll::Ready(read);
        }
        let before = buffer.filled().len();
        let done = Pin::new(&mut this.socket).poll_read(cx, buffer);
        this.flow.received(buffer.filled().len() - before);
        if done.is_pending() && this.flow.is_bulk() {
            this.await_batch(cx);
        }
        done
    }
}

impl AsyncWrite for BulkTcp {
    #[inline]
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // Before the write: the answer may arrive at once, and be shorter than a batch.
        self.note_write();
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.note_write();
        Pin::new(&mut self.socket).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Bytes received from one socket since it was written to. Methods return the new low-water mark where it changes.
#[derive(Debug, Default)]
struct Flow {
    received: usize,
    in_batches: bool,
}

impl Flow {
    #[inline]
    fn received(&mut self, length: usize) {
        self.received = self.received.saturating_add(length);
    }

    #[inline]
    fn is_bulk(&self) -> bool {
        self.received >= BULK
    }

    #[inline]
    fn begin_batches(&mut self) -> Option<usize> {
        (!std::mem::replace(&mut self.in_batches, true)).then_some(BATCH)
    }

    #[inline]
    fn written(&mut self) -> Option<usize> {
        self.received = 0;
        self.end_batches()
    }

    fn paused(&mut self) -> Option<usize> {
        self.received = BULK - BULK_AGAIN;
        self.end_batches()
    }

    #[inline]
    fn end_batches(&mut self) -> Option<usize> {
        std::mem::take(&mut self.in_batches).then_some(ANYTHING)
    }
}

/// Sets the low-water mark, where it changes. A failure costs processor time and nothing else.
#[inline]
fn wake_for(socket: &TcpStream, bytes: Option<usize>) {
    #[cfg(target_os = "linux")]
    if let Some(bytes) = bytes {
        let _ = nix::sys::socket::setsockopt(socket, low_water_mark::Receive, &bytes);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, bytes);
}

// None of nix, rustix and socket2 offers this option.
#[cfg(target_os = "linux")]
mod low_water_mark {
    use nix::{libc, setsockopt_impl, sys::socket::sockopt::SetUsize};

    #[derive(Clone, Copy, Debug)]
    pub(super) struct Receive;

    setsockopt_impl!(
        Receive,
        libc::SOL_SOCKET,
        libc::SO_RCVLOWAT,
        usize,
        SetUsize
    );
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        sync::mpsc,
        time::timeout,
    };

    use super::*;

    const MEGABYTE: usize = 1 << 20;

    async fn pair() -> (TcpStream, BulkTcp) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (peer, accepted) = tokio::join!(connecting, listener.accept());
        (peer.unwrap(), accepted.unwrap().0.into())
    }

    #[test]
    fn only_a_socket_that_receives_much_between_writes_reads_in_batches() {
        let mut flow = Flow::default();
        for _ in 0..3 {
            flow.received(BULK - 1);
            assert!(!flow.is_bulk());
            assert_eq!(flow.written(), None, "nothing has changed");
        }
        flow.received(BULK);
        assert!(flow.is_bulk());
        assert_eq!(flow.begin_batches(), Some(BATCH));
        assert_eq!(flow.begin_batches(), None, "once is enough");
        assert_eq!(flow.written(), Some(ANYTHING));
        assert!(!flow.is_bulk());
    }

    #[test]
    fn after_a_pause_fewer_bytes_make_a_bulk_transfer() {
        let mut flow = Flow::default();
        flow.received(BULK);
        flow.begin_batches();
        assert_eq!(flow.paused(), Some(ANYTHING));
        flow.received(BULK_AGAIN - 1);
        assert!(!flow.is_bulk());
        flow.received(1);
        assert!(flow.is_bulk());
        assert_eq!(flow.begin_batches(), Some(BATCH));
    }

    /// The last part of it is no batch, and neither is what follows.
    #[tokio::test]
    async fn nothing_of_a_bulk_transfer_is_held_back() {
        let (mut peer, mut socket) = pair().await;
        let (totals, mut total) = mpsc::channel(1);
        let reading = async move {
            let mut buffer = vec![0; 64 * 1024];
            for _ in 0..3 {
                let mut total = 0;
                while total < 10 * MEGABYTE + 1 {
                    total += socket.read(&mut buffer).await.unwrap();
                }
                totals.send(total).await.unwrap();
            }
            socket.read_u8().await.unwrap()
        };
        let sending = async {
            for _ in 0..3 {
                for _ in 0..10 {
                    peer.write_all(&vec![7; MEGABYTE]).await.unwrap();
                }
                peer.write_all(&[7]).await.unwrap();
                assert_eq!(total.recv().await, Some(10 * MEGABYTE + 1));
            }
            peer.write_all(&[8]).await.unwrap();
        };
        let both = async { tokio::join!(reading, sending) };
        let (last, ()) = timeout(Duration::from_secs(30), both).await.unwrap();
        assert_eq!(last, 8);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn less_than_the_low_water_mark_wakes_no_reader() {
        let (mut peer, socket) = pair().await;
        let socket = socket.into_inner();
        wake_for(&socket, Some(1000));
        peer.write_all(&[7; 999]).await.unwrap();
        while socket.peek(&mut [0; 1000]).await.unwrap() < 999 {}
        // Registered anew, as an edge may have been reported before.
        let socket = TcpStream::from_std(socket.into_std().unwrap()).unwrap();
        let readable = timeout(Duration::from_millis(50), socket.readable()).await;
        assert!(readable.is_err());
        wake_for(&socket, Some(ANYTHING));
        peer.write_all(&[7]).await.unwrap();
        timeout(Duration::from_secs(30), socket.readable())
            .await
            .unwrap()
            .unwrap();
    }
}
