//! `doctor`: each step from the settings to `SELECT 1` taken alone, timed, and mended in one sentence.
//!
//! It composes the same rooms as the proxy and adds no way of its own to do a thing. It wakes a sleeping compute only
//! when told to connect, changes nothing anywhere, and prints no secret.

mod certificates;
mod endpoint;
mod entry;
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
use report::{Chart, Finding};
use workspace::Access;

/// The steps' names.
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
    /// What the proxy would be started with.
    #[command(flatten)]
    pub settings: Settings,

    /// Connect to the endpoint even if that wakes it
    #[arg(long)]
    pub connect: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is examined.
#[derive(Clone)]
pub struct Inputs {
    /// Flags, and `LAKEBASE_PROXY_*` with them.
    pub settings: Settings,
    /// The environment. Holds secrets, so this does not print.
    pub variables: Vec<(String, String)>,
    /// Whether a sleeping compute may be woken.
    pub connect: bool,
}

/// Runs the command: 0 when all is well, else 1.
pub async fn command(arguments: DoctorArgs) -> ExitCode {
    let inputs = Inputs {
        settings: arguments.settings,
        variables: Environment::variables_of_process(),
        connect: arguments.connect,
    };
    // Strips colours unless a terminal reads along; a closed pipe is the reader's decision, not a finding.
    let print = |text: &str| {
        let _ = anstream::stdout().write_all(text.as_bytes());
    };
    let report = if arguments.json {
        let report = run(&inputs, |_| {}, |_| {}).await;
        print(&report.json());
        print("\n");
        report
    } else {
        let report = run(
            &inputs,
            |settings| print(&report::settings_text(settings)),
            |step| print(&step.text()),
        )
        .await;
        print(&report.verdict_text());
        report
    };
    if report.is_well() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Examines everything; what is found is told as it is found, and returned in all.
pub async fn run(
    inputs: &Inputs,
    on_settings: impl FnOnce(&[Setting]),
    mut on_step: impl FnMut(&Step),
) -> Report {
    let started = Instant::now();
    let environment = Environment::from_variables(inputs.variables.clone());
    let config = Config::resolve(inputs.settings.clone(), environment.clone());
    let list = settings::list(&inputs.variables, &inputs.settings, config.as_ref().ok());
    on_settings(&list);
    let mut chart = Chart::new(list, &mut on_step);

    // An endpoint with a password of its own needs no workspace; settings that cannot be read may still name one.
    let needs_workspace = config.as_ref().map_or(true, |config| {
        config
            .endpoints
            .iter()
            .any(|endpoint| matches!(endpoint.credential, CredentialSource::Workspace))
    });
    let clock = Clock::system();
    let Ok(metrics) = Metrics::new() else {
        let finding = Finding::failed("cannot register metrics, a defect of this program");
        chart.note(step::SETTINGS, started, finding);
        return chart.report;
    };
    let settings = config
        .as_ref()
        .map_or(environment.workspace, |config| config.workspace.clone());
    let workspace = needs_workspace.then(|| open(settings, &clock, &metrics));
    let finding = settings::check(config.as_ref(), workspace.as_ref());
    let is_usable = finding.outcome == Outcome::Ok;
    chart.note(step::SETTINGS, started, finding);

    let workspace = workspace.and_then(Result::ok);
    let access = match &workspace {
        Some(workspace) => workspace::check(&mut chart, workspace, &inputs.variables).await,
        None => {
            let why = if needs_workspace {
                "the settings lead to no workspace"
            } else {
                "no workspace is needed"
            };
            chart.skip(step::OF_WORKSPACE, why);
            Access::default()
        }
    };
    match &config {
        Ok(config) => {
            for endpoint in &config.endpoints {
                if config.endpoints.len() > 1 {
                    chart.endpoint = Some(settings::called(endpoint));
                }
                let examined = endpoint::Examined {
                    config: endpoint,
                    limits: config.settings.timeouts(),
                    workspace: workspace.as_ref(),
                    access: &access,
                    clock: &clock,
                    metrics: &metrics,
                    connect: inputs.connect,
                    is_usable,
                };
                endpoint::check(&mut chart, &examined).await;
                let started = Instant::now();
                let finding = port::check(&endpoint.listen).await;
                chart.note(step::PORT, started, finding);
            }
            chart.endpoint = None;
        }
        Err(_) => {
            chart.skip(step::OF_ENDPOINT, "the settings cannot be used");
            chart.skip(&[step::PORT], "the settings cannot be used");
        }
    }
    chart.report
}

fn open(
    settings: WorkspaceSettings,
    clock: &Clock,
    metrics: &Arc<Metrics>,
) -> Result<Workspace, Finding> {
    let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).map_err(|error| {
        Finding::failed(error.to_string()).mend(
            "install the system's root certificates (Debian: apt install ca-certificates)"
                .to_owned(),
        )
    })?;
    Workspace::new(settings, &tls, clock.clone(), Arc::clone(metrics))
        .map_err(|error| Finding::failed(error.to_string()).mend(error.hint()))
}
