//! Messages to a client, encoded by `pgwire`.

use bytes::{Bytes, BytesMut};
pub(crate) use pgwire::messages::{
    Message as Encode,
    data::{NoData, ParameterDescription},
    extendedquery::{BindComplete, CloseComplete, ParseComplete, PortalSuspended},
    response::EmptyQueryResponse,
};
use pgwire::messages::{
    response::{self, CommandComplete, ReadyForQuery},
    startup::{
        Authentication, BackendKeyData, NegotiateProtocolVersion, ParameterStatus, SecretKey,
    },
};
pub(crate) use postgres_protocol::authentication::sasl::SCRAM_SHA_256;

use super::{
    requests::TransactionStatus,
    startup::{CancelKey, StartupMessage},
};

/// 3.0, as PostgreSQL 15 to 18 send it in NegotiateProtocolVersion: the full number, not the minor version alone.
const NEWEST_PROTOCOL: i32 = 0x0003_0000;

/// Appends a message.
pub(crate) fn encode(message: &impl Encode, out: &mut BytesMut) {
    let at = out.len();
    // Fails for messages longer than libpq accepts. None of ours can be; half a message would break the stream.
    if message.encode(out).is_err() {
        out.truncate(at);
    }
}

/// The response to a newer minor version or to protocol options; empty where the client requests neither.
pub(crate) fn negotiation(startup: &StartupMessage) -> BytesMut {
    let mut out = BytesMut::new();
    if startup.needs_negotiation() {
        let options = startup.protocol_options.clone();
        encode(
            &NegotiateProtocolVersion::new(NEWEST_PROTOCOL, options),
            &mut out,
        );
    }
    out
}

/// Requests SCRAM-SHA-256, without channel binding.
pub(crate) fn sasl_mechanisms() -> BytesMut {
    authentication(&Authentication::SASL(vec![SCRAM_SHA_256.to_owned()]))
}

/// The server's first SCRAM message.
pub(crate) fn sasl_continue(data: &[u8]) -> BytesMut {
    authentication(&Authentication::SASLContinue(Bytes::copy_from_slice(data)))
}

/// The server's final SCRAM message.
pub(crate) fn sasl_final(data: &[u8]) -> BytesMut {
    authentication(&Authentication::SASLFinal(Bytes::copy_from_slice(data)))
}

fn authentication(request: &Authentication) -> BytesMut {
    let mut out = BytesMut::new();
    encode(request, &mut out);
    out
}

/// Everything from AuthenticationOk to the first ReadyForQuery.
///
/// `parameter_status` and `notices` are whole frames as the server sent them.
pub(crate) fn welcome(parameter_status: &[u8], key: CancelKey, notices: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(parameter_status.len() + notices.len() + 64);
    // Before everything else: libpq takes a notice ahead of AuthenticationOk for an error.
    encode(&Authentication::Ok, &mut out);
    out.extend_from_slice(parameter_status);
    // Four bytes, as in protocol 3.0; only 3.2 has longer keys.
    let secret = SecretKey::I32(key.secret.cast_signed());
    encode(
        &BackendKeyData::new(key.process_id.cast_signed(), secret),
        &mut out,
    );
    out.extend_from_slice(notices);
    ready_for_query(&mut out, TransactionStatus::Idle);
    out
}

/// Appends a ParameterStatus.
pub(crate) fn parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    encode(
        &ParameterStatus::new(name.to_owned(), value.to_owned()),
        out,
    );
}

/// Appends a CommandComplete.
pub(crate) fn command_complete(out: &mut BytesMut, tag: &str) {
    encode(&CommandComplete::new(tag.to_owned()), out);
}

/// Appends a ReadyForQuery.
pub(crate) fn ready_for_query(out: &mut BytesMut, status: TransactionStatus) {
    let status = match status {
        TransactionStatus::Failed => response::TransactionStatus::Error,
        TransactionStatus::Idle => response::TransactionStatus::Idle,
        TransactionStatus::InTransaction => response::TransactionStatus::Transaction,
    };
    encode(&ReadyForQuery::new(status), out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::take_message;

    fn tags(mut bytes: BytesMut) -> Vec<u8> {
        std::iter::from_fn(|| {
            take_message(&mut bytes, 1000)
                .unwrap()
                .map(|message| message.tag)
        })
        .collect()
    }

    #[test]
    fn a_newer_protocol_version_is_negotiated_before_authentication() {
        let key = CancelKey {
            process_id: 1,
            secret: 2,
        };
        let mut startup = StartupMessage {
            minor: 2,
            parameters: Vec::new(),
            protocol_options: vec!["_pq_.x".to_owned()],
        };
        let out = negotiation(&startup);
        assert_eq!(&out[..], b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0");
        startup.minor = 0;
        startup.protocol_options.clear();
        assert!(negotiation(&startup).is_empty());
        assert_eq!(tags(welcome(b"S\0\0\0\x08a\0b\0", key, b"")), b"RSKZ");
    }
}
