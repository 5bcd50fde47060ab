//! The command line as people type it: help, mistakes, exit codes.

use std::process::{Command, Output};

const COMMANDS: [&str; 9] = [
    "", "demo", "doctor", "emulator", "exec", "serve", "shutdown", "token", "wait",
];

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lakebase-proxy"))
        .args(arguments)
        .env_clear()
        .env("COLUMNS", "80")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn every_commands_help_fits_80_columns() {
    for command in COMMANDS {
        let mut arguments: Vec<&str> = command.split_terminator(' ').collect();
        arguments.push("--help");
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(0), "{command}");
        assert_eq!(text(&output.stderr), "", "{command}");
        let help = text(&output.stdout);
        let usage = format!("Usage: lakebase-proxy {command}");
        assert!(help.contains(usage.trim()), "{command}: {help}");
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{command}: {line:?}");
        }
    }
}

#[test]
fn the_help_names_every_command() {
    let output = run(&["--help"]);
    let help = text(&output.stdout);
    for command in COMMANDS.into_iter().filter(|command| !command.is_empty()) {
        assert!(
            help.contains(&format!("\n  {command} ")),
            "{command}: {help}"
        );
    }
}

#[test]
fn a_command_line_that_makes_no_sense_is_exit_code_1_and_says_why() {
    for (arguments, why) in [
        (&["--no-such-flag"][..], "--no-such-flag"),
        (&["no-such-command"], "no-such-command"),
        (&["serve", "--port", "70000"], "neither a port"),
        (
            &["serve", "--max-sigterm-delay", "soon"],
            "not a length of time",
        ),
        (&["exec"], "-- <CMD>"),
        (&["exec", "--strip-secrets"], "-- <CMD>"),
        (&["exec", "--strip-secrets=maybe", "--", "true"], "maybe"),
        // What is not behind `--` is no program: it may be a flag's forgotten value.
        (&["exec", "psql"], "psql"),
        (&["wait", "--max", "soon"], "not a length of time"),
        (&["wait", "--http-port", "none"], "--http-port is `none`"),
        (&["shutdown", "--admin-port", "0"], "no port to ask at"),
        (&["serve"], "hint: set ENDPOINT_NAME="),
        (&["exec", "--", "true"], "hint: set ENDPOINT_NAME="),
        (&["serve", "--config-file", "/nowhere"], "`/nowhere`"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
        assert!(
            text(&output.stderr).contains(why),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn the_version_is_the_packages() {
    let output = run(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    let version = concat!("lakebase-proxy ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(text(&output.stdout), version);
}
