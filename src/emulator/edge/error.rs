//! The `ErrorResponse`s of the edge, word for word.
//!
//! Two layers speak: the front (severity FATAL, both severity fields) and the proxy behind it (severity ERROR,
//! SQLSTATE XX000, no `V` field), as clients of Lakebase see them.

use serde::{Deserialize, Serialize};

/// An `ErrorResponse` to be sent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServerError {
    /// `FATAL` or `ERROR`.
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// Message.
    pub message: String,
    /// Detail, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Hint, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ServerError {
    /// An error of the front or of Postgres itself.
    pub fn fatal(code: &str, message: impl Into<String>) -> Self {
        Self {
            severity: "FATAL".to_owned(),
            code: code.to_owned(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// An error of the proxy layer behind the front: ERROR, XX000.
    pub fn proxy(message: impl Into<String>) -> Self {
        Self {
            severity: "ERROR".to_owned(),
            ..Self::fatal("XX000", message)
        }
    }

    /// With a DETAIL.
    #[must_use]
    pub fn detail(self, detail: impl Into<String>) -> Self {
        Self {
            detail: Some(detail.into()),
            ..self
        }
    }

    /// What a sleeping compute, an IP access list and a private link all look like.
    pub fn external_authorization() -> Self {
        Self::fatal("28000", "External authorization failed.").detail(
            "This could be due to paused instances, disabling readable secondaries, IP ACLs or private link \
             configuration.",
        )
    }

    /// A login with the token of another identity, or one too old for the compute's own check.
    pub fn identity() -> Self {
        Self::fatal(
            "28000",
            "Invalid authorization for databricks identity login",
        )
    }

    /// A role without OAuth login, or a wrong password, as the proxy layer puts it.
    pub fn password_failed(user: &str) -> Self {
        Self::proxy(format!("password authentication failed for user '{user}'"))
    }

    /// A compute on its way up.
    pub fn starting_up() -> Self {
        Self::fatal("57P03", "the database system is starting up")
    }

    pub(super) fn protocol_version(version: u32) -> Self {
        Self::fatal("08P01", format!("Invalid protocol version. Protocol version: {version}"))
            .detail("Ensure that connection is using SSL. Try using `sslmode=require` in the connection string.")
    }

    pub(super) fn ssl_request_length() -> Self {
        Self::fatal("08P01", "Invalid SSL request message length.")
            .detail("Ensure that connection is using SSL. Try using `sslmode=require` in the connection string.")
    }

    pub(super) fn cancel_request_length() -> Self {
        Self::fatal("08P01", "Invalid cancel request message length.")
    }

    pub(super) fn unencrypted_data() -> Self {
        Self::fatal("08P01", "Received unencrypted data after SSL request.").detail(
            "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
        )
    }

    pub(super) fn no_sni() -> Self {
        Self::fatal("08006", "Connection does not have SNI.")
            .detail("Please upgrade your client to support SNI.")
    }

    pub(super) fn handshake_timeout() -> Self {
        Self::fatal("08006", "Client handshake timeout.")
    }

    pub(super) fn startup_length() -> Self {
        Self::fatal("08006", "Invalid length of startup packet.")
    }

    pub(super) fn unsupported_protocol(version: u32) -> Self {
        let (major, minor) = (version >> 16, version & 0xffff);
        Self::fatal(
            "0A000",
            format!("Unsupported frontend protocol {major}.{minor}. Server supports 3.0 to 3.0"),
        )
    }

    /// As bytes on the wire.
    pub(super) fn encode(&self) -> Vec<u8> {
        let is_front = self.severity != "ERROR";
        let mut body = Vec::with_capacity(128);
        let fields = [
            (b'S', Some(&self.severity)),
            (b'V', Some(&self.severity).filter(|_| is_front)),
            (b'C', Some(&self.code)),
            (b'M', Some(&self.message)),
            (b'D', self.detail.as_ref()),
            (b'H', self.hint.as_ref()),
        ];
        for (field, text) in fields {
            if let Some(text) = text {
                body.push(field);
                body.extend(text.bytes().filter(|byte| *byte != 0));
                body.push(0);
            }
        }
        body.push(0);
        super::wire::message(b'E', &body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_sends_both_severities_and_the_proxy_layer_only_one() {
        let front = ServerError::external_authorization().encode();
        assert!(front.windows(7).any(|window| window == b"VFATAL\0"));
        let proxy = ServerError::password_failed("ada").encode();
        assert!(proxy.windows(7).any(|window| window == b"SERROR\0"));
        assert!(!proxy.windows(2).any(|window| window == b"VE"));
    }

    #[test]
    fn a_text_cannot_end_its_field_early() {
        let bytes = ServerError::fatal("XX000", "a\0Chidden").encode();
        assert!(bytes.windows(8).any(|window| window == b"aChidden"));
    }
}
