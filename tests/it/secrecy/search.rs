//! Looks for secrets, whole or in pieces, in whatever form something may have printed them.

use std::{collections::HashMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// So many characters of a secret in a row count as a leak.
const PIECE: usize = 16;

/// What must not be found, cut into pieces.
#[derive(Default)]
pub(super) struct Secrets {
    pieces: HashMap<Vec<u8>, String>,
    pub(super) count: usize,
}

impl Secrets {
    /// Adds a secret under a name that may be printed.
    pub(super) fn add(&mut self, name: &str, secret: &str) {
        assert!(
            secret.len() >= PIECE,
            "`{name}` is too short to be looked for"
        );
        self.count += 1;
        let bytes = secret.as_bytes();
        self.add_form(name, secret);
        // As `{:?}` of bytes, as hex, as base64 at any alignment, and as a URL carries it.
        let mut decimal = String::new();
        let mut hex = String::new();
        let mut escaped = String::new();
        for byte in bytes {
            let _ = write!(decimal, "{byte}, ");
            let _ = write!(hex, "{byte:02x}");
            if byte.is_ascii_alphanumeric() || b"-_.~".contains(byte) {
                escaped.push(char::from(*byte));
            } else {
                let _ = write!(escaped, "%{byte:02X}");
            }
        }
        self.add_form(&format!("{name}, in decimal"), &decimal);
        self.add_form(&format!("{name}, in hex"), &hex);
        self.add_form(&format!("{name}, in hex"), &hex.to_uppercase());
        self.add_form(&format!("{name}, escaped"), &escaped);
        for skipped in 0..3 {
            self.add_form(
                &format!("{name}, in base64"),
                &STANDARD.encode(&bytes[skipped..]),
            );
        }
    }

    /// Adds a JWT: its payload and its signature. The header is the same for all.
    pub(super) fn add_token(&mut self, name: &str, token: &str) {
        let parts: Vec<&str> = token.split('.').collect();
        let [_, payload, signature] = parts[..] else {
            panic!("`{name}` is not a JWT");
        };
        self.add(&format!("payload of {name}"), payload);
        self.add(&format!("signature of {name}"), signature);
    }

    fn add_form(&mut self, name: &str, form: &str) {
        for piece in form.as_bytes().windows(PIECE) {
            if is_significant(piece) {
                self.pieces
                    .entry(piece.to_vec())
                    .or_insert_with(|| name.to_owned());
            }
        }
    }

    /// The first piece found in `text`: whose it is, and where, without showing it.
    pub(super) fn find(&self, text: &str) -> Option<String> {
        let bytes = text.as_bytes();
        let (at, name) = bytes
            .windows(PIECE)
            .enumerate()
            .find_map(|(at, piece)| Some((at, self.pieces.get(piece)?)))?;
        let before = String::from_utf8_lossy(&bytes[at.saturating_sub(300)..at]).into_owned();
        let line = before.rsplit('\n').next().unwrap_or_default();
        Some(format!("{name}, after {line:?}"))
    }
}

/// Not mere filling, such as a run of one character.
fn is_significant(piece: &[u8]) -> bool {
    let mut seen = piece.to_vec();
    seen.sort_unstable();
    seen.dedup();
    seen.len() >= 6
}

#[test]
fn a_piece_is_found_in_every_form() {
    let secret = "q7Zx+0Pw/3Lk9Tn5Vb1Md8";
    let mut secrets = Secrets::default();
    secrets.add("the secret", secret);
    let bytes = secret.as_bytes();
    for text in [
        format!("Authorization: Bearer {secret}"),
        format!("...{}...", &secret[2..19]),
        format!("body: {bytes:?}"),
        format!("{bytes:02x?}").replace(", ", ""),
        STANDARD.encode(format!("id:{secret}")),
        "client_secret=q7Zx%2B0Pw%2F3Lk9Tn5Vb1Md8".to_owned(),
    ] {
        assert!(secrets.find(&text).is_some(), "{text}");
    }
    assert_eq!(
        secrets.find("a log without any secrets of note 0123456789 abcdefghijkl"),
        None
    );
    assert_eq!(secrets.find(&secret[..15]), None);
}
