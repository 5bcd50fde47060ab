//! Removes anything like a token from external text, before it is logged or passed on.
//!
//! Workspaces, HTTP proxies and servers sometimes repeat their input, which contains our tokens or parts of them. Tokens are
//! recognized by their form; names, addresses and request ids have a different one.

use std::borrow::Cow;

/// Replaces removed text.
pub(super) const REMOVED: &str = "[removed]";
/// The length from which a run of characters can be a secret: all tokens are longer.
const SHORTEST: usize = 20;
/// Prefixes of Databricks tokens and secrets, and of JSON in base64.
const BEGINNINGS: [&str; 5] = ["eyJ", "dapi", "dose", "dkea", "dsapi"];

/// `text` without anything that looks like a token, a key, or either in base64.
pub fn redact(text: &str) -> Cow<'_, str> {
    let mut clean = String::new();
    let mut taken = 0;
    for run in text.split(|character: char| !is_of_a_token(character)) {
        if run.len() < SHORTEST || !looks_secret(run) {
            continue;
        }
        // `split` yields slices of `text`, in order.
        let start = run.as_ptr().addr() - text.as_ptr().addr();
        clean.push_str(&text[taken..start]);
        clean.push_str(REMOVED);
        taken = start + run.len();
    }
    if taken == 0 {
        return Cow::Borrowed(text);
    }
    clean.push_str(&text[taken..]);
    Cow::Owned(clean)
}

/// The characters of JWTs, of base64 in both alphabets, and of their percent-encoding.
fn is_of_a_token(character: char) -> bool {
    character.is_ascii_alphanumeric() || "-_.~+/%".contains(character)
}

fn looks_secret(run: &str) -> bool {
    let begins = BEGINNINGS.iter().any(|beginning| {
        run.match_indices(beginning)
            .any(|(at, _)| run.len() - at >= SHORTEST && is_plain(&run[at..at + SHORTEST]))
    });
    if begins {
        return true;
    }
    // A slash is a base64 digit, too: parts between slashes may be random only as a whole.
    let parts = || run.split(['.', '/', '%']);
    let names: Vec<&str> = parts().filter(|part| !is_an_id(part)).collect();
    parts().any(is_random) || is_random(&names.join("/"))
}

/// Letters, digits and the separators of JWTs; names of hosts and resources contain dots or slashes earlier.
fn is_plain(part: &str) -> bool {
    part.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Whether it is a UUID or hexadecimal: one case only.
fn is_an_id(part: &str) -> bool {
    let has = |case: fn(&u8) -> bool| part.bytes().any(|byte| case(&byte));
    part.len() >= SHORTEST && !(has(u8::is_ascii_uppercase) && has(u8::is_ascii_lowercase))
}

/// Whether characters are mixed as at random. The longer the text, the weaker the criterion: of 64 characters of base64
/// it misses fewer than one in a million.
fn is_random(text: &str) -> bool {
    let count = |kind: fn(&u8) -> bool| text.bytes().filter(kind).count();
    let length = count(|byte| *byte != b'/');
    let (capitals, smalls) = (count(u8::is_ascii_uppercase), count(u8::is_ascii_lowercase));
    let has_digits = count(u8::is_ascii_digit) > 0;
    let rarer_case = capitals.min(smalls);
    if length < SHORTEST || rarer_case == 0 {
        return false;
    }
    // Adjacent characters that differ in kind: in base64 some 60 %, in names chosen by people some 15 %.
    let pairs = text.as_bytes().windows(2);
    let changes = pairs.filter(|pair| match (kind(pair[0]), kind(pair[1])) {
        (Some(one), Some(other)) => one != other,
        _ => false,
    });
    let changes = changes.count();
    if length < 2 * SHORTEST {
        return has_digits && changes * 3 >= length;
    }
    // Of names run together, SuchAsThis, only the first letters of words are capitals.
    let is_mixed = has_digits || rarer_case * 4 > capitals + smalls;
    is_mixed && changes * 4 >= length
}

/// A representative of the byte's kind: capitals, small letters, digits.
fn kind(byte: u8) -> Option<char> {
    match byte {
        b'A'..=b'Z' => Some('A'),
        b'a'..=b'z' => Some('a'),
        b'0'..=b'9' => Some('0'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use base64::{
        Engine as _,
        engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
    };
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_addresses_and_ids_stay() {
        for text in [
            "",
            "password authentication failed for user \"9c1b4ef1-9fe3-4b31-8cc7-8d6ad0c3afb1\"",
            "projects/my-project-2/branches/br-broad-Pine-0815/endpoints/ep-cool-breeze-abc123",
            "ep-cool-breeze-abc123.database.us-east-1.cloud.databricks.com:5432",
            "endpoint not found [TraceId: 4bf92f3577b34da6a3ce929d0e0e4736]",
            "Source IP address: 203.0.113.7 is blocked by Databricks IP ACL for workspace: 1234567890123456",
            "database \"MyCompany_Production_2024_Archive\" does not exist",
            "https://accounts.cloud.databricks.com/login.html?error=private-link-validation-error",
            "role \"ada.lovelace+test@example.com\" is not permitted to log in",
            "request id 9C1B4EF1-9FE3-4B31-8CC7-8D6AD0C3AFB1",
            "/usr/share/dosexyz/ca-certificates/mozilla/ISRG_Root_X1.crt",
            "service principal \"OurLakebaseServicePrincipalForProduction\" not found",
            "database \"MyCompany_Production_2024_Archive_EU_West1\" does not exist",
            "/api/2.0/postgres/Projects/4bf92f3577b34da6a3ce929d0e0e4736/Operations",
            "com.databricks.backend.daemon.data.common.InvalidMountException",
            "https%3A%2F%2Faccounts.cloud.databricks.com%2Flogin.html",
        ] {
            assert_eq!(redact(text), text);
        }
    }

    #[test]
    fn tokens_go_and_the_words_around_them_stay() {
        let jwt = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2ln-bmF0_dXJl";
        for (text, clean) in [
            (
                format!("token \"{jwt}\" has expired"),
                "token \"[removed]\" has expired",
            ),
            (format!("password={jwt};"), "password=[removed];"),
            (
                format!("{{\\\"t\\\":\\\"{jwt}\\\"}}"),
                "{\\\"t\\\":\\\"[removed]\\\"}",
            ),
            (format!("{jwt} {jwt}"), "[removed] [removed]"),
            (
                format!("dapi{}-2", "0123456789abcdef".repeat(2)),
                "[removed]",
            ),
            (format!("é{jwt}é"), "é[removed]é"),
        ] {
            assert_eq!(redact(&text), clean);
        }
        let pair = STANDARD.encode("9c1b4ef1-9fe3-4b31:dose0123456789abcdef0123456789abcdef");
        let clean = redact(&format!("Authorization: Basic {pair}")).into_owned();
        assert!(
            clean.starts_with("Authorization: Basic [removed]"),
            "{clean}"
        );
    }

    #[test]
    fn base64_goes_whatever_letters_chance_gave_it() {
        for token in [
            // Not a digit.
            "qWvXTbmZkLpSuRYdnaCgEjHoFtIwMyBxVrcKsDfOhJiUlGzNePQAtbXvWkZmRqLs",
            // Slashes where no part holds a digit or is long.
            "qWvXTbmZkLpSuRYdnaCgEjH/FtIwMyBxVrcKsDfOhJiUl/zNePQAtbXvWkZmRqLs",
            "q7vXT/mZ3LpSu9Yd/aCgE8Ho/t2wMyB4Vr/KsD5OhJ/Ul6zNeP/AtbXv1kZ/RqLs",
        ] {
            assert_eq!(redact(token), REMOVED, "{token}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_in_base64_go(bytes in any::<[u8; 48]>()) {
            for encoded in [STANDARD.encode(bytes), URL_SAFE_NO_PAD.encode(bytes)] {
                prop_assert_eq!(redact(&encoded), REMOVED);
            }
        }

        #[test]
        fn any_text_is_taken(text in ".*") {
            let clean = redact(&text);
            prop_assert!(clean.len() <= text.len() + REMOVED.len());
        }
    }
}
