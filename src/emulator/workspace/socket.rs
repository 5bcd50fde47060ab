//! HTTP connections that a fault can break: closed or reset instead of answered.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

use crate::emulator::loss;

const WHOLE: u8 = 0;
const CLOSE: u8 = 1;
const RESET: u8 = 2;

/// What a connection and its requests share.
#[derive(Debug)]
struct Line {
    state: AtomicU8,
    /// The same socket once more; `None` without a descriptor for it.
    socket: Option<Socket>,
}

/// A request's handle on its connection.
#[derive(Clone, Debug)]
pub(super) struct Breaker(Arc<Line>);

impl Breaker {
    /// The answer that follows is not sent; the connection closes.
    pub(super) fn close(&self) {
        self.0.state.store(CLOSE, Ordering::Relaxed);
    }

    /// The answer that follows is not sent; the connection is reset.
    pub(super) fn reset(&self) {
        self.0.state.store(RESET, Ordering::Relaxed);
    }

    /// From now on no packet of the client's arrives.
    pub(super) fn blackhole(&self) {
        if let Some(socket) = &self.0.socket {
            loss::begin(socket);
        }
    }
}

/// Accepts breakable connections.
pub(super) struct BreakableListener(pub(super) TcpListener);

impl Listener for BreakableListener {
    type Io = BreakableStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BreakableStream, SocketAddr) {
        let (stream, address) = Listener::accept(&mut self.0).await;
        let line = Line {
            state: AtomicU8::new(WHOLE),
            socket: SockRef::from(&stream).try_clone().ok(),
        };
        let line = Arc::new(line);
        (BreakableStream { stream, line }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Connected<IncomingStream<'_, BreakableListener>> for Breaker {
    fn connect_info(incoming: IncomingStream<'_, BreakableListener>) -> Self {
        Self(Arc::clone(&incoming.io().line))
    }
}

/// A connection whose writes fail once its breaker was used.
pub(super) struct BreakableStream {
    stream: TcpStream,
    line: Arc<Line>,
}

impl BreakableStream {
    fn check(&self) -> io::Result<()> {
        match self.line.state.load(Ordering::Relaxed) {
            WHOLE => Ok(()),
            state => {
                if state == RESET {
                    let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
                }
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}

impl AsyncRead for BreakableStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for BreakableStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
