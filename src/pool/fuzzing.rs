//! Entry points for tests/fuzz: what a client's messages are without a server.

use super::{
    local, refusal,
    settings::Dialect,
    statements::{ClientMessage, LARGE_STATEMENT},
};
use crate::protocol::{
    frame::{Header, until_zero},
    lexer::Backslash,
};

/// A message that is answered here is whole, whatever follows it.
pub fn answered_locally(bytes: &[u8]) {
    let is_answered = local::resets(bytes).is_some();
    if is_answered {
        let header = Header::first(bytes).ok().flatten();
        let end = header.map_or(0, Header::frame_len);
        assert!(local::resets(&bytes[..end]).is_some());
        for cut in 0..end {
            assert!(local::resets(&bytes[..cut]).is_none(), "cut at {cut}");
        }
    }
}

/// A message that is refused is so as a query and as a statement to prepare, and is never answered here.
pub fn refused(tag: u8, body: &[u8]) {
    for backslash in [Backslash::Plain, Backslash::Escape] {
        let dialect = Dialect {
            backslash,
            is_utf8: true,
        };
        let of = |tag, body: &[u8], length| {
            refusal::pin_of(ClientMessage { tag, length, body }, dialect)
        };
        of(tag, body, body.len());
        of(tag, body, LARGE_STATEMENT + 1);
        let text = until_zero(body);
        let query = [text, b"\0"].concat();
        let parse = [b"name\0", text, b"\0\0\0"].concat();
        let reason = of(b'Q', &query, query.len());
        if parse.len() <= LARGE_STATEMENT {
            assert_eq!(reason, of(b'P', &parse, parse.len()));
        }
        let length = u32::try_from(query.len() + 4).unwrap_or_default();
        let message = [b"Q", &length.to_be_bytes()[..], &query].concat();
        if local::resets(&message).is_some() {
            assert_eq!(reason, None);
        }
    }
}
