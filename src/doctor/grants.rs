//! The grants of a role, and the statements that add missing ones.

use super::check::Finding;
use crate::upstream::probe;

/// The role's rights in the database, as one row.
pub(super) const QUESTION: &str = "\
SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE'), \
    count(*), count(*) FILTER (WHERE readable), min(nspname) FILTER (WHERE NOT readable), \
    (SELECT has_schema_privilege(oid, 'CREATE') FROM pg_catalog.pg_namespace WHERE nspname = 'public') \
FROM (SELECT n.nspname, has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable \
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname <> 'information_schema' \
        AND n.nspname NOT LIKE 'pg\\_%') AS tables";

/// The finding from the answer to [`QUESTION`].
pub(super) fn judge(rows: &[probe::Row], user: &str) -> Finding {
    let cell = |column: usize| rows.first()?.get(column)?.as_deref();
    let number = |column: usize| cell(column)?.parse::<u64>().ok();
    let (Some(tables), Some(readable)) = (number(3), number(4)) else {
        return Finding::failed("the server did not return the grants of the role");
    };
    let creates = match cell(2) {
        Some("t") => "may create schemas",
        _ => "may not create schemas",
    };
    let message = format!("{creates}; reads {readable} of {tables} tables");
    match (tables, readable, cell(5)) {
        (1.., 0, Some(schema)) => {
            let (schema, user) = (identifier(schema), identifier(user));
            Finding::warning(message).fix(format!(
                "as the tables' owner: GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user};"
            ))
        }
        _ if cell(6) == Some("f") => {
            let user = identifier(user);
            Finding::ok(format!("{message}; makes no tables in schema public")).detail(format!(
                "for that, as the schema's owner: GRANT USAGE, CREATE ON SCHEMA public TO {user};"
            ))
        }
        _ => Finding::ok(message),
    }
}

/// The binding of the role to its identity: the extension in this database, and the role's security label.
pub(super) const BINDING: &str = "\
SELECT (SELECT count(*) FROM pg_catalog.pg_extension WHERE extname = 'databricks_auth'), \
    (SELECT label FROM pg_catalog.pg_seclabels l WHERE l.provider = 'databricks_auth' \
        AND l.objtype = 'role' AND l.objoid = r.oid) \
FROM pg_catalog.pg_roles r WHERE r.rolname = current_user";

/// The problem in the answer to [`BINDING`], for an identity with this numeric id.
pub(super) fn judge_binding(
    rows: &[probe::Row],
    user: &str,
    id: Option<&str>,
    database: &str,
) -> Option<Finding> {
    let cell = |column: usize| rows.first()?.get(column)?.as_deref();
    if cell(0) == Some("0") {
        let message = format!(
            "the database `{database}` lacks the extension databricks_auth, which OAuth logins need"
        );
        return Some(Finding::warning(message).fix(create_extension(database)));
    }
    let id = id?;
    // The label reads `id=<numeric id>,type=<kind>`, as `bind_role` writes it.
    let mut parts = cell(1)?.split(',');
    let bound = parts.find_map(|part| part.strip_prefix("id="))?;
    let message = format!("the role `{user}` is bound to the identity {bound}, and we are {id}");
    (bound != id).then(|| Finding::warning(message).fix(bind_role(user, Some(id))))
}

/// The statement that prepares a database made by a plain `CREATE DATABASE`.
pub(super) fn create_extension(database: &str) -> String {
    format!(
        "in the database {}, as its owner: CREATE EXTENSION IF NOT EXISTS databricks_auth;",
        identifier(database)
    )
}

/// The statement that binds a role to the identity with this numeric id.
pub(super) fn bind_role(user: &str, id: Option<&str>) -> String {
    format!(
        "as the role's owner: SECURITY LABEL FOR databricks_auth ON ROLE {} IS 'id={},type={}';",
        identifier(user),
        id.unwrap_or("<numeric id of the identity in the workspace>"),
        kind(user)
    )
}

/// The statements that create a role for OAuth logins.
pub(super) fn create_role(user: &str) -> String {
    let kind = kind(user);
    format!(
        "on this branch, as its owner: CREATE EXTENSION IF NOT EXISTS databricks_auth; SELECT databricks_create_role('{}', '{kind}');",
        user.replace('\'', "''")
    )
}

fn kind(user: &str) -> &'static str {
    // User names are e-mail addresses, those of service principals UUIDs, and groups have names of their own.
    if user.contains('@') {
        "USER"
    } else if uuid::Uuid::parse_str(user).is_ok() {
        "SERVICE_PRINCIPAL"
    } else {
        "GROUP"
    }
}

/// A quoted identifier.
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
        assert!(
            create_role("0f7d4a52-7a55-4b1c-9d0e-3f6a1c2b4d5e").ends_with("'SERVICE_PRINCIPAL');")
        );
        assert!(create_role("data readers").ends_with("'GROUP');"));
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }

    #[test]
    fn a_role_without_grants_gets_the_statements_as_a_fix() {
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
        let fix = finding.fix.unwrap();
        assert!(
            fix.contains("GRANT USAGE ON SCHEMA \"public\" TO \"o'neil@example.com\";"),
            "{fix}"
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
        let app = judge(&row(&["me", "db", "t", "0", "0", "", "f"]), "app");
        assert_eq!(app.outcome, Outcome::Ok, "its own schema will do");
        assert!(
            app.detail
                .unwrap()
                .contains("CREATE ON SCHEMA public TO \"app\";")
        );
    }

    #[test]
    fn a_role_bound_to_another_identity_and_a_database_without_extension_are_noticed() {
        const APP: &str = "0f7d4a52-7a55-4b1c-9d0e-3f6a1c2b4d5e";
        let judged = |extensions: &str, label: Option<&str>| {
            let row = vec![Some(extensions.to_owned()), label.map(str::to_owned)];
            judge_binding(&[row], APP, Some("7"), "raw")
        };
        assert!(judged("1", Some("id=7,type=SERVICE_PRINCIPAL")).is_none());
        assert!(judged("1", None).is_none(), "the login has worked");
        let fix = |finding: Option<Finding>| finding.unwrap().fix.unwrap();
        let other = fix(judged("1", Some("id=70,type=SERVICE_PRINCIPAL")));
        assert!(
            other.ends_with(&format!(
                "ON ROLE \"{APP}\" IS 'id=7,type=SERVICE_PRINCIPAL';"
            )),
            "{other}"
        );
        let raw = fix(judged("0", Some("id=7")));
        assert!(
            raw.contains("\"raw\"") && raw.contains("CREATE EXTENSION"),
            "{raw}"
        );
    }
}
