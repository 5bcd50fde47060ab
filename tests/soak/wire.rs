//! A Postgres client that keeps nothing: it sees headers and streams what is between them.

use std::{io, net::SocketAddr, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const CHUNK: usize = 64 * 1024;

pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    buffer: BytesMut,
    /// Process id and secret, as bytes of a CancelRequest.
    pub(crate) key: Bytes,
}

impl Wire {
    /// Connects as a user that the proxy replaces, with no password, up to ReadyForQuery.
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        let mut wire = Self::open(address).await?;
        wire.send(&startup()).await?;
        loop {
            let (tag, length) = wire.header().await?;
            let body = wire.body(length).await?;
            match tag {
                b'E' => {
                    return Err(io::Error::other(
                        String::from_utf8_lossy(&body).into_owned(),
                    ));
                }
                b'K' => wire.key = body,
                b'Z' => return Ok(wire),
                _ => {}
            }
        }
    }

    /// Connects without a message.
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: BytesMut::with_capacity(CHUNK),
            key: Bytes::new(),
        })
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Type of the next message, and how long its body is.
    pub(crate) async fn header(&mut self) -> io::Result<(u8, usize)> {
        while self.buffer.len() < 5 {
            self.fill().await?;
        }
        let tag = self.buffer.get_u8();
        let length = usize::try_from(self.buffer.get_u32()).map_err(io::Error::other)?;
        Ok((tag, length - 4))
    }

    /// A body that is small.
    pub(crate) async fn body(&mut self, length: usize) -> io::Result<Bytes> {
        while self.buffer.len() < length {
            self.fill().await?;
        }
        Ok(self.buffer.split_to(length).freeze())
    }

    /// A body that is not, piece by piece.
    pub(crate) async fn pieces(
        &mut self,
        mut length: usize,
        mut piece: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        while length > 0 {
            if self.buffer.is_empty() {
                self.fill().await?;
            }
            let now = length.min(self.buffer.len());
            piece(&self.buffer[..now]);
            self.buffer.advance(now);
            length -= now;
        }
        Ok(())
    }

    /// Runs a small query; the body of the first row or of the error.
    pub(crate) async fn query(&mut self, sql: &str) -> io::Result<Result<Bytes, String>> {
        self.send(&query(sql)).await?;
        let mut answer = Ok(Bytes::new());
        loop {
            let (tag, length) = self.header().await?;
            let body = self.body(length).await?;
            match tag {
                b'D' => answer = Ok(body),
                b'E' => answer = Err(String::from_utf8_lossy(&body).into_owned()),
                b'Z' => return Ok(answer),
                _ => {}
            }
        }
    }

    /// Ends the session in order.
    pub(crate) async fn terminate(mut self) -> io::Result<()> {
        self.send(b"X\0\0\0\x04").await?;
        // The server closes; waiting for that is what makes it orderly.
        while self.stream.read_buf(&mut self.buffer).await? > 0 {}
        Ok(())
    }

    /// Dies: what the kernel sends for a process that was killed with data unread.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream)
            .set_linger(Some(Duration::ZERO))
            .ok();
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.buffer.reserve(CHUNK);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

pub(crate) fn startup() -> Vec<u8> {
    let body = b"user\0soak\0database\0databricks_postgres\0application_name\0soak\0\0";
    let length = u32::try_from(body.len() + 8).unwrap_or_default();
    [
        &length.to_be_bytes()[..],
        &0x0003_0000_u32.to_be_bytes(),
        body,
    ]
    .concat()
}

pub(crate) fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &[sql.as_bytes(), b"\0"].concat())
}

pub(crate) fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or_default();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

pub(crate) fn cancel_request(key: &[u8]) -> Vec<u8> {
    let length = u32::try_from(key.len() + 8).unwrap_or_default();
    [
        &length.to_be_bytes()[..],
        &80_877_102_u32.to_be_bytes(),
        key,
    ]
    .concat()
}
