//! The error of settings.

use std::io;

use super::without_userinfo;

/// An error of the settings: one line, and a hint that describes the fix.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    message: String,
    hint: Option<&'static str>,
    source: Option<io::Error>,
}

impl ConfigError {
    pub(super) fn new(message: impl Into<String>, hint: &'static str) -> Self {
        Self {
            message: message.into(),
            hint: Some(hint),
            source: None,
        }
    }

    #[must_use]
    pub(super) fn caused_by(self, source: io::Error) -> Self {
        Self {
            source: Some(source),
            ..self
        }
    }

    /// The value of a variable is invalid. Addresses may hold a password, which is left out.
    pub(super) fn variable(variable: &str, value: &str, expected: &str) -> Self {
        let value = without_userinfo(value);
        Self {
            message: format!("{variable} is `{value}`, which is not {expected}"),
            hint: None,
            source: None,
        }
    }

    /// A variable is not valid UTF-8.
    pub(crate) fn not_text(variable: &str) -> Self {
        let message = format!("{variable} is not valid UTF-8");
        Self::new(message, "set it in UTF-8, or unset it")
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint
    }
}
