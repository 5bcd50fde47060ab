//! Messages of one direction as they arrive, in pieces.

use bytes::{Buf, BytesMut};

use super::{super::statements::LARGE_STATEMENT, MAX_HELD};
use crate::protocol::frame::{HEADER_LEN, Header, frame_body, tag};

/// The message that the bytes of one direction end in.
#[derive(Default)]
pub(super) struct Partial {
    /// As far as it has arrived, while it must be read as a whole.
    pub(super) held: BytesMut,
    /// Bytes to come that are removed.
    pub(super) removed: usize,
    /// Bytes to come behind those that pass as they are.
    pub(super) passed: usize,
    /// No message can be read any more.
    pub(super) is_lost: bool,
}

/// A message as far as it has arrived.
#[derive(Clone, Copy)]
pub(super) struct Arrived<'a> {
    pub(super) tag: u8,
    /// Of the whole body.
    pub(super) length: usize,
    pub(super) body: &'a [u8],
}

/// What a stream begins with.
pub(super) enum Front<'a> {
    /// Less than a header.
    Nothing,
    /// No message.
    Invalid,
    Message(Arrived<'a>),
}

impl<'a> Front<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Self {
        let Header { tag, body_len } = match Header::first(bytes) {
            Ok(Some(header)) => header,
            Ok(None) => return Self::Nothing,
            Err(_) => return Self::Invalid,
        };
        let rest = frame_body(bytes);
        let body = rest.get(..body_len).unwrap_or(rest);
        Self::Message(Arrived {
            tag,
            length: body_len,
            body,
        })
    }
}

impl Arrived<'_> {
    fn is_whole(&self) -> bool {
        self.body.len() == self.length
    }

    /// Whether enough of a client's message is there to know what becomes of it.
    pub(super) fn is_enough_of_client(&self) -> bool {
        let has_strings = |count| self.body.split(|&byte| byte == 0).nth(count).is_some();
        match self.tag {
            _ if self.is_whole() || self.body.len() >= MAX_HELD => true,
            tag::PARSE if self.length > LARGE_STATEMENT => has_strings(1),
            tag::QUERY => self.length > LARGE_STATEMENT,
            // The names of the portal and of the statement.
            tag::BIND => has_strings(2),
            tag::PARSE | tag::DESCRIBE | tag::EXECUTE | tag::CLOSE => false,
            _ => true,
        }
    }

    pub(super) fn is_enough_of_server(&self) -> bool {
        matches!(
            self.tag,
            tag::DATA_ROW | tag::COPY_DATA | tag::FUNCTION_CALL_RESPONSE
        ) || self.is_whole()
            || self.length > MAX_HELD
    }
}

impl Partial {
    /// Whether the bytes so far end between two messages.
    pub(super) fn is_at_boundary(&self) -> bool {
        self.held.is_empty() && self.removed == 0 && self.passed == 0
    }

    /// Takes what belongs to the message before. Returns the part that passes as it is.
    pub(super) fn take_rest<'b>(&mut self, bytes: &mut &'b [u8]) -> &'b [u8] {
        if self.is_lost {
            return std::mem::take(bytes);
        }
        let removed = self.removed.min(bytes.len());
        self.removed -= removed;
        bytes.advance(removed);
        let (passed, rest) = bytes.split_at(self.passed.min(bytes.len()));
        self.passed -= passed.len();
        *bytes = rest;
        passed
    }

    /// Appends to what is held, as much as may be of the same message.
    pub(super) fn hold(&mut self, bytes: &mut &[u8]) {
        // The header first, which has the length.
        let length = |held: &[u8]| match Front::of(held) {
            Front::Message(it) => HEADER_LEN + it.length,
            Front::Nothing | Front::Invalid => HEADER_LEN,
        };
        for _ in 0..2 {
            let missing = length(&self.held).saturating_sub(self.held.len());
            let (taken, rest) = bytes.split_at(missing.min(bytes.len()));
            self.held.extend_from_slice(taken);
            *bytes = rest;
        }
    }
}

/// Passes bytes: in place, if they stand at this position of their chunk, behind others that all pass; else behind what was
/// appended to `out`.
#[inline]
pub(super) fn emit(bytes: &[u8], at: Option<usize>, unchanged: &mut usize, out: &mut BytesMut) {
    if at == Some(*unchanged) && out.is_empty() {
        *unchanged += bytes.len();
    } else {
        out.extend_from_slice(bytes);
    }
}
