//! The command line's flags and their variables.

use std::{
    any::TypeId,
    ffi::{OsStr, OsString},
};

use clap::{Arg, Command, CommandFactory, builder::BoolishValueParser, error::ErrorKind};

use super::{Cli, CommandError};
use crate::config::{
    ConfigError, Environment, PASSWORD_VARIABLE, Setting, Settings, VARIABLE_PREFIX, most_similar,
    text, variable,
};

const UNUSED_BY_DOCTOR: [&str; 5] = [
    "Limits",
    "Pooling",
    "Health and metrics",
    "Notes page",
    "Shutdown",
];
const UNUSED_BY_TOKEN: [&str; 6] = [
    "Listening",
    "Limits",
    "Pooling",
    "Health and metrics",
    "Notes page",
    "Shutdown",
];

/// The command line. Each flag may be set by its variable; an empty variable counts as unset.
pub fn command() -> Command {
    complete(Cli::command(), &Settings::declared())
        .mut_subcommand("doctor", |doctor| without_help(doctor, &UNUSED_BY_DOCTOR))
        .mut_subcommand("token", |token| without_help(token, &UNUSED_BY_TOKEN))
}

/// Hides the flags of sections that a command accepts, so that it can be tried with another's flags, but does not use.
fn without_help(command: Command, sections: &'static [&str]) -> Command {
    command.mut_args(|argument| {
        let section = argument.get_help_heading().unwrap_or_default();
        let is_unused = sections.contains(&section);
        argument.hide(is_unused)
    })
}

/// Adds to each flag what follows from its declaration: the variable, and the default in its help.
fn complete(command: Command, declared: &[Setting]) -> Command {
    let command = command.mut_args(|argument| {
        let long = argument.get_long().unwrap_or("help");
        if matches!(long, "help" | "version") {
            return argument;
        }
        let variable = variable(long);
        let setting = declared.iter().find(|it| argument.get_id() == it.key);
        let argument = described(argument, setting);
        match std::env::var_os(&variable) {
            Some(value) if !value.is_empty() && !is_service_link(&variable, &value) => {
                argument.env(variable).hide_env(true)
            }
            _ => argument,
        }
    });
    command.mut_subcommands(|subcommand| complete(subcommand, declared))
}

fn described(argument: Arg, setting: Option<&Setting>) -> Arg {
    // The further paragraphs of a setting are for the annotated file.
    let argument = argument.long_help(None::<&str>);
    let is_bool = argument.get_value_parser().type_id() == TypeId::of::<bool>();
    // In variables `1` and `yes` are as usual as `true`.
    let argument = if is_bool {
        argument.value_parser(BoolishValueParser::new())
    } else {
        argument
    };
    if is_bool && argument.get_action().takes_values() {
        // `--flag` means `--flag=true`; `--flag=false` overrides a variable.
        return argument
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL");
    }
    let help = argument.get_help().map(ToString::to_string);
    let default = text(setting.and_then(|setting| setting.default.as_ref()));
    match help {
        Some(help) if !default.is_empty() && !help.contains("[default") => {
            argument.help(format!("{help} [default: {default}]"))
        }
        _ => argument,
    }
}

/// The error for an invalid command line. If a variable is not valid UTF-8, clap does not name it.
pub(super) fn usage(error: clap::Error) -> CommandError {
    let unreadable = |(name, value): (OsString, OsString)| {
        let name = name.into_string().ok()?;
        (name.starts_with(VARIABLE_PREFIX) && value.to_str().is_none()).then_some(name)
    };
    if error.kind() == ErrorKind::InvalidUtf8
        && let Some(variable) = Environment::inherited().into_iter().find_map(unreadable)
    {
        return ConfigError::not_text(&variable).into();
    }
    error.into()
}

/// Warns of variables that are named like settings but match none, most likely misspelled.
pub(super) fn warn_of_unknown_variables() {
    let known = known_variables(&Cli::command());
    for variable in unknown_variables(&known, Environment::inherited()) {
        let similar = most_similar(&variable, known.clone());
        tracing::warn!(
            variable,
            similar,
            "this variable matches no setting; hint: `lakebase-proxy serve --help` lists the settings"
        );
    }
}

fn known_variables(command: &Command) -> Vec<String> {
    let commands = std::iter::once(command).chain(command.get_subcommands());
    let flags = commands.flat_map(Command::get_arguments);
    flags.filter_map(Arg::get_long).map(variable).collect()
}

fn unknown_variables(known: &[String], all: Vec<(OsString, OsString)>) -> Vec<String> {
    // Set by Kubernetes for a Service named like the proxy.
    let is_of_service = |name: &str, value: &OsStr| {
        let mut words = name.split('_');
        words.any(|word| ["SERVICE", "TCP", "UDP", "SCTP"].contains(&word))
            || is_service_link(name, value)
    };
    let is_unknown = |name: &String, value: &OsStr| {
        name.starts_with(VARIABLE_PREFIX)
            // It has no flag, as other users can read command lines.
            && name != PASSWORD_VARIABLE
            && !known.contains(name)
            && !is_of_service(name, value)
    };
    all.into_iter()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            is_unknown(&name, &value).then_some(name)
        })
        .collect()
}

/// Whether Kubernetes has set the variable: for a Service called `lakebase-proxy`, each container gets
/// `LAKEBASE_PROXY_PORT=tcp://10.0.0.1:5432`, which is not the setting.
fn is_service_link(variable: &str, value: &OsStr) -> bool {
    let value = value.to_str().unwrap_or_default();
    let schemes = ["tcp://", "udp://", "sctp://"];
    variable.ends_with("_PORT") && schemes.iter().any(|scheme| value.starts_with(scheme))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn a_variable_like_a_setting_that_matches_none_is_reported() {
        let variables = [
            ("LAKEBASE_PROXY_PROT", "5433"),
            ("LAKEBASE_PROXY_PORT", "5433"),
            ("LAKEBASE_PROXY_LOCAL_PASSWORD", "p"),
            ("LAKEBASE_PROXY_STRIP_SECRETS", "true"),
            ("LAKEBASE_PROXY_SERVICE_HOST", "10.96.0.7"),
            ("LAKEBASE_PROXY_SERVICE_PORT_HTTP", "9090"),
            ("LAKEBASE_PROXY_PORT_5432_TCP_ADDR", "10.96.0.7"),
            ("LAKEBASE_PROXY_METRICS_PORT", "tcp://10.96.0.7:9090"),
            ("LAKEBASE_ENDPOINT", "e"),
        ];
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        assert_eq!(
            unknown_variables(&known_variables(&Cli::command()), variables.to_vec()),
            ["LAKEBASE_PROXY_PROT"]
        );
    }

    #[test]
    fn variables_of_a_kubernetes_service_are_not_settings() {
        let is = |variable, value| is_service_link(variable, OsStr::new(value));
        assert!(is("LAKEBASE_PROXY_PORT", "tcp://10.96.0.7:5432"));
        assert!(is("LAKEBASE_PROXY_HTTP_PORT", "tcp://[fd00::7]:9090"));
        assert!(!is("LAKEBASE_PROXY_PORT", "5433"));
        assert!(!is("LAKEBASE_PROXY_ADDRESS", "tcp://10.96.0.7:5432"));
    }
}
