//! The `lakebase-proxy` binary: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lakebase_proxy::cli::run(std::env::args_os())
}
