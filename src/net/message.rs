//! Whole protocol messages over any byte stream, for the phases that exchange whole messages: logins and the console.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::protocol::frame::{FrameError, Message, take_message};

/// Why no message could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Includes an end of the stream, as [`io::ErrorKind::UnexpectedEof`].
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads one message of at most `limit` bytes. `buffer` holds what has been read beyond the last message.
///
/// Cancel safe: bytes already read stay in `buffer`.
pub(crate) async fn read_message<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut BytesMut,
    limit: usize,
) -> Result<Message, ReadError> {
    loop {
        // First, as the peer may have sent it together with the last message.
        if let Some(message) = take_message(buffer, limit)? {
            return Ok(message);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// Writes all of `bytes` and flushes, which a TLS stream needs before the peer can answer. Not cancel safe.
pub(crate) async fn write_and_flush<S: AsyncWrite + Unpin>(
    stream: &mut S,
    bytes: &[u8],
) -> io::Result<()> {
    stream.write_all(bytes).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn messages_are_read_whole_however_they_arrive() {
        let (mut ours, mut theirs) = duplex(3);
        let sent =
            async move { write_and_flush(&mut theirs, b"Q\0\0\0\x08abc\0S\0\0\0\x04X\0\0").await };
        let received = async move {
            let mut buffer = BytesMut::new();
            let query = read_message(&mut ours, &mut buffer, 100).await.unwrap();
            assert_eq!((query.tag, query.body()), (b'Q', &b"abc\0"[..]));
            let sync = read_message(&mut ours, &mut buffer, 100).await.unwrap();
            assert_eq!((sync.tag, sync.body()), (b'S', &b""[..]));
            let end = read_message(&mut ours, &mut buffer, 100).await.unwrap_err();
            assert_eq!(end.to_string(), "unexpected end of file");
        };
        let (sent, ()) = tokio::join!(sent, received);
        sent.unwrap();
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_refused_before_it_is_read() {
        let (mut ours, mut theirs) = duplex(64);
        write_and_flush(&mut theirs, b"Q\0\0\x10\0").await.unwrap();
        let error = read_message(&mut ours, &mut BytesMut::new(), 100).await;
        assert!(matches!(
            error,
            Err(ReadError::Frame(FrameError::TooLong { .. }))
        ));
    }
}
