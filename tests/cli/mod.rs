//! The command line: help, errors, exit codes.

use std::{
    ffi::OsStr,
    io::Write as _,
    net::TcpListener,
    os::unix::ffi::OsStrExt as _,
    process::{Command, Output},
};

use clap::ArgAction;
use lakebase_proxy::cli;

const COMMANDS: [&str; 10] = [
    "",
    "completions",
    "demo",
    "doctor",
    "emulator",
    "exec",
    "serve",
    "shutdown",
    "token",
    "wait",
];

/// Without variables of this process.
fn program(arguments: &[&str]) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_lakebase-proxy"));
    program.args(arguments).env_clear().env("COLUMNS", "80");
    program
}

fn run(arguments: &[&str]) -> Output {
    program(arguments).output().unwrap()
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
fn an_invalid_command_line_exits_with_1_and_a_reason() {
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
        (&["shutdown", "--admin-port", "0"], "no port to connect to"),
        (&["serve"], "hint: set ENDPOINT_NAME="),
        (&["exec", "--", "true"], "hint: set ENDPOINT_NAME="),
        (&["serve", "--config-file", "/nowhere"], "`/nowhere`"),
        (&["serve", "--config-file", "/dev/zero"], "1 MiB"),
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

#[test]
fn every_flag_has_a_help_text_and_a_variable() {
    for command in COMMANDS {
        let description = cli::command();
        let described = match command {
            "" => &description,
            name => description.find_subcommand(name).unwrap(),
        };
        let flags = described.get_arguments().filter(|flag| {
            flag.get_long().is_some()
                && !matches!(flag.get_action(), ArgAction::Help | ArgAction::Version)
        });
        for flag in flags {
            let long = flag.get_long().unwrap();
            let help = flag.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.len() > 8, "{command} --{long}: {help:?}");
            assert!(!help.ends_with('.'), "{command} --{long}: {help:?}");
            // A value that no flag takes is refused, and the message names the flag: so the variable is read.
            let takes_any = flag.get_value_parser().type_id() == std::any::TypeId::of::<String>()
                || flag.get_value_parser().type_id()
                    == std::any::TypeId::of::<std::path::PathBuf>();
            if takes_any || long == "endpoint" {
                continue;
            }
            let variable = format!("LAKEBASE_PROXY_{}", long.to_uppercase().replace('-', "_"));
            let mut program = program(&[]);
            program.args(command.split_terminator(' '));
            if command == "exec" {
                program.args(["--", "true"]);
            }
            if command == "completions" {
                program.arg("bash");
            }
            let output = program.env(&variable, "\u{1f418}").output().unwrap();
            let stderr = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{variable}: {stderr}");
            assert!(
                stderr.contains(&format!("--{long}")),
                "{variable}: {stderr}"
            );
        }
    }
}

#[test]
fn a_command_without_its_separator_is_explained() {
    let output = program(&["exec", "psql", "-c", "select 1"])
        .output()
        .unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr.contains("`exec` needs `--` in front of `psql`"),
        "{stderr}"
    );
}

#[test]
fn the_help_of_a_command_shows_what_it_uses_in_80_columns() {
    for (command, used, unused) in [
        ("token", "--profile", "--pool-mode"),
        ("doctor", "--port", "--notes"),
    ] {
        let output = program(&[command, "--help"])
            .env("COLUMNS", "80")
            .output()
            .unwrap();
        let help = text(&output.stdout);
        assert!(help.contains(used) && !help.contains(unused), "{help}");
        let long = help.lines().find(|line| line.chars().count() > 80);
        assert_eq!(long, None, "{command}");
    }
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let output = program(&["wait", "--max", "10ms"])
        .env("LAKEBASE_PROXY_HTTP_PORT", "")
        .output()
        .unwrap();
    assert!(
        !text(&output.stderr).contains("HTTP_PORT"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_variable_that_is_not_utf_8_is_an_error() {
    for variable in [
        "LAKEBASE_PROXY_PORT",
        "LAKEBASE_PROXY_LOCAL_PASSWORD",
        "PGHOST",
        "DATABRICKS_CLIENT_SECRET",
    ] {
        let output = program(&["serve"])
            .env("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e")
            .env(variable, OsStr::from_bytes(b"p\xe4ss"))
            .output()
            .unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{variable}: {stderr}");
        let expected = format!("lakebase-proxy: {variable} is not valid UTF-8\nhint: ");
        assert!(stderr.starts_with(&expected), "{stderr}");
    }
}

#[test]
fn an_invalid_number_of_threads_is_an_error() {
    for nonsense in ["0", "many"] {
        let output = program(&["serve"])
            .env("TOKIO_WORKER_THREADS", nonsense)
            .output()
            .unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let expected = format!("lakebase-proxy: TOKIO_WORKER_THREADS is `{nonsense}`");
        assert!(stderr.starts_with(&expected), "{stderr}");
    }
}

#[test]
fn variables_of_a_kubernetes_service_are_not_settings() {
    let output = program(&["wait", "--max", "10ms"])
        .env("LAKEBASE_PROXY_PORT", "tcp://10.96.0.7:5432")
        .env("LAKEBASE_PROXY_HTTP_PORT", "tcp://10.96.0.7:9090")
        .output()
        .unwrap();
    let stderr = text(&output.stderr);
    // On the default port, where a proxy of the user's may run.
    let is_ready = output.status.success() && stderr.is_empty();
    assert!(
        is_ready || stderr.contains("127.0.0.1:9090 has not started"),
        "{stderr}"
    );
}

#[test]
fn a_switch_is_set_by_1_too() {
    let output = program(&["emulator", "--postgres-bin-dir", "/nowhere"])
        .env("LAKEBASE_PROXY_NO_DOWNLOAD", "1")
        .output()
        .unwrap();
    let stderr = text(&output.stderr);
    assert!(stderr.contains("no `initdb`"), "{stderr}");
    let output = program(&["token", "--notes=no"])
        .env("LAKEBASE_PROXY_ADMIN_CONSOLE", "1")
        .output()
        .unwrap();
    let stderr = text(&output.stderr);
    assert!(stderr.contains("DATABRICKS_HOST"), "{stderr}");
}

#[test]
fn a_taken_port_names_the_flag_to_change() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = holder.local_addr().unwrap().port().to_string();
    for taken in ["--port", "--http-port", "--notes-port"] {
        let mut program = program(&["--notes"]);
        for flag in ["--port", "--http-port", "--notes-port"] {
            program.args([flag, if flag == taken { &port } else { "0" }]);
        }
        let output = program
            .envs([
                ("PGHOST", "db.example.invalid"),
                ("PGUSER", "me"),
                ("DATABRICKS_HOST", "https://127.0.0.1:1"),
                ("DATABRICKS_TOKEN", "dapi0"),
            ])
            .output()
            .unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{taken}: {stderr}");
        assert!(
            stderr.contains(taken) && stderr.contains(&port),
            "{taken}: {stderr}"
        );
    }
}

#[test]
fn an_error_in_the_file_names_its_line() {
    for (file, words) in [
        (
            "max_connections = \"many\"",
            &["line 1", "max_connections"][..],
        ),
        ("port = 5432\nprot = 5433", &["line 2", "prot"]),
        ("[[endpoint]]\nlisten = \"nowhere\"", &["line 2", "nowhere"]),
        ("port = ", &["line 1"]),
    ] {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        path.write_all(file.as_bytes()).unwrap();
        let output = run(&["serve", "--config-file", path.path().to_str().unwrap()]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{file}");
        assert!(stderr.contains(path.path().to_str().unwrap()), "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{file}: {word} is not in {stderr}");
        }
    }
}

#[test]
fn completions_are_valid_shell_scripts() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = run(&["completions", shell]);
        assert_eq!(output.status.code(), Some(0), "{shell}");
        let script = text(&output.stdout);
        assert!(script.contains("max-connections"), "{shell}");
        assert!(script.contains("doctor"), "{shell}");
    }
    let script = run(&["completions", "bash"]).stdout;
    let mut bash = Command::new("bash")
        .args([
            "--norc",
            "-c",
            "source /dev/stdin && complete -p lakebase-proxy",
        ])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin.take().unwrap().write_all(&script).unwrap();
    let output = bash.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("lakebase-proxy"));
}

#[test]
fn every_command_has_a_manual_page() {
    let directory = tempfile::tempdir().unwrap();
    clap_mangen::generate_to(cli::command(), directory.path()).unwrap();
    for command in COMMANDS {
        let name = ["lakebase-proxy", command].join("-");
        let page = directory
            .path()
            .join(format!("{}.1", name.trim_end_matches('-')));
        let page = std::fs::read_to_string(&page).unwrap_or_else(|_| panic!("{}", page.display()));
        assert!(page.contains(".SH SYNOPSIS"), "{command}");
        assert!(page.contains(".SH OPTIONS"), "{command}");
    }
}
