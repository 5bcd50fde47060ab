//! Errors and notices: those that servers send, and our own to clients.

use bytes::BytesMut;
use pgwire::messages::response::{ErrorResponse, NoticeResponse};

use super::backend::encode;

/// SQLSTATEs that the proxy itself sends, named as in PostgreSQL's appendix A.
pub mod sqlstate {
    /// No connection to the server could be made.
    pub const CANNOT_CONNECT: &str = "08001";
    /// The connection to the server failed.
    pub const CONNECTION_FAILURE: &str = "08006";
    /// A peer broke the protocol.
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    /// The feature does not exist here.
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// The identity is refused.
    pub const INVALID_AUTHORIZATION: &str = "28000";
    /// Wrong password.
    pub const INVALID_PASSWORD: &str = "28P01";
    /// The role lacks a right.
    pub const INSUFFICIENT_PRIVILEGE: &str = "42501";
    /// Bytes that are invalid in their encoding.
    pub const INVALID_ENCODING: &str = "22021";
    /// The statement cannot be parsed.
    pub const SYNTAX_ERROR: &str = "42601";
    /// The prepared statement does not exist.
    pub const UNDEFINED_STATEMENT: &str = "26000";
    /// The portal does not exist.
    pub const UNDEFINED_CURSOR: &str = "34000";
    /// A limit of the program is exceeded.
    pub const PROGRAM_LIMIT: &str = "54000";
    /// `object_not_in_prerequisite_state`
    pub const WRONG_STATE: &str = "55000";
    /// The database does not exist.
    pub const UNDEFINED_DATABASE: &str = "3D000";
    /// The connection limit is reached.
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    /// Cancelled at the client's request.
    pub const QUERY_CANCELED: &str = "57014";
    /// Ended by an administrator.
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    /// Not accepting connections now.
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    /// `idle_session_timeout`
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
}

/// The fields of an ErrorResponse or NoticeResponse.
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
    /// Parses the body of an ErrorResponse or NoticeResponse. Missing fields stay empty.
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
            // Before a login is complete the server may use any encoding.
            let value = String::from_utf8_lossy(value).into_owned();
            match kind {
                // `S` may be translated (lc_messages); `V`, since PostgreSQL 9.6, never is, and wins in either order.
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

/// An error or notice of the proxy itself to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// SQLSTATE.
    pub sqlstate: String,
    /// The primary message: lower-case, no full stop.
    pub message: String,
    /// DETAIL: the server's own message, the session id of the log line.
    pub detail: Option<String>,
    /// HINT: what a person can do.
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

    /// Message and DETAIL in one line, for logs and reports.
    pub fn line(&self) -> String {
        match &self.detail {
            Some(detail) => format!("{} ({detail})", self.message),
            None => self.message.clone(),
        }
    }

    /// An ErrorResponse that ends a statement.
    pub fn encode_error(&self) -> BytesMut {
        let mut out = BytesMut::new();
        encode(&ErrorResponse::new(self.fields("ERROR")), &mut out);
        out
    }

    /// An ErrorResponse that ends the connection.
    pub fn encode_fatal(&self) -> BytesMut {
        let mut out = BytesMut::new();
        encode(&ErrorResponse::new(self.fields("FATAL")), &mut out);
        out
    }

    /// A NoticeResponse.
    pub fn encode_notice(&self) -> BytesMut {
        let mut out = BytesMut::new();
        encode(&NoticeResponse::new(self.fields("NOTICE")), &mut out);
        out
    }

    fn fields(&self, severity: &str) -> Vec<(u8, String)> {
        let mut fields = vec![
            (b'S', severity.to_owned()),
            // Both: clients older than PostgreSQL 9.6 read `S` only.
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
