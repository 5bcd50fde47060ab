//! `exec`: the proxy with one program as its child, for platforms that run one process.
//!
//! The program starts once the proxy has a credential, finds the proxy in its libpq variables, and gets the signals that the
//! proxy gets. Its end is the proxy's end, its exit code the proxy's.

use std::{
    ffi::OsString,
    future::pending,
    io::{self, IsTerminal},
    process::ExitCode,
    time::Duration,
};

use clap::{
    Args,
    error::{ContextKind, ContextValue, ErrorKind},
};
use tokio::time::{Instant, sleep};

use super::{CommandError, serve::Prepared};
use crate::{
    app::App,
    config::{DurationSetting, Environment, PortSetting, Settings, Source},
    credential::CredentialError,
    exec::{self, Child, Program, Signals},
    listener::Inherited,
    net::descriptors::DescriptorLimit,
    telemetry::{LogGuard, chain},
    workspace,
};

pub(super) const AFTER_HELP: &str = "\
CMD starts once the proxy has a credential, with these variables:
  PGHOST PGPORT PGUSER PGDATABASE  this proxy, on a free port unless --port is set
  PGSSLMODE=disable                (the connection to the endpoint is encrypted)
  DATABASE_URL                     postgresql://...?sslmode=disable, if unset
  PGPASSWORD                       the proxy's local password, if it has one
Variables that would lead a client elsewhere (PGPASSWORD, PGSERVICE,
PGSSLROOTCERT and others) are removed, as is LAKEBASE_PROXY_*. The health port
is off unless --http-port is set. In a terminal, only warnings are logged unless
--log-filter is set.

Signals are forwarded. On SIGTERM, CMD ends first, then its sessions, all within
--max-sigterm-delay; a CMD that does not end is killed, as by a second SIGTERM.
If the proxy is killed, CMD gets SIGTERM. Keys such as Ctrl-C reach CMD from the
terminal. As PID 1 of a container, the proxy reaps orphaned processes.
--exit-when-idle and --min-sigterm-delay have no effect.

Exit codes:
  CMD's own, or 128 + n if signal n killed it; with --exit-zero-on-sigterm, 0 if
  a forwarded SIGTERM ended it
  1    bad command line or configuration, or no credential
  126  CMD cannot be run
  127  CMD is not found";

/// Log filter in a terminal, whose screen belongs to the program.
const QUIET_FILTER: &str = "warn";
/// The interval of requests for a credential while the workspace requests a wait.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(super) struct ExecArgs {
    /// Remove variables with secrets of the workspace from CMD's environment
    #[arg(long, value_name = "BOOL", help_heading = "Child")]
    strip_secrets: Option<bool>,
    #[command(flatten)]
    pub(super) settings: Settings,
    /// The program to run, and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// The error for a command without the `--` in front of it, the most likely mistake.
pub(super) fn without_separator(
    arguments: &[OsString],
    error: &clap::Error,
) -> Option<CommandError> {
    let Some(ContextValue::String(first)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let is_exec = arguments.get(1).is_some_and(|verb| verb == "exec");
    if !is_exec || error.kind() != ErrorKind::UnknownArgument || first.starts_with('-') {
        return None;
    }
    Some(CommandError::new(
        format!("`exec` needs `--` in front of `{first}`"),
        Some(format!("lakebase-proxy exec [FLAGS] -- {first} ...")),
    ))
}

pub(super) async fn run(
    arguments: ExecArgs,
    inherited: Inherited,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    // Before the app raises it, since CMD gets this limit.
    let descriptors = DescriptorLimit::now();
    let source = source(arguments.settings);
    let prepared = Prepared::load(&source, log)?;
    let config = prepared.config.clone();
    let mut secrets = Vec::new();
    if arguments.strip_secrets.unwrap_or(false) {
        secrets = workspace::secret_variables(&config.workspace);
        secrets.extend(config.password_variables.iter().cloned());
    }
    let program = Program {
        command: arguments.command,
        inherited: Environment::inherited(),
        secrets,
        descriptors,
    };
    let zero_on_sigterm = config.settings.exit_zero_on_sigterm();
    let timeout = config.settings.timeouts().connect_timeout;
    // Before the start, so that a signal during it is not lost.
    let mut signals = Signals::catch().map_err(CommandError::signals)?;
    let running = tokio::select! {
        running = prepared.start(inherited) => running?,
        signal = signals.ending() => return Ok(exec::interrupted(signal, zero_on_sigterm)),
    };
    // SIGHUP is forwarded to the program instead.
    running.reload_on(running.reloader(source, config), None);
    let started = tokio::select! {
        started = start(&program, &running, timeout) => started,
        signal = signals.ending() => {
            // Without CMD there are no sessions to wait for.
            running.end_within(Duration::ZERO, pending()).await;
            return Ok(exec::interrupted(signal, zero_on_sigterm));
        }
    };
    let child = match started {
        Ok(child) => child,
        Err(error) => {
            running.end_within(Duration::ZERO, pending()).await;
            return Err(error);
        }
    };
    tracing::info!(
        command = program.name(),
        pid = child.id(),
        "program started"
    );
    let grace = running.grace();
    let exit = exec::supervise(child, grace, running.shutdown_requested(), &mut signals).await;
    tracing::info!(command = program.name(), code = exit.code, "program ended");
    let second_signal = async {
        signals.ending().await;
    };
    // CMD and its sessions share one grace time, since platforms kill at a fixed time after SIGTERM.
    let rest = grace.saturating_sub(exit.since_termination());
    // A reload may have changed it since the start.
    let zero_on_sigterm = running.is_zero_on_sigterm();
    running.end_within(rest, second_signal).await;
    Ok(exit.exit_code(zero_on_sigterm))
}

/// The settings of a proxy for one child: a free port and no health port, so that two can run side by side. The child's end
/// is the proxy's, whether idle or not.
fn source(mut settings: Settings) -> Source {
    let quiet = io::stderr().is_terminal().then(|| QUIET_FILTER.to_owned());
    settings.exit_when_idle = Some(DurationSetting::ZERO);
    Source::new(settings, Environment::of_process()).with_defaults(Settings {
        port: Some(PortSetting::Port(0)),
        http_port: Some(PortSetting::None),
        log_filter: quiet,
        ..Settings::default()
    })
}

/// Starts the program once `running` has a credential. Not cancel safe in its last step, which starts the process.
async fn start(program: &Program, running: &App, timeout: Duration) -> Result<Child, CommandError> {
    let deadline = Instant::now() + timeout;
    running.ready().await?;
    let not_started = |reason: String, hint| {
        let message = format!("`{}` was not started: {reason}", program.name());
        CommandError::new(message, hint)
    };
    let proxy = running
        .proxy_address()
        .await
        .map_err(|refusal| not_started(refusal.report.line(), refusal.report.hint.clone()))?;
    loop {
        match running.credentials().get(deadline).await {
            Ok(_) => break,
            // A client would be refused early if the workspace requests a wait for long.
            Err(CredentialError::Failed(error))
                if error.kind.is_transient() && Instant::now() + RETRY_INTERVAL < deadline =>
            {
                sleep(RETRY_INTERVAL).await;
            }
            Err(error) => return Err(not_started(chain(&error).to_string(), error.hint())),
        }
    }
    Ok(program.spawn(&proxy)?)
}
