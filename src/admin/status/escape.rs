//! Escaping in the page's template: HTML, and characters that are invisible or reorder text.

use std::fmt;

use askama::filters::{Escaper, Html};

use crate::telemetry::escape;

/// Escapes values; the template's own text is not affected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OneLine;

impl Escaper for OneLine {
    fn write_escaped_str<W: fmt::Write>(&self, dest: W, text: &str) -> fmt::Result {
        Html.write_escaped_str(dest, &escape(text))
    }
}
