//! The demo: an emulated Lakebase, the proxy in front of it and the notes page, on one machine in one command.
//!
//! Consists of public parts: the [`emulator`], and an [`App`] configured by the tutorial's variables, as in an app's
//! environment. The surrounding environment is ignored, so that a demo never calls a real workspace.

use std::{io::Write, path::PathBuf, time::Duration};

use anstyle::Style;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use super::CommandError;
use crate::{
    app::{Addresses, App},
    config::{Config, ConfigError, Environment, LogOptions, PortSetting, Settings},
    emulator::{self, Emulator, EmulatorOptions, EnvironmentFormat, PostgresArgs},
    shutdown::{Cause, Signals},
};

/// The usual ports, used where they are free.
const PORTS: Ports = Ports {
    postgres: 5432,
    http: 9090,
    notes: 8000,
};
/// Labels of the panel are this wide.
const LABEL_WIDTH: usize = 13;

/// Flags of `lakebase-proxy demo`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DemoArgs {
    /// Port for Postgres clients; 0 = any free one [default: 5432, or another if it is taken]
    #[arg(short, long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Port for health checks and metrics; 0 = any free one [default: 9090, or another if it is taken]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
    /// Port of the notes page; 0 = any free one [default: 8000, or another if it is taken]
    #[arg(long, value_name = "PORT")]
    pub notes_port: Option<u16>,
    /// Lifetime of a database credential; an hour at Lakebase, short here so that refreshes are seen
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = emulator::duration)]
    pub token_ttl: Duration,
    #[command(flatten)]
    pub postgres: PostgresArgs,
    /// Write the variables of the emulated workspace to this file, for `doctor`, `token` and `exec`
    #[arg(long, value_name = "FILE")]
    pub env_file: Option<PathBuf>,
}

/// Warnings only, as short lines: the panel shows normal events.
pub(super) fn log_options() -> LogOptions {
    LogOptions {
        filter: "error,lakebase_proxy=warn".to_owned(),
        brief: true,
        ..LogOptions::default()
    }
}

/// Runs the demo until a signal, and takes everything away again.
pub(super) async fn run(arguments: DemoArgs, signals: &mut Signals) -> Result<Cause, CommandError> {
    let start = Emulator::start(options(&arguments));
    tokio::pin!(start);
    let emulator = tokio::select! {
        started = &mut start => started?,
        cause = signals.next() => {
            // What is half made is finished, so that all of it can be taken away.
            if let Ok(emulator) = start.await {
                emulator.stop().await;
            }
            return Ok(cause);
        }
    };
    let served = serve(&arguments, &emulator, signals).await;
    if let Some(path) = &arguments.env_file {
        // It names ports and a secret that are no more.
        let _ = std::fs::remove_file(path);
    }
    // Also after an error: the emulator has a Postgres server and its directory to remove.
    emulator.stop().await;
    served
}

async fn serve(
    arguments: &DemoArgs,
    emulator: &Emulator,
    signals: &mut Signals,
) -> Result<Cause, CommandError> {
    let proxy = tokio::select! {
        proxy = start_proxy(arguments, emulator) => proxy?,
        cause = signals.next() => return Ok(cause),
    };
    if let Some(path) = &arguments.env_file {
        emulator.write_env_file(path, EnvironmentFormat::default())?;
    }
    print(&panel(proxy.addresses(), emulator, arguments));
    let cause = tokio::select! {
        cause = signals.next() => cause,
        () = print_refreshes(&proxy) => Cause::Request,
    };
    let second_signal = async {
        signals.next().await;
    };
    proxy.end(second_signal).await;
    Ok(cause)
}

fn options(arguments: &DemoArgs) -> EmulatorOptions {
    let mut options = EmulatorOptions {
        postgres: arguments.postgres.source(),
        ..EmulatorOptions::default()
    };
    options.settings.token_ttl = arguments.token_ttl;
    options
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ports {
    postgres: u16,
    http: u16,
    notes: u16,
}

/// Starts the proxy on the requested ports, else on the default ones, else on free ones.
async fn start_proxy(arguments: &DemoArgs, emulator: &Emulator) -> Result<App, CommandError> {
    let mut ports = Ports {
        postgres: arguments.port.unwrap_or(PORTS.postgres),
        http: arguments.http_port.unwrap_or(PORTS.http),
        notes: arguments.notes_port.unwrap_or(PORTS.notes),
    };
    loop {
        // With a port in use nothing has been started, so that it can be repeated with another.
        let error = match App::start(config(ports, emulator)?).await {
            Ok(app) => return Ok(app),
            Err(error) => error,
        };
        let (port, requested) = match error.taken_port {
            Some(taken) if taken == ports.http => (&mut ports.http, arguments.http_port),
            Some(taken) if taken == ports.notes => (&mut ports.notes, arguments.notes_port),
            Some(_) => (&mut ports.postgres, arguments.port),
            None => return Err(error.into()),
        };
        // Only a default port may be replaced; another free one cannot be taken.
        if requested.is_some() || *port == 0 {
            return Err(error.into());
        }
        *port = 0;
    }
}

fn config(ports: Ports, emulator: &Emulator) -> Result<Config, ConfigError> {
    let settings = Settings {
        port: Some(PortSetting::Port(ports.postgres)),
        http_port: Some(PortSetting::Port(ports.http)),
        admin_console: Some(true),
        notes: Some(cfg!(feature = "notes")),
        notes_port: Some(PortSetting::Port(ports.notes)),
        ..Settings::default()
    };
    let variables = emulator
        .environment()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    Config::resolve(settings, Environment::from_variables(variables))
}

/// Prints each new credential. Ends when there will be no more.
async fn print_refreshes(proxy: &App) {
    let mut status = proxy.credentials().subscribe();
    let mut printed = 0;
    loop {
        // A copy, so that the channel is not locked while printing.
        let now = {
            let status = status.borrow_and_update();
            (status.generation, status.minted_at, status.expires_at)
        };
        if let (generation, Some(minted_at), Some(expires_at)) = now
            && generation > printed
        {
            printed = generation;
            print(&refresh(
                generation,
                minted_at,
                expires_at,
                &TimeZone::system(),
            ));
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

fn refresh(
    generation: u64,
    minted_at: Timestamp,
    expires_at: Timestamp,
    zone: &TimeZone,
) -> String {
    let clock = |time: Timestamp| time.to_zoned(zone.clone()).strftime("%H:%M:%S").to_string();
    let lifetime = expires_at
        .duration_since(minted_at)
        .round(jiff::Unit::Second);
    let lifetime = lifetime.unwrap_or(SignedDuration::ZERO).as_secs();
    let what = if generation == 1 {
        "minted"
    } else {
        "refreshed"
    };
    format!(
        "  {}  credential {generation} {what}, good for logins until {} ({lifetime} s)\n",
        clock(minted_at),
        clock(expires_at),
    )
}

/// The addresses, and a command to try.
fn panel(addresses: &Addresses, emulator: &Emulator, arguments: &DemoArgs) -> String {
    let bold = Style::new().bold();
    let port = addresses
        .postgres()
        .map_or(PORTS.postgres, |address| address.port());
    let mut lines = vec![String::new()];
    let requested = [arguments.port, arguments.http_port, arguments.notes_port];
    let used = [
        Some(port),
        addresses.http.map(|address| address.port()),
        addresses.notes.map(|address| address.port()),
    ];
    let known = [PORTS.postgres, PORTS.http, PORTS.notes];
    for ((known, used), requested) in known.into_iter().zip(used).zip(requested) {
        if let Some(text) = used.and_then(|used| replaced(known, used, requested)) {
            lines.push(format!("  {bold}{text}{bold:#}"));
        }
    }
    lines.extend([
        format!("  {bold}Lakebase on this machine{bold:#}"),
        String::new(),
    ]);
    let mut line = |label: &str, text: String| lines.push(format!("  {label:LABEL_WIDTH$}{text}"));
    line(
        "Postgres",
        format!("localhost:{port}, any user, no password"),
    );
    if let Some(address) = addresses.notes {
        line(
            "Notes page",
            format!("http://localhost:{}/", address.port()),
        );
    }
    if let Some(address) = addresses.http {
        let port = address.port();
        line(
            "Status page",
            format!("http://localhost:{port}/ (metrics at /metrics)"),
        );
    }
    line(
        "Workspace",
        format!(
            "{} (emulated; faults at /emulator)",
            emulator.workspace_url()
        ),
    );
    line(
        "Endpoint",
        format!(
            "localhost:{} (emulated; TLS and a token)",
            emulator.pg_port()
        ),
    );
    line("", String::new());
    let psql = psql(emulator);
    line(
        "Try",
        format!("{bold}{psql} -h localhost -p {port} -c 'select content from notes'{bold:#}"),
    );
    line(
        "",
        format!("{bold}{psql} -h localhost -p {port} lakebase_proxy -c 'show clients'{bold:#}"),
    );
    if let Some(path) = &arguments.env_file {
        let path = path.display();
        line(
            "",
            format!("{bold}set -a; . {path}; set +a; lakebase-proxy doctor{bold:#}"),
        );
    }
    line("", String::new());
    let ttl = arguments.token_ttl.as_secs();
    lines.push(format!(
        "  Credentials live for {ttl} s; each refresh is printed here. Ctrl-C ends everything."
    ));
    lines.push(String::new());
    lines
        .into_iter()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

/// How to call psql here: by its path where only the emulator's Postgres has one.
fn psql(emulator: &Emulator) -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = std::env::split_paths(&path).any(|directory| directory.join("psql").exists());
    let own = emulator.psql().filter(|_| !is_there);
    own.map_or_else(|| "psql".to_owned(), |path| path.display().to_string())
}

/// The remark that a default port is taken.
fn replaced(known: u16, used: u16, requested: Option<u16>) -> Option<String> {
    (requested.is_none() && used != known).then(|| {
        format!("Port {known} is used by another program: wherever it is written, use {used}")
    })
}

fn print(text: &str) {
    let mut out = anstream::stdout().lock();
    // A closed pipe is the reader's choice.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refresh_is_printed_with_its_times() {
        let minted: Timestamp = "2026-11-22T10:00:00.4Z".parse().unwrap();
        let expires: Timestamp = "2026-11-22T10:01:00Z".parse().unwrap();
        assert_eq!(
            refresh(2, minted, expires, &TimeZone::UTC),
            "  10:00:00  credential 2 refreshed, good for logins until 10:01:00 (60 s)\n"
        );
    }

    #[test]
    fn only_a_replaced_default_port_is_explained() {
        let text = "Port 5432 is used by another program: wherever it is written, use 40000";
        assert_eq!(replaced(5432, 40_000, None).unwrap(), text);
        assert_eq!(replaced(5432, 5432, None), None);
        assert_eq!(replaced(5432, 40_000, Some(0)), None);
    }
}
