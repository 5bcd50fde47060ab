//! An error in a log: one line, whatever the other side put into it.
#![no_main]

use std::io;

use lakebase_proxy::telemetry::chain;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| {
    let line = chain(&io::Error::other(data.to_owned())).to_string();
    assert!(!line.chars().any(char::is_control), "{line:?}");
});
