//! One event, one line: external text is escaped where a line is written, so that no call site can forget it.

use std::{
    fmt,
    io::{self, Write},
    str,
};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    field::{RecordFields, VisitOutput as _},
    fmt::{
        FormatFields,
        format::{DefaultVisitor, Writer},
    },
};

use super::{
    escape::{Escaped, escape_json},
    sink::Sink,
};

/// The fields of a line of text, the message and those of its spans included. Names of fields and spans, targets and
/// levels are constants of the program.
pub(super) struct EscapedFields;

impl<'writer> FormatFields<'writer> for EscapedFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = EscapingVisitor(DefaultVisitor::new(writer, true));
        fields.record(&mut visitor);
        visitor.0.finish()
    }
}

/// The same with only what a person at a terminal needs: what happened, why, and what to do.
pub(super) struct BriefFields;

impl<'writer> FormatFields<'writer> for BriefFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = BriefVisitor(EscapingVisitor(DefaultVisitor::new(writer, true)));
        fields.record(&mut visitor);
        visitor.0.0.finish()
    }
}

struct BriefVisitor<'a>(EscapingVisitor<'a>);

impl BriefVisitor<'_> {
    fn is_shown(field: &Field) -> bool {
        ["message", "error", "hint"].contains(&field.name())
    }
}

impl Visit for BriefVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if Self::is_shown(field) {
            self.0.record_str(field, value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if Self::is_shown(field) {
            self.0.record_debug(field, value);
        }
    }
}

struct EscapingVisitor<'a>(DefaultVisitor<'a>);

impl Visit for EscapingVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            // Without quotation marks.
            self.record_debug(field, &format_args!("{value}"));
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.record_debug(field, &Escaped(value));
    }
}

/// Lines of JSON, whose strings escape C0 alone so far.
pub(super) struct JsonLines(pub(super) Sink);

impl Write for JsonLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match str::from_utf8(line) {
            Ok(json) => self.0.push(escape_json(json).as_bytes()),
            // The layer writes a whole String at once.
            Err(_) => self.0.push(line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
