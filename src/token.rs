//! `token`: print a credential, for scripts and for tools that must log in themselves.

use std::time::Duration;

use clap::{Args, ValueEnum};
use jiff::Timestamp;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    app::{self, StartError},
    config::{Config, Settings},
    credential::MintError,
};

/// How long the whole may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// What `token` is asked for.
#[derive(Args, Clone, Debug)]
pub struct TokenArgs {
    /// Print JSON: token, expires_at, endpoint, host, port, user, database
    #[arg(long, conflicts_with = "format")]
    pub json: bool,
    /// Print variables to source, or a line for a .pgpass file, instead of the token alone
    #[arg(long, value_enum)]
    pub format: Option<TokenFormat>,
    /// Where and what for, as for `serve`.
    #[command(flatten)]
    pub settings: Settings,
}

/// How a credential is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenFormat {
    /// `export PGHOST=... PGPASSWORD=...`, one a line, quoted for a shell.
    Env,
    /// `host:port:database:user:password`, escaped.
    Pgpass,
}

/// Why there is none to print.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// No credential was given.
    #[error("cannot obtain a database credential: {0}")]
    Mint(MintError),
    /// The endpoint is not known.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Nobody answered.
    #[error("no database credential within a minute")]
    TimedOut,
}

impl TokenError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Mint(error) => error.hint.clone(),
            Self::Start(error) => error.hint(),
            Self::TimedOut => Some("check that the workspace can be reached from here".to_owned()),
        }
    }
}

/// Mints a credential for the first endpoint and says it in the form asked for, a line end included.
///
/// # Errors
/// When the endpoint or its credential cannot be had.
pub async fn text(
    config: Config,
    json: bool,
    format: Option<TokenFormat>,
) -> Result<String, TokenError> {
    let (endpoint, minted) = timeout(PATIENCE, app::mint_once(config))
        .await
        .map_err(|_| TokenError::TimedOut)??;
    let minted = minted.map_err(TokenError::Mint)?;
    let token = minted.secret.expose_secret();
    let port = endpoint.port.to_string();
    if json {
        let answer = json!({
            "token": token,
            "expires_at": minted.expires_at.map(|at: Timestamp| at.to_string()),
            "endpoint": endpoint.label.name(),
            "host": endpoint.host,
            "port": endpoint.port,
            "user": endpoint.user,
            "database": endpoint.database,
        });
        return Ok(format!("{answer}\n"));
    }
    Ok(match format {
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
    })
}

fn shell_quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

fn pgpass_escaped(field: &str) -> String {
    field.replace('\\', r"\\").replace(':', r"\:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_shell_and_the_password_file() {
        assert_eq!(shell_quoted("a'b $c"), r"'a'\''b $c'");
        assert_eq!(pgpass_escaped(r"a:b\c"), r"a\:b\\c");
    }
}
