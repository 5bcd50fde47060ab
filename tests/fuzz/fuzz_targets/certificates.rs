//! What `doctor` shows of a certificate that any server may present.
#![no_main]

use lakebase_proxy::doctor::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::certificate(data));
