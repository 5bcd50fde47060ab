//! The untyped packets that open a connection, and the few messages to a server outside a login, encoded by
//! `postgres-protocol`.

use std::str;

use bytes::{Buf, BytesMut};
use postgres_protocol::message::frontend;

/// PostgreSQL's `MAX_STARTUP_PACKET_LENGTH`, in bytes; the endpoint's edge has the same limit.
pub const MAX_STARTUP_LEN: usize = 9_999;

const CANCEL_REQUEST: u32 = 80_877_102;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST_LEN: usize = 16;
/// First byte of a TLS handshake record.
pub const TLS_HANDSHAKE: u8 = 0x16;

/// The first packet of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InitialPacket {
    /// Cancels the query of another connection.
    Cancel(CancelKey),
    /// Requests GSSAPI encryption.
    GssEnc,
    /// Requests TLS.
    Ssl,
    /// Requests a session.
    Startup(StartupMessage),
}

/// Identifies a session to cancel; meaningful to the server that issued it only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CancelKey {
    /// The process id that the client received.
    pub process_id: u32,
    /// The secret that proves the right to cancel.
    pub secret: u32,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey")
            .field("process_id", &self.process_id)
            .finish_non_exhaustive()
    }
}

impl CancelKey {
    /// The CancelRequest packet for this key.
    pub(crate) fn request(self) -> BytesMut {
        let mut packet = BytesMut::new();
        frontend::cancel_request(
            self.process_id.cast_signed(),
            self.secret.cast_signed(),
            &mut packet,
        );
        packet
    }
}

/// A request for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartupMessage {
    /// The requested minor protocol version; the major version is 3.
    pub minor: u16,
    /// Parameters in the order sent, including `user` and `database`, without `_pq_.` options.
    pub parameters: Vec<(String, String)>,
    /// Names of the requested protocol options (`_pq_.`).
    pub protocol_options: Vec<String>,
}

impl StartupMessage {
    /// The last value sent for `name`, unless that is empty.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let (_, value) = self.parameters.iter().rev().find(|(key, _)| key == name)?;
        // As for PostgreSQL, where an empty database name means the user's.
        (!value.is_empty()).then_some(value.as_str())
    }

    /// Whether the client requests more than protocol 3.0 without options.
    pub fn needs_negotiation(&self) -> bool {
        // The edge refuses every minor version but 0 and sends no NegotiateProtocolVersion itself.
        self.minor > 0 || !self.protocol_options.is_empty()
    }
}

/// Why a first packet is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartupError {
    /// Not a Postgres connection.
    #[error("invalid length of startup packet")]
    InvalidLength,
    /// A request packet of the wrong size.
    #[error("invalid length of a cancel, SSL or GSSAPI request")]
    InvalidRequest,
    /// The parameter list does not end where the packet does.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    InvalidLayout,
    /// A name or value that is not UTF-8.
    #[error("startup parameter is not valid UTF-8")]
    NotUtf8,
    /// A TLS handshake without the SSLRequest that should precede it.
    #[error("TLS handshake instead of a startup packet")]
    TlsHandshake,
    /// A major version other than 3.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.0")]
    UnsupportedVersion {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    },
}

/// Takes the first packet off the front of `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// As soon as the bytes cannot be the start of a first packet.
pub fn take_initial_packet(buffer: &mut BytesMut) -> Result<Option<InitialPacket>, StartupError> {
    // Ahead of the length, of which it is the first byte: direct TLS is reported with a hint, other protocols are not.
    if buffer.first() == Some(&TLS_HANDSHAKE) {
        return Err(StartupError::TlsHandshake);
    }
    let Some(&length) = buffer.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    // Before the bytes have arrived: those of another protocol read as a large length (`GET ` is 1.2 GB).
    if !(8..=MAX_STARTUP_LEN).contains(&length) {
        return Err(StartupError::InvalidLength);
    }
    if buffer.len() < length {
        return Ok(None);
    }
    let mut packet = buffer.split_to(length).freeze();
    packet.advance(4);
    let code = packet.get_u32();
    match code {
        SSL_REQUEST if length == 8 => Ok(Some(InitialPacket::Ssl)),
        GSSENC_REQUEST if length == 8 => Ok(Some(InitialPacket::GssEnc)),
        // Longer keys belong to protocol 3.2, which is never agreed on.
        CANCEL_REQUEST if length == CANCEL_REQUEST_LEN => {
            Ok(Some(InitialPacket::Cancel(CancelKey {
                process_id: packet.get_u32(),
                secret: packet.get_u32(),
            })))
        }
        SSL_REQUEST | GSSENC_REQUEST | CANCEL_REQUEST => Err(StartupError::InvalidRequest),
        _ => startup_message(code, &packet).map(|message| Some(InitialPacket::Startup(message))),
    }
}

fn startup_message(version: u32, mut body: &[u8]) -> Result<StartupMessage, StartupError> {
    let [major_high, major_low, minor_high, minor_low] = version.to_be_bytes();
    let major = u16::from_be_bytes([major_high, major_low]);
    let minor = u16::from_be_bytes([minor_high, minor_low]);
    if major != 3 {
        return Err(StartupError::UnsupportedVersion { major, minor });
    }
    let mut message = StartupMessage {
        minor,
        parameters: Vec::new(),
        protocol_options: Vec::new(),
    };
    loop {
        let name = take_string(&mut body)?;
        if name.is_empty() {
            break;
        }
        let value = take_string(&mut body)?;
        // Reserved for protocol extensions since PostgreSQL 11; a server negotiates them down.
        if name.starts_with("_pq_.") {
            message.protocol_options.push(name.to_owned());
        } else {
            message.parameters.push((name.to_owned(), value.to_owned()));
        }
    }
    // Trailing bytes are refused, as by ProcessStartupPacket().
    if body.is_empty() {
        Ok(message)
    } else {
        Err(StartupError::InvalidLayout)
    }
}

fn take_string<'a>(body: &mut &'a [u8]) -> Result<&'a str, StartupError> {
    let end = body
        .iter()
        .position(|&byte| byte == 0)
        .ok_or(StartupError::InvalidLayout)?;
    let (string, rest) = body.split_at(end);
    *body = rest.get(1..).unwrap_or_default();
    str::from_utf8(string).map_err(|_| StartupError::NotUtf8)
}

/// The SSLRequest packet.
pub(crate) fn ssl_request() -> BytesMut {
    let mut packet = BytesMut::new();
    frontend::ssl_request(&mut packet);
    packet
}

/// A Terminate message.
pub(crate) fn terminate() -> BytesMut {
    let mut message = BytesMut::new();
    frontend::terminate(&mut message);
    message
}

/// A Query message; `None` if `sql` holds a zero byte.
pub(crate) fn query(sql: &str) -> Option<BytesMut> {
    let mut message = BytesMut::new();
    frontend::query(sql, &mut message).ok()?;
    Some(message)
}

/// A 3.0 StartupMessage; `None` if it would exceed [`MAX_STARTUP_LEN`] or a string holds a zero byte.
pub fn encode_startup(parameters: &[(&str, &str)]) -> Option<BytesMut> {
    let mut packet = BytesMut::new();
    frontend::startup_message(parameters.iter().copied(), &mut packet).ok()?;
    (packet.len() <= MAX_STARTUP_LEN).then_some(packet)
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    const PROTOCOL_3_0: u32 = 196_608;

    fn parse(bytes: &[u8]) -> Result<Option<InitialPacket>, StartupError> {
        take_initial_packet(&mut BytesMut::from(bytes))
    }

    fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u32(u32::try_from(body.len()).unwrap() + 8);
        out.put_u32(code);
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn each_request_code_has_its_packet() {
        assert_eq!(parse(&ssl_request()), Ok(Some(InitialPacket::Ssl)));
        assert_eq!(
            parse(&packet(GSSENC_REQUEST, b"")),
            Ok(Some(InitialPacket::GssEnc))
        );
        let key = CancelKey {
            process_id: 7,
            secret: 0xdead_beef,
        };
        assert_eq!(parse(&key.request()), Ok(Some(InitialPacket::Cancel(key))));
    }

    #[test]
    fn requests_of_another_length_are_refused() {
        for code in [SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST] {
            assert_eq!(
                parse(&packet(code, &[0; 40])),
                Err(StartupError::InvalidRequest)
            );
        }
    }

    #[test]
    fn other_protocols_are_refused_at_once() {
        assert_eq!(parse(&[0x16, 3, 1]), Err(StartupError::TlsHandshake));
        assert_eq!(
            parse(b"GET / HTTP/1.1\r\n"),
            Err(StartupError::InvalidLength)
        );
        assert_eq!(parse(&[0, 0, 0, 7]), Err(StartupError::InvalidLength));
        assert_eq!(parse(&[0, 0, 0x27, 0x10]), Err(StartupError::InvalidLength));
        assert_eq!(
            parse(&packet(2 << 16, b"\0")),
            Err(StartupError::UnsupportedVersion { major: 2, minor: 0 })
        );
    }

    #[test]
    fn parameters_keep_their_order_and_options_are_set_apart() {
        let bytes = packet(
            196_610,
            b"user\0a\0_pq_.x\x001\0DateStyle\0ISO\0user\0b\0\0",
        );
        let Ok(Some(InitialPacket::Startup(message))) = parse(&bytes) else {
            panic!("no startup")
        };
        assert_eq!(message.minor, 2);
        assert!(message.needs_negotiation());
        assert_eq!(message.protocol_options, ["_pq_.x"]);
        assert_eq!(message.parameter("user"), Some("b"));
        assert_eq!(
            message.parameters[1],
            ("DateStyle".to_owned(), "ISO".to_owned())
        );
    }

    #[test]
    fn a_list_must_end_where_the_packet_does() {
        assert_eq!(
            parse(&packet(PROTOCOL_3_0, b"user\0a\0")),
            Err(StartupError::InvalidLayout)
        );
        assert_eq!(
            parse(&packet(PROTOCOL_3_0, b"user\0a\0\0x")),
            Err(StartupError::InvalidLayout)
        );
        assert_eq!(
            parse(&packet(PROTOCOL_3_0, b"user\0a")),
            Err(StartupError::InvalidLayout)
        );
        assert_eq!(
            parse(&packet(PROTOCOL_3_0, b"")),
            Err(StartupError::InvalidLayout)
        );
        assert_eq!(
            parse(&packet(PROTOCOL_3_0, b"user\0\xff\0\0")),
            Err(StartupError::NotUtf8)
        );
    }

    proptest! {
        #[test]
        fn any_parameters_survive_the_round_trip(
            parameters in prop::collection::vec(("[a-zA-Z.]{1,12}", "[^\0]{0,40}"), 0..8),
        ) {
            let borrowed: Vec<_> = parameters.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            let packet = encode_startup(&borrowed).unwrap();
            for cut in 0..packet.len() {
                prop_assert_eq!(parse(&packet[..cut]), Ok(None));
            }
            let Ok(Some(InitialPacket::Startup(message))) = parse(&packet) else { panic!("no startup") };
            prop_assert_eq!(message.parameters, parameters);
        }

        #[test]
        fn our_reader_agrees_with_pgwire_on_well_formed_startups(
            parameters in prop::collection::btree_map("[a-z]{1,12}", "[a-z0-9 ]{1,20}", 1..6),
        ) {
            use pgwire::messages::{DecodeContext, Message as _, startup::Startup};
            let mut theirs = Startup::new();
            theirs.parameters.clone_from(&parameters);
            let mut buffer = BytesMut::new();
            theirs.encode(&mut buffer).unwrap();
            let Ok(Some(InitialPacket::Startup(ours))) = parse(&buffer) else { panic!("no startup") };
            let decoded = Startup::decode(&mut buffer, &DecodeContext::default()).unwrap().unwrap();
            prop_assert_eq!(ours.parameters, decoded.parameters.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse(&bytes);
            let _ = parse(&packet(PROTOCOL_3_0, &bytes));
        }
    }
}
