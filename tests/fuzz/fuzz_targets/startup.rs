//! The first packet of a connection: no bytes make the reader panic, and it reads the same however they are split. What it
//! accepts can be sent on.
#![no_main]

use bytes::BytesMut;
use lakebase_proxy::protocol::{
    options::LoginParameters,
    startup::{InitialPacket, encode_startup, take_initial_packet},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut whole = BytesMut::from(data);
    let at_once = take_initial_packet(&mut whole);

    let mut buffer = BytesMut::new();
    let mut by_bytes = Ok(None);
    for (read, &byte) in data.iter().enumerate() {
        buffer.extend_from_slice(&[byte]);
        by_bytes = take_initial_packet(&mut buffer);
        if !matches!(by_bytes, Ok(None)) {
            assert!(!matches!(by_bytes, Ok(Some(_))) || whole[..] == data[read + 1..]);
            break;
        }
    }
    assert_eq!(at_once, by_bytes);

    let Ok(Some(InitialPacket::Startup(message))) = at_once else {
        return;
    };
    let parameters: Vec<_> = message
        .parameters
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let again = encode_startup(&parameters).expect("what was read fits");
    let Ok(Some(InitialPacket::Startup(same))) =
        take_initial_packet(&mut BytesMut::from(&again[..]))
    else {
        panic!("what was sent on cannot be read");
    };
    assert_eq!(same.parameters, message.parameters);
    let _ = LoginParameters::new(&message, "db".to_owned());
});
