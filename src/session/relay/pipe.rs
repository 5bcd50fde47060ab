//! One direction of a session.
//!
//! An idle session holds no buffer: both directions read into one buffer of the thread's, and only what the other side
//! does not accept at once is kept, at most one buffer per direction. While something is kept nothing more is read,
//! so a slow reader slows its sender down.

use std::{
    cell::RefCell,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use prometheus::IntCounter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    task::yield_now,
};

use crate::protocol::frame::{Scanner, Seen};

/// Bytes per read: four TLS records of maximum length. From 16 KiB to 1 MiB a bulk transfer takes as much processor
/// time for a byte.
pub(super) const BUFFER_LEN: usize = 64 * 1024;

/// Reads per turn: a bulk transfer gives way to other sessions after half a megabyte, a fraction of a millisecond. Without
/// this bound a query beside two COPYs on its thread waits up to 11 ms, with it 1.5.
const TURN: usize = 8;

thread_local! {
    /// Borrowed during a poll, never across polls.
    // Streams with buffers of their own (TLS) use others, so that this is never borrowed twice.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_LEN].into_boxed_slice());
}

/// Reads what there is to `received`, through the thread's buffer; 0 at the end. Until there is something, `received` needs no
/// memory.
pub(in crate::session) fn poll_receive<R: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    source: &mut R,
    received: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut space = ReadBuf::new(buffer);
        ready!(Pin::new(source).poll_read(cx, &mut space))?;
        received.extend_from_slice(space.filled());
        Poll::Ready(Ok(space.filled().len()))
    })
}

/// Which side of a direction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// No more can be read.
    Source,
    /// The source has acknowledged nothing for too long.
    Silent,
    /// No more can be written.
    Sink,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PipeState {
    /// Bytes may come.
    Open,
    /// The source has ended; what was kept is still to be written.
    Ending,
    /// The source has ended and the sink is closed.
    Closed,
    /// The sink accepts no more.
    Refused,
}

/// One direction.
pub(super) struct Pipe {
    /// Read, but not yet written to the sink.
    pub(super) kept: BytesMut,
    scanner: Scanner,
    pub(super) state: PipeState,
    pub(super) unflushed: bool,
    pub(super) total: u64,
    /// The part of it that the counter includes.
    counted: u64,
    pub(super) counter: IntCounter,
}

impl Pipe {
    /// For a source from which `total` bytes have been passed on already.
    pub(super) fn new(counter: IntCounter, total: u64) -> Self {
        Self {
            kept: BytesMut::new(),
            scanner: Scanner::new(),
            state: PipeState::Open,
            unflushed: false,
            total,
            counted: total,
            counter,
        }
    }

    pub(super) fn is_between_messages(&self) -> bool {
        self.kept.is_empty() && self.scanner.is_at_boundary()
    }

    /// Whether what was read ends between two messages.
    pub(super) fn is_at_boundary(&self) -> bool {
        self.scanner.is_at_boundary()
    }

    /// Appends a message of ours, unless it would land inside another.
    pub(super) fn append(&mut self, frame: &[u8]) {
        if self.scanner.is_at_boundary() {
            self.kept.extend_from_slice(frame);
        }
    }

    /// Leaves bytes out of the counter.
    pub(super) fn skip(&mut self, bytes: u64) {
        self.counted = self.counted.wrapping_add(bytes);
    }

    /// Updates the counter, once per poll because all sessions share it.
    pub(super) fn count(&mut self) {
        if self.counted != self.total {
            self.counter.inc_by(self.total.wrapping_sub(self.counted));
            self.counted = self.total;
        }
    }

    pub(super) fn take_in(&mut self, chunk: &[u8], seen: impl FnMut(Seen)) {
        let length = u64::try_from(chunk.len()).unwrap_or_default();
        self.total = self.total.wrapping_add(length);
        self.scanner.scan(chunk, seen);
    }

    /// Passes bytes from `source` to `sink` until either must be waited for; ready once the source has ended and all
    /// of it has been written.
    ///
    /// `strip` removes bytes before they are scanned, and `passed` those that were scanned and are not to be written.
    pub(super) fn poll_pump<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
        mut strip: impl FnMut(&mut &[u8]),
        mut seen: impl FnMut(Seen),
        mut passed: impl FnMut(&mut &[u8]),
    ) -> Poll<Result<(), Broken>> {
        for _ in 0..TURN {
            // Nothing is read before the rest is written: this is what slows the sender down.
            ready!(self.poll_write_kept(cx, sink))?;
            if self.state == PipeState::Ending {
                return Poll::Ready(Ok(()));
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                let mut space = ReadBuf::new(buffer);
                ready!(Pin::new(&mut *source).poll_read(cx, &mut space)).map_err(|error| {
                    match error.kind() {
                        // ETIMEDOUT: the keepalive or TCP_USER_TIMEOUT has given the peer up.
                        io::ErrorKind::TimedOut => Broken::Silent,
                        _ => Broken::Source,
                    }
                })?;
                let mut chunk = space.filled();
                if chunk.is_empty() {
                    self.state = PipeState::Ending;
                    return Poll::Ready(Ok(()));
                }
                strip(&mut chunk);
                self.take_in(chunk, &mut seen);
                passed(&mut chunk);
                self.poll_write(cx, sink, chunk)
            });
            match read {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(broken)) => return Poll::Ready(Err(broken)),
                Poll::Pending => return self.poll_rest(cx, sink),
            }
        }
        // The next turn comes after the sockets have been polled, and after the other sessions that are ready.
        let _ = pin!(yield_now()).poll(cx);
        self.poll_rest(cx, sink)
    }

    /// Writes what is kept while nothing more is to be read.
    pub(super) fn poll_hold<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        ready!(self.poll_write_kept(cx, sink))?;
        self.poll_rest(cx, sink)
    }

    /// Flushes, as there is nothing to read for now.
    fn poll_rest<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        ready!(self.poll_flush(cx, sink))?;
        Poll::Pending
    }

    /// Writes straight from the thread's buffer and keeps what the sink does not accept.
    #[expect(
        clippy::inline_always,
        reason = "for each message; as there are two kinds of relay, it would be called"
    )]
    #[inline(always)]
    fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
        mut chunk: &[u8],
    ) -> Poll<Result<(), Broken>> {
        // Until the sink is pending: only then does it wake this task.
        while !chunk.is_empty() {
            self.unflushed = true;
            match Pin::new(&mut *sink).poll_write(cx, chunk) {
                Poll::Ready(Ok(written @ 1..)) => chunk.advance(written),
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Broken::Sink)),
                Poll::Pending => {
                    // A copy, as the thread's buffer is another session's at the next poll.
                    self.kept.extend_from_slice(chunk);
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn poll_write_kept<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        if self.kept.is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.poll_write_rest(cx, sink)
    }

    #[cold]
    fn poll_write_rest<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        while !self.kept.is_empty() {
            self.unflushed = true;
            match ready!(Pin::new(&mut *sink).poll_write(cx, &self.kept)) {
                Ok(written @ 1..) => self.kept.advance(written),
                Ok(0) | Err(_) => return Poll::Ready(Err(Broken::Sink)),
            }
            if self.kept.is_empty() {
                // An idle session holds no buffer.
                self.kept = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    pub(super) fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        if self.unflushed {
            ready!(Pin::new(sink).poll_flush(cx)).map_err(|_| Broken::Sink)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes the rest and closes the sink's half.
    pub(super) fn poll_finish<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        ready!(self.poll_write_kept(cx, sink))?;
        ready!(self.poll_flush(cx, sink))?;
        Pin::new(sink).poll_shutdown(cx).map_err(|_| Broken::Sink)
    }
}
