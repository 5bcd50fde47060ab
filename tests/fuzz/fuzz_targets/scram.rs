//! SCRAM-SHA-256 with a client: no message causes a panic, our answer contains its
//! nonce, and authentication needs the password. The input is the client's two messages, separated by a
//! zero byte; in the second `%` stands for the nonce of the exchange.
#![no_main]

use std::sync::LazyLock;

use lakebase_proxy::protocol::scram::{Exchange, Verifier};
use libfuzzer_sys::fuzz_target;
use secrecy::SecretString;

static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    Verifier::new(&SecretString::from("open sesame")).expect("the library derives keys")
});

fuzz_target!(|data: &[u8]| {
    let mut messages = data.splitn(2, |&byte| byte == 0);
    let first = messages.next().unwrap_or_default();
    let last = messages.next().unwrap_or_default();
    let Ok((exchange, answer)) = Exchange::begin(&VERIFIER, first) else {
        return;
    };
    let nonce = answer
        .strip_prefix("r=")
        .and_then(|rest| rest.split(',').next())
        .expect("an answer begins with the nonce");
    let theirs = std::str::from_utf8(first)
        .ok()
        .and_then(|first| first.split(',').nth(3))
        .and_then(|attribute| attribute.strip_prefix("r="))
        .expect("what was taken has a nonce");
    assert!(nonce.starts_with(theirs) && nonce.len() > theirs.len());

    let mut filled = Vec::new();
    for &byte in last {
        match byte {
            b'%' => filled.extend_from_slice(nonce.as_bytes()),
            byte => filled.push(byte),
        }
    }
    assert!(exchange.finish(&filled).is_err());
});
