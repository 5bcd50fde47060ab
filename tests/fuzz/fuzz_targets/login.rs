//! A login at a server that sends anything, in pieces of any size. The first byte selects how it is done: two bits for what is
//! configured, the others for the size of the pieces.
#![no_main]

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use lakebase_proxy::upstream::fuzzing;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Gives what is there, piece by piece, then ends; takes everything.
struct Server<'a> {
    data: &'a [u8],
    piece: usize,
}

impl AsyncRead for Server<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let now = self.piece.min(buf.remaining()).min(self.data.len());
        let (piece, rest) = self.data.split_at(now);
        buf.put_slice(piece);
        self.data = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Server<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&how, data)) = data.split_first() else {
        return;
    };
    let piece = usize::from(how >> 2).saturating_add(1);
    let encoding = (how & 1 == 1).then_some("LATIN1");
    let server = Server { data, piece };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(fuzzing::log_in(server, encoding, how & 2 == 2));
});
