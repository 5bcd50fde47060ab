//! The `lakebase-proxy` binary: everything is in the library.

use std::process::ExitCode;

/// jemalloc returns the memory of ended sessions to the kernel and overwrites what is freed; figures are in Cargo.toml.
/// Only in release builds: tools that check memory in development expect the system's allocator.
#[cfg(all(target_os = "linux", target_env = "gnu", not(debug_assertions)))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    lakebase_proxy::cli::run(std::env::args_os())
}
