//! The client's byte stream: plain, or TLS that begins in the middle of the handshake.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, BufMut, BytesMut};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    net::{
        message::write_and_flush,
        socket::{HangUp, Socket, Transport},
        tls::ALPN_POSTGRESQL,
    },
    status::Encrypted,
};

/// Enough for most startup messages.
const INITIAL_BUFFER: usize = 1024;
/// Bytes buffered from a client that waits for its server connection.
const EARLY_LIMIT: usize = 16 * 1024;
/// How often a client that has sent more is checked: its end lies behind bytes that are not read.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);
/// Time for a client to read the last message, and again to close its side.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A client's connection.
pub(super) struct Client<S> {
    pub(super) stream: ClientStream<S>,
    /// Received, but not yet interpreted.
    pub(super) received: BytesMut,
}

/// A client's byte stream.
pub(super) enum ClientStream<S> {
    Plain(S),
    /// A box, as clients without TLS need no room for it.
    Tls(Box<TlsStream<Rewind<S>>>),
    /// Taken for, or lost in, a TLS handshake.
    Closed,
}

impl<S: Transport> Client<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream: ClientStream::Plain(stream),
            received: BytesMut::with_capacity(INITIAL_BUFFER),
        }
    }

    /// Performs the TLS handshake, which begins with what was received already.
    ///
    /// Not cancel safe. The caller sets the deadline.
    pub(super) async fn accept_tls(&mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        // The handshake consumes the stream; after an error there is nothing left to write to.
        let stream = std::mem::replace(&mut self.stream, ClientStream::Closed);
        let ClientStream::Plain(stream) = stream else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let received =
            std::mem::replace(&mut self.received, BytesMut::with_capacity(INITIAL_BUFFER));
        let accepting = TlsAcceptor::from(config).accept(Rewind {
            front: received,
            stream,
        });
        self.stream = ClientStream::Tls(Box::new(accepting.await?));
        Ok(())
    }

    /// Whether the client chose the application protocol `postgresql`, which direct TLS requires.
    pub(super) fn has_alpn(&self) -> bool {
        matches!(&self.stream, ClientStream::Tls(stream)
            if stream.get_ref().1.alpn_protocol() == Some(ALPN_POSTGRESQL))
    }

    pub(super) fn encryption(&self) -> Encrypted {
        match &self.stream {
            ClientStream::Tls(stream) => match stream.get_ref().1.protocol_version() {
                Some(rustls::ProtocolVersion::TLSv1_3) => Encrypted::Tls13,
                _ => Encrypted::Tls12,
            },
            ClientStream::Plain(_) | ClientStream::Closed => Encrypted::No,
        }
    }

    /// Frees the buffer unless there is something in it; the next read allocates another.
    pub(super) fn shrink(&mut self) {
        if self.received.is_empty() {
            self.received = BytesMut::new();
        }
    }

    /// Receives more; 0 at the end. Cancel safe.
    pub(super) async fn receive(&mut self) -> io::Result<usize> {
        self.stream.read_buf(&mut self.received).await
    }

    /// Not cancel safe.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_and_flush(&mut self.stream, bytes).await
    }

    /// Sends the last message, if any, and closes; `false` when the client does not take it in time.
    pub(super) async fn finish(&mut self, bytes: &[u8]) -> bool {
        let finishing = async {
            self.send(bytes).await?;
            // libpq 17 takes an end without a TLS close_notify for a cancel request that failed.
            self.stream.shutdown().await
        };
        matches!(timeout(CLOSE_TIMEOUT, finishing).await, Ok(Ok(())))
    }

    /// Reads until the client closes too: closing with bytes unread resets the connection, and the reset may overtake
    /// the last message.
    pub(super) async fn linger(&mut self) {
        // On the heap, as every session's task has room for all that it may come to.
        let mut ignored = vec![0; 512];
        let closed = async { while let Ok(1..) = self.stream.read(&mut ignored).await {} };
        let _ = timeout(CLOSE_TIMEOUT, closed).await;
    }

    /// Returns when the client hangs up; buffers what it sends meanwhile. Cancel safe.
    pub(super) async fn wait_for_hang_up(&mut self) {
        // Only a read reveals the end of a stream; the bytes go to the server after the login.
        while self.received.len() < EARLY_LIMIT {
            let space = EARLY_LIMIT - self.received.len();
            let mut buffer = (&mut self.received).limit(space);
            if let Ok(0) | Err(_) = self.stream.read_buf(&mut buffer).await {
                return;
            }
        }
        while self.stream.hang_up_state() == HangUp::None {
            sleep(HANG_UP_CHECK).await;
        }
    }
}

impl<S: Transport> Transport for ClientStream<S> {
    fn socket(&self) -> Option<&Socket> {
        match self {
            Self::Plain(stream) => stream.socket(),
            Self::Tls(stream) => stream.get_ref().0.stream.socket(),
            Self::Closed => None,
        }
    }
}

impl<S: Transport> AsyncRead for ClientStream<S> {
    #[inline]
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Closed => Poll::Ready(Ok(())),
        }
    }
}

impl<S: Transport> AsyncWrite for ClientStream<S> {
    #[inline]
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Closed => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Closed => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Closed => Poll::Ready(Ok(())),
        }
    }
}

/// A stream that yields bytes read too early first: the first TLS record, by which direct TLS is recognized.
pub(super) struct Rewind<S> {
    front: BytesMut,
    stream: S,
}

impl<S: Transport> AsyncRead for Rewind<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.front.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let length = self.front.len().min(buffer.remaining());
        buffer.put_slice(self.front.get(..length).unwrap_or_default());
        self.front.advance(length);
        if self.front.is_empty() {
            // An idle session keeps no buffer.
            self.front = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Transport> AsyncWrite for Rewind<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn a_rewound_stream_yields_the_early_bytes_first() {
        let (mut far, near) = duplex(16);
        far.write_all(b"end").await.unwrap();
        drop(far);
        let mut rewound = Rewind {
            front: BytesMut::from(&b"beginning, "[..]),
            stream: near,
        };
        let mut pieces = [0; 4];
        rewound.read_exact(&mut pieces).await.unwrap();
        assert_eq!(&pieces, b"begi");
        let mut rest = String::new();
        rewound.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "nning, end");
    }
}
