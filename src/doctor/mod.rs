//! `doctor`: checks each step from the settings to `SELECT 1` by itself, with its time and a fix in one sentence.
//!
//! [`run`], `workspace::check` and `check_endpoint` list the checks in order, each with what it needs of earlier ones:
//! `check` runs it on that, or skips it with the reason why that is missing.
//!
//! The checks use the modules of the proxy. They wake a suspended compute only with `--connect`, change nothing, and print
//! no secret.

mod certificates;
mod check;
mod connection;
mod endpoint;
#[cfg(fuzzing)]
pub mod fuzzing;
mod grants;
mod pins;
mod port;
mod report;
mod settings;
mod workspace;

use std::{io::Write, process::ExitCode, sync::Arc};

use tokio::time::Instant;

pub use report::{Outcome, Report, Setting, Step};

use crate::{
    clock::Clock,
    config::{Config, CredentialSource, Environment, PoolMode, Settings, WorkspaceSettings},
    telemetry::Metrics,
    workspace::Workspace,
};
use check::{Finding, Need, Steps};
use connection::Connection;
use endpoint::{Examined, Found};

/// The command line of `doctor`.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct DoctorArgs {
    /// The proxy's settings.
    #[command(flatten)]
    pub settings: Settings,

    /// Connect to the endpoint even if that wakes it
    #[arg(long)]
    pub connect: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The set-up to check.
#[derive(Clone)]
pub struct Inputs {
    /// Flags, and `LAKEBASE_PROXY_*` with them.
    pub settings: Settings,
    /// The environment. Holds secrets, so this does not print.
    pub variables: Vec<(String, String)>,
    /// Whether a suspended compute may be woken.
    pub connect: bool,
}

/// Runs the command: 0 when all is well, else 1.
pub async fn command(arguments: DoctorArgs) -> ExitCode {
    let inputs = Inputs {
        settings: arguments.settings,
        variables: Environment::variables_of_process(),
        connect: arguments.connect,
    };
    // Strips colors unless this is a terminal; a closed pipe is no finding.
    let print = |text: &str| {
        let _ = anstream::stdout().write_all(text.as_bytes());
    };
    let report = if arguments.json {
        let report = run(&inputs, |_| {}, |_| {}).await;
        print(&report.json());
        print("\n");
        report
    } else {
        let on_settings = |settings: &[Setting]| print(&report::settings_text(settings));
        let report = run(&inputs, on_settings, |step| print(&step.text())).await;
        print(&report.verdict_text());
        report
    };
    if report.is_well() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs all checks; reports settings and steps as they come, and returns them.
pub async fn run(
    inputs: &Inputs,
    on_settings: impl FnOnce(&[Setting]),
    mut on_step: impl FnMut(&Step),
) -> Report {
    let started = Instant::now();
    let environment = Environment::from_variables(inputs.variables.clone());
    let config = Config::resolve(inputs.settings.clone(), environment.clone());
    let list = settings::list(&inputs.variables, &inputs.settings, config.as_ref().ok());
    // Before the checks, which may take minutes while an endpoint wakes.
    on_settings(&list);
    let mut steps = Steps::new(list, &mut on_step);

    let Ok(metrics) = Metrics::new() else {
        let finding = Finding::failed("cannot register metrics, a defect of this program");
        steps.note("settings", started.elapsed(), finding);
        return steps.report;
    };
    let clock = Clock::system();
    // Endpoints with a password of their own need no workspace; invalid settings may still name one.
    let needs_workspace = config.as_ref().map_or(true, |config| {
        let mut sources = config.endpoints.iter().map(|endpoint| &endpoint.credential);
        sources.any(|source| matches!(source, CredentialSource::Workspace))
    });
    let settings = match &config {
        Ok(config) => config.workspace.clone(),
        Err(_) => environment.workspace,
    };
    let workspace = needs_workspace.then(|| open(settings, &clock, &metrics));
    let finding = settings::check(config.as_ref(), workspace.as_ref());
    let is_usable = finding.outcome == Outcome::Ok;
    steps.note("settings", started.elapsed(), finding);

    let workspace = match workspace {
        Some(Ok(workspace)) => Ok(workspace),
        // The error is the finding of the step above.
        Some(Err(_)) => Err("the settings lead to no workspace".to_owned()),
        None => Err("no workspace is needed".to_owned()),
    };
    let access = workspace::check(&mut steps, workspace.as_ref(), &inputs.variables).await;
    let examined: Vec<Need<Examined<'_>>> = match &config {
        Ok(config) => {
            let examine = |endpoint| Examined {
                config: endpoint,
                timeouts: config.settings.timeouts(),
                pool: endpoint.pool(&config.settings),
                access: &access,
                clock: &clock,
                metrics: &metrics,
                connect: inputs.connect,
                is_usable,
            };
            config.endpoints.iter().map(examine).map(Ok).collect()
        }
        Err(_) => vec![Err("the settings cannot be used".to_owned())],
    };
    for endpoint in &examined {
        let endpoint = endpoint.as_ref();
        let shown = endpoint.ok().filter(|_| examined.len() > 1);
        steps.endpoint = shown.map(|endpoint| settings::display_name(endpoint.config));
        check_endpoint(&mut steps, endpoint).await;
        let port = async |endpoint: &Examined<'_>| Ok(port::check(&endpoint.config.listen).await);
        steps.run("local port", endpoint, port).await;
    }
    steps.endpoint = None;
    let began = Instant::now();
    let shares = |mode| matches!(mode, PoolMode::Transaction | PoolMode::Auto);
    if let Ok(config) = &config
        && let Some(metrics) = config.http
        && config.endpoints.iter().any(|it| shares(it.pool_mode))
        && let Some(finding) = pins::check(metrics).await
    {
        steps.note("pinned clients", began.elapsed(), finding);
    }
    steps.report
}

/// Checks an endpoint, up to a query if it may be dialed.
async fn check_endpoint(steps: &mut Steps<'_>, examined: Result<&Examined<'_>, &String>) {
    let unknown = "the endpoint is unknown";
    let found = steps
        .check("endpoint", examined, unknown, Examined::locate)
        .await;
    let needed = found.as_ref();
    let credential = steps
        .check("credential", needed, "", Found::credential)
        .await;
    let unusable = "the endpoint's host cannot be used";
    // Names are resolved even if nothing may be dialed: that wakes nothing.
    let addresses = steps
        .check("endpoint DNS", needed, unusable, Found::resolve)
        .await;
    let connection = addresses.and_then(|addresses| {
        let found = needed.map_err(Clone::clone)?;
        found.may_dial()?;
        Connection::new(found, addresses, credential.ok())
    });
    connection::check(steps, needed.ok(), connection).await;
}

fn open(
    settings: WorkspaceSettings,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Workspace, Finding> {
    let tls = Workspace::tls(&settings)?;
    Workspace::new(settings, &tls, clock.clone(), Arc::clone(metrics))
        .map_err(|error| Finding::failed(error.to_string()).hint(error.hint()))
}
