//! Answers with rows in them, for the one server that we are ourselves: the console.

use bytes::{BufMut, BytesMut};

use super::frame::tag;

/// The types our columns have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `int8`.
    Number,
    /// `text`.
    Text,
}

impl Kind {
    /// Object id and length, as `pg_type` has them.
    fn oid_and_len(self) -> (u32, i16) {
        match self {
            Self::Number => (20, 8),
            Self::Text => (25, -1),
        }
    }
}

/// One column of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
}

/// One value of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// SQL's NULL.
    Null,
    /// In a column of numbers.
    Number(i64),
    /// In a column of texts.
    Text(String),
}

/// How values are written, as Bind asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Formats(Vec<bool>);

impl Formats {
    /// From Bind's format codes: none means text, one is for all columns. `None` where they do not fit the columns.
    pub fn new(codes: &[i16], columns: usize) -> Option<Self> {
        let binary = |code: &i16| match code {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        };
        match codes {
            [] => Some(Self::default()),
            [code] => Some(Self(vec![binary(code)?; columns])),
            codes if codes.len() == columns => {
                codes.iter().map(binary).collect::<Option<_>>().map(Self)
            }
            _ => None,
        }
    }

    fn is_binary(&self, column: usize) -> bool {
        self.0.get(column).copied().unwrap_or_default()
    }
}

/// Appends a message whose body `write` writes.
pub fn message(out: &mut BytesMut, tag: u8, write: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let at = out.len();
    out.put_u32(0);
    write(out);
    let length = u32::try_from(out.len().saturating_sub(at)).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(at..at.saturating_add(4)) {
        place.copy_from_slice(&length.to_be_bytes());
    }
}

/// Appends a message without a body.
pub fn bare(out: &mut BytesMut, tag: u8) {
    message(out, tag, |_| {});
}

/// Appends a RowDescription.
pub fn row_description(out: &mut BytesMut, columns: &[Column], formats: &Formats) {
    message(out, tag::ROW_DESCRIPTION, |out| {
        out.put_u16(count(columns.len()));
        for (index, column) in columns.iter().enumerate() {
            text(out, column.name);
            let (oid, length) = column.kind.oid_and_len();
            // Of no table.
            out.put_u32(0);
            out.put_u16(0);
            out.put_u32(oid);
            out.put_i16(length);
            out.put_i32(-1);
            out.put_i16(i16::from(formats.is_binary(index)));
        }
    });
}

/// Appends a DataRow.
pub fn data_row(out: &mut BytesMut, values: &[Value], formats: &Formats) {
    message(out, tag::DATA_ROW, |out| {
        out.put_u16(count(values.len()));
        for (index, value) in values.iter().enumerate() {
            match value {
                Value::Null => out.put_i32(-1),
                Value::Number(number) if formats.is_binary(index) => {
                    out.put_i32(8);
                    out.put_i64(*number);
                }
                Value::Number(number) => sized(out, number.to_string().as_bytes()),
                // Text is the same in both formats.
                Value::Text(value) => sized(out, value.as_bytes()),
            }
        }
    });
}

/// Appends a CommandComplete.
pub fn command_complete(out: &mut BytesMut, what: &str) {
    message(out, tag::COMMAND_COMPLETE, |out| text(out, what));
}

/// Appends a ReadyForQuery with a transaction's status: `I`, `T` or `E`.
pub fn ready_for_query(out: &mut BytesMut, status: u8) {
    message(out, tag::READY_FOR_QUERY, |out| out.put_u8(status));
}

/// Appends a ParameterStatus.
pub fn parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    message(out, tag::PARAMETER_STATUS, |out| {
        text(out, name);
        text(out, value);
    });
}

/// A string and the zero byte that ends it; one inside would end it early.
fn text(out: &mut BytesMut, text: &str) {
    out.extend(text.bytes().filter(|byte| *byte != 0));
    out.put_u8(0);
}

fn sized(out: &mut BytesMut, value: &[u8]) {
    out.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
    out.put_slice(value);
}

fn count(count: usize) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 2] = [
        Column {
            name: "n",
            kind: Kind::Number,
        },
        Column {
            name: "t",
            kind: Kind::Text,
        },
    ];

    #[test]
    fn rows_are_written_as_the_protocol_documentation_has_them() {
        let mut out = BytesMut::new();
        let formats = Formats::default();
        row_description(&mut out, &COLUMNS[..1], &formats);
        assert_eq!(
            &out[..],
            b"T\0\0\0\x1a\0\x01n\0\0\0\0\0\0\0\0\0\0\x14\0\x08\xff\xff\xff\xff\0\0"
        );
        out.clear();
        data_row(
            &mut out,
            &[Value::Number(-5), Value::Null, Value::Text("x".to_owned())],
            &formats,
        );
        assert_eq!(
            &out[..],
            b"D\0\0\0\x15\0\x03\0\0\0\x02-5\xff\xff\xff\xff\0\0\0\x01x"
        );
        out.clear();
        ready_for_query(&mut out, b'I');
        command_complete(&mut out, "SHOW");
        assert_eq!(&out[..], b"Z\0\0\0\x05IC\0\0\0\x09SHOW\0");
    }

    #[test]
    fn numbers_are_eight_bytes_where_binary_is_asked_for() {
        let formats = Formats::new(&[1], 2).unwrap();
        let mut out = BytesMut::new();
        let row = [Value::Number(1), Value::Text("1".to_owned())];
        data_row(&mut out, &row, &formats);
        assert_eq!(
            &out[..],
            b"D\0\0\0\x17\0\x02\0\0\0\x08\0\0\0\0\0\0\0\x01\0\0\0\x011"
        );
    }

    #[test]
    fn formats_must_fit_the_columns() {
        assert!(Formats::new(&[], 2).is_some());
        assert!(Formats::new(&[0, 1], 2).is_some());
        assert!(Formats::new(&[0, 1], 3).is_none());
        assert!(Formats::new(&[2], 1).is_none());
    }
}
