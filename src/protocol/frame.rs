//! Message frames: one tag byte, a length that counts itself, a body.

use bytes::{Buf, BytesMut};
use memchr::memchr;

/// Bytes before a frame's body: the tag and the length.
pub const HEADER_LEN: usize = 5;

/// libpq's limit for message types outside its `VALID_LONG_MESSAGE_TYPE`, in bytes.
pub const SMALL_MESSAGE_LIMIT: usize = 30_000;

/// Message types, named as in the protocol documentation.
pub mod tag {
    /// Authentication request of any kind.
    pub const AUTHENTICATION: u8 = b'R';
    /// Cancel key.
    pub const BACKEND_KEY_DATA: u8 = b'K';
    /// A statement is bound to a portal (the client's `B`).
    pub const BIND: u8 = b'B';
    /// A Bind is complete.
    pub const BIND_COMPLETE: u8 = b'2';
    /// A statement or portal is closed (the client's `C`).
    pub const CLOSE: u8 = b'C';
    /// A Close is complete.
    pub const CLOSE_COMPLETE: u8 = b'3';
    /// End of a command.
    pub const COMMAND_COMPLETE: u8 = b'C';
    /// Both sides may send COPY data, as in replication.
    pub const COPY_BOTH_RESPONSE: u8 = b'W';
    /// COPY data, of either side.
    pub const COPY_DATA: u8 = b'd';
    /// End of the COPY data of either side.
    pub const COPY_DONE: u8 = b'c';
    /// COPY IN given up by the client.
    pub const COPY_FAIL: u8 = b'f';
    /// The server accepts COPY data.
    pub const COPY_IN_RESPONSE: u8 = b'G';
    /// The server sends COPY data.
    pub const COPY_OUT_RESPONSE: u8 = b'H';
    /// One row.
    pub const DATA_ROW: u8 = b'D';
    /// A description is requested (the client's `D`).
    pub const DESCRIBE: u8 = b'D';
    /// The answer to an empty query.
    pub const EMPTY_QUERY_RESPONSE: u8 = b'I';
    /// Error.
    pub const ERROR_RESPONSE: u8 = b'E';
    /// Execute a portal (the client's `E`).
    pub const EXECUTE: u8 = b'E';
    /// The server is to send what it holds (the client's `H`).
    pub const FLUSH: u8 = b'H';
    /// Function call (the client's).
    pub const FUNCTION_CALL: u8 = b'F';
    /// The result of a function call.
    pub const FUNCTION_CALL_RESPONSE: u8 = b'V';
    /// There are no rows to describe.
    pub const NO_DATA: u8 = b'n';
    /// Notice.
    pub const NOTICE_RESPONSE: u8 = b'N';
    /// A notification of LISTEN.
    pub const NOTIFICATION_RESPONSE: u8 = b'A';
    /// The types of a statement's parameters.
    pub const PARAMETER_DESCRIPTION: u8 = b't';
    /// The value of a run-time parameter.
    pub const PARAMETER_STATUS: u8 = b'S';
    /// A statement is prepared (the client's `P`).
    pub const PARSE: u8 = b'P';
    /// A Parse is complete.
    pub const PARSE_COMPLETE: u8 = b'1';
    /// Password, or a SASL message (the client's).
    pub const PASSWORD: u8 = b'p';
    /// An Execute has returned as many rows as requested.
    pub const PORTAL_SUSPENDED: u8 = b's';
    /// Simple query.
    pub const QUERY: u8 = b'Q';
    /// The server accepts the next request.
    pub const READY_FOR_QUERY: u8 = b'Z';
    /// The columns of a result.
    pub const ROW_DESCRIPTION: u8 = b'T';
    /// End of an extended-protocol request (the client's `S`).
    pub const SYNC: u8 = b'S';
    /// Orderly end of the connection (the client's).
    pub const TERMINATE: u8 = b'X';
}

/// An invalid frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is less than 4, the length field itself.
    #[error("invalid length {length} for message type {tag:#04x}")]
    InvalidLength {
        /// The message type.
        tag: u8,
        /// The length as sent.
        length: i32,
    },
    /// Longer than the limit at this point.
    #[error("message type {tag:#04x} of {length} bytes is longer than the {limit} allowed here")]
    TooLong {
        /// The message type.
        tag: u8,
        /// The length as sent.
        length: usize,
        /// The limit.
        limit: usize,
    },
}

/// What a message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The message type.
    pub tag: u8,
    /// Bytes of the body.
    pub body_len: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// A length below 4, or above what a length is, a signed number of 32 bits.
    #[inline]
    pub fn of([tag, a, b, c, d]: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let length = i32::from_be_bytes([a, b, c, d]);
        // The length counts itself, but not the tag.
        match usize::try_from(length).map(|it| it.checked_sub(4)) {
            Ok(Some(body_len)) => Ok(Self { tag, body_len }),
            _ => Err(FrameError::InvalidLength { tag, length }),
        }
    }

    /// The header at the front of `bytes`; `None` if more of them are needed.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    #[inline]
    pub fn first(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        bytes
            .first_chunk()
            .map(|header| Self::of(*header))
            .transpose()
    }

    /// Bytes of the whole frame.
    pub fn frame_len(self) -> usize {
        HEADER_LEN.saturating_add(self.body_len)
    }
}

/// The whole messages at the front of `bytes`, by their types and bodies; what is no message ends them.
pub(crate) fn whole_messages(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let Header { tag, body_len } = Header::first(bytes).ok()??;
        let (body, rest) = frame_body(bytes).split_at_checked(body_len)?;
        bytes = rest;
        Some((tag, body))
    })
}

/// A whole message, for the phases that exchange whole messages.
#[derive(Debug)]
pub struct Message {
    /// The message type.
    pub tag: u8,
    /// The whole frame as received, including its header.
    pub frame: BytesMut,
}

impl Message {
    /// The body, without the header.
    pub fn body(&self) -> &[u8] {
        frame_body(&self.frame)
    }
}

/// The body of a whole frame.
pub(crate) fn frame_body(frame: &[u8]) -> &[u8] {
    frame.get(HEADER_LEN..).unwrap_or_default()
}

/// Takes one whole message off the front of `buffer`; `None` if more bytes are needed.
///
/// # Errors
/// A length below 4, or a frame of more than `limit` bytes.
pub fn take_message(buffer: &mut BytesMut, limit: usize) -> Result<Option<Message>, FrameError> {
    let Some(header) = Header::first(buffer)? else {
        return Ok(None);
    };
    let total = header.frame_len();
    // Before the body has arrived: a length alone must not make the buffer grow.
    if total > limit {
        return Err(FrameError::TooLong {
            tag: header.tag,
            length: total,
            limit,
        });
    }
    if buffer.len() < total {
        return Ok(None);
    }
    Ok(Some(Message {
        tag: header.tag,
        frame: buffer.split_to(total),
    }))
}

/// An event of the scanner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A message begins.
    Message {
        /// Its type.
        tag: u8,
    },
    /// The transaction status byte of a `ReadyForQuery`.
    Status(u8),
}

/// A part of a scanned stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// An event.
    Event(Seen),
    /// Bytes of the body of the message that began last; not all of them, if the rest is still to come.
    Body(&'a [u8]),
}

/// Follows message boundaries in a byte stream without keeping any of it.
///
/// An invalid header ends the scan for good: the rest of the stream passes unread, and the peer responds to it as it would
/// without the proxy.
#[derive(Debug, Default)]
pub struct Scanner {
    header: [u8; HEADER_LEN],
    have: usize,
    body_left: usize,
    status_next: bool,
    lost: bool,
}

impl Scanner {
    /// A scanner at a message boundary.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the bytes so far end between two messages.
    pub fn is_at_boundary(&self) -> bool {
        self.have == 0 && self.body_left == 0 && !self.lost
    }

    /// Whether an invalid header has ended the scan.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Scans `chunk` and passes its events to `visit`.
    #[inline]
    pub fn scan(&mut self, chunk: &[u8], visit: impl FnMut(Seen)) {
        self.walk(chunk, Events(visit));
    }

    /// Scans `chunk` and passes its events and what it has of the bodies to `visit`.
    #[inline]
    pub fn scan_parts<'a>(&mut self, chunk: &'a [u8], visit: impl FnMut(Part<'a>)) {
        self.walk(chunk, Parts(visit));
    }

    #[inline]
    fn walk<'a>(&mut self, mut chunk: &'a [u8], mut visitor: impl Visitor<'a>) {
        while !self.lost {
            if self.body_left > 0 {
                if self.status_next {
                    // The status byte may arrive in a later chunk than the header.
                    let Some(&status) = chunk.first() else { return };
                    self.status_next = false;
                    visitor.event(Seen::Status(status));
                }
                let skip = self.body_left.min(chunk.len());
                self.body_left -= skip;
                let (body, rest) = chunk.split_at(skip);
                visitor.body(body);
                chunk = rest;
                if self.body_left > 0 {
                    return;
                }
            }
            if chunk.is_empty() {
                return;
            }
            let take = (HEADER_LEN - self.have).min(chunk.len());
            self.header[self.have..self.have + take].copy_from_slice(&chunk[..take]);
            self.have += take;
            chunk.advance(take);
            if self.have < HEADER_LEN {
                return;
            }
            self.have = 0;
            match Header::of(self.header) {
                Ok(Header { tag, body_len }) => {
                    self.body_left = body_len;
                    // A client's stream has no `Z`, so that one scanner serves both directions.
                    self.status_next = tag == tag::READY_FOR_QUERY && self.body_left > 0;
                    visitor.event(Seen::Message { tag });
                }
                Err(_) => self.lost = true,
            }
        }
    }
}

/// The string in front of a zero byte, and what follows that.
pub fn split_string(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr(0, body)?;
    Some((body.get(..end)?, body.get(end + 1..)?))
}

/// The string in front of the first zero byte, or all if there is none.
pub fn until_zero(text: &[u8]) -> &[u8] {
    split_string(text).map_or(text, |(string, _)| string)
}

/// What a scan finds, by methods of its own: with one closure for both, the relay of every message pays for the bodies that
/// it does not look at.
trait Visitor<'a> {
    fn event(&mut self, seen: Seen);
    fn body(&mut self, body: &'a [u8]);
}

struct Events<F>(F);

impl<F: FnMut(Seen)> Visitor<'_> for Events<F> {
    #[inline]
    fn event(&mut self, seen: Seen) {
        self.0(seen);
    }

    #[inline]
    fn body(&mut self, _: &[u8]) {}
}

struct Parts<F>(F);

impl<'a, F: FnMut(Part<'a>)> Visitor<'a> for Parts<F> {
    #[inline]
    fn event(&mut self, seen: Seen) {
        self.0(Part::Event(seen));
    }

    #[inline]
    fn body(&mut self, body: &'a [u8]) {
        self.0(Part::Body(body));
    }
}

/// A whole message of any type, for tests.
#[cfg(test)]
pub(crate) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    fn scan_all(scanner: &mut Scanner, chunks: &[&[u8]]) -> Vec<Seen> {
        let mut seen = Vec::new();
        for chunk in chunks {
            scanner.scan(chunk, |event| seen.push(event));
        }
        seen
    }

    #[test]
    fn a_message_is_taken_only_when_whole() {
        let whole = frame(b'Q', b"select 1\0");
        for cut in 0..whole.len() {
            let mut buffer = BytesMut::from(&whole[..cut]);
            assert!(take_message(&mut buffer, 100).unwrap().is_none());
            assert_eq!(buffer.len(), cut, "nothing is consumed while incomplete");
        }
        let mut buffer = BytesMut::from(&whole[..]);
        let message = take_message(&mut buffer, 100).unwrap().unwrap();
        assert_eq!((message.tag, message.body()), (b'Q', &b"select 1\0"[..]));
    }

    #[test]
    fn impossible_lengths_are_errors() {
        for length in [i32::MIN, -1, 0, 3] {
            let mut bytes = vec![b'R'];
            bytes.put_i32(length);
            let error = take_message(&mut BytesMut::from(&bytes[..]), 100).unwrap_err();
            assert_eq!(error, FrameError::InvalidLength { tag: b'R', length });
        }
        let long = frame(b'R', &[0; 200]);
        assert!(matches!(
            take_message(&mut BytesMut::from(&long[..]), 100),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn an_invalid_header_ends_the_scan_for_good() {
        let mut scanner = Scanner::new();
        scanner.scan(&[b'Q', 0, 0, 0, 2, b'Q'], |_| {});
        assert!(scanner.is_lost() && !scanner.is_at_boundary());
        let seen = scan_all(&mut scanner, &[&frame(b'Q', b"")]);
        assert!(seen.is_empty(), "no event after that");
    }

    proptest! {
        #[test]
        fn splitting_a_stream_anywhere_changes_nothing(
            messages in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..20)), 0..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|(tag, body)| frame(*tag, body)).collect();
            let mut expected = Vec::new();
            for (tag, body) in &messages {
                expected.push(Seen::Message { tag: *tag });
                if let (b'Z', Some(status)) = (*tag, body.first()) {
                    expected.push(Seen::Status(*status));
                }
            }
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
            at.sort_unstable();
            let mut scanner = Scanner::new();
            let mut seen = Vec::new();
            let mut from = 0;
            for to in at.into_iter().chain([stream.len()]) {
                scanner.scan(&stream[from..to], |event| seen.push(event));
                from = to;
            }
            prop_assert_eq!(seen, expected);
            prop_assert!(scanner.is_at_boundary());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            Scanner::new().scan(&bytes, |_| {});
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_message(&mut buffer, 1000) {}
        }
    }
}
