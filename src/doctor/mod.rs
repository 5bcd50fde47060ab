//! `doctor`: checks each step from the settings to `SELECT 1` by itself, with its time and a fix in one sentence.
//!
//! The checks use the modules of the proxy. They wake a suspended compute only with `--connect`, change nothing, and print
//! no secret.

mod certificates;
mod connection;
mod endpoint;
#[cfg(fuzzing)]
pub mod fuzzing;
mod grants;
mod port;
mod report;
mod settings;
mod workspace;

use std::{io::Write, process::ExitCode, sync::Arc};

use tokio::time::Instant;

pub use report::{Outcome, Report, Setting, Step};

use crate::{
    clock::Clock,
    config::{Config, CredentialSource, Environment, Roots, Settings, WorkspaceSettings},
    net::tls,
    telemetry::Metrics,
    workspace::Workspace,
};
use endpoint::Examined;
use report::{Finding, Steps};
use workspace::Access;

/// The checks, in order.
mod step {
    pub(super) const SETTINGS: &str = "settings";
    pub(super) const CLOCK: &str = "clock";
    pub(super) const DNS: &str = "DNS";
    pub(super) const TCP: &str = "TCP";
    pub(super) const WORKSPACE_TLS: &str = "workspace TLS";
    pub(super) const TOKEN: &str = "workspace token";
    pub(super) const IDENTITY: &str = "who am I";
    pub(super) const ENTITLEMENT: &str = "entitlement";
    pub(super) const ENDPOINT: &str = "endpoint";
    pub(super) const CREDENTIAL: &str = "credential";
    pub(super) const ENDPOINT_DNS: &str = "endpoint DNS";
    pub(super) const ENDPOINT_TCP: &str = "endpoint TCP";
    pub(super) const EDGE_TLS: &str = "endpoint TLS";
    pub(super) const LOGIN: &str = "login";
    pub(super) const GRANTS: &str = "role and grants";
    pub(super) const SELECT: &str = "SELECT 1";
    pub(super) const PORT: &str = "local port";

    pub(super) const OF_WORKSPACE: &[&str] =
        &[CLOCK, DNS, TCP, WORKSPACE_TLS, TOKEN, IDENTITY, ENTITLEMENT];
    pub(super) const OF_ENDPOINT: &[&str] = &[
        ENDPOINT,
        CREDENTIAL,
        ENDPOINT_DNS,
        ENDPOINT_TCP,
        EDGE_TLS,
        LOGIN,
        GRANTS,
        SELECT,
    ];
}

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
        steps.note(step::SETTINGS, started.elapsed(), finding);
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
    steps.note(step::SETTINGS, started.elapsed(), finding);

    // An error is the finding of the step above.
    let workspace = workspace.and_then(Result::ok);
    let access = match &workspace {
        Some(workspace) => workspace::check(&mut steps, workspace, &inputs.variables).await,
        None => {
            let why = if needs_workspace {
                "the settings lead to no workspace"
            } else {
                "no workspace is needed"
            };
            steps.skip(step::OF_WORKSPACE, why);
            Access::default()
        }
    };
    let Ok(config) = &config else {
        steps.skip(step::OF_ENDPOINT, "the settings cannot be used");
        steps.skip(&[step::PORT], "the settings cannot be used");
        return steps.report;
    };
    for endpoint in &config.endpoints {
        let name = (config.endpoints.len() > 1).then(|| settings::called(endpoint));
        steps.begin(name);
        let examined = Examined {
            config: endpoint,
            timeouts: config.settings.timeouts(),
            workspace: workspace.as_ref(),
            access: &access,
            clock: &clock,
            metrics: &metrics,
            connect: inputs.connect,
            is_usable,
        };
        if let Some(ready) = endpoint::check(&mut steps, &examined).await {
            connection::check(&mut steps, &examined, ready).await;
            steps.skip_rest(step::OF_ENDPOINT, "an earlier check failed");
        }
        let started = Instant::now();
        let finding = port::check(&endpoint.listen).await;
        steps.note(step::PORT, started.elapsed(), finding);
    }
    steps.report
}

fn open(
    settings: WorkspaceSettings,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Workspace, Finding> {
    let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1);
    let tls = tls.map_err(|error| workspace::no_roots(&error))?;
    Workspace::new(settings, &tls, clock.clone(), Arc::clone(metrics))
        .map_err(|error| Finding::failed(error.to_string()).hint(error.hint()))
}
