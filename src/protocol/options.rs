//! Startup parameters of a login at the endpoint.
//!
//! The edge forwards `user`, `database`, `application_name`, `options` and `replication` only. Every other parameter is
//! folded into `options` as `-c name=value`: the server applies it at startup all the same, so it survives `RESET ALL` and
//! `DISCARD ALL` as a startup value does.
//!
//! Some names are not settings (`pgbouncer`, `schema`, `max_conns`: leftovers of a driver's connection string). The edge
//! would drop them, but in `options` the server refuses them. Only the server knows its settings, so every name is sent
//! until the server has refused it.

use std::borrow::Cow;

use bytes::BytesMut;

use super::startup::{MAX_STARTUP_LEN, StartupMessage, encode_startup};

/// Parameters that the edge forwards unchanged, besides `user` and `database`.
const FORWARDED: [&str; 2] = ["application_name", "replication"];
const CLIENT_ENCODING: &str = "client_encoding";
const OPTIONS: &str = "options";

/// The parameters of one login at the endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoginParameters {
    /// The database to open.
    pub database: String,
    /// The database to open if that one does not exist.
    pub fallback_database: Option<String>,
    /// Parameters to send unchanged, besides `user` and `database`.
    pub parameters: Vec<(String, String)>,
    /// Parameters to fold into `options`.
    pub folded: Vec<(String, String)>,
    /// Names that cannot be settings; they are omitted.
    pub unusable: Vec<String>,
    /// The encoding that the client requests. The edge may force another, which a `SET` then corrects.
    pub client_encoding: Option<String>,
    /// Whether the session uses the replication protocol, where the proxy must not send a `SET`.
    pub replication: bool,
}

/// The startup message would exceed the length that servers accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the startup message to the endpoint takes {length} bytes, more than the limit of {MAX_STARTUP_LEN}"
)]
pub struct TooLong {
    /// In bytes.
    pub length: usize,
}

impl LoginParameters {
    /// Derives them from a client's startup message.
    pub fn new(message: &StartupMessage, database: String) -> Self {
        let mut settings = Self {
            database,
            client_encoding: message.parameter(CLIENT_ENCODING).map(str::to_owned),
            replication: message.parameter("replication").is_some_and(is_replication),
            ..Self::default()
        };
        for (name, value) in &message.parameters {
            match name.as_str() {
                // The user is the credential's role. Of several `options` the last counts (ProcessStartupPacket()).
                "user" | "database" | OPTIONS => {}
                known if FORWARDED.contains(&known) => {
                    settings.parameters.push((name.clone(), value.clone()));
                }
                unusable if !can_be_folded(unusable) => settings.unusable.push(name.clone()),
                _ => settings.folded.push((name.clone(), value.clone())),
            }
        }
        if let Some(options) = message.parameter(OPTIONS) {
            settings
                .parameters
                .push((OPTIONS.to_owned(), options.to_owned()));
        }
        settings
    }

    /// The startup message for `user`, without the folded parameters that `is_dropped` names.
    pub fn startup(
        &self,
        user: &str,
        is_dropped: impl Fn(&str) -> bool,
    ) -> Result<BytesMut, TooLong> {
        let options = self.options(is_dropped);
        let mut parameters = vec![("user", user), ("database", self.database.as_str())];
        let forwarded = self.parameters.iter().filter(|(name, _)| name != OPTIONS);
        parameters.extend(forwarded.map(|(name, value)| (name.as_str(), value.as_str())));
        if !options.is_empty() {
            parameters.push((OPTIONS, &options));
        }
        encode_startup(&parameters).ok_or_else(|| {
            let strings = parameters.iter().flat_map(|(name, value)| [name, value]);
            TooLong {
                // The length, the version, and the end of the list.
                length: strings.map(|text| text.len() + 1).sum::<usize>() + 9,
            }
        })
    }

    /// The client's own options, followed by the folded parameters.
    fn options(&self, is_dropped: impl Fn(&str) -> bool) -> Cow<'_, str> {
        // First, as process_startup_options() has it: a later value wins, and parameters follow the options there.
        let own = self.parameters.iter().find(|(name, _)| name == OPTIONS);
        let mut options = Cow::Borrowed(own.map_or("", |(_, options)| options));
        for (name, value) in &self.folded {
            if !is_dropped(name) {
                fold(options.to_mut(), name, value);
            }
        }
        options
    }

    /// Every text that the client may have chosen: a server may repeat any of them in an error.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let parameters = self
            .parameters
            .iter()
            .chain(&self.folded)
            .flat_map(|(name, value)| [name.as_str(), value]);
        parameters
            .chain([self.database.as_str()])
            .chain(self.client_encoding.as_deref())
    }
}

/// Whether a `replication` value selects the replication protocol: anything but a Boolean "no" does.
fn is_replication(value: &str) -> bool {
    !["false", "off", "no", "0", "f", "n"]
        .iter()
        .any(|no| value.eq_ignore_ascii_case(no))
}

/// `-c` ends the name at the first `=` and reads `-` as `_`: a name with either would set another parameter.
fn can_be_folded(name: &str) -> bool {
    !name.contains(['=', '-']) && !name.contains(char::is_whitespace)
}

/// `UTF8`, `utf-8` and `Utf_8` are one encoding.
pub(crate) fn is_same_encoding(a: &str, b: &str) -> bool {
    let plain = |name: &str| {
        name.chars()
            .filter(char::is_ascii_alphanumeric)
            .map(|c| c.to_ascii_lowercase())
            .collect::<String>()
    };
    plain(a) == plain(b)
}

/// A SET command. The value is an escape string, which means the same whatever `standard_conforming_strings` is.
pub(crate) fn set(parameter: &str, value: &str) -> String {
    format!("SET {parameter} TO {}", literal(value))
}

/// A string as SQL has it, whatever `standard_conforming_strings` is.
pub(crate) fn literal(value: &str) -> String {
    let quoted = value.replace('\\', "\\\\").replace('\'', "''");
    format!("E'{quoted}'")
}

fn fold(options: &mut String, name: &str, value: &str) {
    // The server drops a lone backslash at the very end; here it would escape the space that follows.
    let backslashes = options.len() - options.trim_end_matches('\\').len();
    if backslashes % 2 == 1 {
        options.pop();
    }
    if !options.is_empty() {
        options.push(' ');
    }
    options.push_str("-c ");
    for part in [name, "=", value] {
        for character in part.chars() {
            // pg_split_opts() splits at C's isspace(); a backslash escapes the next character.
            if matches!(
                character,
                ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}' | '\\'
            ) {
                options.push('\\');
            }
            options.push(character);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(parameters: &[(&str, &str)]) -> StartupMessage {
        StartupMessage {
            minor: 0,
            parameters: parameters
                .iter()
                .map(|&(n, v)| (n.to_owned(), v.to_owned()))
                .collect(),
            protocol_options: Vec::new(),
        }
    }

    fn settings(parameters: &[(&str, &str)]) -> LoginParameters {
        LoginParameters::new(&message(parameters), "db".to_owned())
    }

    /// The arguments that the server reads.
    fn words(settings: &LoginParameters) -> Vec<String> {
        split(&settings.options(|_| false))
    }

    /// PostgreSQL's `pg_split_opts`.
    fn split(options: &str) -> Vec<String> {
        let mut words = Vec::new();
        let mut characters = options.chars().peekable();
        loop {
            while characters
                .next_if(|c| c.is_ascii_whitespace() || *c == '\u{b}')
                .is_some()
            {}
            if characters.peek().is_none() {
                return words;
            }
            let mut word = String::new();
            while let Some(character) =
                characters.next_if(|c| !(c.is_ascii_whitespace() || *c == '\u{b}'))
            {
                if character == '\\' {
                    word.extend(characters.next());
                } else {
                    word.push(character);
                }
            }
            words.push(word);
        }
    }

    #[test]
    fn parameters_that_the_edge_forwards_are_unchanged() {
        let settings = settings(&[
            ("user", "me"),
            ("application_name", "my app"),
            ("replication", "database"),
            ("options", "-c a=b"),
        ]);
        let expected = [
            ("application_name", "my app"),
            ("replication", "database"),
            ("options", "-c a=b"),
        ];
        assert_eq!(
            settings.parameters,
            expected.map(|(n, v)| (n.to_owned(), v.to_owned()))
        );
        assert!(settings.replication);
    }

    #[test]
    fn other_parameters_are_folded_into_options_behind_the_clients_own() {
        let settings = settings(&[
            ("search_path", "\"my schema\", public"),
            ("options", "-c x=1"),
            ("TimeZone", "UTC"),
        ]);
        assert_eq!(
            words(&settings),
            [
                "-c",
                "x=1",
                "-c",
                "search_path=\"my schema\", public",
                "-c",
                "TimeZone=UTC"
            ]
        );
    }

    #[test]
    fn a_backslash_at_the_end_of_the_clients_options_does_not_escape_a_folded_parameter() {
        for own in ["-c x=1\\", "-c x=1"] {
            let settings = settings(&[("options", own), ("a", "b\\"), ("c", "d")]);
            assert_eq!(
                words(&settings),
                ["-c", "x=1", "-c", "a=b\\", "-c", "c=d"],
                "{own}"
            );
        }
    }

    #[test]
    fn client_encoding_is_folded_and_remembered() {
        let settings = settings(&[("client_encoding", "LATIN1")]);
        assert_eq!(settings.client_encoding.as_deref(), Some("LATIN1"));
        assert_eq!(words(&settings), ["-c", "client_encoding=LATIN1"]);
        assert!(!settings.replication);
    }

    /// The edge drops them, so a connection string with such a word works without the proxy.
    #[test]
    fn names_that_would_set_another_parameter_are_omitted() {
        let settings = settings(&[("a=b", "x"), ("a-b", "x"), ("a b", "x"), ("c", "d")]);
        assert_eq!(settings.unusable, ["a=b", "a-b", "a b"]);
        assert_eq!(words(&settings), ["-c", "c=d"]);
    }

    #[test]
    fn only_the_dropped_parameter_is_omitted() {
        let settings = settings(&[
            ("options", "-c x=1"),
            ("schema", "app"),
            ("TimeZone", "UTC"),
        ]);
        let options = settings.options(|name| name == "schema");
        assert_eq!(split(&options), ["-c", "x=1", "-c", "TimeZone=UTC"]);
    }

    #[test]
    fn a_startup_message_too_long_after_folding_is_refused() {
        let value = " ".repeat(6_000);
        let settings = settings(&[("search_path", &value)]);
        let too_long = settings.startup("me", |_| false).unwrap_err();
        assert!(too_long.length > 12_000, "{too_long}");
        let sent = settings.startup("me", |_| true).unwrap();
        assert_eq!(sent.len(), b"....____user\0me\0database\0db\0\0".len());
        // Exactly as long as is allowed, and one more.
        for (more, fits) in [(0, true), (1, false)] {
            let length = MAX_STARTUP_LEN - sent.len() - b"options\0-c x=\0".len() + more;
            let settings = LoginParameters {
                folded: vec![("x".to_owned(), "y".repeat(length))],
                ..settings.clone()
            };
            let sent = settings.startup("me", |_| false);
            match sent {
                Ok(sent) => assert_eq!((sent.len(), fits), (MAX_STARTUP_LEN, true)),
                Err(TooLong { length }) => assert_eq!((length, fits), (MAX_STARTUP_LEN + 1, false)),
            }
        }
    }

    #[test]
    fn replication_off_is_an_ordinary_session() {
        assert!(!settings(&[("replication", "off")]).replication);
        assert!(settings(&[("replication", "true")]).replication);
    }

    proptest! {
        #[test]
        fn the_server_reads_back_any_value(value in "[^\0]{0,60}") {
            let settings = settings(&[("x.y", &value)]);
            prop_assert_eq!(words(&settings), ["-c".to_owned(), format!("x.y={value}")]);
        }
    }
}
