//! Escapes external text for one line: in logs, on a terminal, in a row of the console, on a page.
//!
//! Names and messages from a connection may contain line ends, which forge log lines, terminal escape sequences, and
//! bidirectional controls, which reorder displayed text.

use std::{
    borrow::Cow,
    fmt::{self, Write},
};

/// Whether it must be escaped: C0, DEL and C1, line and paragraph separators, bidirectional controls.
fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
        )
}

/// `text` on one line, with Rust's escapes: `\n` or `\u{1b}`.
pub fn escape(text: &str) -> Cow<'_, str> {
    if text.contains(is_hidden) {
        Escaped(text).to_string().into()
    } else {
        text.into()
    }
}

/// JSON with escaped strings. Outside of strings JSON has line ends at most, which stay.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let hidden = |character: char| is_hidden(character) && character != '\n';
    if !json.contains(hidden) {
        return json.into();
    }
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        if hidden(character) {
            // All of them are one UTF-16 unit.
            let _ = write!(escaped, "\\u{:04x}", u32::from(character));
        } else {
            escaped.push(character);
        }
    }
    escaped.into()
}

/// Displays its content like [`escape`].
pub struct Escaped<T>(pub T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

impl<T: fmt::Debug> fmt::Debug for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{:?}", self.0)
    }
}

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(is_hidden) {
            let mut characters = part.chars();
            match characters.next_back() {
                Some(last) if is_hidden(last) => {
                    self.0.write_str(characters.as_str())?;
                    write!(self.0, "{}", last.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All characters to escape.
    fn hidden() -> impl Iterator<Item = char> {
        [
            '\0'..='\u{1f}',
            '\u{7f}'..='\u{9f}',
            '\u{61c}'..='\u{61c}',
            '\u{200e}'..='\u{200f}',
            '\u{2028}'..='\u{202e}',
            '\u{2066}'..='\u{2069}',
        ]
        .into_iter()
        .flatten()
    }

    #[test]
    fn control_characters_are_escaped() {
        for character in hidden() {
            let text = format!("a{character}b");
            let escaped = escape(&text);
            assert!(escaped.starts_with("a\\") && escaped.ends_with('b'));
            assert!(!escaped.contains(is_hidden), "{escaped:?}");
        }
        assert_eq!(
            escape("one\ntwo\r\tthree\u{1b}[31m"),
            "one\\ntwo\\r\\tthree\\u{1b}[31m"
        );
        assert_eq!(escape("\u{202e}txt"), "\\u{202e}txt");
    }

    #[test]
    fn text_of_any_language_is_unchanged() {
        for text in [
            "",
            "naïve café",
            "数据库",
            "قاعدة",
            "👩‍💻",
            "a\\nb",
            "\u{feff}",
        ] {
            assert!(matches!(escape(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn json_keeps_its_meaning() {
        let text: String = hidden().chain("é".chars()).collect();
        let json = format!("{}\n", serde_json::json!({ "text": text }));
        let escaped = escape_json(&json);
        assert!(!escaped.trim_end().contains(is_hidden), "{escaped:?}");
        let parsed: serde_json::Value = serde_json::from_str(&escaped).unwrap();
        assert_eq!(parsed["text"], text);
    }

    proptest! {
        #[test]
        fn any_text_becomes_one_line(text in any::<String>()) {
            prop_assert!(!escape(&text).contains(is_hidden));
            prop_assert_eq!(Escaped(&text).to_string(), escape(&text));
        }
    }
}
