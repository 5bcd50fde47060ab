//! Subcommands and flags, and what becomes of them.

use std::{
    any::TypeId,
    ffi::{OsStr, OsString},
    future::pending,
    io::Write as _,
    process::ExitCode,
    time::Duration,
};

use clap::{
    ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind,
};
use tokio::runtime::Builder;

use crate::{
    app::App,
    config::{
        Config, ConfigError, Environment, LogOptions, PASSWORD_VARIABLE, Setting, Settings, Source,
        VARIABLE_PREFIX, text, variable,
    },
    descriptors::DescriptorLimit,
    exec::{self, ExecArgs, Secrets},
    listener::{Inherited, InheritedError},
    remote::{self, ShutdownArgs, WaitArgs},
    shutdown::{Cause, Hangup, Signals},
    systemd::Notifier,
    telemetry::{self, LogGuard, LogHandle},
    token::{self, TokenArgs},
    workspace,
};

/// What it is called.
const PROGRAM: &str = "lakebase-proxy";
/// A bad command line or configuration, or a start that failed.
const FAILURE: u8 = 1;

const AFTER_HELP: &str = "\
Every flag may also be set as LAKEBASE_PROXY_<FLAG>, or in the file named by --config-file.

The endpoint is named by the variables that Databricks' tutorial and Databricks Apps use:
  ENDPOINT_NAME (or LAKEBASE_ENDPOINT)   projects/<project>/branches/<branch>/endpoints/<endpoint>
  PGHOST PGPORT PGDATABASE PGUSER        looked up where unset
  PGSSLMODE PGSSLROOTCERT                certificates are always verified, against the system's roots or this file
  DATABRICKS_HOST                        the workspace, with one of
  DATABRICKS_CLIENT_ID + _CLIENT_SECRET  a service principal
  DATABRICKS_TOKEN                       a personal access token
  DATABRICKS_OIDC_TOKEN_FILEPATH         an identity token to exchange, and the others that Databricks SDKs take
  DATABRICKS_CONFIG_PROFILE              or all of that from a profile of ~/.databrickscfg; without any of it, whoever is
                                         logged in with `databricks auth login`

Exit codes: 0 ended on request, 1 bad command or configuration, 130 SIGINT, 143 SIGTERM.";

const EXEC_HELP: &str = "\
CMD starts once the proxy holds a credential, and is given
  PGHOST PGPORT PGUSER PGDATABASE  this proxy, on any free port without --port
  PGSSLMODE=disable                (the way to the endpoint is encrypted)
  DATABASE_URL                     postgresql://...?sslmode=disable, where unset
  PGPASSWORD                       this proxy's own, where it asks for one
Variables that would lead a client elsewhere (PGPASSWORD, PGSERVICE,
PGSSLROOTCERT and such) are taken away, and LAKEBASE_PROXY_* with them. The
health port is off unless --http-port is given. In a terminal only warnings are
logged, unless --log-filter is given.

Signals are passed on. On SIGTERM CMD goes first, then its sessions, all within
--max-sigterm-delay; a CMD that stays is killed, and so it is by a second
SIGTERM. If the proxy itself is killed, CMD is sent SIGTERM. Keys such as Ctrl-C
are the terminal's business with CMD. As PID 1 of a container orphans are
reaped. --exit-when-idle and --min-sigterm-delay mean nothing here.

Exit codes:
  CMD's own, or 128 + n when signal n killed it; with --exit-zero-on-sigterm 0
  where it ended by the SIGTERM that was passed on
  1    bad command line or configuration, or no credential
  126  CMD cannot be run
  127  CMD is not found";

/// Any Postgres client reaches Databricks Lakebase on localhost, with no password and no token code.
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    verb: Option<Verb>,
}

impl Cli {
    /// What was typed, with where each setting was given.
    fn of(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut cli = Self::from_arg_matches(matches)?;
        let settings = match &mut cli.verb {
            None => Some(&mut cli.settings),
            Some(Verb::Doctor(arguments)) => Some(&mut arguments.settings),
            Some(Verb::Exec(arguments)) => Some(&mut arguments.settings),
            Some(Verb::Serve(arguments)) => Some(&mut arguments.settings),
            Some(Verb::Token(arguments)) => Some(&mut arguments.settings),
            Some(_) => None,
        };
        if let Some(settings) = settings {
            let matches = matches.subcommand().map_or(matches, |(_, verb)| verb);
            settings.record_origins(matches);
        }
        Ok(cli)
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print a shell's completions: `source <(lakebase-proxy completions bash)`
    Completions(Completions),
    /// Everything on this machine, no account needed: the emulator, the proxy, a web page
    #[cfg(feature = "demo")]
    Demo(crate::demo::DemoArgs),
    /// Check each step from the settings to `SELECT 1` and say how to mend what is wrong
    Doctor(crate::doctor::DoctorArgs),
    /// Run only the emulator: a Lakebase for this machine, for tests and for trying things out
    #[cfg(feature = "demo")]
    Emulator(crate::emulator::EmulatorArgs),
    /// Run CMD as a child whose Postgres clients find the proxy
    #[command(after_help = EXEC_HELP)]
    Exec(ExecArgs),
    /// Run the proxy (the default)
    #[command(after_help = AFTER_HELP)]
    Serve(Serve),
    /// End a proxy that was started with --quitquitquit
    Shutdown(ShutdownArgs),
    /// Print a database credential, on standard output only
    #[command(after_help = AFTER_HELP)]
    Token(TokenArgs),
    /// Wait until a proxy has started
    Wait(WaitArgs),
}

#[derive(Args, Debug)]
struct Completions {
    /// The shell
    shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
struct Serve {
    #[command(flatten)]
    settings: Settings,
}

/// Why a command came to nothing.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[cfg(feature = "demo")]
    #[error(transparent)]
    Demo(#[from] crate::demo::DemoError),
    #[cfg(feature = "demo")]
    #[error(transparent)]
    Emulator(#[from] crate::emulator::EmulatorError),
    #[error(transparent)]
    Exec(#[from] exec::ExecError),
    #[error(transparent)]
    Log(#[from] telemetry::LogError),
    #[error(transparent)]
    Remote(#[from] remote::RemoteError),
    #[error("cannot watch for signals")]
    Signals(#[source] std::io::Error),
    #[error(transparent)]
    Start(#[from] crate::app::StartError),
    #[error(transparent)]
    Token(#[from] token::TokenError),
}

/// Why there is no runtime.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the runtime")]
struct RuntimeError(#[source] std::io::Error);

impl CommandError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint().map(str::to_owned),
            Self::Exec(error) => error.hint(),
            Self::Remote(error) => error.hint().map(str::to_owned),
            Self::Start(error) => error.hint(),
            Self::Token(error) => error.hint(),
            #[cfg(feature = "demo")]
            Self::Demo(error) => error.hint(),
            #[cfg(feature = "demo")]
            Self::Emulator(_) => None,
            Self::Log(_) | Self::Signals(_) => None,
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Exec(error) => error.exit_code(),
            _ => FAILURE,
        }
    }
}

/// Runs the program with these arguments, the first of which is its name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(launched) = exec::launch::run(&arguments) {
        return launched.unwrap_or_else(|error| fail(&error, error.hint(), error.exit_code()));
    }
    let parsed = command()
        .try_get_matches_from(&arguments)
        .and_then(|matches| Cli::of(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(message) => {
            // It does not say which argument, or whether it was one.
            if message.kind() == ErrorKind::InvalidUtf8
                && let Some(variable) = unreadable_variable()
            {
                let error = ConfigError::NotText { variable };
                return fail(&error, error.hint().map(str::to_owned), FAILURE);
            }
            // Help and version go to standard output and are no failure.
            let _ = message.print();
            return if message.use_stderr() {
                ExitCode::from(FAILURE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if let Some(Verb::Completions(Completions { shell })) = cli.verb {
        // A reader that has seen enough, as `head` has, is no failure.
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command(), PROGRAM, &mut text);
        let _ = std::io::stdout().write_all(&text);
        return ExitCode::SUCCESS;
    }
    if matches!(cli.verb, Some(Verb::Exec(_))) && std::process::id() == 1 {
        return exec::init::run(&arguments).unwrap_or_else(|error| fail(&error, None, FAILURE));
    }
    // Before there are threads, as it changes the environment.
    let inherited = match &cli.verb {
        None | Some(Verb::Serve(_) | Verb::Exec(_)) => inherited(),
        Some(_) => Ok(Inherited::default()),
    };
    let inherited = match inherited {
        Ok(inherited) => inherited,
        Err(error) => return fail(&error, Some(error.hint().to_owned()), FAILURE),
    };
    // Sessions have threads of their own (`listener::Runtimes`); this one accepts and does everything else.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&RuntimeError(error), None, FAILURE),
    };
    let mut log = None;
    let result = runtime.block_on(dispatch(cli, inherited, &mut log));
    // What is left are name look-ups on the blocking pool, which nobody waits for.
    runtime.shutdown_background();
    drop(log);
    match result {
        Ok(code) => code,
        Err(error) => fail(&error, error.hint(), error.exit_code()),
    }
}

async fn dispatch(
    cli: Cli,
    inherited: Inherited,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    if let None | Some(Verb::Doctor(_) | Verb::Exec(_) | Verb::Serve(_) | Verb::Token(_)) =
        &cli.verb
    {
        Environment::check_process()?;
    }
    match cli.verb {
        None => serve(cli.settings, inherited, log).await,
        // Needs no runtime, and has been done.
        Some(Verb::Completions(_)) => Ok(ExitCode::SUCCESS),
        Some(Verb::Doctor(arguments)) => Ok(crate::doctor::command(arguments).await),
        #[cfg(feature = "demo")]
        Some(Verb::Demo(arguments)) => demonstrate(arguments, log).await,
        #[cfg(feature = "demo")]
        Some(Verb::Emulator(arguments)) => emulate(arguments, log).await,
        Some(Verb::Exec(arguments)) => execute(arguments, inherited, log).await,
        Some(Verb::Serve(Serve { settings })) => serve(settings, inherited, log).await,
        Some(Verb::Shutdown(arguments)) => {
            remote::shutdown(arguments).await?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Verb::Token(arguments)) => print_token(arguments, log).await,
        Some(Verb::Wait(arguments)) => {
            remote::wait(arguments).await?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Begins to log; `guard` sees to the last lines.
fn start_log(
    options: &LogOptions,
    guard: &mut Option<LogGuard>,
) -> Result<LogHandle, telemetry::LogError> {
    let (handle, new) = telemetry::logging::init(options)?;
    *guard = Some(new);
    Ok(handle)
}

/// The sockets that a service manager has passed.
fn inherited() -> Result<Inherited, InheritedError> {
    let names = std::env::var_os("LISTEN_FDNAMES");
    Inherited::take(names.as_deref().and_then(OsStr::to_str))
}

/// A variable that is called like a setting and is none is most likely a slip of the pen, which nobody else would notice.
fn warn_of_unknown_variables() {
    let command = Cli::command();
    for variable in unknown_variables(&command, Environment::inherited()) {
        tracing::warn!(
            variable,
            "no setting is called like this variable; hint: `lakebase-proxy serve --help` lists the settings"
        );
    }
}

fn unknown_variables(command: &Command, all: Vec<(OsString, OsString)>) -> Vec<String> {
    let is_setting = |name: &str| {
        let flag = name.to_lowercase().replace('_', "-");
        let commands = std::iter::once(command).chain(command.get_subcommands());
        commands
            .flat_map(Command::get_arguments)
            .any(|argument| argument.get_long() == Some(flag.as_str()))
    };
    // What Kubernetes tells of a Service of our name.
    let is_of_service = |name: &str, value: &OsStr| {
        let tells = |part: &str| name.split('_').any(|word| word == part);
        ["SERVICE", "TCP", "UDP", "SCTP"].into_iter().any(tells) || is_service_link(name, value)
    };
    all.into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, value)| {
            name.strip_prefix(VARIABLE_PREFIX).is_some_and(|setting| {
                name != PASSWORD_VARIABLE && !is_setting(setting) && !is_of_service(name, value)
            })
        })
        .map(|(name, _)| name)
        .collect()
}

/// Who is to be told how things stand.
fn notifier(source: &Source) -> Notifier {
    Notifier::connect(&source.environment().service_manager).unwrap_or_else(|error| {
        tracing::warn!(%error, "the socket in NOTIFY_SOCKET cannot be used; the service manager is told nothing");
        Notifier::default()
    })
}

async fn serve(
    settings: Settings,
    inherited: Inherited,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    let source = Source::new(settings, Environment::of_process());
    let config = source.load()?;
    let log = start_log(&config.settings.log_options(), log)?;
    warn_of_unknown_variables();
    let notifier = notifier(&source);
    // Caught before anything is begun, so that a signal during the start is not lost.
    let mut signals = Signals::catch().map_err(CommandError::Signals)?;
    let hangup = Hangup::catch().map_err(CommandError::Signals)?;
    let running = tokio::select! {
        app = App::build_with(config.clone(), inherited) => app?.with_log(log).with_notifier(notifier).start()?,
        cause = signals.next() => return Ok(cause.exit_code(config.settings.exit_zero_on_sigterm())),
    };
    let reloader = running.reloader(source, config);
    running.reload_on(reloader, Some(hangup));
    let serving = async {
        running.ready().await?;
        let hopeless = async {
            match running.found().await {
                Ok(()) => pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            () = running.asked_to_end() => Ok(Cause::Request),
            error = hopeless => Err(error),
        }
    };
    let cause = tokio::select! {
        cause = serving => cause,
        cause = signals.next() => Ok(cause),
    };
    let hurry = async {
        signals.next().await;
    };
    let zero_on_sigterm = running.is_zero_on_sigterm();
    match cause {
        Ok(Cause::Terminate) => running.end_after_delay(hurry).await,
        Ok(Cause::Hangup | Cause::Interrupt | Cause::Request) => running.end(hurry).await,
        Err(_) => running.end_within(Duration::ZERO, hurry).await,
    }
    cause
        .map(|cause| cause.exit_code(zero_on_sigterm))
        .map_err(CommandError::Start)
}

async fn execute(
    arguments: ExecArgs,
    inherited: Inherited,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    // The app raises it.
    let descriptors = DescriptorLimit::now();
    let ExecArgs {
        strip_secrets,
        settings,
        command,
    } = arguments;
    let source = exec::source(settings, Environment::of_process());
    let config = source.load()?;
    let log = start_log(&config.settings.log_options(), log)?;
    warn_of_unknown_variables();
    let notifier = notifier(&source);
    let program = exec::Program {
        command,
        inherited: Environment::inherited(),
        secrets: if strip_secrets.unwrap_or(false) {
            let mut names = workspace::secret_variables(&config.workspace);
            names.extend(config.password_variables.iter().cloned());
            Secrets::Stripped(names)
        } else {
            Secrets::Kept
        },
        descriptors,
    };
    let zero_on_sigterm = config.settings.exit_zero_on_sigterm();
    let patience = config.settings.timeouts().connect_timeout;
    let mut signals = exec::Signals::catch().map_err(CommandError::Signals)?;
    let running = tokio::select! {
        app = App::build_with(config.clone(), inherited) => app?.with_log(log).with_notifier(notifier).start()?,
        signal = signals.ending() => return Ok(exec::interrupted(signal, zero_on_sigterm)),
    };
    // A hangup is the program's business.
    running.reload_on(running.reloader(source, config), None);
    let code = exec::run(running, &program, signals, patience, zero_on_sigterm).await?;
    Ok(code)
}

#[expect(clippy::print_stdout, reason = "printing is what it is for")]
async fn print_token(
    arguments: TokenArgs,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    let TokenArgs {
        json,
        format,
        settings,
    } = arguments;
    let config = Config::resolve(settings, Environment::of_process())?;
    start_log(&config.settings.log_options(), log)?;
    print!("{}", token::text(config, json, format).await?);
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "demo")]
async fn demonstrate(
    arguments: crate::demo::DemoArgs,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    start_log(&crate::demo::log_options(), log)?;
    let mut signals = Signals::catch().map_err(CommandError::Signals)?;
    let cause = crate::demo::run(arguments, &mut signals).await?;
    Ok(cause.exit_code(false))
}

#[cfg(feature = "demo")]
async fn emulate(
    arguments: crate::emulator::EmulatorArgs,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    start_log(&LogOptions::default(), log)?;
    let mut signals = Signals::catch().map_err(CommandError::Signals)?;
    let mut cause = None;
    let stop = async { cause = Some(signals.next().await) };
    crate::emulator::run(arguments.options(), arguments.env_file, stop).await?;
    Ok(cause.map_or(ExitCode::SUCCESS, |cause| cause.exit_code(false)))
}

/// The command line. Each flag may be set by its variable; an empty variable counts as unset.
pub fn command() -> Command {
    complete(Cli::command(), &Settings::declared())
}

/// Adds to each flag what follows from its declaration: the variable, and the default in its help.
fn complete(command: Command, declared: &[Setting]) -> Command {
    let command = command.mut_args(|argument| {
        let Some(long) = argument.get_long() else {
            return argument;
        };
        if matches!(long, "help" | "version") {
            return argument;
        }
        let variable = variable(long);
        // `--flag` alone means `--flag=true`, so that `--flag=false` overrides a variable.
        let is_switch = argument.get_value_parser().type_id() == TypeId::of::<bool>()
            && argument.get_action().takes_values();
        let setting = declared.iter().find(|it| argument.get_id() == it.key);
        let default = text(setting.and_then(|setting| setting.default.as_ref()));
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let argument = if is_switch {
            argument
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_name("BOOL")
        } else if default.is_empty() || help.contains("[default") {
            argument
        } else {
            argument.help(format!("{help} [default: {default}]"))
        };
        let argument = argument.long_help(None::<&str>);
        let value = std::env::var_os(&variable);
        if value.is_none_or(|value| value.is_empty() || is_service_link(&variable, &value)) {
            return argument;
        }
        argument.env(variable).hide_env(true)
    });
    command.mut_subcommands(|subcommand| complete(subcommand, declared))
}

/// A variable of a flag that is no text.
fn unreadable_variable() -> Option<String> {
    Environment::inherited()
        .into_iter()
        .find_map(|(name, value)| {
            let name = name.into_string().ok()?;
            (name.starts_with(VARIABLE_PREFIX) && value.to_str().is_none()).then_some(name)
        })
}

/// Kubernetes tells every container of a Service called `lakebase-proxy` by `LAKEBASE_PROXY_PORT=tcp://10.0.0.1:5432`
/// (`lakebase-proxy-http` by `LAKEBASE_PROXY_HTTP_PORT`), which is none of our settings.
fn is_service_link(variable: &str, value: &OsStr) -> bool {
    let value = value.to_str().unwrap_or_default();
    variable.ends_with("_PORT")
        && ["tcp://", "udp://", "sctp://"]
            .iter()
            .any(|scheme| value.starts_with(scheme))
}

/// The last words of a command that failed, maybe before there is a log.
fn fail(error: &(dyn std::error::Error + 'static), hint: Option<String>, code: u8) -> ExitCode {
    let mut words = format!("{PROGRAM}: {}\n", telemetry::chain(error));
    if let Some(hint) = hint {
        words.extend(["hint: ", &telemetry::escape(&hint), "\n"]);
    }
    telemetry::last_words(&words);
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn a_variable_that_is_called_like_a_setting_and_is_none_is_noticed() {
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
            unknown_variables(&Cli::command(), variables.to_vec()),
            ["LAKEBASE_PROXY_PROT"]
        );
    }

    #[test]
    fn what_kubernetes_says_of_a_service_of_our_name_is_no_setting() {
        let is = |variable, value| is_service_link(variable, OsStr::new(value));
        assert!(is("LAKEBASE_PROXY_PORT", "tcp://10.96.0.7:5432"));
        assert!(is("LAKEBASE_PROXY_HTTP_PORT", "tcp://[fd00::7]:9090"));
        assert!(!is("LAKEBASE_PROXY_PORT", "5433"));
        assert!(!is("LAKEBASE_PROXY_ADDRESS", "tcp://10.96.0.7:5432"));
    }
}
