//! TLS over a socket, with no buffer of its own while it waits.
//!
//! rustls's unbuffered connection does all that is TLS: handshake, keys and their updates, tickets, alerts. This
//! module owns the bytes around it: records are read into and sealed in buffers of the worker's, which are borrowed for
//! the length of a poll; a stream keeps only what cannot be helped: the front of a record whose rest has not come, the
//! rest of a record that the reader had no room for, sealed bytes that the socket has not taken. It never sees a key.
//!
//! The connection must be shown all bytes that it has not let go of, each time: in them it may have put the first half
//! of a handshake message.

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

/// What is read at a time, with what is left from before: several records, so that one system call brings them all.
const READ_LEN: usize = 64 * 1024;
/// Room for the longest handshake message with its records around it, beyond which rustls gives up by itself, and more.
const INCOMING_LEN: usize = 96 * 1024;
/// What is read at least, however much is left from before.
const LEAST_READ: usize = 4 * 1024;
/// What is sealed at a time: four whole records.
const CHUNK_LEN: usize = 64 * 1024;
/// Room for what four records add, and for a key update before them.
const OUTGOING_LEN: usize = CHUNK_LEN + 1024;

thread_local! {
    /// Borrowed for the length of a poll, never across one.
    static INCOMING: RefCell<Box<[u8]>> = RefCell::new(vec![0; INCOMING_LEN].into_boxed_slice());
    static OUTGOING: RefCell<Box<[u8]>> = RefCell::new(vec![0; OUTGOING_LEN].into_boxed_slice());
}

/// A client's side of TLS over `S`, its handshake done.
pub struct TlsStream<S> {
    socket: S,
    tls: Box<UnbufferedClientConnection>,
    /// Read from the socket; the connection has not let go of it.
    partial: BytesMut,
    /// Opened, but not read yet.
    plaintext: BytesMut,
    /// Sealed, but not taken by the socket yet.
    sealed: BytesMut,
    state: State,
    close_sent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Handshaking,
    Open,
    /// The peer has said that nothing more comes; it may still be sent to.
    PeerClosed,
    /// The connection is not to be asked anything any more.
    Failed,
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Shakes hands over `socket`, the peer being `name`.
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
            sealed: BytesMut::new(),
            state: State::Handshaking,
            close_sent: false,
        };
        stream.advance(&mut [], &mut ReadBuf::new(&mut []))?;
        poll_fn(|cx| stream.poll_handshake(cx)).await?;
        Ok(stream)
    }

    /// Whether a ticket of an earlier connection spared the peer its certificate.
    pub fn is_resumed(&self) -> bool {
        self.tls.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// What is under it.
    pub fn get_ref(&self) -> &S {
        &self.socket
    }

    /// What the two agreed on.
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

    /// Reads once from the socket and takes in what has come.
    fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // What the connection itself had to say goes out as soon as it can; reading need not wait for that.
        if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
            return Poll::Ready(Err(error));
        }
        INCOMING.with_borrow_mut(|incoming| {
            let kept = self.partial.len();
            let end = READ_LEN.max(kept + LEAST_READ);
            let Some((front, room)) = incoming
                .get_mut(..end)
                .and_then(|incoming| incoming.split_at_mut_checked(kept))
            else {
                // rustls refuses longer records and messages, so this cannot come about.
                self.state = State::Failed;
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            };
            let mut space = ReadBuf::new(room);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut space))?;
            let read = space.filled().len();
            if read == 0 {
                // Without a goodbye somebody else may have cut the connection.
                self.state = State::Failed;
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            front.copy_from_slice(&self.partial);
            let records = incoming.get_mut(..kept + read).unwrap_or_default();
            let done = match self.advance(records, out) {
                Ok(done) => done,
                Err(error) => {
                    // The alert tells the peer why, if it can be told.
                    let _ = self.poll_drain(cx);
                    return Poll::Ready(Err(error));
                }
            };
            let rest = records.get(done..).unwrap_or_default();
            keep(&mut self.partial, rest);
            Poll::Ready(Ok(()))
        })
    }

    /// Takes in `records`: what they hold goes to `out`, and what `out` has no room for is kept; answers are sealed.
    /// Returns how many bytes at the front are done with.
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
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.sealed)?,
                // Everything sealed goes out in its order.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
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
                // Early data is a server's business, and we send none.
                Ok(_) => {
                    self.state = State::Failed;
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Err(error) => {
                    self.state = State::Failed;
                    let rest = records.get_mut(done + discard..).unwrap_or_default();
                    let alert = self.tls.process_tls_records(rest);
                    if let Ok(ConnectionState::EncodeTlsData(alert)) = alert.state {
                        encode(alert, &mut self.sealed)?;
                    }
                    return Err(invalid(error));
                }
            }
            done += discard;
            // Nothing is left that could say more; what the connection has to say goes with the next write.
            if self.state == State::Open && done == records.len() && self.sealed.is_empty() {
                return Ok(done);
            }
        }
    }

    /// Seals `chunk` at the front of `room`, and says how long that became.
    fn seal(&mut self, chunk: &[u8], room: &mut [u8]) -> io::Result<usize> {
        self.write_traffic(|traffic| traffic.encrypt(chunk, room))
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
            // Nothing is left over from the last advance, so this is not reached; it costs nothing to be sure.
            drop(state);
            self.partial.advance(discard);
            let mut partial = mem::take(&mut self.partial);
            let done = self.advance(&mut partial, &mut ReadBuf::new(&mut []))?;
            partial.advance(done);
            self.partial = partial;
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    /// Hands the socket what was sealed before.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.sealed.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.sealed))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.sealed.advance(written),
            }
            if self.sealed.is_empty() {
                self.sealed = BytesMut::new();
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
        // What was taken before goes first, and nothing more is taken meanwhile.
        ready!(this.poll_drain(cx))?;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if this.close_sent || this.state == State::Failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let chunk = buf.get(..CHUNK_LEN).unwrap_or(buf);
        OUTGOING.with_borrow_mut(|outgoing| {
            let sealed = this.seal(chunk, outgoing)?;
            let mut rest = outgoing.get(..sealed).unwrap_or_default();
            if !this.sealed.is_empty() {
                this.sealed.extend_from_slice(rest);
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
                        this.sealed.extend_from_slice(rest);
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
            let mut goodbye = [0; 128];
            let written = this.write_traffic(|traffic| traffic.queue_close_notify(&mut goodbye))?;
            this.sealed
                .extend_from_slice(goodbye.get(..written).unwrap_or_default());
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

/// Makes `kept` hold `rest`, and no memory where that is nothing.
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
mod tests;
