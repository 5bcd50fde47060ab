//! What we send to a client as if we were its server.

use bytes::{BufMut, BytesMut};
use pgwire::messages::{
    Message as _,
    response::{ReadyForQuery, TransactionStatus},
    startup::{Authentication, BackendKeyData, NegotiateProtocolVersion, SecretKey},
};

pub(crate) use postgres_protocol::authentication::sasl::SCRAM_SHA_256;

use super::{
    frame::tag,
    startup::{CancelKey, StartupMessage},
};

/// 3.0, as NegotiateProtocolVersion states it: the full number, as PostgreSQL 15 to 18 send.
const NEWEST_PROTOCOL: i32 = 0x0003_0000;

/// Codes of Authentication messages.
const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// The answer to a version or an option that is not spoken here; empty where none is due.
pub fn negotiation(startup: &StartupMessage) -> BytesMut {
    let mut out = BytesMut::new();
    if startup.needs_negotiation() {
        // The encoders only refuse messages beyond their size limits.
        let _ = NegotiateProtocolVersion::new(NEWEST_PROTOCOL, startup.protocol_options.clone())
            .encode(&mut out);
    }
    out
}

/// Asks for SCRAM-SHA-256, without channel binding.
pub fn sasl_mechanisms() -> BytesMut {
    authentication(SASL, &[SCRAM_SHA_256.as_bytes(), b"\0\0"].concat())
}

/// Our turn in the exchange.
pub fn sasl_continue(data: &[u8]) -> BytesMut {
    authentication(SASL_CONTINUE, data)
}

/// Our last word in the exchange.
pub fn sasl_final(data: &[u8]) -> BytesMut {
    authentication(SASL_FINAL, data)
}

fn authentication(code: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(data.len() + 9);
    out.put_u8(tag::AUTHENTICATION);
    out.put_u32(u32::try_from(data.len() + 8).unwrap_or(u32::MAX));
    out.put_u32(code);
    out.put_slice(data);
    out
}

/// Everything between a client's login and its first query; the [`negotiation`] goes before.
///
/// `parameter_status` and `notices` are whole frames as the upstream sent them.
pub fn welcome(parameter_status: &[u8], key: CancelKey, notices: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(parameter_status.len() + notices.len() + 64);
    // None of these can fail: the encoders only refuse messages beyond their size limits.
    let _ = Authentication::Ok.encode(&mut out);
    out.extend_from_slice(parameter_status);
    let secret = SecretKey::I32(key.secret.cast_signed());
    let _ = BackendKeyData::new(key.process_id.cast_signed(), secret).encode(&mut out);
    out.extend_from_slice(notices);
    let _ = ReadyForQuery::new(TransactionStatus::Idle).encode(&mut out);
    out
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
    fn a_newer_client_is_told_the_version_first() {
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
