//! Random traffic of a client and a server, both played by a small model of them: the proxy's model of the requests in flight
//! agrees. The first byte selects the client.
#![no_main]

#[path = "../../../src/protocol/requests/tests/reference.rs"]
mod reference;

use lakebase_proxy::protocol::{
    frame::Scanner,
    requests::{Requests, TransactionStatus},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some((first, choices)) = data.split_first() {
        reference::run(choices, first % 2 == 0);
    }
});
