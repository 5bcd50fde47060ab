//! Client TLS as [`AsyncRead`] and [`AsyncWrite`], without buffers while it waits.
//!
//! The reason for an own stream: tokio-rustls costs 4.2 KB more per session, and 6 to 11 % more CPU in COPY (measured).
//! rustls's unbuffered connection does everything of TLS: handshake, keys and their updates, tickets, alerts. This module
//! owns the bytes around it. Records are read into and encrypted in buffers of the thread, which are borrowed for one poll.
//! A stream keeps only the front of an incomplete record, plaintext that the reader had no space for, and encrypted bytes
//! that the socket has not accepted. It never sees a key.
//!
//! The next version of rustls (after 0.23) deletes the unbuffered API. Its ordinary API lets the caller own the input
//! buffer: port this file then (a trial port took 245 lines in place of 407). Nothing else knows how it works.
//!
//! All bytes that the connection has not discarded must be passed to it each time: it may keep the first half of a handshake
//! message in them.

use std::{
    cell::RefCell,
    fmt,
    future::poll_fn,
    io, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use rustls::{
    ClientConfig, HandshakeKind, ProtocolVersion,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::ServerName,
    unbuffered::{
        ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
    },
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes read at a time, with the rest of the last read: several records in one system call.
const READ_LEN: usize = 64 * 1024;
/// More than the longest handshake message with its records; rustls refuses longer ones.
const INCOMING_LEN: usize = 96 * 1024;
/// Least number of bytes to read, however many are left from the last read.
const MIN_READ: usize = 4 * 1024;
/// Bytes encrypted at a time: four whole records.
const CHUNK_LEN: usize = 64 * 1024;
/// Space for the overhead of four records, and for a key update before them.
const OUTGOING_LEN: usize = CHUNK_LEN + 1024;

thread_local! {
    // Borrowed for one poll, never across two.
    static INCOMING: RefCell<Box<[u8]>> = RefCell::new(vec![0; INCOMING_LEN].into_boxed_slice());
    static OUTGOING: RefCell<Box<[u8]>> = RefCell::new(vec![0; OUTGOING_LEN].into_boxed_slice());
}

/// The client's side of TLS over `S`, after the handshake.
pub struct TlsStream<S> {
    socket: S,
    tls: Box<UnbufferedClientConnection>,
    /// Read from the socket, and not discarded by the connection.
    partial: BytesMut,
    /// Decrypted, and not read yet.
    plaintext: BytesMut,
    /// Encrypted, and not accepted by the socket yet.
    encrypted: BytesMut,
    state: State,
    close_sent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Handshaking,
    Open,
    /// The peer has sent close_notify; it may still be written to.
    PeerClosed,
    /// The connection must not be used any more.
    Failed,
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// The handshake over `socket` with the peer `name`.
    ///
    /// Not cancel safe, and need not be: dropping it drops the connection.
    pub async fn connect(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
        socket: S,
    ) -> io::Result<Self> {
        let tls = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
        let mut stream = Self {
            socket,
            tls: Box::new(tls),
            partial: BytesMut::new(),
            plaintext: BytesMut::new(),
            encrypted: BytesMut::new(),
            state: State::Handshaking,
            close_sent: false,
        };
        stream.advance(&mut [], &mut ReadBuf::new(&mut []))?;
        poll_fn(|cx| stream.poll_handshake(cx)).await?;
        Ok(stream)
    }

    /// Whether the session was resumed, without a certificate.
    pub fn is_resumed(&self) -> bool {
        self.tls.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// The socket.
    pub fn get_ref(&self) -> &S {
        &self.socket
    }

    /// The same connection over what `map` makes of its socket.
    pub(super) fn try_map<T>(
        self,
        map: impl FnOnce(S) -> io::Result<T>,
    ) -> io::Result<TlsStream<T>> {
        let Self {
            socket,
            tls,
            partial,
            plaintext,
            encrypted,
            state,
            close_sent,
        } = self;
        Ok(TlsStream {
            socket: map(socket)?,
            tls,
            partial,
            plaintext,
            encrypted,
            state,
            close_sent,
        })
    }

    /// The negotiated version.
    pub fn protocol_version(&self) -> Option<ProtocolVersion> {
        self.tls.protocol_version()
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_drain(cx))?;
            ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
            if self.state != State::Handshaking {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_fill(cx, &mut ReadBuf::new(&mut [])))?;
        }
    }

    /// Reads once from the socket and processes the records.
    fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // The connection's own records are sent as soon as possible; reading does not wait for that.
        if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        INCOMING.with_borrow_mut(|incoming| {
            let kept = self.partial.len();
            let end = READ_LEN.max(kept + MIN_READ);
            let Some((front, space)) = incoming
                .get_mut(..end)
                .and_then(|incoming| incoming.split_at_mut_checked(kept))
            else {
                // Cannot happen: rustls refuses longer records and messages.
                self.state = State::Failed;
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            };
            let mut space = ReadBuf::new(space);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut space))?;
            let read = space.filled().len();
            if read == 0 {
                // Without close_notify a third party may have cut the connection.
                self.state = State::Failed;
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            // After the read: a wake-up that finds no bytes copies nothing.
            front.copy_from_slice(&self.partial);
            let records = incoming.get_mut(..kept + read).unwrap_or_default();
            let done = match self.advance(records, out) {
                Ok(done) => done,
                Err(error) => {
                    // Sends the alert, if the socket accepts it at once.
                    let _ = self.poll_drain(cx);
                    return Poll::Ready(Err(error));
                }
            };
            let rest = records.get(done..).unwrap_or_default();
            keep(&mut self.partial, rest);
            Poll::Ready(Ok(()))
        })
    }

    /// Processes `records`: plaintext goes to `out` and the excess is kept; responses are encrypted. Returns the number of
    /// bytes at the front that are processed.
    fn advance(&mut self, records: &mut [u8], out: &mut ReadBuf<'_>) -> io::Result<usize> {
        let mut done = 0;
        loop {
            let rest = records.get_mut(done..).unwrap_or_default();
            let UnbufferedStatus { discard, state } = self.tls.process_tls_records(rest);
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(invalid)?;
                        done += record.discard;
                        let now = record.payload.len().min(out.remaining());
                        let (now, later) = record.payload.split_at(now);
                        out.put_slice(now);
                        self.plaintext.extend_from_slice(later);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.encrypted)?,
                // Encrypted bytes are sent in order.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                // TLS 1.3 closes each direction on its own (RFC 8446, 6.1): the client's last bytes can still be sent.
                Ok(ConnectionState::PeerClosed) => self.state = State::PeerClosed,
                Ok(ConnectionState::WriteTraffic(_)) => {
                    if self.state == State::Handshaking {
                        self.state = State::Open;
                    }
                    return Ok(done + discard);
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::Closed) => {
                    return Ok(done + discard);
                }
                // Early data, which a client does not receive and this one does not send.
                Ok(_) => {
                    self.state = State::Failed;
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Err(error) => {
                    self.state = State::Failed;
                    let rest = records.get_mut(done + discard..).unwrap_or_default();
                    let alert = self.tls.process_tls_records(rest);
                    if let Ok(ConnectionState::EncodeTlsData(alert)) = alert.state {
                        encode(alert, &mut self.encrypted)?;
                    }
                    return Err(invalid(error));
                }
            }
            done += discard;
            // All records are processed; the connection's own records are sent with the next write.
            if self.state == State::Open && done == records.len() && self.encrypted.is_empty() {
                return Ok(done);
            }
        }
    }

    /// Encrypts `chunk` into `space`; returns the length.
    fn encrypt(&mut self, chunk: &[u8], space: &mut [u8]) -> io::Result<usize> {
        self.write_traffic(|traffic| traffic.encrypt(chunk, space))
    }

    fn write_traffic(
        &mut self,
        mut write: impl FnMut(
            &mut WriteTraffic<'_, ClientConnectionData>,
        ) -> Result<usize, EncryptError>,
    ) -> io::Result<usize> {
        for _ in 0..2 {
            let UnbufferedStatus { discard, state } =
                self.tls.process_tls_records(&mut self.partial);
            if let Ok(ConnectionState::WriteTraffic(mut traffic)) = state {
                let written = write(&mut traffic).map_err(|error| {
                    self.state = State::Failed;
                    io::Error::new(io::ErrorKind::InvalidData, error)
                })?;
                self.partial.advance(discard);
                return Ok(written);
            }
            // Not reached, because nothing is left over from the last advance.
            drop(state);
            self.partial.advance(discard);
            let mut partial = mem::take(&mut self.partial);
            let done = self.advance(&mut partial, &mut ReadBuf::new(&mut []))?;
            partial.advance(done);
            self.partial = partial;
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    /// Writes the encrypted bytes that are left from before.
    #[inline]
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.encrypted.is_empty() {
            return Poll::Ready(Ok(()));
        }
        self.poll_write_rest(cx)
    }

    #[cold]
    fn poll_write_rest(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.encrypted.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.encrypted))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.encrypted.advance(written),
            }
            if self.encrypted.is_empty() {
                self.encrypted = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if !this.plaintext.is_empty() {
            let now = this.plaintext.len().min(buf.remaining());
            buf.put_slice(this.plaintext.get(..now).unwrap_or_default());
            this.plaintext.advance(now);
            if this.plaintext.is_empty() {
                this.plaintext = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        while buf.filled().len() == before && buf.remaining() > 0 {
            match this.state {
                State::PeerClosed => break,
                State::Failed => return Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
                State::Handshaking | State::Open => ready!(this.poll_fill(cx, buf))?,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Bytes accepted before are sent first; nothing more is accepted meanwhile.
        ready!(this.poll_drain(cx))?;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if this.close_sent || this.state == State::Failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let chunk = buf.get(..CHUNK_LEN).unwrap_or(buf);
        OUTGOING.with_borrow_mut(|outgoing| {
            let sealed = this.encrypt(chunk, outgoing)?;
            let mut rest = outgoing.get(..sealed).unwrap_or_default();
            if !this.encrypted.is_empty() {
                this.encrypted.extend_from_slice(rest);
                return Poll::Ready(Ok(chunk.len()));
            }
            while !rest.is_empty() {
                match Pin::new(&mut this.socket).poll_write(cx, rest) {
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                    }
                    Poll::Ready(Ok(written)) => rest.advance(written),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        // The chunk counts as written: a sealed record cannot be taken back, only sent later.
                        this.encrypted.extend_from_slice(rest);
                        break;
                    }
                }
            }
            Poll::Ready(Ok(chunk.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.close_sent && this.state != State::Failed {
            this.close_sent = true;
            let mut alert = [0; 128];
            let written = this.write_traffic(|traffic| traffic.queue_close_notify(&mut alert))?;
            this.encrypted
                .extend_from_slice(alert.get(..written).unwrap_or_default());
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

impl<S> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, sealed: &mut BytesMut) -> io::Result<()> {
    let at = sealed.len();
    let mut room = 0;
    loop {
        sealed.resize(at + room, 0);
        // The first call has no space and returns the size.
        match data.encode(sealed.get_mut(at..).unwrap_or_default()) {
            Ok(written) => {
                sealed.truncate(at + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(short)) if short.required_size > room => {
                room = short.required_size;
            }
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

/// Sets `kept` to `rest`; frees its memory if that is empty.
fn keep(kept: &mut BytesMut, rest: &[u8]) {
    if rest.is_empty() {
        if kept.capacity() > 0 {
            *kept = BytesMut::new();
        }
    } else {
        kept.clear();
        kept.extend_from_slice(rest);
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
pub(super) mod tests;
