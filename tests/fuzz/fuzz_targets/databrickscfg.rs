//! `~/.databrickscfg`.
#![no_main]

use lakebase_proxy::workspace::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| fuzzing::databrickscfg(data));
