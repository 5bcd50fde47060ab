//! Opened to tests/fuzz: a login at a server that sends anything.

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Failure, login::exchange_with};
use crate::protocol::{frame::take_message, options::LoginParameters};
use crate::status::Label;

const TOKEN: &str = "eyJh.eyJz.c2ln";

/// Logs in; what is kept for the client are whole frames of the right kinds, and no refusal shows the credential.
pub async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    client_encoding: Option<&str>,
    may_send_cleartext: bool,
) {
    let settings = LoginParameters {
        database: "db".to_owned(),
        client_encoding: client_encoding.map(str::to_owned),
        ..LoginParameters::default()
    };
    match exchange_with(&mut stream, TOKEN, &settings, may_send_cleartext).await {
        Ok(greeting) => {
            check(greeting.parameter_status, b'S');
            check(greeting.notices, b'N');
        }
        Err(failure) => refused(&failure),
    }
}

fn check(mut frames: BytesMut, kind: u8) {
    while let Some(message) = take_message(&mut frames, usize::MAX).expect("a frame") {
        assert_eq!(message.tag, kind);
    }
    assert!(frames.is_empty(), "half a message");
}

fn refused(failure: &Failure) {
    let report = failure.report(&Label::new("e"));
    assert!(!report.sqlstate.is_empty());
    assert!(!report.line().contains(TOKEN));
}
