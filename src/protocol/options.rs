//! Carrying start-up settings through an edge that drops the ones it does not know.
//!
//! The endpoint's edge forwards `user`, `database`, `application_name`, `options` and `replication` only. Every other
//! setting is folded into `options` as `-c name=value`, where the server reads it at start-up just the same, so it
//! survives `RESET ALL` and `DISCARD ALL` as a start-up value does.
//!
//! Names that are no settings (`pgbouncer`, `schema`, `max_conns`: words that a driver did not take out of its connection
//! string) would be refused there, while the edge drops them. The server alone knows its settings, so they are sent,
//! and left out once the server has refused them by name.

use std::borrow::Cow;

use super::startup::{MAX_STARTUP_LEN, StartupMessage, encode_startup};

/// Parameters that the edge passes on as they are (`user` and `database` are set apart).
const FORWARDED: [&str; 2] = ["application_name", "replication"];
const CLIENT_ENCODING: &str = "client_encoding";
const OPTIONS: &str = "options";

/// What is asked of the upstream in one client's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionSettings {
    /// The database to open.
    pub database: String,
    /// The database to open if that one does not exist.
    pub fallback_database: Option<String>,
    /// The parameters to send as they are, besides `user` and `database`.
    pub parameters: Vec<(String, String)>,
    /// The parameters to fold into `options`.
    pub folded: Vec<(String, String)>,
    /// Names of parameters that cannot be settings and are left out.
    pub unusable: Vec<String>,
    /// The encoding the client asked for: the edge may force another, which is then mended by a `SET`.
    pub client_encoding: Option<String>,
    /// Whether the session speaks the replication protocol, in which no `SET` may be slipped in.
    pub replication: bool,
}

/// The startup message would be longer than servers accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the startup parameters take {length} bytes as they are sent to the endpoint, which accepts {MAX_STARTUP_LEN}"
)]
pub struct TooLong {
    /// In bytes.
    pub length: usize,
}

impl SessionSettings {
    /// Works out what to ask of the upstream.
    pub fn new(message: &StartupMessage, database: String) -> Self {
        let mut settings = Self {
            database,
            client_encoding: message.parameter(CLIENT_ENCODING).map(str::to_owned),
            replication: message.parameter("replication").is_some_and(is_replication),
            ..Self::default()
        };
        for (name, value) in &message.parameters {
            match name.as_str() {
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
    ) -> Result<Vec<u8>, TooLong> {
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

    /// The client's own options, and what is folded into them.
    fn options(&self, is_dropped: impl Fn(&str) -> bool) -> Cow<'_, str> {
        let own = self.parameters.iter().find(|(name, _)| name == OPTIONS);
        let mut options = Cow::Borrowed(own.map_or("", |(_, options)| options));
        for (name, value) in &self.folded {
            if !is_dropped(name) {
                fold(options.to_mut(), name, value);
            }
        }
        options
    }

    /// Every text in it that the client may have chosen: a server may repeat any of them in an error.
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

/// Whether a `replication` value asks for the replication protocol: anything that is not a Boolean "no" does.
fn is_replication(value: &str) -> bool {
    !["false", "off", "no", "0", "f", "n"]
        .iter()
        .any(|no| value.eq_ignore_ascii_case(no))
}

/// `-c` ends the name at the first `=` and reads `-` as `_`: either would set something else.
fn can_be_folded(name: &str) -> bool {
    !name.contains(['=', '-']) && !name.contains(char::is_whitespace)
}

fn fold(options: &mut String, name: &str, value: &str) {
    // The server drops a lone backslash at the very end; here it would take the space that follows.
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
            // The server splits at C's isspace() and takes a backslash as "the next one is literal".
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

    fn settings(parameters: &[(&str, &str)]) -> SessionSettings {
        SessionSettings::new(&message(parameters), "db".to_owned())
    }

    /// What the server reads of them.
    fn words(settings: &SessionSettings) -> Vec<String> {
        split(&settings.options(|_| false))
    }

    /// PostgreSQL's `pg_split_opts`: what the server makes of an `options` string.
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
    fn what_the_edge_knows_passes_as_it_is() {
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
    fn every_other_setting_is_folded_into_options_after_the_clients_own() {
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
    fn a_backslash_at_the_end_of_the_clients_own_takes_nothing_of_ours() {
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
    fn the_encoding_is_both_folded_and_remembered() {
        let settings = settings(&[("client_encoding", "LATIN1")]);
        assert_eq!(settings.client_encoding.as_deref(), Some("LATIN1"));
        assert_eq!(words(&settings), ["-c", "client_encoding=LATIN1"]);
        assert!(!settings.replication);
    }

    /// The edge drops them, so that a connection string with such a word works without the proxy, too.
    #[test]
    fn names_that_would_set_something_else_are_left_out() {
        let settings = settings(&[("a=b", "x"), ("a-b", "x"), ("a b", "x"), ("c", "d")]);
        assert_eq!(settings.unusable, ["a=b", "a-b", "a b"]);
        assert_eq!(words(&settings), ["-c", "c=d"]);
    }

    #[test]
    fn what_the_server_does_not_know_is_left_out_alone() {
        let settings = settings(&[
            ("options", "-c x=1"),
            ("schema", "app"),
            ("TimeZone", "UTC"),
        ]);
        let options = settings.options(|name| name == "schema");
        assert_eq!(split(&options), ["-c", "x=1", "-c", "TimeZone=UTC"]);
    }

    #[test]
    fn what_folding_makes_too_long_is_measured() {
        let value = " ".repeat(6_000);
        let settings = settings(&[("search_path", &value)]);
        let too_long = settings.startup("me", |_| false).unwrap_err();
        assert!(too_long.length > 12_000, "{too_long}");
        let sent = settings.startup("me", |_| true).unwrap();
        assert_eq!(sent.len(), b"....____user\0me\0database\0db\0\0".len());
        // Exactly as long as is allowed, and one more.
        for (more, fits) in [(0, true), (1, false)] {
            let room = MAX_STARTUP_LEN - sent.len() - b"options\0-c x=\0".len() + more;
            let settings = SessionSettings {
                folded: vec![("x".to_owned(), "y".repeat(room))],
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
