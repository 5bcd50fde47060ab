//! `doctor` against set-ups that are broken in one way each: it must report that fault first, with its fix and no secret.

use std::{
    io::Write,
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use lakebase_proxy::{
    config::{PortSetting, Settings},
    doctor::{self, Inputs, Outcome, Report, Step},
    emulator::{
        Action, AppResource, BadCertificate, Emulator, Identity, Response, ServerError, Site,
    },
};
use secrecy::ExposeSecret;

use crate::harness::{emulator, port::ReservedPort};

const OTHER_ENDPOINT: &str = "projects/lakebase-local/branches/production/endpoints/primery";

/// What `doctor` is run with: the emulator's variables, and changes to them; an empty value unsets.
struct Setup<'a> {
    emulator: &'a Emulator,
    variables: Vec<(String, String)>,
    settings: Settings,
    connect: bool,
}

impl<'a> Setup<'a> {
    fn new(emulator: &'a Emulator) -> Self {
        let variables = emulator
            .environment()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        Self {
            emulator,
            variables,
            settings: Settings {
                port: Some(PortSetting::Port(0)),
                max_connections: Some(10),
                ..Settings::default()
            },
            connect: false,
        }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.retain(|(known, _)| known != name);
        if !value.is_empty() {
            self.variables.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    fn identity(self, identity: &Identity) -> Self {
        let secret = identity.client_secret.as_ref().unwrap().expose_secret();
        self.with("DATABRICKS_CLIENT_ID", &identity.name)
            .with("DATABRICKS_CLIENT_SECRET", secret)
            .with("PGUSER", &identity.name)
    }

    fn token(self, token: &str) -> Self {
        self.with("DATABRICKS_CLIENT_ID", "")
            .with("DATABRICKS_CLIENT_SECRET", "")
            .with("PGUSER", "")
            .with("DATABRICKS_TOKEN", token)
    }

    fn connecting(mut self) -> Self {
        self.connect = true;
        self
    }

    async fn report(&self) -> Report {
        let inputs = Inputs {
            settings: self.settings.clone(),
            variables: self.variables.clone(),
            connect: self.connect,
        };
        let mut reported = Vec::new();
        let report = doctor::run(&inputs, |_| {}, |step| reported.push(step.clone())).await;
        assert_eq!(reported, report.steps, "reported as found");
        self.contains_no_secret(&report);
        report
    }

    fn contains_no_secret(&self, report: &Report) {
        let shown = format!("{}{}{report:?}", report.text(), report.json());
        let identities = self.emulator.identities();
        let secrets = identities
            .iter()
            .flat_map(|identity| [&identity.client_secret, &identity.pat])
            .flatten();
        for secret in secrets {
            assert!(!shown.contains(secret.expose_secret()), "{shown}");
        }
        for (name, value) in &self.variables {
            let is_secret = name.ends_with("_SECRET") || name.ends_with("_TOKEN");
            assert!(!is_secret || !shown.contains(value), "{name}: {shown}");
        }
        assert!(!shown.contains("eyJ"), "a token: {shown}");
    }

    /// The first problem is this step, and its fix contains this.
    async fn fails_at(&self, step: &str, fix: &str) -> Report {
        let report = self.report().await;
        let text = anstream::adapter::strip_str(&report.text()).to_string();
        let Some(first) = report.first_problem() else {
            panic!("all is well, but should not be:\n{text}");
        };
        assert_eq!(first.name, step, "{text}");
        let reply = first.fix.as_deref().unwrap_or_default();
        assert!(reply.contains(fix), "no `{fix}` in `{reply}`:\n{text}");
        assert!(!report.is_well());
        // Every step is there whatever happened, once.
        let names: Vec<_> = report.steps.iter().map(|step| step.name).collect();
        assert_eq!(names, STEPS, "{text}");
        report
    }

    async fn is_well(&self) -> Report {
        let report = self.report().await;
        let text = anstream::adapter::strip_str(&report.text()).to_string();
        assert!(report.is_well(), "{text}");
        report
    }
}

const STEPS: [&str; 18] = [
    "settings",
    "clock",
    "DNS",
    "TCP",
    "workspace TLS",
    "workspace token",
    "who am I",
    "entitlement",
    "endpoint",
    "credential",
    "endpoint DNS",
    "endpoint TCP",
    "endpoint TLS",
    "login",
    "role and grants",
    "SELECT 1",
    "connections",
    "local port",
];

fn step<'a>(report: &'a Report, name: &str) -> &'a Step {
    report.steps.iter().find(|step| step.name == name).unwrap()
}

fn refusal(code: &str, message: &str, detail: Option<&str>) -> Action {
    let mut error = serde_json::json!({ "severity": "FATAL", "code": code, "message": message });
    if let Some(detail) = detail {
        error["detail"] = detail.into();
    }
    Action::Error(serde_json::from_value::<ServerError>(error).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_setup_passes_with_either_authentication() {
    let emulator = emulator().await;
    let report = Setup::new(&emulator).is_well().await;
    assert_eq!(step(&report, "SELECT 1").outcome, Outcome::Ok);
    let tls = &step(&report, "endpoint TLS").message;
    assert!(
        tls.contains("Lakebase emulator CA") && tls.contains("2049-01-01"),
        "{tls}"
    );
    let token = &step(&report, "workspace token").message;
    assert!(
        token.contains("oauth-m2m") && token.contains("59 min"),
        "{token}"
    );
    assert_eq!(step(&report, "workspace TLS").outcome, Outcome::Skipped);

    // A personal access token alone: user and host are looked up.
    let user = &emulator.identities().user;
    let setup = Setup::new(&emulator)
        .token(user.pat.as_ref().unwrap().expose_secret())
        .with("PGHOST", "")
        .with("PGDATABASE", "");
    let report = setup.is_well().await;
    assert!(step(&report, "login").message.contains(&user.name));

    // A host alone, or the app alone, leads to the endpoint as well.
    let report = Setup::new(&emulator)
        .with("ENDPOINT_NAME", "")
        .is_well()
        .await;
    assert!(
        step(&report, "endpoint")
            .message
            .contains(emulator.endpoint_name())
    );
    let setup = Setup::new(&emulator)
        .with("ENDPOINT_NAME", "")
        .with("PGHOST", "")
        .with("PGDATABASE", "")
        .with("DATABRICKS_APP_NAME", "lakebase-local-app");
    let report = setup.is_well().await;
    assert_eq!(step(&report, "SELECT 1").outcome, Outcome::Ok);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_work_are_the_first_cause() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    setup()
        .with("ENDPOINT_NAME", "")
        .with("PGHOST", "")
        .fails_at("endpoint", "projects/lakebase-local")
        .await;
    setup()
        .with("ENDPOINT_NAME", "")
        .with("PGHOST", "")
        .with("DATABRICKS_HOST", "")
        .fails_at("settings", "ENDPOINT_NAME=")
        .await;
    setup()
        .with("PGHOST", "127.0.0.1")
        .fails_at("settings", "host name")
        .await;
    setup()
        .with("PGHOST", "ep-a-1.us-east-2.aws.neon.tech")
        .fails_at("settings", "Lakebase")
        .await;
    setup()
        .with("DATABRICKS_HOST", "")
        .fails_at("settings", "DATABRICKS_HOST")
        .await;
    setup()
        .with("DATABRICKS_CLIENT_SECRET", "")
        .fails_at("settings", "DATABRICKS_CLIENT_SECRET")
        .await;
    setup()
        .with("PGSSLROOTCERT", "/nowhere/ca.pem")
        .fails_at("settings", "PGSSLROOTCERT")
        .await;
    setup()
        .with("PGSSLMODE", "disable")
        .with("PGHOST", "db.example.com")
        .fails_at("settings", "PGSSLMODE")
        .await;
    assert_eq!(emulator.counts().dials, 0);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_possible_kinds_of_authentication_are_both_named() {
    let emulator = emulator().await;
    let setup = Setup::new(&emulator).with("DATABRICKS_TOKEN", "dapi-left-over");
    let report = setup.fails_at("settings", "DATABRICKS_AUTH_TYPE").await;
    let message = &step(&report, "settings").message;
    assert!(message.contains("DATABRICKS_TOKEN"), "{message}");
    emulator.stop().await;
}

/// A program that stands in for the Databricks CLI. Written by another process, since a file that is open for writing
/// during a fork cannot be run.
fn databricks_cli(path: &Path, script: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = version ]; then echo '{{\"Major\":0,\"Minor\":296,\"Patch\":0}}'; exit; fi\n{script}\n"
    );
    let mut stdin = install.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    assert!(install.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_login_is_reported_with_the_command_that_renews_it() {
    let emulator = emulator().await;
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().display().to_string();
    databricks_cli(
        &scratch.path().join("databricks"),
        "echo 'Error: a new access token could not be retrieved because the refresh token is invalid' >&2; exit 1",
    );
    let setup = Setup::new(&emulator)
        .token("")
        .with("HOME", &directory)
        .with("PATH", &directory);
    setup
        .fails_at("workspace token", "databricks auth login --host")
        .await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_a_profile_are_shown_with_their_source() {
    let emulator = emulator().await;
    let scratch = tempfile::tempdir().unwrap();
    let app = &emulator.identities().app;
    let profile = format!(
        "[here]\nhost = {}\nclient_id = {}\nclient_secret = {}\n",
        emulator.workspace_url(),
        app.name,
        app.client_secret.as_ref().unwrap().expose_secret()
    );
    let file = scratch.path().join("databrickscfg");
    std::fs::write(&file, profile).unwrap();
    let setup = Setup::new(&emulator)
        .token("")
        .with("DATABRICKS_HOST", "")
        .with("DATABRICKS_CONFIG_FILE", &file.display().to_string())
        .with("DATABRICKS_CONFIG_PROFILE", "here");
    let report = setup.is_well().await;
    let of = |name: &str| report.settings.iter().find(|setting| setting.name == name);
    let secret = of("client_secret").unwrap();
    assert_eq!(secret.value, "present");
    assert!(secret.source.contains("profile `here`"), "{secret:?}");
    assert_eq!(of("DATABRICKS_CLIENT_SECRET"), None);

    let setup = setup.with("DATABRICKS_CONFIG_PROFILE", "elsewhere");
    setup.fails_at("settings", "here").await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_clock_is_noticed_though_all_else_works() {
    let emulator = emulator().await;
    // Half a minute more than reported: a `Date` is cut to whole seconds, and the answer takes its time.
    emulator.configure(|settings| settings.clock_skew_seconds = 630);
    let report = Setup::new(&emulator).fails_at("clock", "timedatectl").await;
    assert!(
        step(&report, "clock").message.contains("10 min behind"),
        "{}",
        step(&report, "clock").message
    );
    assert_eq!(step(&report, "SELECT 1").outcome, Outcome::Ok);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_workspace_is_reported_with_the_failed_step() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    // A label of more than 63 characters is sent to no name server, whose time to answer would count.
    let host = format!("https://{}", "x".repeat(64));
    let report = setup()
        .with("DATABRICKS_HOST", &host)
        .fails_at("DNS", "DATABRICKS_HOST")
        .await;
    assert_eq!(step(&report, "workspace token").outcome, Outcome::Skipped);
    let closed = ReservedPort::new();
    setup()
        .with("DATABRICKS_HOST", &format!("http://{}", closed.address()))
        .fails_at("TCP", "firewall")
        .await;
    // The endpoint's port does not accept this TLS, and reports that soon.
    emulator.configure(|settings| settings.handshake_timeout = Duration::from_millis(200));
    let port = emulator.pg_port();
    setup()
        .with("DATABRICKS_HOST", &format!("https://localhost:{port}"))
        .fails_at("workspace TLS", "DATABRICKS_HOST")
        .await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_the_workspace_are_distinguished() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    setup()
        .with("DATABRICKS_CLIENT_SECRET", "dose-not-the-secret")
        .fails_at("workspace token", "DATABRICKS_CLIENT_SECRET")
        .await;
    setup()
        .token("dapi-not-a-token")
        .fails_at("who am I", "DATABRICKS_TOKEN")
        .await;
    let report = setup()
        .identity(&emulator.identities().unentitled)
        .fails_at("entitlement", "databricks service-principals patch")
        .await;
    assert_eq!(step(&report, "who am I").outcome, Outcome::Skipped);

    let blocked = r#"{"error_code":"403","message":"Source IP address: 192.0.2.7 is blocked by Databricks IP ACL for workspace: 1"}"#;
    for (site, name) in [
        (Site::Token, "workspace token"),
        (Site::Whoami, "who am I"),
        (Site::Lookup, "endpoint"),
        (Site::Mint, "credential"),
    ] {
        let blocked = Action::Respond(Response::body(403, blocked));
        emulator.faults().always(site, blocked);
        setup().fails_at(name, "IP access list").await;
        emulator.faults().clear();
    }
    emulator
        .faults()
        .always(Site::Mint, Action::Respond(Response::status(429)));
    setup().fails_at("credential", "retries").await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_endpoint_is_reported_with_the_usable_ones() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    setup()
        .with("ENDPOINT_NAME", OTHER_ENDPOINT)
        .fails_at("endpoint", emulator.endpoint_name())
        .await;
    setup()
        .with("PGHOST", "ep-other-1.database.cloud.databricks.com")
        .fails_at("endpoint", "unset PGHOST")
        .await;
    emulator.configure(|settings| settings.is_disabled = true);
    setup()
        .fails_at("endpoint", "update-endpoint projects/lakebase-local/")
        .await;
    assert_eq!(emulator.counts().dials, 0);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_to_look_up_are_not_needed_where_the_host_is_known() {
    let emulator = emulator().await;
    emulator
        .faults()
        .always(Site::Lookup, Action::Respond(Response::status(403)));
    let report = Setup::new(&emulator).is_well().await;
    assert_eq!(
        step(&report, "login").outcome,
        Outcome::Skipped,
        "it may be asleep"
    );
    let report = Setup::new(&emulator).connecting().is_well().await;
    assert_eq!(step(&report, "SELECT 1").outcome, Outcome::Ok);
    Setup::new(&emulator)
        .with("PGHOST", "")
        .fails_at("endpoint", "PGHOST")
        .await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_compute_is_woken_only_on_request() {
    let emulator = emulator().await;
    emulator.suspend().await;
    let report = Setup::new(&emulator).is_well().await;
    let login = step(&report, "login");
    assert_eq!(login.outcome, Outcome::Skipped);
    assert!(login.message.contains("--connect"), "{}", login.message);
    assert_eq!(step(&report, "role and grants").outcome, Outcome::Ok);
    assert_eq!(emulator.counts().dials, 0);
    assert!(!emulator.is_active());

    // The workspace's data on roles is reported without waking the endpoint.
    Setup::new(&emulator)
        .identity(&emulator.identities().stranger)
        .fails_at("role and grants", "databricks_create_role")
        .await;
    assert!(!emulator.is_active());

    let report = Setup::new(&emulator).connecting().is_well().await;
    let login = &step(&report, "login").message;
    assert!(login.contains("awake after"), "{login}");
    assert!(emulator.is_active());
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_on_the_path_to_the_edge_are_distinguished() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    setup()
        .with("PGSSLROOTCERT", "")
        .fails_at("endpoint TLS", "`Lakebase emulator CA`")
        .await;
    for (certificate, fix) in [
        (BadCertificate::Expired, "clock"),
        (BadCertificate::OtherAuthority, "An untrusted authority"),
        (BadCertificate::WrongName, "elsewhere.invalid"),
    ] {
        emulator
            .faults()
            .always(Site::SslRequest, Action::Certificate(certificate));
        let report = setup().fails_at("endpoint TLS", fix).await;
        assert!(step(&report, "endpoint TLS").detail.is_some());
        emulator.faults().clear();
    }
    emulator.faults().always(Site::SslRequest, Action::NoTls);
    setup().fails_at("endpoint TLS", "PGHOST").await;
    emulator.faults().clear();

    emulator.configure(|settings| settings.is_listening = false);
    // The port closes when the emulator has taken notice.
    crate::harness::eventually("the port is closed", async || {
        let dialed = tokio::net::TcpStream::connect(("127.0.0.1", emulator.pg_port())).await;
        dialed.is_err().then_some(())
    })
    .await;
    setup().fails_at("endpoint TCP", "firewall").await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_is_reported_with_its_cause() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    let stranger = &emulator.identities().stranger;
    let fix = format!(
        "databricks_create_role('{}', 'SERVICE_PRINCIPAL');",
        stranger.name
    );
    setup().identity(stranger).fails_at("login", &fix).await;
    setup()
        .with("PGUSER", &emulator.identities().user.name)
        .fails_at("login", &emulator.identities().app.name)
        .await;

    let report = setup()
        .with("PGDATABASE", "nowhere")
        .fails_at("role and grants", "databricks_postgres")
        .await;
    assert_eq!(step(&report, "login").outcome, Outcome::Ok);
    for statement in [
        "drop database if exists doctor_closed",
        "create database doctor_closed",
        "revoke connect on database doctor_closed from public",
    ] {
        emulator.execute(statement).await.unwrap();
    }
    let fix = format!(
        "GRANT CONNECT ON DATABASE \"doctor_closed\" TO \"{}\";",
        emulator.identities().app.name
    );
    setup()
        .with("PGDATABASE", "doctor_closed")
        .fails_at("role and grants", &fix)
        .await;

    let hidden = "Source IP address: 192.0.2.7 is blocked by Databricks IP ACL for workspace: 1";
    for (action, fix) in [
        (
            refusal("28000", "External authorization failed.", Some(hidden)),
            "access list",
        ),
        (
            refusal("XX000", "JWT token is not yet ready to use (nbf=1)", None),
            "clock",
        ),
        (
            refusal("53300", "sorry, too many clients already", None),
            "pools",
        ),
        (
            refusal(
                "XX000",
                "Provided authentication token is not a valid JWT encoding",
                None,
            ),
            "OAuth",
        ),
    ] {
        emulator.faults().once(Site::Password, action);
        setup().fails_at("login", fix).await;
    }
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_in_another_language_are_reported_with_their_cause() {
    let emulator = emulator().await;
    let app = &emulator.identities().app;
    let stranger = &emulator.identities().stranger;
    let no_role = "Rolle \u{bb}x\u{ab} existiert nicht";
    for (identity, code, message, step, fix) in [
        (
            app,
            "42501",
            "keine Berechtigung f\u{fc}r Datenbank \u{bb}x\u{ab}",
            "role and grants",
            "GRANT CONNECT",
        ),
        (
            app,
            "3D000",
            "Datenbank \u{bb}x\u{ab} existiert nicht",
            "role and grants",
            "databricks_postgres",
        ),
        (
            stranger,
            "28000",
            no_role,
            "login",
            "databricks_create_role",
        ),
    ] {
        let refusal = refusal(code, message, None);
        emulator.faults().always(Site::Password, refusal);
        let setup = Setup::new(&emulator).identity(identity);
        setup.fails_at(step, fix).await;
        emulator.faults().clear();
    }
    emulator.stop().await;
}

/// The role exists, and logins fail: it is bound to another identity, or the database lacks the extension.
#[tokio::test(flavor = "multi_thread")]
async fn the_security_label_of_a_role_is_checked() {
    let emulator = emulator().await;
    let setup = || Setup::new(&emulator);
    let app = &emulator.identities().app;
    let label = format!("'id={},type=SERVICE_PRINCIPAL';", app.id);
    for wrong in [Some("id=1,type=SERVICE_PRINCIPAL"), None] {
        emulator.label_role(&app.name, wrong).await.unwrap();
        let report = setup().fails_at("login", &label).await;
        let fix = step(&report, "login").fix.as_deref().unwrap();
        assert!(fix.contains("SECURITY LABEL FOR databricks_auth"), "{fix}");
    }
    let right = format!("id={},type=SERVICE_PRINCIPAL", app.id);
    emulator.label_role(&app.name, Some(&right)).await.unwrap();
    setup().is_well().await;

    // One that was made before the template had the extension.
    let extension = "in the database \"postgres\", as its owner: CREATE EXTENSION";
    let postgres = || setup().with("PGDATABASE", "postgres");
    let report = postgres().fails_at("role and grants", extension).await;
    assert_eq!(step(&report, "login").outcome, Outcome::Ok);
    emulator.configure(|settings| {
        settings.databases_without_extension = vec!["postgres".to_owned()];
    });
    let report = postgres().fails_at("login", extension).await;
    let message = &step(&report, "login").message;
    assert!(
        message.contains("works in `databricks_postgres`"),
        "{message}"
    );
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_not_us_is_not_given_a_role() {
    let emulator = emulator().await;
    let setup = Setup::new(&emulator).with("PGUSER", "unknown@example.com");
    let report = setup.fails_at("login", "unset PGUSER").await;
    let step = step(&report, "login");
    assert!(step.message.contains("not who we are"), "{}", step.message);
    assert!(!step.fix.as_deref().unwrap().contains("create_role"));
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_two_databases_logs_the_served_one() {
    let emulator = emulator().await;
    emulator.configure(|settings| {
        settings.app_resources = vec![
            AppResource::postgres("orders", "databricks_postgres"),
            AppResource::postgres("archive", "history"),
        ];
    });
    let setup = || {
        Setup::new(&emulator)
            .with("ENDPOINT_NAME", "")
            .with("DATABRICKS_APP_NAME", "lakebase-local-app")
    };
    for setup in [setup(), setup().with("PGHOST", "").with("PGDATABASE", "")] {
        let report = setup.is_well().await;
        let detail = step(&report, "endpoint").detail.as_deref().unwrap();
        assert!(
            detail.contains("`orders` is served") && detail.contains("`archive` not"),
            "{detail}"
        );
        assert!(detail.contains("valueFrom"), "how to serve both: {detail}");
    }
    let report = Setup::new(&emulator).is_well().await;
    assert_eq!(step(&report, "endpoint").detail, None, "it is named");
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_reported_with_its_owner() {
    let emulator = emulator().await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut setup = Setup::new(&emulator);
    setup.settings.port = Some(PortSetting::Port(port));
    let report = setup.fails_at("local port", "--port").await;
    let message = &step(&report, "local port").message;
    assert!(
        message.contains(&format!("pid {}", std::process::id())),
        "{message}"
    );
    assert_eq!(step(&report, "SELECT 1").outcome, Outcome::Ok);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_itself_is_not_taken_for_the_endpoint() {
    let emulator = emulator().await;
    let mut setup = Setup::new(&emulator);
    setup.settings.port = Some(PortSetting::Port(emulator.pg_port()));
    setup.fails_at("endpoint DNS", "--port").await;
    emulator.stop().await;
}
