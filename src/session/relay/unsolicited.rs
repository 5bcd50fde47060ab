//! Passwords that a client sends without a request.

use bytes::Buf;

use crate::protocol::frame::{HEADER_LEN, Header, tag};

/// Drops password messages sent before anything else, which only a client does that expects a request for one. They are
/// not stored.
#[derive(Debug, Default)]
pub(super) struct UnsolicitedPasswords {
    header: [u8; HEADER_LEN],
    have: usize,
    left: usize,
    over: bool,
}

impl UnsolicitedPasswords {
    pub(super) fn strip(&mut self, chunk: &mut &[u8]) {
        while !self.over && !chunk.is_empty() {
            if self.left > 0 {
                let skip = self.left.min(chunk.len());
                self.left -= skip;
                chunk.advance(skip);
                continue;
            }
            if self.have == 0 && chunk.first() != Some(&tag::PASSWORD) {
                // From here on a password message is the server's to refuse.
                self.over = true;
                return;
            }
            let take = (HEADER_LEN - self.have).min(chunk.len());
            self.header[self.have..self.have + take].copy_from_slice(&chunk[..take]);
            self.have += take;
            chunk.advance(take);
            if self.have == HEADER_LEN {
                self.have = 0;
                self.left = Header::of(self.header).map_or(0, |it| it.body_len);
            }
        }
    }
}
