//! The `lakebase-proxy` binary: everything is in the library.

use std::process::ExitCode;

/// jemalloc, which gives back what thousands of sessions had once they have left; figures are in Cargo.toml.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    lakebase_proxy::cli::run(std::env::args_os())
}
