//! One client's conversation with the console, simple and extended.
#![no_main]

use lakebase_proxy::console::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::conversation(data));
