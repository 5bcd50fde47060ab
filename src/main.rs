//! The program's order: parse, run as init process or child if requested, start the runtime, run the command, report.

use std::{ffi::OsString, process::ExitCode};

use lakebase_proxy::{
    cli::{self, Cli, CommandError},
    exec,
};

/// jemalloc returns the memory of ended sessions to the kernel and overwrites what is freed; figures are in Cargo.toml.
/// Only with optimization: tools that check memory in development expect the system's allocator.
#[cfg(all(
    feature = "jemalloc",
    target_os = "linux",
    target_env = "gnu",
    not(debug_assertions)
))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    run(&arguments).unwrap_or_else(CommandError::report)
}

fn run(arguments: &[OsString]) -> Result<ExitCode, CommandError> {
    if let Some(launched) = exec::launch::run(arguments) {
        return Ok(launched?);
    }
    let cli = Cli::parse(arguments)?;
    if cli.needs_init() {
        return Ok(exec::init::run(arguments)?);
    }
    let inherited = cli.inherited_sockets()?;
    let runtime = cli::runtime()?;
    let mut log = None;
    let result = runtime.block_on(cli.run(inherited, &mut log));
    // Name lookups may still block threads; nothing waits for them.
    runtime.shutdown_background();
    result
}
