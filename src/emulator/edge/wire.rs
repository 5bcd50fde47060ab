//! Just enough of the wire protocol for the edge: startup packets, typed messages, keys.
//!
//! Reads are bounded; everything is hostile until parsed.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::emulator::faults::Login;

pub(super) const SSL_REQUEST: u32 = 80_877_103;
pub(super) const CANCEL_REQUEST: u32 = 80_877_102;
pub(super) const PROTOCOL_3_0: u32 = 3 << 16;

/// The edge's `MAX_POSTGRES_MESSAGE_LENGTH`: a startup packet must be shorter.
pub(super) const MAX_STARTUP_LENGTH: usize = 10_000;
/// The longest password message taken; Postgres itself stops at 65535.
pub(super) const MAX_PASSWORD_LENGTH: usize = 65_535;
/// The longest message taken from Postgres during login.
const MAX_LOGIN_MESSAGE_LENGTH: usize = 1 << 20;

/// A message with its type byte, whole.
pub(super) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + 5);
    bytes.push(kind);
    bytes.extend(length_field(body.len() + 4));
    bytes.extend(body);
    bytes
}

/// An untyped packet: startup or cancel.
pub(super) fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend(length_field(body.len() + 8));
    bytes.extend(code.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// `CancelRequest` for a key of Postgres's.
pub(super) fn cancel_request(process_id: u32, secret: &[u8]) -> Vec<u8> {
    packet(
        CANCEL_REQUEST,
        &[&process_id.to_be_bytes()[..], secret].concat(),
    )
}

/// The first word of a slice, big-endian.
pub(super) fn word(bytes: &[u8]) -> Option<u32> {
    bytes
        .first_chunk::<4>()
        .map(|chunk| u32::from_be_bytes(*chunk))
}

/// One typed message.
pub(super) struct Message {
    pub(super) kind: u8,
    pub(super) body: Vec<u8>,
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        message(self.kind, &self.body)
    }
}

/// Reads one typed message of at most `limit` bytes. Not cancel safe.
pub(super) async fn read_message<S: AsyncRead + Unpin>(
    stream: &mut S,
    limit: usize,
) -> io::Result<Message> {
    let kind = stream.read_u8().await?;
    let length = usize::try_from(stream.read_u32().await?).unwrap_or(usize::MAX);
    if !(4..=limit).contains(&length) {
        return Err(invalid("message length out of range"));
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Ok(Message { kind, body })
}

/// Reads one message of the login phase from Postgres. Not cancel safe.
pub(super) async fn read_backend<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Message> {
    read_message(stream, MAX_LOGIN_MESSAGE_LENGTH).await
}

/// The name/value pairs of a `StartupMessage`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Parses what follows the protocol version; `None` if it is not pairs of UTF-8 strings with a terminator.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(body).ok()?;
        let mut pairs = Vec::new();
        // The list ends with an empty name, i.e. a lone NUL behind the last value's.
        let mut fields = text.strip_suffix('\0')?.split_terminator('\0');
        while let Some(name) = fields.next() {
            if name.is_empty() {
                return None;
            }
            pairs.push((name.to_owned(), fields.next()?.to_owned()));
        }
        Some(Self(pairs))
    }

    pub(super) fn find(&self, name: &str) -> Option<&str> {
        // The last one wins, as in Postgres.
        self.0
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The login requested by these, for the conditions of faults; the database defaults to the user, as in Postgres.
    pub(super) fn login(&self) -> Login<'_> {
        let user = self.find("user");
        Login {
            user,
            database: self
                .find("database")
                .filter(|database| !database.is_empty())
                .or(user),
            credential_age: None,
        }
    }

    /// What the proxy layer passes on: five names, UTF8 forced, its own options taken out.
    ///
    /// `options` holding `neon_proxy_params_compat:true` lets all names through.
    pub(super) fn forwarded(&self, is_read_only: bool) -> Vec<u8> {
        let options = self.find("options").unwrap_or_default();
        let is_compat = words(options).any(|word| word == "neon_proxy_params_compat:true");
        let mut kept = Vec::new();
        let mut body = Vec::new();
        let mut push = |name: &str, value: &str| {
            for text in [name, value] {
                body.extend(text.bytes());
                body.push(0);
            }
        };
        for (name, value) in &self.0 {
            match name.as_str() {
                "user" | "database" | "application_name" | "replication" => push(name, value),
                "options" => {
                    kept.extend(words(value).filter(|word| !is_proxy_option(word)));
                }
                _ if is_compat => push(name, value),
                _ => {}
            }
        }
        if is_read_only {
            kept.push("-c default_transaction_read_only=on");
        }
        if !kept.is_empty() {
            push("options", &kept.join(" "));
        }
        if !is_compat {
            push("client_encoding", "UTF8");
        }
        body.push(0);
        body
    }
}

fn is_proxy_option(word: &str) -> bool {
    word.starts_with("endpoint=") || word.starts_with("project=") || word.starts_with("neon_")
}

/// Splits `options` at blanks, as Postgres does: a backslash keeps the next character with the word.
fn words(options: &str) -> impl Iterator<Item = &str> {
    let mut rest = options;
    std::iter::from_fn(move || {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return None;
        }
        let mut is_escaped = false;
        let end = rest
            .find(|character: char| {
                let is_end = !is_escaped && character.is_ascii_whitespace();
                is_escaped = !is_escaped && character == '\\';
                is_end
            })
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail;
        Some(word)
    })
}

fn length_field(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}

pub(super) fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut body: Vec<u8> = pairs
            .iter()
            .flat_map(|(name, value)| format!("{name}\0{value}\0").into_bytes())
            .collect();
        body.push(0);
        body
    }

    #[test]
    fn only_five_names_pass_and_the_encoding_is_forced() {
        let sent = body(&[
            ("user", "ada"),
            ("search_path", "x"),
            ("client_encoding", "LATIN1"),
            ("options", "-c a=b"),
        ]);
        let forwarded = Parameters::parse(&sent).unwrap().forwarded(false);
        assert_eq!(
            forwarded,
            body(&[
                ("user", "ada"),
                ("options", "-c a=b"),
                ("client_encoding", "UTF8")
            ])
        );
    }

    #[test]
    fn the_compatibility_option_lets_everything_pass() {
        let sent = body(&[
            ("user", "ada"),
            ("search_path", "x"),
            ("options", "neon_proxy_params_compat:true"),
        ]);
        assert_eq!(
            Parameters::parse(&sent).unwrap().forwarded(false),
            body(&[("user", "ada"), ("search_path", "x")])
        );
    }

    #[test]
    fn options_meant_for_the_proxy_are_taken_out_and_escapes_survive() {
        let sent = body(&[
            ("user", "a"),
            (
                "options",
                r" endpoint=ep-1  -c application_name=a\ b\\ -c x=y ",
            ),
        ]);
        let forwarded = Parameters::parse(&sent).unwrap().forwarded(false);
        let expected = body(&[
            ("user", "a"),
            ("options", r"-c application_name=a\ b\\ -c x=y"),
            ("client_encoding", "UTF8"),
        ]);
        assert_eq!(forwarded, expected);
    }

    #[test]
    fn an_empty_value_is_a_value() {
        let parsed = Parameters::parse(&body(&[("user", "ada"), ("database", "")])).unwrap();
        assert_eq!(parsed.find("database"), Some(""));
    }

    #[test]
    fn malformed_lists_are_refused() {
        for bytes in [
            &b""[..],
            b"user",
            b"user\0",
            b"user\0ada",
            b"user\0\xff\0\0",
        ] {
            assert_eq!(Parameters::parse(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_packet_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Some(parameters) = Parameters::parse(&bytes) {
                let _ = parameters.login();
                prop_assert!(parameters.forwarded(false).ends_with(b"\0"));
            }
        }

        #[test]
        fn a_list_is_read_back(pairs in prop::collection::vec(("[^\\x00]{1,8}", "[^\\x00]{0,8}"), 0..6)) {
            let pairs: Vec<(&str, &str)> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let parameters = Parameters::parse(&body(&pairs)).unwrap();
            for (name, _) in &pairs {
                let last = pairs.iter().rev().find(|(key, _)| key == name);
                prop_assert_eq!(parameters.find(name), last.map(|(_, value)| *value));
            }
        }
    }
}
