use proptest::prelude::*;

use super::*;

/// Errors in which a server repeats a client's text, at `{}`. Those of Postgres and PgBouncer are real.
const ECHOES: &[(&str, &str)] = &[
    ("22023", "invalid value for parameter \"work_mem\": \"{}\""),
    ("22023", "role \"{}\" does not exist"),
    ("22P02", "invalid input syntax for type integer: \"{}\""),
    ("3D000", "database \"{}\" does not exist"),
    ("42501", "permission denied for database \"{}\""),
    (
        "42601",
        "invalid command-line argument for server process: {}",
    ),
    ("42704", "unrecognized configuration parameter \"{}\""),
    (
        "55000",
        "database \"{}\" is not currently accepting connections",
    ),
    (
        "55P02",
        "parameter \"{}\" cannot be changed without restarting the server",
    ),
    (
        "58P01",
        "could not access file \"$libdir/plugins/{}\": No such file or directory",
    ),
    (
        "XX000",
        "could not access file \"$libdir/plugins/{}\": File name too long",
    ),
    ("53300", "too many connections for database \"{}\""),
    (
        "28000",
        "no pg_hba.conf entry for host \"10.0.0.1\", user \"app\", database \"{}\", no encryption",
    ),
    (
        "28000",
        "pg_hba.conf rejects connection for host \"10.0.0.1\", user \"app\", database \"{}\", SSL encryption",
    ),
    (
        "28000",
        "kein pg_hba.conf-Eintrag f\u{fc}r Host \u{bb}10.0.0.1\u{ab}, Datenbank \u{bb}{}\u{ab}: no pg_hba.conf entry",
    ),
    (
        "28P01",
        "password authentication failed for user \"app\" in database \"{}\"",
    ),
    (
        "57P03",
        "the database system is starting up, database \"{}\"",
    ),
    ("08P01", "unsupported startup parameter: {}"),
    ("08P01", "unsupported startup parameter in options: {}"),
    (
        "XX000",
        "Inconsistent project name inferred from SNI ('ep-x') and project option ('{}').",
    ),
    ("XX000", "unknown database '{}'"),
    ("", "unknown database {}"),
];

fn class(code: &str, message: &str, detail: Option<&str>, client: &[&str]) -> Class {
    let error = ErrorFields {
        code: code.to_owned(),
        message: message.to_owned(),
        detail: detail.map(str::to_owned),
        ..ErrorFields::default()
    };
    classify(&error, client.iter().copied()).0
}

/// Texts of an attacker who knows the table.
fn chosen() -> impl Strategy<Value = String> {
    let words: Vec<String> = RULES
        .iter()
        .flat_map(|rule| ["", " ", " x "].map(|between| rule.text.replace('*', between)))
        .flat_map(|text| [text.to_uppercase(), text])
        .chain(["\"", "'", "`", "\u{bb}", "\u{ab}", "\n", ", ", "\\", "x"].map(str::to_owned))
        .collect();
    let piece = prop_oneof![4 => prop::sample::select(words), 1 => "[^\0]{0,6}"];
    prop::collection::vec(piece, 1..5).prop_map(|pieces| pieces.join(" "))
}

proptest! {
    /// A client with a database, or a value in `options`, named `endpoint is idle` once counted as a sleeping endpoint, led
    /// the retries, and made every other login wait for a minute; one with `token x has expired` used up the forced refreshes
    /// of all.
    #[test]
    fn no_text_that_a_client_chooses_changes_the_class(
        (code, echo) in prop::sample::select(ECHOES),
        text in chosen(),
        in_detail in any::<bool>(),
        escaped in any::<bool>(),
    ) {
        let sent = if escaped {
            format!("-c work_mem={}", text.replace('\\', "\\\\").replace(' ', "\\ "))
        } else {
            text.clone()
        };
        let classified = |text: &str| {
            let echo = echo.replace("{}", text);
            if in_detail {
                class(code, "no", Some(&echo), &[&sent])
            } else {
                class(code, &echo, None, &[&sent])
            }
        };
        let (class, expected) = (classified(&text), classified("x"));
        // With a mark of its own a text can leave its quotation; then it may lead to a class that concerns this client alone.
        let is_quoted = !text.contains(['"', '\'', '`', '\u{ab}', '\u{bb}']);
        let is_harmless = !concerns_others(class);
        prop_assert!(
            class == expected || (is_harmless && !is_quoted),
            "{class:?}, not {expected:?}: {code} {text}"
        );
    }

    /// A server may also truncate, unquote or change the case of a client's text.
    #[test]
    fn a_text_of_the_client_never_makes_others_wait(
        code in prop::sample::select(&["", "XX000", "53300", "08P01", "0A000", "42501"][..]),
        text in chosen(),
        cut in 0_usize..60,
    ) {
        let echoed: String = text.to_lowercase().replace(['"', '\''], "").chars().skip(cut).collect();
        let class = class(code, &format!("not understood: {echoed}"), None, &[&text]);
        prop_assert!(!concerns_others(class), "{class:?} {code} {text}");
    }
}

#[test]
fn a_database_named_like_a_rule_does_not_disable_the_rule() {
    for (code, message, expected) in [
        ("57P03", "the database system is starting up", Waking),
        ("XX000", "JWT token has expired (exp=1)", Identity),
        (
            "28P01",
            "password authentication failed for user \"app\"",
            Identity,
        ),
    ] {
        for database in [
            "token",
            "database system is",
            "password authentication failed",
            "role",
        ] {
            assert_eq!(
                class(code, message, None, &[database]),
                expected,
                "{code} {message} {database}"
            );
        }
    }
}

#[test]
fn an_idle_session_timeout_is_not_a_sleeping_endpoint() {
    let ended = "terminating connection due to idle-session timeout";
    assert_eq!(class("57P05", ended, None, &[]), Class::Other);
}

#[test]
fn quotations_are_removed_and_apostrophes_are_not() {
    for (text, plain) in [
        (
            "Couldn't connect to 'x y' now",
            "couldn't connect to \"\" now",
        ),
        (
            "token's identity \"a\" is not \"b\"",
            "token's identity \"\" is not \"\"",
        ),
        ("Datenbank \u{bb}x\u{ab} fehlt", "datenbank \"\" fehlt"),
        ("la base \u{ab} x \u{bb} manque", "la base \"\" manque"),
        ("option `x'", "option \"\""),
        ("role \"x", "role \"x"),
    ] {
        assert_eq!(without_quotations(text), plain);
    }
}
