//! What a workspace, an identity provider or a proxy in their place answers: as a refusal, as a token, and the times in it.
//! The first two bytes are the status.
#![no_main]

use lakebase_proxy::workspace::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((status, body)) = data.split_first_chunk() else {
        return;
    };
    fuzzing::answer(u16::from_be_bytes(*status), body);
    if let Ok(text) = str::from_utf8(body) {
        fuzzing::times(text);
    }
});
