//! Types without values, with the methods that are used of the real ones.

use std::{
    convert::Infallible,
    io,
    os::windows::io::{AsSocket, BorrowedSocket},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::PeerProcess;

/// No connection comes from a Unix user.
pub(crate) fn effective_uid() -> u32 {
    0
}

/// A listener without a runtime.
#[derive(Debug)]
pub enum BoundUnix {}

/// A listener.
#[derive(Debug)]
pub enum UnixListener {}

/// A connection.
#[derive(Debug)]
pub enum UnixStream {}

pub(crate) fn peer(socket: &UnixStream) -> io::Result<PeerProcess> {
    match *socket {}
}

pub(crate) fn path(socket: &BoundUnix) -> io::Result<Option<PathBuf>> {
    match *socket {}
}

impl BoundUnix {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        match *self {}
    }
}

impl UnixListener {
    #[expect(clippy::needless_pass_by_value, reason = "as the real one takes it")]
    pub(crate) fn from_std(bound: BoundUnix) -> io::Result<Self> {
        match bound {}
    }

    #[expect(clippy::unused_async, reason = "the real one is")]
    pub(crate) async fn accept(&self) -> io::Result<(UnixStream, Infallible)> {
        match *self {}
    }
}

impl UnixStream {
    #[expect(clippy::unused_async, reason = "the real one is")]
    pub(crate) async fn connect(_path: impl AsRef<Path>) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn from_std(never: Infallible) -> io::Result<Self> {
        match never {}
    }

    pub(crate) fn into_std(self) -> io::Result<Infallible> {
        match self {}
    }
}

impl AsSocket for BoundUnix {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        match *self {}
    }
}

impl AsSocket for UnixStream {
    fn as_socket(&self) -> BorrowedSocket<'_> {
        match *self {}
    }
}

impl AsyncRead for UnixStream {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match *self {}
    }
}

impl AsyncWrite for UnixStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match *self {}
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match *self {}
    }
}
