//! The `emulator` command: flags, start, and the lines people need.

use std::{
    future::Future,
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use jiff::SignedDuration;
use secrecy::SecretString;

use super::{
    Emulator, EmulatorError, EmulatorOptions, EnvironmentFormat, Fault, LocalPostgresOptions,
    PostgresSource, Settings,
};

const AFTER_HELP: &str = "\
While it runs, under the workspace's address (DATABRICKS_HOST):
  GET    /emulator            state, settings, faults to come
  GET    /emulator/counts     requests, logins, credentials; by user, database, endpoint
  GET    /emulator/faults     those to come and those spent, with how often each struck
  PUT    /emulator/faults     replaces them; POST adds, DELETE clears them all
    {\"faults\":[{\"at\":\"mint\",\"do\":{\"respond\":{\"status\":429,\"retry_after\":\"2\"}},
                \"times\":3}]}
  PATCH  /emulator/settings
    {\"token_ttl\":90,\"wake_delay\":5,\"while_asleep\":\"starting_up\"}
  POST   /emulator/events     {\"event\":\"suspend\"}

A fault is {\"at\":SITE,\"do\":ACTION}, and \"times\":N unless it strikes until cleared.
  What cannot happen at a site is refused.
Sites and their actions:
  discovery token mint lookup whoami voucher (the workspace's API)
    {\"respond\":{\"status\":N,\"body\":TEXT,\"content_type\":TEXT,\"retry_after\":TEXT}}
    {\"merge\":{\"expire_time\":\"9999-12-31T23:59:59Z\"}} \"quote_numbers\" (the real
    answer, changed), and what is possible everywhere
  accept ssl_request tls startup password session cancel (the endpoint)
    {\"error\":{\"severity\":\"FATAL\",\"code\":\"53300\",\"message\":\"sorry, too many\"}}
    {\"answer\":TEXT}, at ssl_request \"no_tls\" and
    {\"certificate\":\"expired\"|\"other_authority\"|\"wrong_name\"}, at cancel
    {\"defer\":MILLISECONDS} (closes before it sends the signal), and what is possible
    everywhere
  everywhere: {\"delay\":MILLISECONDS} \"stall\" \"close\" \"reset\"
    \"blackhole\" (no packet arrives or leaves, as when the network path is lost)
Conditions: at startup, password and session \"user\":NAME \"database\":NAME; at password
  and session \"credential_younger_than\":SECONDS \"credential_older_than\":SECONDS;
  at session \"after_bytes\":N sent to the client.
Events: suspend revoke_credentials revoke_tokens terminate_sessions close_sessions
  reset_sessions stall_sessions blackhole_sessions resume_sessions, of another branch with
  \"endpoint\":NAME; label_role with \"role\":NAME and \"label\":TEXT";

/// Flags of `lakebase-proxy emulator`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct EmulatorArgs {
    /// Port of the emulated workspace API on 127.0.0.1; 0 picks a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub workspace_port: u16,
    /// Port of the emulated Lakebase endpoint on localhost; 0 picks a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub pg_port: u16,
    /// Lifetime of a database credential, e.g. `60s` or `15m`
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub token_ttl: Duration,
    /// Suspend the endpoint after this long without logins, queries and open transactions; never if not given
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub suspend_after: Option<Duration>,
    /// How long a suspended endpoint takes to wake, counted from the connection that wakes it
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration)]
    pub wake_delay: Duration,
    /// A fault to start with, in JSON as under `/emulator/faults`, e.g. `{"at":"mint","do":"close","times":1}`; may be
    /// given several times
    #[arg(long = "fault", value_name = "JSON", value_parser = fault)]
    pub faults: Vec<Fault>,
    /// The Postgres behind the edge.
    #[command(flatten)]
    pub postgres: PostgresArgs,
    /// Write the variables that clients need to this file once the emulator is ready; without it they are printed
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,
    /// How the variables are written
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub format: EnvironmentFormat,
}

/// Flags that choose the Postgres behind the edge.
#[derive(Clone, Debug, clap::Args)]
pub struct PostgresArgs {
    /// Use this Postgres instead of an own one: a superuser's URL, without TLS
    #[arg(long, value_name = "URL", conflicts_with = "postgres_bin_dir")]
    pub postgres_url: Option<SecretString>,
    /// Where `initdb` and `postgres` are; looked for if not given
    #[arg(long, value_name = "DIR")]
    pub postgres_bin_dir: Option<PathBuf>,
    /// Fail if this machine has no Postgres, instead of fetching one with pip
    #[arg(long)]
    pub no_download: bool,
}

impl PostgresArgs {
    pub(crate) fn source(&self) -> PostgresSource {
        match &self.postgres_url {
            Some(url) => PostgresSource::Url(url.clone()),
            None => PostgresSource::Local(LocalPostgresOptions {
                bin_dir: self.postgres_bin_dir.clone(),
                download: !self.no_download,
                ..LocalPostgresOptions::default()
            }),
        }
    }
}

impl EmulatorArgs {
    /// The flags as options.
    pub fn options(&self) -> EmulatorOptions {
        EmulatorOptions {
            workspace_port: self.workspace_port,
            pg_port: self.pg_port,
            settings: Settings {
                token_ttl: self.token_ttl,
                suspend_after: self.suspend_after.unwrap_or_default(),
                wake_delay: self.wake_delay,
                ..Settings::default()
            },
            postgres: self.postgres.source(),
            faults: self.faults.clone(),
            ..EmulatorOptions::default()
        }
    }
}

/// Runs an emulator until `shutdown` resolves, then takes everything away.
///
/// Once it is ready the variables that clients need go to `env_file`, or to standard output if there is none.
pub async fn run(
    options: EmulatorOptions,
    env_file: Option<PathBuf>,
    format: EnvironmentFormat,
    shutdown: impl Future<Output = ()>,
) -> Result<(), EmulatorError> {
    tokio::pin!(shutdown);
    let start = Emulator::start(options);
    tokio::pin!(start);
    let emulator = tokio::select! {
        started = &mut start => started?,
        () = &mut shutdown => {
            // What is half made is finished, so that all of it can be taken away.
            if let Ok(emulator) = start.await {
                emulator.stop().await;
            }
            return Ok(());
        }
    };
    let written = match &env_file {
        Some(path) => emulator.write_env_file(path, format),
        None => {
            print_environment(&emulator, format);
            Ok(())
        }
    };
    if written.is_ok() {
        tracing::info!(
            workspace = emulator.workspace_url(),
            port = emulator.pg_port(),
            "the emulator is ready"
        );
        shutdown.await;
    }
    if let (Ok(()), Some(path)) = (&written, &env_file) {
        // It names ports and a secret that are no more.
        let _ = std::fs::remove_file(path);
    }
    emulator.stop().await;
    written
}

fn print_environment(emulator: &Emulator, format: EnvironmentFormat) {
    let mut out = io::stdout().lock();
    // A closed pipe is the reader's choice.
    let _ = out
        .write_all(emulator.environment_text(format).as_bytes())
        .and_then(|()| out.flush());
}

/// Reads a flag such as `60s`, `15m`, `1h 30m`, or a number of seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || {
        "expected a length of time such as `60s`, `15m`, `1h 30m` or a number of seconds".to_owned()
    };
    let parsed = match text.parse() {
        Ok(seconds) => SignedDuration::from_secs(seconds),
        Err(_) => text.parse().map_err(|_| wrong())?,
    };
    let duration = Duration::try_from(parsed).map_err(|_| wrong())?;
    if duration > super::MAX_DURATION {
        return Err("must not be longer than 100 years".to_owned());
    }
    Ok(duration)
}

/// Reads the flag `--fault`.
fn fault(text: &str) -> Result<Fault, String> {
    let fault: Fault = serde_json::from_str(text).map_err(|error| error.to_string())?;
    fault.check().map_err(|error| error.to_string())?;
    Ok(fault)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        emulator: EmulatorArgs,
    }

    #[test]
    fn flags_become_options() {
        let cli = Cli::parse_from([
            "x",
            "--token-ttl",
            "90s",
            "--suspend-after",
            "1m",
            "--pg-port",
            "7",
        ]);
        let options = cli.emulator.options();
        assert_eq!(options.settings.token_ttl, Duration::from_secs(90));
        assert_eq!(options.settings.suspend_after, Duration::from_mins(1));
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(options.pg_port, 7);
        assert!(Cli::try_parse_from(["x", "--token-ttl", "-3s"]).is_err());
        assert!(Cli::try_parse_from(["x", "--token-ttl", "soon"]).is_err());
        // Added to the time, it would end the compute's watcher in a panic.
        assert!(Cli::try_parse_from(["x", "--suspend-after", "9223372036854775807s"]).is_err());
    }

    #[test]
    fn faults_are_read_and_what_is_wrong_with_one_is_named() {
        let fault = |text| Cli::try_parse_from(["x", "--fault", text]);
        let cli = fault(r#"{"at":"mint","do":"close","times":1}"#).unwrap();
        assert_eq!(cli.emulator.options().faults.len(), 1);
        for (text, words) in [
            (r#"{"at":"mint","do":"close","time":1}"#, "`times`"),
            (r#"{"at":"mint","do":"no_tls"}"#, "possible there: respond"),
            ("mint", "expected value"),
        ] {
            let error = fault(text).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    /// The help is the reference of what can be set where.
    #[test]
    fn the_help_names_every_site_action_and_event() {
        for site in crate::emulator::Site::ALL {
            for name in [&[site.name()], site.actions(), site.conditions()].concat() {
                assert!(AFTER_HELP.contains(name), "{name}");
            }
        }
    }
}
