//! Writes the man pages, one for the program and one for each command, into a directory.
//!
//!     cargo run --example man-pages -- DIR

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(env::args_os().nth(1).ok_or("name a directory")?);
    fs::create_dir_all(&directory)?;
    clap_mangen::generate_to(lakebase_proxy::cli::command(), &directory)?;
    Ok(())
}
