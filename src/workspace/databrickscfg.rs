//! The format of `~/.databrickscfg`, by the rules of the Databricks Go SDK and CLI.
//!
//! Without I/O. Differences from other INI dialects: names are case-sensitive; a comment after a value needs a blank before
//! its `#` or `;`, since secrets contain those; one pair of quotes around a value is removed; a backslash joins lines at
//! their end and has no meaning elsewhere.

use std::collections::BTreeMap;

/// A mistake in a `.databrickscfg`. Never quotes the text, which holds secrets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason} in line {line}")]
pub(super) struct SyntaxError {
    /// Counted from 1.
    pub(super) line: usize,
    /// The mistake.
    pub(super) reason: &'static str,
}

/// The entries of one section; of a repeated key, the last value.
pub(super) type Section = BTreeMap<String, String>;

/// All sections by name.
#[derive(Clone, Default)]
pub(super) struct Profiles(BTreeMap<String, Section>);

/// The section of entries above the first header.
pub(super) const DEFAULT: &str = "DEFAULT";

impl Profiles {
    /// Parses the text of a file.
    pub(super) fn parse(text: &str) -> Result<Self, SyntaxError> {
        // A byte order mark, as editors on Windows write it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut profiles = Self::default();
        let mut section = DEFAULT.to_owned();
        let mut lines = text.split('\n').enumerate();
        while let Some((index, line)) = lines.next() {
            let error = |reason| SyntaxError {
                line: index + 1,
                reason,
            };
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            if let Some(rest) = line.strip_prefix('[') {
                // The last one, as in go-ini (`parser.go`), which the SDK for Go uses.
                let name = rest.rsplit_once(']');
                let (name, _) = name.ok_or_else(|| error("a section is not closed with `]`"))?;
                name.clone_into(&mut section);
                continue;
            }
            let (key, value) = key(line)
                .map_err(error)?
                .ok_or_else(|| error("neither `key = value` nor `[profile]`"))?;
            let value = value_of(value, &mut lines).map_err(error)?;
            // A later header of the same name continues the section.
            let entries = profiles.0.entry(section.clone()).or_default();
            // An empty value is absent.
            if value.is_empty() {
                entries.remove(key);
            } else {
                entries.insert(key.to_owned(), value);
            }
        }
        Ok(profiles)
    }

    /// The section with this name, if it is not empty.
    pub(super) fn get(&self, name: &str) -> Option<&Section> {
        self.0.get(name)
    }

    /// The names of sections that are not empty.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Splits a line at its delimiter; a key may stand in quotes.
fn key(line: &str) -> Result<Option<(&str, &str)>, &'static str> {
    // The quotes that go-ini allows around a key.
    for quote in ["\"\"\"", "\"", "`"] {
        let Some(rest) = line.strip_prefix(quote) else {
            continue;
        };
        let (key, rest) = rest
            .split_once(quote)
            .ok_or("a key's quote is not closed")?;
        return Ok(rest
            .split_once(['=', ':'])
            .map(|(_, value)| (key.trim(), value)));
    }
    Ok(line
        .split_once(['=', ':'])
        .map(|(key, value)| (key.trim(), value)))
}

/// Reads a value, which may go on in the lines below.
fn value_of<'a>(
    text: &str,
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Result<String, &'static str> {
    let text = text.trim();
    // Those around a value that may span lines, in go-ini; any other pair is removed below.
    for quote in ["\"\"\"", "`"] {
        let Some(rest) = text.strip_prefix(quote).filter(|rest| !rest.is_empty()) else {
            continue;
        };
        if let Some((value, _)) = rest.rsplit_once(quote) {
            return Ok(value.to_owned());
        }
        let mut value = rest.to_owned();
        for (_, line) in lines {
            value.push('\n');
            if let Some((last, _)) = line.rsplit_once(quote) {
                value.push_str(last);
                return Ok(value);
            }
            value.push_str(line);
        }
        return Err("a value's quote is not closed");
    }
    if let Some(start) = text.strip_suffix('\\') {
        let mut value = start.to_owned();
        for (_, line) in lines {
            let line = line.trim();
            match line.strip_suffix('\\') {
                Some(part) => value.push_str(part),
                None => {
                    value.push_str(line);
                    break;
                }
            }
        }
        return Ok(value);
    }
    // In this order, as in go-ini with `SpaceBeforeInlineComment`.
    let end = text.find(" #").or_else(|| text.find(" ;"));
    let value = end.map_or(text, |end| text[..end].trim());
    for quote in ['\'', '"'] {
        let inner = value
            .strip_prefix(quote)
            .and_then(|value| value.strip_suffix(quote));
        if let Some(inner) = inner.filter(|inner| !inner.contains(quote)) {
            return Ok(inner.to_owned());
        }
    }
    Ok(value.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str, section: &str, key: &str) -> Option<String> {
        Profiles::parse(text)
            .unwrap()
            .get(section)
            .and_then(|section| section.get(key).cloned())
    }

    #[test]
    fn values_are_read_by_the_rules_of_the_go_sdk() {
        for (line, value) in [
            ("token = dapi1", "dapi1"),
            ("token=dapi1", "dapi1"),
            ("token: dapi1", "dapi1"),
            ("  token\t= \t dapi1 \t", "dapi1"),
            ("token = dapi1\r", "dapi1"),
            ("token = a#b;c", "a#b;c"),
            ("token = #abc", "#abc"),
            ("token = abc # a comment", "abc"),
            ("token = abc ; a comment", "abc"),
            ("token = a ; b # c", "a ; b"),
            ("token = a=b==", "a=b=="),
            ("token = a:b", "a:b"),
            (r"token = a\b\u0041", r"a\b\u0041"),
            ("token = it's", "it's"),
            ("token = a\"b", "a\"b"),
            ("token = \"quoted\"", "quoted"),
            ("token = ' quoted '", " quoted "),
            ("token = 'a'b'", "'a'b'"),
            ("token = \"a' ", "\"a'"),
            ("token = two words", "two words"),
            ("token = %(host)s ${x}", "%(host)s ${x}"),
            ("token = `a # b`", "a # b"),
            ("token = \"\"\"a # b\"\"\"", "a # b"),
            ("token = `a\nb`", "a\nb"),
            ("token = one\\\n  two", "onetwo"),
            ("token = one\\\n  two\\\nthree", "onetwothree"),
            ("\"token\" = x", "x"),
            ("token = first\ntoken = last", "last"),
        ] {
            assert_eq!(
                read(&format!("[p]\n{line}\nhost = h"), "p", "token").as_deref(),
                Some(value),
                "{line}"
            );
        }
    }

    #[test]
    fn section_names_are_case_sensitive_and_may_repeat() {
        let text = "\u{feff}host = top\n# comment\n; comment\n[A]\nhost = 1\n[a]\nhost = 2\n\n[A] # again\ntoken = 3\n[empty]\n[x]y]\nhost = 4";
        assert_eq!(read(text, "DEFAULT", "host").as_deref(), Some("top"));
        assert_eq!(read(text, "A", "host").as_deref(), Some("1"));
        assert_eq!(read(text, "A", "token").as_deref(), Some("3"));
        assert_eq!(read(text, "a", "host").as_deref(), Some("2"));
        assert_eq!(read(text, "a", "token"), None);
        assert_eq!(read(text, "x]y", "host").as_deref(), Some("4"));
        let profiles = Profiles::parse(text).unwrap();
        assert!(profiles.get("empty").is_none());
        assert_eq!(
            profiles.names().collect::<Vec<_>>(),
            ["A", "DEFAULT", "a", "x]y"]
        );
        assert_eq!(read("[p]\ntoken =\n", "p", "token"), None);
        assert_eq!(read("[p]\nToken = x\n", "p", "token"), None);
    }

    #[test]
    fn a_mistake_is_reported_by_its_line_without_its_text() {
        for (text, line) in [
            ("[p]\n\ndapi-secret", 3),
            ("[p\ntoken = dapi-secret", 1),
            ("[p]\ntoken = `dapi-secret", 2),
            ("\"dapi-secret = 1", 1),
        ] {
            let error = Profiles::parse(text).err().unwrap();
            assert_eq!(error.line, line, "{text}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(\\[|\\]|=|:|\"|`|'|\\\\|\n|#|;| |a|\u{e9}){0,60}") {
            let _ = Profiles::parse(&text);
        }

        #[test]
        fn a_secret_of_one_word_is_kept(secret in "[!-\\[\\]-~]{1,60}") {
            prop_assume!(!secret.starts_with(['"', '\'', '`']));
            let text = format!("[p]\ntoken = {secret}\n");
            prop_assert_eq!(read(&text, "p", "token"), Some(secret));
        }
    }
}
