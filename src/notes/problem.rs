//! Why the notes page cannot show its notes, as text for its readers.
//!
//! The texts contain no codes, no addresses and no server messages; the log has those.

use tokio_postgres::error::SqlState;

use super::database::Failure;

/// A state of the database, as seen by a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// Asleep, starting, or not answering yet.
    Waking,
    /// Connected, but no answer in time.
    Slow,
    /// Too many clients, ours or others.
    Busy,
    /// The proxy accepts no connections.
    Unreachable,
    /// The proxy's identity was refused.
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

impl Problem {
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

    /// What it means and what happens next.
    pub(super) fn explanation(self) -> &'static str {
        match self {
            Self::Waking => {
                "It sleeps when it is not used, and is waking up now. That usually takes a few seconds: \
                 try again in a moment."
            }
            Self::Slow => "It was reached, but did not answer in time. Try again in a moment.",
            Self::Busy => "All of its connections are in use. Try again in a moment.",
            Self::Unreachable => {
                "This page reads its notes through lakebase-proxy, which is starting or stopping. Try again in a \
                 moment."
            }
            Self::Login => {
                "The proxy could not log in with its identity. Its log has the reason and the fix."
            }
            Self::Permission => {
                "The proxy is logged in, but its role may not read the table. A grant fixes that; this page then works \
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
            Self::Other => "The database answered with an error. The proxy's log has it.",
        }
    }

    /// The statement that fixes it.
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

impl From<&Failure> for Problem {
    fn from(failure: &Failure) -> Self {
        match failure {
            Failure::NoConnection => Self::Waking,
            Failure::Slow => Self::Slow,
            Failure::Busy => Self::Busy,
            Failure::Closed => Self::Unreachable,
            Failure::Database(error) => match error.code() {
                Some(code) => from_code(code),
                // The proxy always sends an error; a silent close means that it is not running.
                None => Self::Unreachable,
            },
        }
    }
}

fn from_code(code: &SqlState) -> Problem {
    let known = [
        (SqlState::UNDEFINED_TABLE, Problem::NoTable),
        (SqlState::UNDEFINED_COLUMN, Problem::OtherShape),
        (SqlState::INSUFFICIENT_PRIVILEGE, Problem::Permission),
        (SqlState::INVALID_CATALOG_NAME, Problem::NoDatabase),
        // By the `statement_timeout` of the page's connections.
        (SqlState::QUERY_CANCELED, Problem::Slow),
        (SqlState::TOO_MANY_CONNECTIONS, Problem::Busy),
        (SqlState::CANNOT_CONNECT_NOW, Problem::Waking),
        // Sent to open connections when an endpoint is suspended.
        (SqlState::ADMIN_SHUTDOWN, Problem::Waking),
        (SqlState::CRASH_SHUTDOWN, Problem::Waking),
        // Of class 08, but no sign of an endpoint that sleeps.
        (SqlState::PROTOCOL_VIOLATION, Problem::Other),
    ];
    if let Some((_, problem)) = known.iter().find(|(known, _)| known == code) {
        return *problem;
    }
    // Otherwise the class: the first two characters of a SQLSTATE.
    match code.code().get(..2) {
        Some("08") => Problem::Waking,
        Some("28") => Problem::Login,
        Some("53") => Problem::Busy,
        _ => Problem::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_explanation() {
        for (code, problem) in [
            ("42P01", Problem::NoTable),
            ("42703", Problem::OtherShape),
            ("42501", Problem::Permission),
            ("3D000", Problem::NoDatabase),
            ("28P01", Problem::Login),
            ("28000", Problem::Login),
            ("53300", Problem::Busy),
            ("57P03", Problem::Waking),
            ("57P01", Problem::Waking),
            ("08001", Problem::Waking),
            ("08006", Problem::Waking),
            ("08P01", Problem::Other),
            ("57014", Problem::Slow),
            ("XX000", Problem::Other),
        ] {
            assert_eq!(from_code(&SqlState::from_code(code)), problem, "{code}");
        }
    }
}
