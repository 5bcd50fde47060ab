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
        traces::{is_extended, is_request},
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

/// What a client sends that no server gets, as far as it is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discarding {
    /// Bytes of the current message.
    left: usize,
    then: Then,
}

/// What follows the current message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    NextRequest,
    ReadyForQuery,
    /// Messages up to a Sync, which a server skips after an error.
    Skipped,
}

/// How far a client has sent what is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discarded {
    Part,
    All,
    /// All, and a ReadyForQuery is due.
    Request,
}

impl Discarding {
    /// Of the refused request that `received` begins with; `None` if it is none.
    pub(super) fn request(received: &[u8]) -> Option<Self> {
        let header = Header::first(received).ok()??;
        let then = match header.tag {
            tag::QUERY | tag::FUNCTION_CALL => Then::ReadyForQuery,
            tag if is_extended(tag) => Then::Skipped,
            _ => return None,
        };
        let left = header.frame_len();
        Some(Self { left, then })
    }

    /// Discards what has been received.
    pub(super) fn discard(&mut self, received: &mut BytesMut) -> Discarded {
        loop {
            let length = self.left.min(received.len());
            received.advance(length);
            self.left -= length;
            match self.then {
                _ if self.left > 0 => return Discarded::Part,
                Then::NextRequest => return Discarded::All,
                Then::ReadyForQuery => return Discarded::Request,
                Then::Skipped => {}
            }
            match Header::first(received) {
                Ok(None) => return Discarded::Part,
                Ok(Some(header)) if header.tag != tag::TERMINATE && is_request(header.tag) => {
                    self.left = header.frame_len();
                    if header.tag == tag::SYNC {
                        self.then = Then::ReadyForQuery;
                    }
                }
                // No server skips these.
                _ => return Discarded::All,
            }
        }
    }
}

/// Waits for the next request, which stays in `client.received`. Cancel safe.
pub(super) async fn next_request<S: Transport>(
    client: &mut Client<S>,
    shutdown: &Shutdown,
    discarding: &mut Option<Discarding>,
) -> Next {
    let mut late_at = None;
    loop {
        if let Some(rest) = discarding {
            let discarded = rest.discard(&mut client.received);
            if discarded == Discarded::Part {
                if let Some(next) = receive(client, shutdown, None).await {
                    return next;
                }
                continue;
            }
            *discarding = None;
            if discarded == Discarded::Request && !send_ready(client, shutdown).await {
                return Next::Left;
            }
        }
        match front(&client.received) {
            Front::Whole(_) | Front::Flushed => return Next::Request,
            Front::Terminate => return Next::Left,
            Front::Sync => {
                client.received.advance(HEADER_LEN);
                if !send_ready(client, shutdown).await {
                    return Next::Left;
                }
                continue;
            }
            Front::Ignored(left) => {
                let then = Then::NextRequest;
                *discarding = Some(Discarding { left, then });
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
        if let Some(next) = receive(client, shutdown, late_at).await {
            return next;
        }
    }
}

/// Receives more, or returns what the client does instead; `Request` at `late_at`. Cancel safe.
async fn receive<S: Transport>(
    client: &mut Client<S>,
    shutdown: &Shutdown,
    late_at: Option<Instant>,
) -> Option<Next> {
    client.shrink();
    let Client { stream, received } = client;
    tokio::select! {
        biased;
        read = poll_fn(|cx| poll_receive(cx, stream, received)) => match read {
            Ok(0) | Err(_) => Some(Next::Left),
            Ok(_) => None,
        },
        () = shutdown.draining().cancelled() => Some(Next::Shutdown),
        () = sleep_until(late_at.unwrap_or_else(Instant::now)), if late_at.is_some() => {
            Some(Next::Request)
        }
    }
}

/// Answers a Sync; `false` if the client does not take that. Not cancel safe.
async fn send_ready<S: Transport>(client: &mut Client<S>, shutdown: &Shutdown) -> bool {
    let mut answer = BytesMut::new();
    ready_for_query(&mut answer, TransactionStatus::Idle);
    tokio::select! {
        biased;
        sent = client.send(&answer) => sent.is_ok(),
        // It does not read, and so would not read the reason.
        () = shutdown.draining().cancelled() => false,
    }
}

/// Whether a message is part of a COPY from the client.
fn is_copy(tag: u8) -> bool {
    matches!(tag, tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL)
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
            tag if is_first && is_copy(tag) => return Front::Ignored(end),
            tag::QUERY | tag::FUNCTION_CALL | tag::SYNC => return Front::Whole(end),
            tag::FLUSH => return Front::Flushed,
            _ => {}
        }
    }
    match Header::first(received.get(end..).unwrap_or_default()) {
        // The server refuses it.
        Err(_) => Front::Flushed,
        Ok(Some(header)) if end == 0 && is_copy(header.tag) => Front::Ignored(header.frame_len()),
        _ if end == 0 => Front::Nothing,
        _ => Front::Begun,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::frame;

    #[test]
    fn the_rest_of_a_refused_request_is_discarded_wherever_it_is_cut() {
        let message = |tag| frame(tag, b"some bytes\0");
        let of = |tags: &[u8]| {
            tags.iter()
                .map(|tag| message(*tag))
                .collect::<Vec<_>>()
                .concat()
        };
        let (query, sync) = (message(b'Q'), frame(b'S', b""));
        for (refused, behind, discarded) in [
            (query.clone(), sync.clone(), Discarded::Request),
            (of(b"F"), query.clone(), Discarded::Request),
            (
                [of(b"PBDEHCdcfQF"), sync.clone()].concat(),
                sync,
                Discarded::Request,
            ),
            (of(b"PB"), frame(b'X', b""), Discarded::All),
            (of(b"PB"), frame(b'?', b""), Discarded::All),
            (of(b"PB"), b"Q\0\0\0\x03".to_vec(), Discarded::All),
        ] {
            let all = [&refused[..], &behind].concat();
            for cut in HEADER_LEN..all.len() {
                let mut received = BytesMut::from(&all[..cut]);
                let mut discarding = Discarding::request(&received).unwrap();
                let mut found = discarding.discard(&mut received);
                if found == Discarded::Part {
                    assert!(received.len() < HEADER_LEN, "{cut}");
                    received.extend_from_slice(&all[cut..]);
                    found = discarding.discard(&mut received);
                } else {
                    received.extend_from_slice(&all[cut..]);
                }
                assert_eq!((found, &received[..]), (discarded, &behind[..]), "{cut}");
            }
        }
        for tag in *b"SXHd?" {
            assert_eq!(Discarding::request(&message(tag)), None);
        }
    }
}
