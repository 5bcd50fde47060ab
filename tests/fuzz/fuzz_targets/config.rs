//! The file of settings and the flag `--endpoint`.
#![no_main]

use lakebase_proxy::config::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| {
    fuzzing::settings_file(data);
    fuzzing::endpoint_flag(data);
});
