//! Result rows of the console, encoded by `pgwire`.

use bytes::{BufMut, BytesMut};
use jiff::Timestamp;
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};

use super::backend::encode;

/// The type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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

/// A result column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
}

/// A value of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// SQL's NULL.
    Null,
    Number(i64),
    Text(String),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Declares the conversion of integers; beyond `i64::MAX` they are that.
macro_rules! integers {
    ($($integer:ty),+) => {
        $(impl From<$integer> for Value {
            fn from(number: $integer) -> Self {
                Self::Number(number.try_into().unwrap_or(i64::MAX))
            }
        })+
    };
}
integers!(i32, i64, u16, u32, u64, u128, usize);

impl From<Timestamp> for Value {
    /// In PgBouncer's format.
    fn from(at: Timestamp) -> Self {
        Self::Text(at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
    }
}

impl<V: Into<Value>> From<Option<V>> for Value {
    fn from(value: Option<V>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// Text or binary format of each result column, as Bind requests it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Formats(Vec<bool>);

impl Formats {
    /// From Bind's format codes: no code means text, one code is for all columns. `None` if they do not fit the columns.
    pub(crate) fn new(codes: &[i16], columns: usize) -> Option<Self> {
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

/// Appends a RowDescription.
pub(crate) fn row_description(out: &mut BytesMut, columns: &[Column], formats: &Formats) {
    let fields = columns.iter().enumerate().map(|(index, column)| {
        let (oid, length) = column.kind.oid_and_len();
        let format = i16::from(formats.is_binary(index));
        // Zeros: the column belongs to no table. -1: its type has no modifier.
        FieldDescription::new(column.name.to_owned(), 0, 0, oid, length, -1, format)
    });
    encode(&RowDescription::new(fields.collect()), out);
}

/// Appends a DataRow.
pub(crate) fn data_row(out: &mut BytesMut, values: &[Value], formats: &Formats) {
    let mut data = BytesMut::new();
    for (index, value) in values.iter().enumerate() {
        match value {
            // -1 in place of a length stands for NULL.
            Value::Null => data.put_i32(-1),
            Value::Number(number) if formats.is_binary(index) => {
                sized(&mut data, &number.to_be_bytes());
            }
            Value::Number(number) => sized(&mut data, number.to_string().as_bytes()),
            // Text is the same in both formats.
            Value::Text(value) => sized(&mut data, value.as_bytes()),
        }
    }
    let count = i16::try_from(values.len()).unwrap_or(i16::MAX);
    encode(&DataRow::new(data, count), out);
}

/// A value behind its length.
fn sized(data: &mut BytesMut, value: &[u8]) {
    data.put_i32(i32::try_from(value.len()).unwrap_or(i32::MAX));
    data.put_slice(value);
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
    }

    #[test]
    fn binary_numbers_have_eight_bytes() {
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
