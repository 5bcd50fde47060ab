//! Removes known secrets from text in any form: plain, hexadecimal, base64, percent-encoded,
//! or escaped for JSON or HTML, whole or in part.
//!
//! [`redact`] recognizes only the form of a token, and hexadecimal has the form of a request id.

use std::collections::HashSet;

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::redact::{REMOVED, redact};

/// This many consecutive characters of a form are a repetition.
const PIECE: usize = 16;
/// Shorter secrets occur in ordinary text by chance.
const SHORTEST: usize = 6;
/// Fewer different characters are padding, not a secret.
const VARIETY: usize = 5;
/// Longer texts are truncated: a message has a few hundred characters.
const MAX_TEXT: usize = 16 * 1024;

/// Every form of some secrets, in lower case since digits of hexadecimal have either; wiped when dropped.
#[derive(Default)]
pub(crate) struct KnownSecrets(Vec<Zeroizing<String>>);

impl KnownSecrets {
    pub(crate) fn new<'a>(secrets: impl IntoIterator<Item = &'a SecretString>) -> Self {
        let mut known = Self::default();
        for secret in secrets {
            known.add(secret.expose_secret());
        }
        known
    }

    fn add(&mut self, secret: &str) {
        let bytes = secret.as_bytes();
        if bytes.len() < SHORTEST {
            return;
        }
        let mut add = |form: &str| self.0.push(Zeroizing::new(form.to_ascii_lowercase()));
        add(secret);
        // A base64 digit holds bits of two bytes: what precedes the secret shifts it by 0 to 2 bytes.
        for skipped in bytes.iter().enumerate().take(3).map(|(at, _)| &bytes[at..]) {
            let whole = &skipped[..skipped.len() / 3 * 3];
            add(&Zeroizing::new(STANDARD_NO_PAD.encode(whole)));
            add(&Zeroizing::new(URL_SAFE_NO_PAD.encode(whole)));
        }
        let json = Zeroizing::new(serde_json::to_string(secret).unwrap_or_default());
        let json = json.trim_matches('"');
        add(json);
        // JSON allows `\/` for a slash (RFC 8259 section 7).
        add(&Zeroizing::new(json.replace('/', "\\/")));
        add(&Zeroizing::new(html(secret)));
        let mut each = |form: &dyn Fn(u8) -> String| {
            let form: Zeroizing<String> =
                Zeroizing::new(bytes.iter().map(|byte| form(*byte)).collect());
            add(&form);
        };
        // Digits are hexadecimal in these: `6461`, `%64%61`, `\x64\x61`, `\u0064\u0061`, `64:61`, `64 61`, `0x64, 0x61`.
        for (before, between) in [
            ("", ""),
            ("%", ""),
            ("\\x", ""),
            ("\\u00", ""),
            ("", ":"),
            ("", " "),
            ("", "-"),
            ("", ", "),
            ("0x", ", "),
        ] {
            each(&|byte| format!("{before}{byte:02x}{between}"));
        }
        for separator in [", ", ",", " "] {
            each(&|byte| format!("{byte}{separator}"));
        }
        // As RFC 3986 has it; as HTML forms do; as browsers do.
        for (kept, space) in [("-_.~", "%20"), ("-_.*", "+"), ("-_.~!*'()/:@,;=", "%20")] {
            each(&|byte| match byte {
                b' ' => space.to_owned(),
                _ if byte.is_ascii_alphanumeric() || kept.as_bytes().contains(&byte) => {
                    char::from(byte).to_string()
                }
                _ => format!("%{byte:02x}"),
            });
        }
    }

    /// `text` without these secrets and without anything like a token.
    pub(crate) fn redact(&self, text: &str) -> String {
        // By form first: removing a part of a token would leave a rest without a recognizable form.
        let text = &redact(&text[..text.floor_char_boundary(MAX_TEXT)]);
        let is_secret = self.mark(&Zeroizing::new(text.to_ascii_lowercase()));
        let mut clean = String::with_capacity(text.len());
        let mut was_secret = false;
        for (at, character) in text.char_indices() {
            match (is_secret.get(at).copied().unwrap_or_default(), was_secret) {
                (false, _) => clean.push(character),
                (true, false) => clean.push_str(REMOVED),
                (true, true) => {}
            }
            was_secret = is_secret.get(at).copied().unwrap_or_default();
        }
        clean
    }

    /// The bytes of `text` that repeat a form.
    fn mark(&self, text: &str) -> Vec<bool> {
        let mut is_secret = vec![false; text.len()];
        let mut pieces: HashSet<&[u8]> = HashSet::new();
        for form in self.0.iter().filter(|form| form.len() >= SHORTEST) {
            let windows = form.as_bytes().windows(form.len().min(PIECE));
            pieces.extend(windows.filter(|piece| varies(piece)));
        }
        // A form shorter than PIECE is searched for as a whole, by its own length.
        for length in SHORTEST..=PIECE {
            for (at, piece) in text.as_bytes().windows(length).enumerate() {
                if pieces.contains(piece) {
                    is_secret[at..at + length].fill(true);
                }
            }
        }
        is_secret
    }
}

fn varies(piece: &[u8]) -> bool {
    let mut seen = HashSet::new();
    piece.iter().any(|byte| {
        seen.insert(byte);
        seen.len() >= VARIETY
    })
}

fn html(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "dose0123/45+67\"89abcdef";

    fn known(secret: &str) -> KnownSecrets {
        KnownSecrets::new([&SecretString::from(secret)])
    }

    fn hex(text: &str) -> String {
        let digits: Vec<String> = text.bytes().map(|byte| format!("{byte:02x}")).collect();
        digits.concat()
    }

    #[test]
    fn every_form_goes_and_the_words_around_it_stay() {
        let known = known(SECRET);
        let all = |before: &str| -> String {
            let bytes = SECRET.bytes().map(|byte| format!("{before}{byte:02X}"));
            bytes.collect::<Vec<_>>().concat()
        };
        for form in [
            SECRET.to_owned(),
            hex(SECRET),
            hex(SECRET).to_uppercase(),
            all("%"),
            all("\\x"),
            all("\\u00"),
            "dose0123%2F45%2B67%2289abcdef".to_owned(),
            "dose0123%2f45%2b67%2289abcdef".to_owned(),
            "dose0123\\/45+67\\\"89abcdef".to_owned(),
            "dose0123/45+67&quot;89abcdef".to_owned(),
        ] {
            let clean = known.redact(&format!("client '{form}' is unknown"));
            assert_eq!(clean, "client '[removed]' is unknown", "{form}");
        }
        for before in ["", "i", "id", "id:", "9c1b4ef1:"] {
            for encoded in [
                STANDARD.encode(format!("{before}{SECRET}")),
                URL_SAFE.encode(format!("{before}{SECRET}:more")),
            ] {
                let clean = known.redact(&format!("Basic {encoded}"));
                // The edges mix with what is beside the secret.
                assert!(
                    clean.starts_with("Basic ") && clean.contains(REMOVED),
                    "{clean}"
                );
                assert!(
                    clean.len() <= "Basic [removed]".len() + before.len() * 2 + 14,
                    "{clean}"
                );
            }
        }
        let debug = format!("{:?}", SECRET.as_bytes());
        assert!(!known.redact(&debug).contains("48, 49, 50"), "{debug}");
    }

    #[test]
    fn a_part_goes_and_other_texts_stay() {
        let known = known(&format!(
            "eyJhbGci.{}.c2ln",
            "q7ZxPw3Lk9Tn5Vb1Md8".repeat(3)
        ));
        assert_eq!(
            known.redact("token q7ZxPw3Lk9Tn5Vb1Md8q7... is bad"),
            "token [removed] is bad"
        );
        for text in [
            "",
            "request id 4bf92f3577b34da6a3ce929d0e0e4736",
            "endpoint `projects/p/branches/b/endpoints/e` not found",
            "été",
        ] {
            assert_eq!(known.redact(text), text);
        }
        assert_eq!(KnownSecrets::default().redact("text"), "text");
        // Short ones, and mere filling, are no secrets to be looked for.
        assert_eq!(
            KnownSecrets::new([&"abc".into()]).redact("abcabc"),
            "abcabc"
        );
        assert_eq!(
            KnownSecrets::new([&"hunter2!".into()]).redact("no hunter2! here"),
            "no [removed] here"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_secret_goes_from_any_text(secret in "[!-~]{16,40}", before in "[ -~]{0,9}", text in ".*") {
            prop_assume!(varies(secret.as_bytes()));
            let known = known(&secret);
            let clean = known.redact(&format!("{before}{secret}{text}"));
            prop_assert!(!clean.contains(&secret));
            let clean = known.redact(&hex(&secret));
            prop_assert!(!clean.contains(&hex(&secret)));
        }
    }
}
