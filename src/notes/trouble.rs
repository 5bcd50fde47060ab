//! What can stand between a reader and the notes, in plain words.
//!
//! The words are for whoever opens the page: no codes, no addresses, nothing that a server said. Those are in the log.

use tokio_postgres::error::SqlState;

use super::database::Failure;

/// A state of the database as a reader meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Asleep, starting, or not answering yet.
    Waking,
    /// It took a connection, and then too long.
    Slow,
    /// Too many clients, ours or others.
    Busy,
    /// The proxy itself takes no connections.
    Unreachable,
    /// Who the proxy is was not accepted.
    Login,
    /// The role may not do this.
    Permission,
    /// No such database.
    NoDatabase,
    /// No such table.
    NoTable,
    /// A table of another shape.
    OtherShape,
    /// Anything else.
    Other,
}

impl Trouble {
    /// The heading.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Self::Waking => "The database is waking up",
            Self::Slow => "The database is taking too long",
            Self::Busy => "The database is busy",
            Self::Unreachable => "The proxy is not taking connections",
            Self::Login => "The database did not accept the login",
            Self::Permission => "The notes may not be read",
            Self::NoDatabase => "There is no such database",
            Self::NoTable => "There is no notes table yet",
            Self::OtherShape => "The notes table looks different",
            Self::Other => "The notes cannot be shown",
        }
    }

    /// What it means and what will happen.
    pub(super) fn explanation(self) -> &'static str {
        match self {
            Self::Waking => {
                "It sleeps while nobody needs it, and has been asked to wake. That usually takes a few seconds: \
                 try again in a moment."
            }
            Self::Slow => "It was reached, but did not answer in time. Try again in a moment.",
            Self::Busy => "All of its connections are in use. Try again in a moment.",
            Self::Unreachable => {
                "This page reads its notes through lakebase-proxy, which is starting or stopping. Try again in a \
                 moment."
            }
            Self::Login => {
                "The proxy could not log in with the identity it was given. Whoever runs it finds the reason, and \
                 what to do about it, in its log."
            }
            Self::Permission => {
                "The proxy is logged in, but its role may not read the table. A grant mends it; this page then works \
                 at once."
            }
            Self::NoDatabase => {
                "The proxy reached the server, but the database it is set to use does not exist there."
            }
            Self::NoTable => {
                "The database is awake and answers. Create the table, and this page shows what is in it."
            }
            Self::OtherShape => {
                "The page reads the columns id, content and created_at; not all of them are there."
            }
            Self::Other => {
                "The database answered with an error. Whoever runs the proxy finds it in the log."
            }
        }
    }

    /// A statement that mends it.
    pub(super) fn statement(self) -> Option<&'static str> {
        match self {
            Self::NoTable => Some(
                "CREATE TABLE notes (\n    id serial PRIMARY KEY,\n    content text NOT NULL,\n    \
                 created_at timestamp DEFAULT now()\n);",
            ),
            Self::Permission => Some("GRANT SELECT ON notes TO \"the proxy's role\";"),
            _ => None,
        }
    }

    /// Seconds after which another try is sensible.
    pub(super) fn retry_after(self) -> u32 {
        match self {
            Self::Waking | Self::Slow | Self::Busy | Self::Unreachable => 5,
            _ => 30,
        }
    }
}

impl From<&Failure> for Trouble {
    fn from(failure: &Failure) -> Self {
        match failure {
            Failure::NoConnection => Self::Waking,
            Failure::Slow => Self::Slow,
            Failure::Busy => Self::Busy,
            Failure::Closed => Self::Unreachable,
            Failure::Database(error) => match error.code() {
                Some(code) => from_code(code),
                // The proxy always says why; silence means that nobody is there.
                None => Self::Unreachable,
            },
        }
    }
}

fn from_code(code: &SqlState) -> Trouble {
    let known = [
        (SqlState::UNDEFINED_TABLE, Trouble::NoTable),
        (SqlState::UNDEFINED_COLUMN, Trouble::OtherShape),
        (SqlState::INSUFFICIENT_PRIVILEGE, Trouble::Permission),
        (SqlState::INVALID_CATALOG_NAME, Trouble::NoDatabase),
        (SqlState::QUERY_CANCELED, Trouble::Slow),
        (SqlState::TOO_MANY_CONNECTIONS, Trouble::Busy),
        (SqlState::CANNOT_CONNECT_NOW, Trouble::Waking),
        (SqlState::ADMIN_SHUTDOWN, Trouble::Waking),
        (SqlState::CRASH_SHUTDOWN, Trouble::Waking),
        (SqlState::PROTOCOL_VIOLATION, Trouble::Other),
    ];
    if let Some((_, trouble)) = known.iter().find(|(known, _)| known == code) {
        return *trouble;
    }
    // Otherwise the class: the first two characters of a SQLSTATE.
    match code.code().get(..2) {
        Some("08") => Trouble::Waking,
        Some("28") => Trouble::Login,
        Some("53") => Trouble::Busy,
        _ => Trouble::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reader_is_told_what_stands_in_the_way() {
        for (code, trouble) in [
            ("42P01", Trouble::NoTable),
            ("42703", Trouble::OtherShape),
            ("42501", Trouble::Permission),
            ("3D000", Trouble::NoDatabase),
            ("28P01", Trouble::Login),
            ("28000", Trouble::Login),
            ("53300", Trouble::Busy),
            ("57P03", Trouble::Waking),
            ("57P01", Trouble::Waking),
            ("08001", Trouble::Waking),
            ("08006", Trouble::Waking),
            ("08P01", Trouble::Other),
            ("57014", Trouble::Slow),
            ("XX000", Trouble::Other),
        ] {
            assert_eq!(from_code(&SqlState::from_code(code)), trouble, "{code}");
        }
    }
}
