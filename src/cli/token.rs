//! `token`: prints a credential, for scripts and tools that log in themselves.

use std::{process::ExitCode, time::Duration};

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::time::timeout;

use super::{CommandError, start_log};
use crate::{
    app::{self, AppError},
    config::{Config, Environment, Settings},
    telemetry::LogGuard,
};

const TIMEOUT: Duration = Duration::from_mins(1);

#[derive(Args, Debug)]
pub(super) struct TokenArgs {
    /// Print JSON: token, expires_at, endpoint, host, port, user, database
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Print variables for a shell, or a line of a .pgpass file, instead of the token alone
    #[arg(long, value_enum)]
    format: Option<TokenFormat>,
    #[command(flatten)]
    pub(super) settings: Settings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TokenFormat {
    /// `export PGHOST=... PGPASSWORD=...`, one per line, quoted for a shell
    Env,
    /// `host:port:database:user:password`, escaped
    Pgpass,
}

/// Mints a credential for the first endpoint and prints it.
#[expect(clippy::print_stdout, reason = "the output of the command")]
pub(super) async fn run(
    arguments: TokenArgs,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    let config = Config::resolve(arguments.settings, Environment::of_process())?;
    start_log(&config.settings.log_options(), log)?;
    let timed_out = || {
        let hint = "check that the workspace can be reached from here";
        CommandError::new(
            "no database credential within a minute",
            Some(hint.to_owned()),
        )
    };
    let minting = async {
        let located = app::locate_first(config).await?;
        let minted = located.mint.mint().await;
        Ok::<_, AppError>((located.endpoint, minted))
    };
    let (endpoint, minted) = timeout(TIMEOUT, minting).await.map_err(|_| timed_out())??;
    let minted = minted.map_err(|error| {
        let hint = error.hint.clone();
        CommandError::new(
            format!("cannot obtain a database credential: {error}"),
            hint,
        )
    })?;
    let token = minted.secret.expose_secret();
    let port = endpoint.port.to_string();
    let text = match arguments.format {
        None if arguments.json => {
            let answer = json!({
                "token": token,
                "expires_at": minted.expires_at.map(|at: Timestamp| at.to_string()),
                "endpoint": endpoint.label.name(),
                "host": endpoint.host,
                "port": endpoint.port,
                "user": endpoint.user,
                "database": endpoint.database,
            });
            format!("{answer}\n")
        }
        None => format!("{token}\n"),
        Some(TokenFormat::Env) => {
            let variables = [
                ("PGHOST", endpoint.host.as_str()),
                ("PGPORT", &port),
                ("PGDATABASE", &endpoint.database),
                ("PGUSER", &endpoint.user),
                ("PGPASSWORD", token),
            ];
            let line =
                |(name, value): (&str, &str)| format!("export {name}={}\n", shell_quoted(value));
            variables.map(line).concat()
        }
        Some(TokenFormat::Pgpass) => {
            let fields = [
                &endpoint.host,
                &port,
                &endpoint.database,
                &endpoint.user,
                token,
            ];
            format!("{}\n", fields.map(pgpass_escaped).join(":"))
        }
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

fn shell_quoted(value: &str) -> String {
    // POSIX shells expand nothing within single quotes, and have no escape for one inside.
    format!("'{}'", value.replace('\'', r"'\''"))
}

fn pgpass_escaped(field: &str) -> String {
    // PostgreSQL docs, "The Password File": a backslash escapes `:` and `\`.
    field.replace('\\', r"\\").replace(':', r"\:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_for_the_shell_and_escaped_for_the_password_file() {
        assert_eq!(shell_quoted("a'b $c"), r"'a'\''b $c'");
        assert_eq!(pgpass_escaped(r"a:b\c"), r"a\:b\\c");
    }
}
