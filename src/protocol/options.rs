//! Carrying start-up settings through an edge that drops the ones it does not know.
//!
//! The endpoint's edge forwards `user`, `database`, `application_name`, `options` and `replication` only. Every other
//! setting is folded into `options` as `-c name=value`, where the server reads it at start-up just the same, so it
//! survives `RESET ALL` and `DISCARD ALL` as a start-up value does.

use super::startup::StartupMessage;

/// Parameters that the edge passes on as they are (`user` and `database` are set apart).
const FORWARDED: [&str; 2] = ["application_name", "replication"];
const CLIENT_ENCODING: &str = "client_encoding";

/// What is asked of the upstream in one client's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSettings {
    /// The database to open.
    pub database: String,
    /// The database to open if that one does not exist.
    pub fallback_database: Option<String>,
    /// The parameters to send besides `user` and `database`.
    pub parameters: Vec<(String, String)>,
    /// The encoding the client asked for: the edge may force another, which is then mended by a `SET`.
    pub client_encoding: Option<String>,
    /// Whether the session speaks the replication protocol, in which no `SET` may be slipped in.
    pub replication: bool,
}

/// A setting that cannot be carried.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unrecognized configuration parameter \"{name}\"")]
pub struct UnknownSetting {
    /// The name as sent.
    pub name: String,
}

impl SessionSettings {
    /// Works out what to ask of the upstream.
    ///
    /// # Errors
    /// A parameter name that no server setting can have.
    pub fn new(message: &StartupMessage, database: String) -> Result<Self, UnknownSetting> {
        let mut parameters = Vec::new();
        let mut options = message.parameter("options").unwrap_or_default().to_owned();
        for (name, value) in &message.parameters {
            match name.as_str() {
                "user" | "database" | "options" => {}
                name if FORWARDED.contains(&name) => {
                    parameters.push((name.to_owned(), value.clone()));
                }
                name => fold(&mut options, name, value)?,
            }
        }
        if !options.is_empty() {
            parameters.push(("options".to_owned(), options));
        }
        Ok(Self {
            database,
            fallback_database: None,
            parameters,
            client_encoding: message.parameter(CLIENT_ENCODING).map(str::to_owned),
            replication: message.parameter("replication").is_some_and(is_replication),
        })
    }

    /// Every text in it that the client may have chosen: a server may repeat any of them in an error.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let parameters = self
            .parameters
            .iter()
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

fn fold(options: &mut String, name: &str, value: &str) -> Result<(), UnknownSetting> {
    // `-c` ends the name at the first `=` and reads `-` as `_`: either would set something else.
    if name.contains(['=', '-']) || name.contains(char::is_whitespace) {
        return Err(UnknownSetting {
            name: name.to_owned(),
        });
    }
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
    Ok(())
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
        SessionSettings::new(&message(parameters), "db".to_owned()).unwrap()
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
        let (_, options) = settings.parameters.last().unwrap();
        assert_eq!(
            split(options),
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
            let (_, options) = settings.parameters.last().unwrap();
            assert_eq!(
                split(options),
                ["-c", "x=1", "-c", "a=b\\", "-c", "c=d"],
                "{own}"
            );
        }
    }

    #[test]
    fn the_encoding_is_both_folded_and_remembered() {
        let settings = settings(&[("client_encoding", "LATIN1")]);
        assert_eq!(settings.client_encoding.as_deref(), Some("LATIN1"));
        assert_eq!(
            settings.parameters,
            [("options".to_owned(), "-c client_encoding=LATIN1".to_owned())]
        );
        assert!(!settings.replication);
    }

    #[test]
    fn names_that_would_set_something_else_are_refused() {
        for name in ["a=b", "a-b", "a b"] {
            assert!(
                SessionSettings::new(&message(&[(name, "x")]), String::new()).is_err(),
                "{name}"
            );
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
            let (_, options) = settings.parameters.last().unwrap();
            prop_assert_eq!(split(options), ["-c".to_owned(), format!("x.y={value}")]);
        }
    }
}
