//! What a role may do, and the statements that give it what it lacks.

use super::report::Finding;
use crate::upstream::probe;

/// What may be done with the database, in one row.
pub(super) const QUESTION: &str = "\
SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE'), \
    count(*), count(*) FILTER (WHERE readable), min(nspname) FILTER (WHERE NOT readable) \
FROM (SELECT n.nspname, has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable \
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname <> 'information_schema' \
        AND n.nspname NOT LIKE 'pg\\_%') AS tables";

/// What the answer to [`QUESTION`] says of this user.
pub(super) fn judge(rows: &[probe::Row], user: &str) -> Finding {
    let cell = |column: usize| rows.first()?.get(column)?.as_deref();
    let number = |column: usize| cell(column)?.parse::<u64>().ok();
    let (Some(tables), Some(readable)) = (number(3), number(4)) else {
        return Finding::failed("the server does not say what the role may do");
    };
    let creates = match cell(2) {
        Some("t") => "may create schemas",
        _ => "may not create schemas",
    };
    let message = format!("{creates}; reads {readable} of {tables} tables");
    match (tables, readable, cell(5)) {
        (1.., 0, Some(schema)) => {
            let (schema, user) = (identifier(schema), identifier(user));
            Finding::warning(message).mend(format!(
                "as the tables' owner: GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user};"
            ))
        }
        _ => Finding::ok(message),
    }
}

/// The statements that make a role for OAuth logins.
pub(super) fn create_role(user: &str) -> String {
    let kind = if user.contains('@') {
        "USER"
    } else {
        "SERVICE_PRINCIPAL"
    };
    format!(
        "on this branch, as its owner: CREATE EXTENSION IF NOT EXISTS databricks_auth; SELECT databricks_create_role('{}', '{kind}');",
        user.replace('\'', "''")
    )
}

/// A name as it is quoted in SQL.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Outcome;

    #[test]
    fn statements_are_quoted() {
        assert!(
            create_role("o'neil@example.com")
                .ends_with("databricks_create_role('o''neil@example.com', 'USER');")
        );
        assert!(create_role("0f7d-1").ends_with("'SERVICE_PRINCIPAL');"));
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }

    #[test]
    fn a_role_that_reads_nothing_is_told_what_to_ask_for() {
        let row = |cells: &[&str]| {
            vec![
                cells
                    .iter()
                    .map(|cell| Some((*cell).to_owned()))
                    .collect::<probe::Row>(),
            ]
        };
        let finding = judge(
            &row(&["me", "db", "f", "3", "0", "public"]),
            "o'neil@example.com",
        );
        assert_eq!(finding.outcome, Outcome::Warning);
        let mend = finding.mend.unwrap();
        assert!(
            mend.contains("GRANT USAGE ON SCHEMA \"public\" TO \"o'neil@example.com\";"),
            "{mend}"
        );
        assert_eq!(
            judge(
                &row(&["me", "db", "t", "3", "2", "x"]),
                "o'neil@example.com"
            )
            .outcome,
            Outcome::Ok
        );
        assert_eq!(
            judge(&row(&["me", "db", "t", "0", "0"]), "o'neil@example.com").outcome,
            Outcome::Ok
        );
        assert_eq!(judge(&[], "o'neil@example.com").outcome, Outcome::Failed);
    }
}
