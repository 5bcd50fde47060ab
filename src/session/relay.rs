//! Bytes between a client and its server, aware of message boundaries, never holding a message.
//!
//! A session that waits holds no buffer: both directions read into one buffer of the worker's, and only what the other
//! side does not take at once is kept, at most one bufferful a direction. While something is kept nothing more is read,
//! so a slow reader slows its sender down.
//!
//! The end of each side:
//!
//! | what happens | what follows |
//! |---|---|
//! | the client closes its half | the server's half is closed; replies drain while they keep coming |
//! | the client resets, or takes no more | both are closed at once |
//! | the server closes | what it said goes to the client, then the client is closed |
//! | the server breaks between two messages, having said nothing | the client is told so, then closed |
//! | the server takes no more | its last words are read, as they explain why |
//! | draining | an idle session is ended with 57P01, others as soon as they are idle |
//! | cutting | every session is ended, with 57P01 where that cannot be mistaken for part of a reply |

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use prometheus::IntCounter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

use crate::{
    protocol::{
        error::{Report, sqlstate},
        frame::{HEADER_LEN, Scanner, Seen, tag},
        progress::Progress,
    },
    shutdown::{Phase, Shutdown},
};

/// How long replies may pause after a client has closed its half.
const REPLY_PAUSE: Duration = Duration::from_secs(5);
/// How long a client may leave the last words of its server untouched.
const DELIVERY_PAUSE: Duration = Duration::from_mins(1);
/// What is read at a time; a TLS record holds 16 KiB at most.
const BUFFER_LEN: usize = 32 * 1024;

thread_local! {
    /// Borrowed for the length of a poll, never across one.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_LEN].into_boxed_slice());
}

/// How a relay came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The client left or broke.
    Client,
    /// The server left or broke.
    Server,
    /// We ended it.
    Shutdown,
}

/// Both directions of one session.
pub(super) struct Relay<'a, C, U> {
    client: &'a mut C,
    server: &'a mut U,
    shutdown: &'a Shutdown,
    to_server: Pipe,
    to_client: Pipe,
    progress: Progress,
    unasked: UnaskedPasswords,
    /// Type of the last message from the server: an error that nothing follows explains why it left.
    last_from_server: u8,
    /// Set once no more is read from the server.
    end: Option<End>,
}

impl<'a, C, U> Relay<'a, C, U>
where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    /// A relay that begins with what client and server have sent already; the counters count the bytes of each.
    pub(super) fn new(
        (client, from_client, client_bytes): (&'a mut C, &[u8], IntCounter),
        (server, from_server, server_bytes): (&'a mut U, &[u8], IntCounter),
        shutdown: &'a Shutdown,
    ) -> Self {
        let mut relay = Self {
            client,
            server,
            shutdown,
            to_server: Pipe::new(client_bytes),
            to_client: Pipe::new(server_bytes),
            progress: Progress::new(),
            unasked: UnaskedPasswords::default(),
            last_from_server: 0,
            end: None,
        };
        let mut from_client = from_client;
        relay.unasked.strip(&mut from_client);
        relay
            .to_server
            .take_in(from_client, |seen| relay.progress.from_client(seen));
        relay.to_server.kept.extend_from_slice(from_client);
        relay
            .to_client
            .take_in(from_server, |seen| relay.progress.from_server(seen));
        relay.to_client.kept.extend_from_slice(from_server);
        relay
    }

    /// Runs until the session is over; what the server said last has then been handed to the client.
    ///
    /// Not cancel safe.
    pub(super) async fn run(mut self) -> End {
        let (draining, cutting) = (self.shutdown.draining(), self.shutdown.cutting());
        let mut phases = pin!(async {
            draining.cancelled().await;
            cutting.cancelled().await;
        });
        let mut watched = None;
        let mut patience = None;
        poll_fn(|cx| {
            // The phase costs a load; the tokens, which lock, are polled only to be woken by the next change.
            let phase = self.shutdown.phase();
            if watched != Some(phase) {
                watched = Some(phase);
                let _ = phases.as_mut().poll(cx);
            }
            self.poll(cx, phase, &mut patience)
        })
        .await
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        phase: Phase,
        patience: &mut Option<Pin<Box<Sleep>>>,
    ) -> Poll<End> {
        let before = (self.to_client.total, self.to_client.kept.len());
        if self.poll_from_client(cx).is_err() || self.poll_from_server(cx).is_err() {
            return Poll::Ready(End::Client);
        }
        self.heed(phase);
        let allowed = match self.end {
            Some(end) => {
                // A client that is gone needs no telling.
                if self.to_client.poll_finish(cx, self.client).is_ready() {
                    return Poll::Ready(end);
                }
                if phase == Phase::Cutting {
                    REPLY_PAUSE
                } else {
                    DELIVERY_PAUSE
                }
            }
            None if self.to_server.state == PipeState::Closed => REPLY_PAUSE,
            None => return Poll::Pending,
        };
        let patience = patience.get_or_insert_with(|| Box::pin(sleep(allowed)));
        if before != (self.to_client.total, self.to_client.kept.len()) {
            patience.as_mut().reset(Instant::now() + allowed);
        }
        patience
            .as_mut()
            .poll(cx)
            .map(|()| self.end.unwrap_or(End::Client))
    }

    /// Passes on what the client says. An error is the end of the session.
    fn poll_from_client(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.to_server.state == PipeState::Closed || self.end.is_some() {
            return Ok(());
        }
        let (progress, unasked) = (&mut self.progress, &mut self.unasked);
        let pumped = self.to_server.poll_pump(
            cx,
            self.client,
            self.server,
            |chunk| unasked.strip(chunk),
            |seen| progress.from_client(seen),
        );
        match pumped {
            Poll::Ready(Err(Broken::Source)) => return Err(Broken::Source),
            // The server takes no more, but may have said why: go on reading from it.
            Poll::Ready(Err(Broken::Sink)) => self.to_server.state = PipeState::Closed,
            Poll::Ready(Ok(())) => {
                if Pin::new(&mut *self.server).poll_shutdown(cx).is_ready() {
                    self.to_server.state = PipeState::Closed;
                }
            }
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Passes on what the server says. An error is the end of the session.
    fn poll_from_server(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.end.is_some() {
            return Ok(());
        }
        let (progress, last) = (&mut self.progress, &mut self.last_from_server);
        let pumped = self.to_client.poll_pump(
            cx,
            self.server,
            self.client,
            |_| {},
            |seen| {
                if let Seen::Message { tag } = seen {
                    *last = tag;
                }
                progress.from_server(seen);
            },
        );
        match pumped {
            Poll::Ready(Err(Broken::Sink)) => return Err(Broken::Sink),
            Poll::Ready(Err(Broken::Source) | Ok(())) => {
                self.end = Some(End::Server);
                self.explain_loss();
            }
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Says why the session ends when the server has not.
    fn explain_loss(&mut self) {
        let said_why = self.last_from_server == tag::ERROR_RESPONSE;
        let client_left = self.progress.is_terminated() || self.to_server.state != PipeState::Open;
        if !said_why && !client_left {
            self.to_client.say(
                &Report::new(
                    sqlstate::CONNECTION_FAILURE,
                    "the Lakebase endpoint closed the connection",
                )
                .with_hint("The endpoint was suspended, restarted or failed over. Connect again."),
            );
        }
    }

    fn heed(&mut self, phase: Phase) {
        let may_end = match phase {
            Phase::Serving => false,
            Phase::Draining => {
                self.progress.is_idle()
                    && self.to_server.is_between_messages()
                    && self.to_client.is_between_messages()
            }
            Phase::Cutting => true,
        };
        if may_end && self.end.is_none() {
            self.end = Some(End::Shutdown);
            self.to_client.say(
                &Report::new(
                    sqlstate::ADMIN_SHUTDOWN,
                    "terminating connection because lakebase-proxy is shutting down",
                )
                .with_hint("Connect again."),
            );
        }
    }
}

/// Which side of a direction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    /// No more can be read.
    Source,
    /// No more can be written.
    Sink,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PipeState {
    /// Bytes may come.
    Open,
    /// The source has ended; what was kept is still to be written.
    Ending,
    /// Nothing will be written any more.
    Closed,
}

/// One direction.
struct Pipe {
    /// Read, but not yet taken by the other side.
    kept: BytesMut,
    scanner: Scanner,
    state: PipeState,
    unflushed: bool,
    total: u64,
    counter: IntCounter,
}

impl Pipe {
    fn new(counter: IntCounter) -> Self {
        Self {
            kept: BytesMut::new(),
            scanner: Scanner::new(),
            state: PipeState::Open,
            unflushed: false,
            total: 0,
            counter,
        }
    }

    fn is_between_messages(&self) -> bool {
        self.kept.is_empty() && self.scanner.is_at_boundary()
    }

    /// Appends a last word, unless that would land inside a message.
    fn say(&mut self, report: &Report) {
        if self.scanner.is_at_boundary() {
            self.kept.extend_from_slice(&report.encode_fatal());
        }
    }

    fn take_in(&mut self, chunk: &[u8], seen: impl FnMut(Seen)) {
        let length = u64::try_from(chunk.len()).unwrap_or_default();
        self.total = self.total.wrapping_add(length);
        self.counter.inc_by(length);
        self.scanner.scan(chunk, seen);
    }

    /// Passes bytes from `source` to `sink` until either must be waited for; ready once the source has ended and all
    /// of it has been written.
    fn poll_pump<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
        mut strip: impl FnMut(&mut &[u8]),
        mut seen: impl FnMut(Seen),
    ) -> Poll<Result<(), Broken>> {
        loop {
            ready!(self.poll_write_kept(cx, sink))?;
            if self.state == PipeState::Ending {
                return Poll::Ready(Ok(()));
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                let mut space = ReadBuf::new(buffer);
                ready!(Pin::new(&mut *source).poll_read(cx, &mut space))
                    .map_err(|_| Broken::Source)?;
                let mut chunk = space.filled();
                if chunk.is_empty() {
                    self.state = PipeState::Ending;
                    return Poll::Ready(Ok(()));
                }
                strip(&mut chunk);
                self.take_in(chunk, &mut seen);
                self.poll_write(cx, sink, chunk)
            });
            match read {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(broken)) => return Poll::Ready(Err(broken)),
                Poll::Pending => {
                    // Nothing to read for now: let what was written go out.
                    ready!(self.poll_flush(cx, sink))?;
                    return Poll::Pending;
                }
            }
        }
    }

    /// Writes straight from the worker's buffer and keeps what the sink does not take.
    fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
        mut chunk: &[u8],
    ) -> Poll<Result<(), Broken>> {
        while !chunk.is_empty() {
            self.unflushed = true;
            match Pin::new(&mut *sink).poll_write(cx, chunk) {
                Poll::Ready(Ok(written @ 1..)) => chunk.advance(written),
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(Broken::Sink)),
                Poll::Pending => {
                    self.kept.extend_from_slice(chunk);
                    break;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_kept<W: AsyncWrite + Unpin>(
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
                // A session that waits holds no buffer.
                self.kept = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush<W: AsyncWrite + Unpin>(
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
    fn poll_finish<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        sink: &mut W,
    ) -> Poll<Result<(), Broken>> {
        ready!(self.poll_write_kept(cx, sink))?;
        ready!(self.poll_flush(cx, sink))?;
        Pin::new(sink).poll_shutdown(cx).map_err(|_| Broken::Sink)
    }
}

/// Drops password messages that a client sends without having been asked, which it can only do first of all. They are
/// not stored.
#[derive(Debug, Default)]
struct UnaskedPasswords {
    header: [u8; HEADER_LEN],
    have: usize,
    left: usize,
    over: bool,
}

impl UnaskedPasswords {
    fn strip(&mut self, chunk: &mut &[u8]) {
        while !self.over && !chunk.is_empty() {
            if self.left > 0 {
                let skip = self.left.min(chunk.len());
                self.left -= skip;
                chunk.advance(skip);
                continue;
            }
            if self.have == 0 && chunk.first() != Some(&tag::PASSWORD) {
                self.over = true;
                return;
            }
            let take = (HEADER_LEN - self.have).min(chunk.len());
            self.header[self.have..self.have + take].copy_from_slice(&chunk[..take]);
            self.have += take;
            chunk.advance(take);
            if let [_, a, b, c, d] = self.header
                && self.have == HEADER_LEN
            {
                self.have = 0;
                let length =
                    usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
                self.left = length.saturating_sub(4);
            }
        }
    }
}
