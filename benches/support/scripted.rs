//! The scripted server as a program of its own, for `benches/compare`: `scripted-upstream scripted-upstream DIRECTORY`.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    dead_code,
    reason = "it is no part of the program: it fails by panicking and prints its port on standard output"
)]

mod upstream;

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    match &std::env::args().skip(1).collect::<Vec<_>>()[..] {
        [word, directory] if word == upstream::WORD => upstream::serve(Path::new(directory)),
        _ => ExitCode::FAILURE,
    }
}
