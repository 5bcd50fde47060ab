//! Errors and notices: read what a server said, write what a client is told.

use bytes::BytesMut;
use pgwire::messages::{
    Message as _,
    response::{ErrorResponse, NoticeResponse},
};

/// SQLSTATEs that we send ourselves, named as in PostgreSQL's appendix A.
pub mod sqlstate {
    /// Cannot be had: no connection to the server could be made.
    pub const CANNOT_CONNECT: &str = "08001";
    /// The connection to the server failed.
    pub const CONNECTION_FAILURE: &str = "08006";
    /// Somebody broke the protocol.
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    /// A feature we lack.
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// Identity refused.
    pub const INVALID_AUTHORIZATION: &str = "28000";
    /// Wrong password.
    pub const INVALID_PASSWORD: &str = "28P01";
    /// Bytes that are not in the encoding they should be in.
    pub const INVALID_ENCODING: &str = "22021";
    /// A statement that cannot be read.
    pub const SYNTAX_ERROR: &str = "42601";
    /// A prepared statement that does not exist.
    pub const UNDEFINED_STATEMENT: &str = "26000";
    /// A portal that does not exist.
    pub const UNDEFINED_CURSOR: &str = "34000";
    /// Nothing but the end of the transaction is possible.
    pub const FAILED_TRANSACTION: &str = "25P02";
    /// More than there is room for.
    pub const PROGRAM_LIMIT: &str = "54000";
    /// No such setting.
    pub const UNDEFINED_OBJECT: &str = "42704";
    /// No such database.
    pub const UNDEFINED_DATABASE: &str = "3D000";
    /// No more connections.
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    /// Ended by an administrator.
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    /// Not accepting connections now.
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    /// `idle_session_timeout`
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
}

/// What an ErrorResponse or NoticeResponse said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorFields {
    /// FATAL, ERROR, ...; the untranslated field where the server sends it.
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// DETAIL.
    pub detail: Option<String>,
    /// HINT.
    pub hint: Option<String>,
}

impl ErrorFields {
    /// Reads the body of an ErrorResponse or NoticeResponse; never fails: what is missing stays empty.
    pub fn parse(mut body: &[u8]) -> Self {
        let mut fields = Self::default();
        while let Some((&kind, rest)) = body.split_first() {
            if kind == 0 {
                break;
            }
            let end = rest
                .iter()
                .position(|&byte| byte == 0)
                .unwrap_or(rest.len());
            let (value, rest) = rest.split_at(end);
            body = rest.get(1..).unwrap_or_default();
            let value = String::from_utf8_lossy(value).into_owned();
            match kind {
                b'S' if fields.severity.is_empty() => fields.severity = value,
                b'V' => fields.severity = value,
                b'C' => fields.code = value,
                b'M' => fields.message = value,
                b'D' => fields.detail = Some(value),
                b'H' => fields.hint = Some(value),
                _ => {}
            }
        }
        fields
    }
}

/// A message of ours to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// SQLSTATE.
    pub sqlstate: String,
    /// The primary message: lower-case, no full stop.
    pub message: String,
    /// DETAIL: the server's own words, an id to find the log line by.
    pub detail: Option<String>,
    /// HINT: what to do about it.
    pub hint: Option<String>,
}

impl Report {
    /// A report without detail and hint.
    pub fn new(sqlstate: &str, message: impl Into<String>) -> Self {
        Self {
            sqlstate: sqlstate.to_owned(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// Adds the DETAIL.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the HINT.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Message and DETAIL in one line, for people who are no client.
    pub fn line(&self) -> String {
        match &self.detail {
            Some(detail) => format!("{} ({detail})", self.message),
            None => self.message.clone(),
        }
    }

    /// As an ErrorResponse that ends a statement.
    pub fn encode_error(&self) -> BytesMut {
        let mut out = BytesMut::new();
        let _ = ErrorResponse::new(self.fields("ERROR")).encode(&mut out);
        out
    }

    /// As an ErrorResponse that ends the connection.
    pub fn encode_fatal(&self) -> BytesMut {
        let mut out = BytesMut::new();
        // Encoding fails only beyond 2 GiB.
        let _ = ErrorResponse::new(self.fields("FATAL")).encode(&mut out);
        out
    }

    /// As a NoticeResponse.
    pub fn encode_notice(&self) -> BytesMut {
        let mut out = BytesMut::new();
        let _ = NoticeResponse::new(self.fields("NOTICE")).encode(&mut out);
        out
    }

    fn fields(&self, severity: &str) -> Vec<(u8, String)> {
        let mut fields = vec![
            (b'S', severity.to_owned()),
            (b'V', severity.to_owned()),
            (b'C', self.sqlstate.clone()),
            (b'M', self.message.clone()),
        ];
        fields.extend(self.detail.clone().map(|detail| (b'D', detail)));
        fields.extend(self.hint.clone().map(|hint| (b'H', hint)));
        for (_, value) in &mut fields {
            // A zero byte would end the field early.
            value.retain(|character| character != '\0');
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::frame::{tag, take_message};

    #[test]
    fn a_report_reads_back_as_it_was_written() {
        let report = Report::new("53300", "too many")
            .with_detail("the \0 detail")
            .with_hint("wait");
        let message = take_message(&mut report.encode_fatal(), 1000)
            .unwrap()
            .unwrap();
        assert_eq!(message.tag, tag::ERROR_RESPONSE);
        let fields = ErrorFields::parse(message.body());
        assert_eq!(fields.severity, "FATAL");
        assert_eq!(fields.code, "53300");
        assert_eq!(fields.detail.as_deref(), Some("the  detail"));
        assert_eq!(fields.hint.as_deref(), Some("wait"));
    }

    #[test]
    fn the_untranslated_severity_wins() {
        let fields = ErrorFields::parse(b"SFATAL\0VERROR\0C28P01\0Mno\0\0");
        assert_eq!(fields.severity, "ERROR");
        let fields = ErrorFields::parse(b"SERROR\0CXX000\0Mno\0");
        assert_eq!(
            (fields.severity.as_str(), fields.message.as_str()),
            ("ERROR", "no")
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = ErrorFields::parse(&bytes);
        }
    }
}
