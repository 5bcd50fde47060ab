//! Writes the man pages, one for the program and one for each command, into a directory, and the completions of each shell
//! into one below it.
//!
//!     cargo run --example man-pages -- DIR

use std::{
    env,
    error::Error,
    fs::{self, File},
    path::PathBuf,
};

use clap::ValueEnum;
use clap_complete::Shell;
use lakebase_proxy::cli;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(env::args_os().nth(1).ok_or("name a directory")?);
    let completions = directory.join("completions");
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(cli::command(), &directory)?;
    for shell in Shell::value_variants() {
        let mut file = File::create(completions.join(shell.to_string()))?;
        clap_complete::generate(*shell, &mut cli::command(), "lakebase-proxy", &mut file);
    }
    Ok(())
}
