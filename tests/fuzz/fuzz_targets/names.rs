//! Names of resources and hosts, as people write them.
#![no_main]

use lakebase_proxy::workspace::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &str| fuzzing::names(data));
