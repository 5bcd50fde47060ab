//! The database that a client's session opens.

use crate::config::DatabaseMapping;

/// The database to open for a client that sent `user` and `database`, and the one to open if that does not exist;
/// `default` is the endpoint's.
pub(super) fn choose(
    mapping: DatabaseMapping,
    user: Option<&str>,
    database: Option<&str>,
    default: &str,
) -> (String, Option<String>) {
    let Some(database) = database.or(user) else {
        return (default.to_owned(), None);
    };
    // libpq sends the user's name if no database is given, but many applications name both alike: the client's comes first.
    let may_be_default =
        mapping == DatabaseMapping::Default && Some(database) == user && database != default;
    (
        database.to_owned(),
        may_be_default.then(|| default.to_owned()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_named_like_the_user_falls_back_to_the_default() {
        use DatabaseMapping::{Default, Exact};
        const FALLBACK: Option<&str> = Some("main");
        for (mapping, user, database, name, fallback) in [
            (Default, Some("app"), None, "app", FALLBACK),
            (Default, Some("app"), Some("app"), "app", FALLBACK),
            (Default, Some("app"), Some("other"), "other", None),
            (Default, Some("main"), Some("main"), "main", None),
            (Default, None, None, "main", None),
            (Exact, Some("app"), Some("app"), "app", None),
            (Exact, Some("app"), None, "app", None),
        ] {
            let chosen = choose(mapping, user, database, "main");
            let expected = (name.to_owned(), fallback.map(str::to_owned));
            assert_eq!(chosen, expected, "{mapping:?} {user:?} {database:?}");
        }
    }
}
