//! The next request of a client that has no server connection, and its place in what the client has sent.
//!
//! Half a message must not hold a server connection, so a client gets one with its first whole request only.

use std::{future::poll_fn, time::Duration};

use bytes::{Buf, BytesMut};
use tokio::time::{Instant, sleep_until};

use super::{client::Client, relay::pipe::poll_receive};
use crate::{
    net::socket::Transport,
    protocol::{
        backend::ready_for_query,
        frame::{HEADER_LEN, Header, tag, whole_messages},
        requests::TransactionStatus,
    },
    shutdown::Shutdown,
};

/// From this size on a request needs a server connection although it is not whole: it would be held in memory.
const LARGE: usize = 16 * 1024;
/// The same after this time, if it begins with a whole message: its error is due before its Sync.
const LATE: Duration = Duration::from_millis(100);

/// What a client without a server connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It has sent what needs a server.
    Request,
    /// It has left.
    Left,
    /// It is to be ended.
    Shutdown,
}

/// The front of what a client has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    /// Less than one message.
    Nothing,
    /// A request as far as its answer, of this many bytes.
    Whole(usize),
    /// Whole messages of a request that goes on.
    Begun,
    /// The same, and answers are due.
    Flushed,
    /// A Sync with nothing before it, which is answered without a server.
    Sync,
    /// A message that a server at rest ignores, of this many bytes: the end of a COPY that has failed.
    Ignored(usize),
    Terminate,
}

/// Waits for the next request, which stays in `client.received`. Cancel safe.
pub(super) async fn next_request<S: Transport>(
    client: &mut Client<S>,
    shutdown: &Shutdown,
) -> Next {
    let mut late_at = None;
    loop {
        match front(&client.received) {
            Front::Whole(_) | Front::Flushed => return Next::Request,
            Front::Terminate => return Next::Left,
            Front::Sync => {
                client.received.advance(HEADER_LEN);
                let mut answer = BytesMut::new();
                ready_for_query(&mut answer, TransactionStatus::Idle);
                tokio::select! {
                    biased;
                    sent = client.send(&answer) => if sent.is_err() {
                        return Next::Left;
                    },
                    // It does not read, and so would not read the reason.
                    () = shutdown.draining().cancelled() => return Next::Left,
                }
                continue;
            }
            Front::Ignored(length) => {
                client.received.advance(length);
                continue;
            }
            Front::Begun => {
                late_at.get_or_insert_with(|| Instant::now() + LATE);
            }
            Front::Nothing => {}
        }
        if client.received.len() >= LARGE {
            return Next::Request;
        }
        client.shrink();
        let Client { stream, received } = client;
        tokio::select! {
            biased;
            read = poll_fn(|cx| poll_receive(cx, stream, received)) => {
                if let Ok(0) | Err(_) = read {
                    return Next::Left;
                }
            }
            () = shutdown.draining().cancelled() => return Next::Shutdown,
            () = sleep_until(late_at.unwrap_or_else(Instant::now)), if late_at.is_some() => {
                return Next::Request;
            }
        }
    }
}

/// Removes the request at the front, if it is there as far as its answer.
pub(super) fn take_request(received: &mut BytesMut) -> bool {
    let Front::Whole(length) = front(received) else {
        return false;
    };
    received.advance(length);
    true
}

fn front(received: &[u8]) -> Front {
    let mut end = 0;
    for (tag, body) in whole_messages(received) {
        let is_first = end == 0;
        end += HEADER_LEN + body.len();
        match tag {
            // With a body it is an error, which is the server's to report.
            tag::SYNC if is_first && body.is_empty() => return Front::Sync,
            tag::TERMINATE if is_first => return Front::Terminate,
            tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL if is_first => {
                return Front::Ignored(end);
            }
            tag::QUERY | tag::FUNCTION_CALL | tag::SYNC => return Front::Whole(end),
            tag::FLUSH => return Front::Flushed,
            _ => {}
        }
    }
    match Header::first(received.get(end..).unwrap_or_default()) {
        // The server refuses it.
        Err(_) => Front::Flushed,
        _ if end == 0 => Front::Nothing,
        _ => Front::Begun,
    }
}
