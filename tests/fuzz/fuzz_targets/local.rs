//! Messages that a pool answers or refuses by itself, wherever their bytes are cut.
#![no_main]

use lakebase_proxy::pool::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fuzzing::answered_locally(data);
    if let Some((tag, body)) = data.split_first() {
        fuzzing::refused(*tag, body);
    }
});
