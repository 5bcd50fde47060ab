//! Random clients on shared connections: each receives what a direct connection would have sent. The first byte selects how
//! many statements a connection keeps, the next ones are messages, and the last ones decide on connections and pauses.
#![no_main]

#[path = "../../../src/pool/statements/tests/reference.rs"]
mod reference;

use lakebase_proxy::{
    pool::statements::{
        ClientMessage, ClientStatements, Meaning, Passage, Sent, ServerStatements, Texts,
    },
    protocol::{error::ErrorFields, frame::HEADER_LEN},
};
use libfuzzer_sys::fuzz_target;
use reference::{Step, run};

const TAGS: &[u8; 8] = b"PBDCESQH";

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    let (steps, mut choices) = data.split_at(data.len() / 2);
    let mut program = vec![(0, Vec::new())];
    for pair in steps.chunks_exact(2).take(200) {
        let tag = TAGS[usize::from(pair[0]) % TAGS.len()];
        if tag == b'S' {
            // The end of a unit, and the client of the next.
            program.push((usize::from(pair[1] % 3), Vec::new()));
        } else if let Some((_, unit)) = program.last_mut() {
            unit.push(Step(tag.into(), pair[0] / 8, pair[1]));
        }
    }
    let choose = |among: usize| match choices.split_first() {
        Some((first, rest)) => {
            choices = rest;
            usize::from(*first) % among
        }
        None => 0,
    };
    run(&program, choose, 1 + usize::from(first % 4), |_, _| {});
});
