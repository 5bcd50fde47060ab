//! What one round trip and one idle session cost, counted exactly: the machine's load does not change these figures.
//!
//! ```text
//! cargo build-release && cargo test --test exact   compare with record.toml; fails when a figure has grown by over 3 %
//! cargo test --test exact -- --renew                 put what was counted into the record
//! cargo test --test exact -- --program PATH          count another build of the proxy
//! ```
//!
//! Instructions are those of user space and of one worker, as callgrind counts them; they depend on the CPU model a
//! little (which variant of a function is taken), so each model has its own. A machine whose model has no record is held
//! to the limits alone, and to what does not depend on the CPU. Resident memory and that of clients at rest have limits and
//! no record: pages are the kernel's business. What a tool is missing for is left out, with a line.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "it is no part of the program: it fails by panicking, reports on standard output and waits by sleeping"
)]

#[path = "../support/mod.rs"]
mod support;

mod count;
mod record;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use record::{Figure, Record};
use support::{process::cpu_model, upstream};

/// The share by which a figure may exceed its record: what repeated counts differ by, and a little.
const TOLERANCE: f64 = 0.03;

/// What is counted: its name in the record, its unit, what it must not exceed anywhere, and what it is meant to be.
const FIGURES: [(Figure, &str, f64, f64); 7] = [
    (
        Figure::Instructions,
        "instructions per SELECT 1",
        // An executor of our own took 6,973 against 10,641 of tokio's; per SELECT 1 that is no measurable time (CPU 0.99 of
        // it, throughput 1.03), and 980 lines. Overwriting freed memory (.cargo/config.toml) adds 450, and encryption takes
        // 300 more on some CPUs than on others.
        11_000.0,
        6_000.0,
    ),
    (
        Figure::InstructionsOfPool,
        "the same, pooled",
        // Its goal is no measurable time: a round trip takes the kernel about 100,000.
        15_000.0,
        12_000.0,
    ),
    (Figure::Allocations, "allocations per SELECT 1", 3.0, 0.0),
    (Figure::SystemCalls, "system calls per SELECT 1", 6.1, 6.1),
    (Figure::Memory, "kB per idle session", 12.0, 6.0),
    (Figure::MemoryAtRest, "kB per client at rest", 6.0, 1.5),
    (
        Figure::Resident,
        "MB resident before any session",
        // Of this, 2.8 are the process's own. The rest is the program, of which the kernel maps pages around those that are
        // used: 8.8 to 10.1 in all for copies of the same file.
        11.0,
        6.0,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, directory] = &arguments[..]
        && word == upstream::WORD
    {
        return upstream::serve(Path::new(directory));
    }
    let renew = arguments.iter().any(|argument| argument == "--renew");
    let program = arguments
        .iter()
        .skip_while(|argument| *argument != "--program")
        .nth(1)
        .map_or_else(release_build, PathBuf::from);
    assert!(
        program.is_file(),
        "{} is missing: cargo build-release",
        program.display()
    );

    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/exact/record.toml");
    let model = cpu_model();
    let mut record = Record::read(&file);
    if !record.knows(&model) {
        println!(
            "no record for {model}: instructions are held to the limit alone (--renew makes one)"
        );
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let counted = count::all(&program, directory.path());

    println!(
        "{:<30} {:>10} {:>10} {:>10} {:>10}",
        "", "counted", "recorded", "limit", "goal"
    );
    let mut failed = false;
    for (figure, name, limit, goal) in FIGURES {
        let Some(&value) = counted.get(&figure) else {
            continue;
        };
        let recorded = record.get(figure, &model);
        let most = recorded.map_or(limit, |recorded| limit.min(recorded * (1.0 + TOLERANCE)));
        let verdict = if value > limit || (!renew && value > most) {
            failed = true;
            "TOO MUCH"
        } else if value > goal {
            "over the goal"
        } else {
            ""
        };
        let recorded = recorded.map_or_else(|| "-".to_owned(), |recorded| format!("{recorded:.2}"));
        println!("{name:<30} {value:>10.2} {recorded:>10} {limit:>10.2} {goal:>10.2} {verdict}");
        record.set(figure, &model, value);
    }
    if renew {
        record.write(&file);
        println!("recorded in {}", file.display());
    }
    if failed {
        println!("if that is meant: cargo test --test exact -- --renew");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The build that is shipped, beside the one that this was built with.
fn release_build() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_lakebase-proxy"));
    let target = built.ancestors().nth(2).unwrap_or(built);
    target.join("release/lakebase-proxy")
}
