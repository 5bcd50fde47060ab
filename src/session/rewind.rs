//! A stream with bytes put back in front of it that had been read too early.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::net::socket::{Socket, Transport};

/// Reads `front` first, then the stream; writes go straight through.
#[derive(Debug)]
pub(super) struct Rewind<S> {
    front: BytesMut,
    stream: S,
}

impl<S> Rewind<S> {
    pub(super) fn new(front: BytesMut, stream: S) -> Self {
        Self { front, stream }
    }
}

impl<S: Transport> Transport for Rewind<S> {
    fn socket(&self) -> Option<&Socket> {
        self.stream.socket()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewind<S> {
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
            // Whoever waits should not keep the memory.
            self.front = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewind<S> {
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
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    #[tokio::test]
    async fn what_was_read_comes_first() {
        let (mut far, near) = duplex(16);
        tokio::io::AsyncWriteExt::write_all(&mut far, b"end")
            .await
            .unwrap();
        drop(far);
        let mut rewound = Rewind::new(BytesMut::from(&b"beginning, "[..]), near);
        let mut pieces = [0; 4];
        rewound.read_exact(&mut pieces).await.unwrap();
        assert_eq!(&pieces, b"begi");
        let mut rest = String::new();
        rewound.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "nning, end");
    }
}
