//! The command line: one file per subcommand, each thin.

#[cfg(feature = "demo")]
mod demo;
mod error;
mod exec;
mod flags;
mod serve;
mod shutdown;
mod token;
mod wait;

use std::{
    ffi::{OsStr, OsString},
    io::Write as _,
    process::ExitCode,
};

use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};

pub use self::{error::CommandError, flags::command};
use self::{exec::ExecArgs, shutdown::ShutdownArgs, token::TokenArgs, wait::WaitArgs};
#[cfg(feature = "demo")]
use crate::shutdown::Signals;
use crate::{
    config::{Environment, LogOptions, Settings},
    listener::Inherited,
    telemetry::{self, LogGuard, LogHandle},
};

const PROGRAM: &str = "lakebase-proxy";

const AFTER_HELP: &str = "\
Every flag may also be set as LAKEBASE_PROXY_<FLAG>, or in the file named by
--config-file.

Databricks' own variables configure the endpoint, as in its tutorial and in
Databricks Apps:
  ENDPOINT_NAME (or LAKEBASE_ENDPOINT)
                      projects/<project>/branches/<branch>/endpoints/<endpoint>
  PGHOST PGPORT PGDATABASE PGUSER
                      looked up if unset
  PGSSLMODE PGSSLROOTCERT
                      certificates are always verified, with the system's roots
                      or this file
  DATABRICKS_HOST     the workspace, with one of
  DATABRICKS_CLIENT_ID and DATABRICKS_CLIENT_SECRET
                      a service principal
  DATABRICKS_TOKEN    a personal access token
  DATABRICKS_OIDC_TOKEN_FILEPATH
                      an identity token to exchange, and others that Databricks
                      SDKs support
  DATABRICKS_CONFIG_PROFILE
                      or a profile of ~/.databrickscfg; without any of these, the
                      user who is logged in with `databricks auth login`

Exit codes: 0 requested shutdown, 1 bad command or configuration, 130 SIGINT, 143 SIGTERM.";

/// Any Postgres client reaches Databricks Lakebase on localhost, with no password and no token code.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    subcommand: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print shell completions: `source <(lakebase-proxy completions bash)`
    Completions(CompletionsArgs),
    /// Run the emulator, the proxy and a web page on this machine, without an account
    #[cfg(feature = "demo")]
    Demo(demo::DemoArgs),
    /// Check each step from the settings to `SELECT 1` and suggest fixes
    Doctor(crate::doctor::DoctorArgs),
    /// Run only the emulator, a Lakebase for this machine, for tests and experiments
    #[cfg(feature = "demo")]
    Emulator(crate::emulator::EmulatorArgs),
    /// Run CMD as a child process whose Postgres clients connect to the proxy
    #[command(after_help = exec::AFTER_HELP)]
    Exec(ExecArgs),
    /// Run the proxy (the default)
    #[command(after_help = AFTER_HELP)]
    Serve(Settings),
    /// Shut down a proxy that was started with --quitquitquit
    Shutdown(ShutdownArgs),
    /// Print a database credential to standard output
    #[command(after_help = AFTER_HELP)]
    Token(TokenArgs),
    /// Wait until a proxy has started
    Wait(WaitArgs),
}

#[derive(Args, Debug)]
struct CompletionsArgs {
    /// The shell
    shell: clap_complete::Shell,
}

impl Cli {
    /// Parses the arguments, the first of which is the program's name.
    pub fn parse(arguments: &[OsString]) -> Result<Self, CommandError> {
        let parsed = command().try_get_matches_from(arguments).map_err(|error| {
            exec::without_separator(arguments, &error).unwrap_or_else(|| flags::usage(error))
        })?;
        Self::from_matches(&parsed).map_err(flags::usage)
    }

    fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut cli = Self::from_arg_matches(matches)?;
        let settings = match &mut cli.subcommand {
            None => Some(&mut cli.settings),
            Some(Verb::Doctor(arguments)) => Some(&mut arguments.settings),
            Some(Verb::Exec(arguments)) => Some(&mut arguments.settings),
            Some(Verb::Serve(settings)) => Some(settings),
            Some(Verb::Token(arguments)) => Some(&mut arguments.settings),
            Some(_) => None,
        };
        if let Some(settings) = settings {
            let matches = matches.subcommand().map_or(matches, |(_, matches)| matches);
            settings.record_origins(matches);
        }
        Ok(cli)
    }

    /// Whether the command must not run as PID 1: it waits for its children, and so does the init process.
    pub fn needs_init(&self) -> bool {
        matches!(self.subcommand, Some(Verb::Exec(_))) && std::process::id() == 1
    }

    /// Takes the sockets passed by a service manager. Call it before threads start, as it changes the environment.
    pub fn inherited_sockets(&self) -> Result<Inherited, CommandError> {
        match &self.subcommand {
            None | Some(Verb::Serve(_) | Verb::Exec(_)) => {
                let names = std::env::var_os("LISTEN_FDNAMES");
                Ok(Inherited::take(names.as_deref().and_then(OsStr::to_str))?)
            }
            Some(_) => Ok(Inherited::default()),
        }
    }

    /// Runs the command to its end. `log` keeps the log open after that.
    pub async fn run(
        self,
        inherited: Inherited,
        log: &mut Option<LogGuard>,
    ) -> Result<ExitCode, CommandError> {
        // The other commands read no variables of the endpoint or the workspace.
        if let None | Some(Verb::Doctor(_) | Verb::Exec(_) | Verb::Serve(_) | Verb::Token(_)) =
            &self.subcommand
        {
            Environment::check_process()?;
        }
        match self.subcommand {
            None => Box::pin(serve::run(self.settings, inherited, log)).await,
            Some(Verb::Completions(arguments)) => Ok(completions(&arguments)),
            Some(Verb::Doctor(arguments)) => Ok(crate::doctor::command(arguments).await),
            #[cfg(feature = "demo")]
            Some(Verb::Demo(arguments)) => {
                start_log(&demo::log_options(), log)?;
                let mut signals = Signals::catch().map_err(CommandError::signals)?;
                let cause = demo::run(arguments, &mut signals).await?;
                Ok(cause.exit_code(false))
            }
            #[cfg(feature = "demo")]
            Some(Verb::Emulator(arguments)) => {
                start_log(&LogOptions::default(), log)?;
                let mut signals = Signals::catch().map_err(CommandError::signals)?;
                let mut cause = None;
                let stop = async { cause = Some(signals.next().await) };
                let options = arguments.options();
                crate::emulator::run(options, arguments.env_file, arguments.format, stop).await?;
                Ok(cause.map_or(ExitCode::SUCCESS, |cause| cause.exit_code(false)))
            }
            Some(Verb::Exec(arguments)) => Box::pin(exec::run(arguments, inherited, log)).await,
            Some(Verb::Serve(settings)) => Box::pin(serve::run(settings, inherited, log)).await,
            Some(Verb::Shutdown(arguments)) => shutdown::run(arguments).await,
            Some(Verb::Token(arguments)) => token::run(arguments, log).await,
            Some(Verb::Wait(arguments)) => wait::run(arguments).await,
        }
    }
}

/// Starts logging; `guard` flushes the last lines when dropped.
fn start_log(
    options: &LogOptions,
    guard: &mut Option<LogGuard>,
) -> Result<LogHandle, telemetry::LogError> {
    let (handle, new) = telemetry::logging::init(options)?;
    *guard = Some(new);
    Ok(handle)
}

fn completions(arguments: &CompletionsArgs) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut command(), PROGRAM, &mut text);
    // A reader that closes the pipe early, such as `head`, is not an error.
    let _ = std::io::stdout().write_all(&text);
    ExitCode::SUCCESS
}

/// The runtime of everything but sessions, which have threads of their own (`listener::SessionThreads`).
pub fn runtime() -> Result<Runtime, CommandError> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.map_err(CommandError::runtime)
}
