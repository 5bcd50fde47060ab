//! How the page's template escapes what it is given: as HTML, and what is hidden or reorders the text is spelt out.

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
