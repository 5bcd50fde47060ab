//! A server's questions at login, in any order: nothing panics, a cut short exchange is never taken for a welcome, and
//! every answer is one whole message. Messages are separated by their lengths: one byte, then that many.
#![no_main]

use bytes::BytesMut;
use lakebase_proxy::protocol::{
    auth::{AuthenticationRequest, Authenticator},
    frame::take_message,
};
use libfuzzer_sys::fuzz_target;
use secrecy::SecretString;

fuzz_target!(|data: &[u8]| {
    let password = SecretString::from("password");
    let mut authenticator = Authenticator::new("user", &password);
    let (mut begun, mut proved) = (false, false);
    let mut rest = data;
    while let Some((&length, after)) = rest.split_first() {
        let (body, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        let Some(request) = AuthenticationRequest::parse(body) else {
            continue;
        };
        let requested = request.clone();
        let answer = authenticator.answer(request);
        match (&requested, &answer) {
            (AuthenticationRequest::Sasl(_), Ok(_)) => begun = true,
            (AuthenticationRequest::SaslFinal(_), Ok(_)) => proved = true,
            (AuthenticationRequest::Ok, Ok(_)) => assert!(proved || !begun),
            _ => {}
        }
        if let Ok(Some(answer)) = answer {
            let mut answer = BytesMut::from(&answer[..]);
            let message = take_message(&mut answer, 100_000)
                .expect("a frame")
                .expect("a whole one");
            assert!(message.tag == b'p' && answer.is_empty());
        }
    }
});
