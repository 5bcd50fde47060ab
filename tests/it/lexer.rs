//! SQL texts are split into statements as Postgres splits them.

use std::{env, fs, path::Path};

use lakebase_proxy::protocol::lexer::{Backslash, statements};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::harness::{
    self,
    wire::{Reply, Wire, message, sync, text},
};

async fn split_matches<S: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    sql: &str,
    backslash: Backslash,
) {
    let count = statements(sql.as_bytes(), backslash).count();
    wire.send(&text('Q', sql)).await;
    let replies = wire.until('Z').await;
    let errors: Vec<_> = replies.iter().filter(|it| it.tag == 'E').collect();
    assert!(errors.is_empty(), "{sql}: {}", errors[0].error().message);
    let tags = replies.iter().filter(|it| it.tag == 'C').count();
    assert_eq!(count, tags, "{sql}");
}

/// Each text is valid in a failed and in a working server alike; the number of command tags is the number of statements.
#[tokio::test]
async fn as_many_statements_are_found_as_the_server_reports() {
    let emulator = harness::emulator().await;
    let mut wire = Wire::direct(&emulator).await;
    for sql in [
        "",
        ";;; -- nothing\n;",
        "select 1; select 2;; select 3",
        "/*/* nested */*/ select 1; /* ; */ select 2 -- ; select 3",
        "--\rselect 1; --\nselect 2",
        "select\x0c1;\tselect 2",
        "select ';'';', 'a' -- ;\n ';b', 'c'\n\n';d'; select 1",
        "select E'\\';', e'a\\\\'; select E'a'\n'\\';'",
        "select b'01', x'0f', n';', u&'\\0061;', U&'d!0061t;' uescape '!'; select b''",
        "select 1 as \";\", 2 as \"a\"\";\", 3 as u&\"d\\0061t;\", 4 as \"$$\"; select $$;$$",
        "select $a$;$b$;$$;$a$, $ä$;$ä$, $_1$;$_1$, $$$;$$; select 1",
        "select 1 as a$$; select 2 as b$$",
        "select 1+-- ;\n1; select 1*/* ; */1; select 1 - -1",
        "create temp table t$1 (a int); create rule r as on insert to t$1 do also (delete from t$1; select 1;); drop table t$1",
        "create function pg_temp.f() returns int begin atomic select 1; select case when true then 2 end; end; select 1",
        "create or replace function pg_temp.f() returns int begin atomic; select 1 as end; end; create or replace procedure pg_temp.p() language sql begin atomic end",
        "create or replace function pg_temp.begin() returns int language sql as 'select 1; select 2'; select 1",
        "begin; select 1; end; start transaction; commit and chain; rollback",
        "do $do$ begin perform $$;$$; end; $do$; select 1",
        "select 1 as e, 'a' as e; select 2 as U; select 3 as \"e\"",
        "select 1 as \u{e9}\u{4e2d}; select 'x' as \u{e9}",
        "select 1.5e3, .5, 1., 0; select 1",
        "prepare lexer as select $1::int; execute lexer(1); deallocate lexer",
    ] {
        split_matches(&mut wire, sql, Backslash::Plain).await;
    }
    wire.query("set standard_conforming_strings = off; set escape_string_warning = off")
        .await;
    for sql in [
        "select 'a\\'; select 1'; select 2",
        "select 'a' -- \n '\\';'; select 'b\\\\'; select 3",
        "select b'01', $$\\$$; select 'a'';'",
    ] {
        split_matches(&mut wire, sql, Backslash::Escape).await;
    }
}

/// Each statement by itself, prepared and not executed: the server parses it as exactly one.
///
/// The texts are those of Postgres' regression tests, which tests/versions/regress fetches.
#[tokio::test]
#[ignore = "needs the source of PostgreSQL: tests/versions/regress"]
async fn statements_of_the_regression_tests_are_split_as_the_server_splits_them() {
    let directory = env::var_os("REGRESS_SQL").expect("REGRESS_SQL");
    let emulator = harness::emulator().await;
    let mut wire = Wire::direct(&emulator).await;
    let mut parsed = 0;
    for file in fs::read_dir(Path::new(&directory)).unwrap() {
        let path = file.unwrap().path();
        // A few are in other encodings.
        let Ok(script) = fs::read_to_string(&path) else {
            continue;
        };
        let sql = without_psql(&script);
        for statement in statements(sql.as_bytes(), Backslash::Plain) {
            let body = [b"\0", statement.text, b"\0\0\0"].concat();
            wire.send(&[message('P', &body), sync()].concat()).await;
            let replies = wire.until('Z').await;
            parsed += 1;
            // Statements with errors are part of the tests; these two are errors of the split.
            let error = replies.iter().find(|it| it.tag == 'E').map(Reply::error);
            let error = error.map(|it| it.message).unwrap_or_default();
            let is_split = !error.contains("multiple commands") && !error.contains("unterminated");
            let text = String::from_utf8_lossy(statement.text);
            assert!(is_split, "{}: {error}: {text}", path.display());
        }
    }
    assert!(parsed > 30_000, "{parsed} statements");
}

/// The SQL of a script of psql: without its commands, and without the data of COPY.
fn without_psql(script: &str) -> String {
    let mut sql = String::new();
    let mut is_data = false;
    for line in script.lines() {
        if is_data {
            is_data = line != "\\.";
            continue;
        }
        let line = line.replace("\\;", ";");
        let command = if line.trim_start().starts_with('\\') {
            0
        } else {
            line.find(" \\g").unwrap_or(line.len())
        };
        sql.push_str(&line[..command]);
        if command < line.len() && command > 0 {
            sql.push(';');
        }
        sql.push('\n');
        let lower = line.to_ascii_lowercase();
        is_data = lower.contains("from stdin")
            && lower.trim_end().ends_with(';')
            && !lower.starts_with("--");
    }
    sql
}
