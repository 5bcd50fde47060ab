//! What we send to a client as if we were its server.

use bytes::BytesMut;
use pgwire::messages::{
    Message as _,
    response::{ReadyForQuery, TransactionStatus},
    startup::{Authentication, BackendKeyData, NegotiateProtocolVersion, SecretKey},
};

use super::startup::{CancelKey, StartupMessage};

/// 3.0, as NegotiateProtocolVersion states it: the full number, as PostgreSQL 15 to 18 send.
const NEWEST_PROTOCOL: i32 = 0x0003_0000;

/// Everything between a client's StartupMessage and its first query.
///
/// `parameter_status` and `notices` are whole frames as the upstream sent them.
pub fn welcome(
    startup: &StartupMessage,
    parameter_status: &[u8],
    key: CancelKey,
    notices: &[u8],
) -> BytesMut {
    let mut out = BytesMut::with_capacity(parameter_status.len() + notices.len() + 64);
    // None of these can fail: the encoders only refuse messages beyond their size limits.
    if startup.needs_negotiation() {
        let _ = NegotiateProtocolVersion::new(NEWEST_PROTOCOL, startup.protocol_options.clone())
            .encode(&mut out);
    }
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
        let out = welcome(&startup, b"", key, b"");
        assert_eq!(&out[..20], b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0");
        assert_eq!(tags(out), b"vRKZ");
        startup.minor = 0;
        startup.protocol_options.clear();
        assert_eq!(
            tags(welcome(&startup, b"S\0\0\0\x08a\0b\0", key, b"")),
            b"RSKZ"
        );
    }
}
