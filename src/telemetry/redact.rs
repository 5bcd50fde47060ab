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
    let mut all = Mixture::default();
    for part in run.split(['.', '/', '%']).map(Mixture::of) {
        if part.is_random() {
            return true;
        }
        if !part.is_an_id() {
            all.add(&part);
        }
    }
    all.is_random()
}

/// Letters, digits and the separators of JWTs; names of hosts and resources contain dots or slashes earlier.
fn is_plain(part: &str) -> bool {
    part.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Counts of a run's characters by kind.
#[derive(Default)]
struct Mixture {
    length: usize,
    capitals: usize,
    smalls: usize,
    digits: usize,
    /// Adjacent characters that differ in kind: in base64 some 60 %, in names chosen by people some 15 %.
    changes: usize,
}

impl Mixture {
    fn of(part: &str) -> Self {
        let mut mixture = Self {
            length: part.len(),
            ..Self::default()
        };
        let mut before = Kind::Other;
        for byte in part.bytes() {
            let kind = Kind::of(byte);
            match kind {
                Kind::Capital => mixture.capitals += 1,
                Kind::Small => mixture.smalls += 1,
                Kind::Digit => mixture.digits += 1,
                Kind::Other => {}
            }
            let both = before != Kind::Other && kind != Kind::Other;
            mixture.changes += usize::from(both && before != kind);
            before = kind;
        }
        mixture
    }

    fn add(&mut self, other: &Self) {
        self.length += other.length;
        self.capitals += other.capitals;
        self.smalls += other.smalls;
        self.digits += other.digits;
        self.changes += other.changes;
    }

    /// Whether the mixture is random. The longer the text, the weaker the criterion: of 64 characters of base64 it
    /// misses fewer than one in a million.
    fn is_random(&self) -> bool {
        let rarer_case = self.capitals.min(self.smalls);
        if self.length < SHORTEST || rarer_case == 0 {
            return false;
        }
        if self.length < 2 * SHORTEST {
            return self.digits > 0 && self.changes * 3 >= self.length;
        }
        // Of names run together, SuchAsThis, only the first letters of words are capitals.
        let mixed = self.digits > 0 || rarer_case * 4 > self.capitals + self.smalls;
        mixed && self.changes * 4 >= self.length
    }

    /// Whether it is a UUID or hexadecimal: one case only.
    fn is_an_id(&self) -> bool {
        self.length >= SHORTEST && (self.capitals == 0 || self.smalls == 0)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Capital,
    Digit,
    Small,
    Other,
}

impl Kind {
    fn of(byte: u8) -> Self {
        match byte {
            b'A'..=b'Z' => Self::Capital,
            b'a'..=b'z' => Self::Small,
            b'0'..=b'9' => Self::Digit,
            _ => Self::Other,
        }
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
