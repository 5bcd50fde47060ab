//! Every way to sign in against the emulator: the way that works, and each failure that a user meets with its words.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp, Zoned};
use lakebase_proxy::{
    clock::Clock,
    config::{Roots, WorkspaceSettings},
    credential::{CallError, CallErrorKind},
    emulator::{Action, Emulator, Identity, Response, Site},
    net::tls,
    telemetry::Metrics,
    workspace::{AuthKind, CredentialMinter, Target, Workspace},
};
use secrecy::ExposeSecret;
use tempfile::TempDir;

use crate::harness;

use CallErrorKind::{Malformed, RateLimited, Refused, Unavailable};

const HOUR: Duration = Duration::from_hours(1);

/// An emulator, a home directory and a directory of programs.
struct Stage {
    emulator: Emulator,
    scratch: TempDir,
    variables: BTreeMap<String, String>,
}

impl Stage {
    async fn new() -> Self {
        let emulator = harness::emulator().await;
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().display().to_string();
        let variables = [
            ("DATABRICKS_HOST", emulator.workspace_url().to_owned()),
            ("HOME", path.clone()),
            ("PATH", path),
        ];
        Self {
            variables: variables
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            emulator,
            scratch,
        }
    }

    fn with(&self, variables: &[(&str, &str)]) -> WorkspaceSettings {
        let mut all = self.variables.clone();
        for (name, value) in variables {
            all.insert((*name).to_owned(), (*value).to_owned());
        }
        let mut settings = WorkspaceSettings::from_variables(all.into_iter().collect());
        settings.services.entra_id = Some(self.emulator.entra_id_url());
        settings.services.instance_metadata = Some(self.emulator.workspace_url().to_owned());
        settings
    }

    fn workspace(&self, variables: &[(&str, &str)]) -> Workspace {
        workspace(self.with(variables))
    }

    async fn mint(&self, workspace: &Workspace) -> Result<(), CallError> {
        let target = Target::Endpoint(self.emulator.endpoint_name().parse().unwrap());
        let minter = CredentialMinter::new(workspace.clone(), target);
        minter.request_credential().await.map(drop)
    }

    /// Signs in and is who it should be.
    async fn succeeds(&self, variables: &[(&str, &str)], kind: AuthKind, who: &Identity) {
        let workspace = self.workspace(variables);
        self.mint(&workspace).await.unwrap_or_else(|error| {
            panic!("{kind:?}: {error} {:?} {:?}", error.detail, error.hint)
        });
        assert_eq!(workspace.profile().await.unwrap().user_name, who.name);
        assert_eq!(workspace.auth_kind(), kind);
    }

    /// Fails with an error that contains all of these words and none of the secrets.
    async fn fails(&self, variables: &[(&str, &str)], kind: CallErrorKind, words: &[&str]) {
        let error = self.mint(&self.workspace(variables)).await.unwrap_err();
        let reported = format!(
            "{} | {} | {}",
            error.message,
            error.detail.as_deref().unwrap_or_default(),
            error.hint.as_deref().unwrap_or_default()
        );
        assert_eq!(error.kind, kind, "{reported}");
        for word in words {
            assert!(reported.contains(word), "no `{word}` in: {reported}");
        }
        assert!(
            error.message.starts_with(char::is_lowercase)
                || error.message.starts_with(['`', 'A', 'G', 'M']),
            "{reported}"
        );
        for secret in ["eyJ", "hunter2", "dose", "github-request-token"] {
            assert!(!reported.contains(secret), "`{secret}` in: {reported}");
        }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.scratch.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// A program whose interpreter does not exist.
    fn unstartable(&self, name: &str) {
        program(&self.scratch.path().join(name), "#!/nowhere/sh\n");
    }

    fn logged(&self) -> String {
        fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    /// A Databricks CLI of this version whose `auth token` runs `script`. Its arguments are in `log`.
    fn databricks(&self, version: &str, script: &str) {
        let [major, minor, patch] = version.split('.').collect::<Vec<_>>()[..] else {
            panic!("{version}");
        };
        let log = self.scratch.path().join("log");
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\nif [ \"$1\" = version ]; then\n\
             echo '{{\"Major\":{major},\"Minor\":{minor},\"Patch\":{patch}}}'\nexit\nfi\n\
             echo \"$@\" >> '{}'\n{script}\nexit\n",
            log.display()
        );
        program(&self.scratch.path().join("databricks"), &script);
    }

    /// An Azure CLI that is logged in as this, whose `get-access-token` runs `script` with the resource in `$4`.
    fn az(&self, user: &str, script: &str) {
        let log = self.scratch.path().join("log");
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\nif [ \"$2\" = show ]; then\necho '{{\"user\":{user}}}'\nexit\nfi\n\
             echo \"$@\" >> '{}'\n{script}\n",
            log.display()
        );
        program(&self.scratch.path().join("az"), &script);
    }

    fn token(&self, who: &Identity) -> String {
        self.emulator.workspace_token_for(who, HOUR).unwrap()
    }

    /// What `databricks auth token` prints.
    fn printed(&self, who: &Identity, expiry: &str) -> String {
        format!(
            "echo '{{\"access_token\":\"{}\",\"token_type\":\"Bearer\",\"expiry\":\"{expiry}\"}}'",
            self.token(who)
        )
    }
}

fn workspace(settings: WorkspaceSettings) -> Workspace {
    let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).unwrap();
    Workspace::new(settings, &tls, Clock::system(), Metrics::new().unwrap()).unwrap()
}

/// Written by another process: were it open here while a third one is forked, it could not be run.
pub(crate) fn program(path: &Path, text: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = install.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    drop(stdin);
    assert!(install.wait().unwrap().success());
}

fn in_an_hour() -> String {
    // With an offset, as the CLI prints it.
    let zoned = Zoned::now()
        .checked_add(SignedDuration::from_hours(1))
        .unwrap();
    zoned.strftime("%Y-%m-%dT%H:%M:%S.%9f%:z").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_a_service_principal_signs_in_or_is_explained() {
    let stage = Stage::new().await;
    let app = &stage.emulator.identities().app;
    let secret = app.client_secret.as_ref().unwrap().expose_secret();
    let id = ("DATABRICKS_CLIENT_ID", app.name.as_str());
    let good = [id, ("DATABRICKS_CLIENT_SECRET", secret)];
    stage.succeeds(&good, AuthKind::OAuthM2m, app).await;
    // White space round a secret is not part of it.
    let padded = format!(" {secret}\r\n");
    stage
        .succeeds(
            &[id, ("DATABRICKS_CLIENT_SECRET", &padded)],
            AuthKind::OAuthM2m,
            app,
        )
        .await;

    let wrong = [id, ("DATABRICKS_CLIENT_SECRET", "hunter2")];
    let words = [
        "refused the client id or its secret",
        "`DATABRICKS_CLIENT_SECRET`",
        "invalid_client",
    ];
    stage.fails(&wrong, Refused, &words).await;
    let profile = format!(
        "[work]\nhost = {}\nclient_id = {}\nclient_secret = hunter2\n[scoped]\nhost = {}\nclient_id = {}\nclient_secret = {secret}\nscopes = nonsense",
        stage.emulator.workspace_url(),
        app.name,
        stage.emulator.workspace_url(),
        app.name,
    );
    stage.file(".databrickscfg", &profile);
    let words = [
        "`client_secret` from profile `work` of `",
        ".databrickscfg`",
    ];
    stage
        .fails(&[("DATABRICKS_CONFIG_PROFILE", "work")], Refused, &words)
        .await;
    let words = ["does not grant the requested scopes", "`scopes`"];
    stage
        .fails(&[("DATABRICKS_CONFIG_PROFILE", "scoped")], Refused, &words)
        .await;

    // What time heals at the token endpoint, and what it does not.
    for (status, kind, words) in [
        (429, RateLimited, &["limits the rate"][..]),
        (500, Unavailable, &["failed"]),
        (502, Unavailable, &["failed"]),
        (503, Unavailable, &["failed"]),
        (504, Unavailable, &["failed"]),
        (
            403,
            Refused,
            &["refused the request", "assigned to this workspace"],
        ),
        (404, Refused, &["no token endpoint", "DATABRICKS_HOST"]),
    ] {
        let faults = stage.emulator.faults();
        faults.once(Site::Token, Action::Respond(Response::status(status)));
        stage.fails(&good, kind, words).await;
    }
    stage.emulator.faults().once(Site::Token, Action::Reset);
    stage
        .fails(&good, Unavailable, &["cannot reach the workspace"])
        .await;
    let unentitled = &stage.emulator.identities().unentitled;
    let secret = unentitled.client_secret.as_ref().unwrap().expose_secret();
    let without = [
        ("DATABRICKS_CLIENT_ID", unentitled.name.as_str()),
        ("DATABRICKS_CLIENT_SECRET", secret),
    ];
    stage
        .fails(&without, Refused, &["`Workspace access`"])
        .await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_personal_access_token_signs_in_or_is_explained() {
    let stage = Stage::new().await;
    let user = &stage.emulator.identities().user;
    let pat = user.pat.as_ref().unwrap().expose_secret();
    stage
        .succeeds(&[("DATABRICKS_TOKEN", pat)], AuthKind::Pat, user)
        .await;
    let words = [
        "refused the personal access token",
        "check `DATABRICKS_TOKEN`",
    ];
    stage
        .fails(&[("DATABRICKS_TOKEN", "dapi-hunter2")], Refused, &words)
        .await;
    stage.file(
        "cfg",
        &format!(
            "[DEFAULT]\nhost = {}\ntoken = dapi-hunter2",
            stage.emulator.workspace_url()
        ),
    );
    let words = ["check `token` from profile `DEFAULT`"];
    let variables = [
        ("DATABRICKS_CONFIG_FILE", "~/cfg"),
        ("DATABRICKS_CONFIG_PROFILE", "DEFAULT"),
    ];
    stage.fails(&variables, Refused, &words).await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_of_the_databricks_cli_signs_in_or_is_explained() {
    let stage = Stage::new().await;
    let user = stage.emulator.identities().user.clone();
    let host = stage.emulator.workspace_url().to_owned();
    let printed = stage.printed(&user, &in_an_hour());
    stage.databricks("0.296.0", &printed);
    stage.succeeds(&[], AuthKind::DatabricksCli, &user).await;
    assert_eq!(stage.logged(), format!("auth token --host {host}\n"));

    // A profile goes by its name where the CLI knows the flag, else by its host.
    stage.file(
        ".databrickscfg",
        &format!("[me]\nhost = {host}\nauth_type = databricks-cli\n"),
    );
    let profile = [("DATABRICKS_CONFIG_PROFILE", "me")];
    for (version, argument) in [
        ("0.296.0", "--profile me".to_owned()),
        ("0.207.1", "--profile me".to_owned()),
        ("0.207.0", format!("--host {host}")),
        ("0.0.0", format!("--host {host}")),
    ] {
        fs::remove_file(stage.scratch.path().join("log")).unwrap();
        stage.databricks(version, &printed);
        stage
            .succeeds(&profile, AuthKind::DatabricksCli, &user)
            .await;
        assert_eq!(
            stage.logged(),
            format!("auth token {argument}\n"),
            "{version}"
        );
    }

    // A token that the workspace does not take any more is replaced by force, where the CLI can.
    stage.databricks("0.296.0", &printed);
    let signed_in = stage.workspace(&[]);
    stage.mint(&signed_in).await.unwrap();
    stage.emulator.revoke_workspace_tokens();
    stage.databricks("0.296.0", &stage.printed(&user, &in_an_hour()));
    stage.mint(&signed_in).await.unwrap();
    assert!(
        stage
            .logged()
            .ends_with(&format!("auth token --host {host} --force-refresh\n"))
    );

    // Retried slowly: only a person can repair a program that does not start.
    let unstartable = stage.workspace(&[]);
    stage.unstartable("databricks");
    let error = stage.mint(&unstartable).await.unwrap_err();
    assert_eq!(error.kind, Refused, "{error:?}");
    assert!(error.hint.unwrap().contains("may execute it"));

    let login = format!("run `databricks auth login --host {host}`");
    for (script, kind, words) in [
        (
            "echo 'Error: cache: databricks OAuth is not configured for this host' >&2; exit 1",
            Refused,
            &["is not logged in to http", login.as_str()][..],
        ),
        (
            "echo 'Error: a new access token could not be retrieved because the refresh token is invalid' >&2; exit 1",
            Refused,
            &["login to http", "has expired", login.as_str()],
        ),
        (
            "echo 'Error: unknown flag: --host' >&2; exit 1",
            Refused,
            &["the Databricks CLI is 0.296.0, which is too old", "install"],
        ),
        (
            "echo 'Error: Post \"https://h\": dial tcp: lookup h: no such host' >&2; exit 1",
            Unavailable,
            &["does not reach the workspace", "HTTPS_PROXY"],
        ),
        ("echo nonsense", Malformed, &["did not print a token"]),
        (
            "echo 'Error: something eyJhbGciOiJIUzI1NiJ9.hunterhunterhunterhunter.x' >&2; exit 1",
            Refused,
            &["failed", "[removed]"],
        ),
        ("kill -9 $$", Refused, &["`databricks auth token` failed"]),
    ] {
        stage.databricks("0.296.0", script);
        stage.fails(&[], kind, words).await;
    }
    stage.databricks("0.296.0", &stage.printed(&user, "2020-01-01T00:00:00Z"));
    stage.fails(&[], Refused, &["has expired", &login]).await;
    stage.databricks("0.296.0", &stage.printed(&user, "soon"));
    stage.fails(&[], Malformed, &["expiry"]).await;
    // The path may be named.
    fs::rename(
        stage.scratch.path().join("databricks"),
        stage.scratch.path().join("mine"),
    )
    .unwrap();
    program(
        &stage.scratch.path().join("mine"),
        &format!("#!/bin/sh\n{printed}\n"),
    );
    let path = stage.scratch.path().join("mine").display().to_string();
    // That token was revoked, and there is no other.
    let words = [
        "refused the token that databricks-cli gave",
        "databricks auth login",
    ];
    stage
        .fails(&[("DATABRICKS_CLI_PATH", &path)], Refused, &words)
        .await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_exchanged_or_the_refusal_is_explained() {
    let stage = Stage::new().await;
    let identities = stage.emulator.identities().clone();
    let (app, user) = (&identities.app, &identities.user);
    let identity = |who: &Identity| stage.emulator.identity_token_for(who, HOUR).unwrap();
    let id = ("DATABRICKS_CLIENT_ID", app.name.as_str());

    // In a variable.
    let token = identity(app);
    stage
        .succeeds(
            &[id, ("DATABRICKS_OIDC_TOKEN", &token)],
            AuthKind::EnvOidc,
            app,
        )
        .await;
    let named = [
        id,
        ("DATABRICKS_OIDC_TOKEN_ENV", "MINE"),
        ("MINE", token.as_str()),
    ];
    stage.succeeds(&named, AuthKind::EnvOidc, app).await;
    // Account-wide: no service principal is named.
    let person = identity(user);
    stage
        .succeeds(
            &[("DATABRICKS_OIDC_TOKEN", &person)],
            AuthKind::EnvOidc,
            user,
        )
        .await;

    // In a file, which is read again each time.
    let path = stage.file("token", &format!("{token}\n"));
    let file = [id, ("DATABRICKS_OIDC_TOKEN_FILEPATH", path.as_str())];
    stage.succeeds(&file, AuthKind::FileOidc, app).await;
    let signed_in = stage.workspace(&file);
    stage.file("token", "not yet a token");
    let error = stage.mint(&signed_in).await.unwrap_err();
    assert!(
        error.message.contains("did not accept the identity token"),
        "{error:?}"
    );
    stage.file("token", &identity(app));
    stage.mint(&signed_in).await.unwrap();

    // From GitHub.
    let github = stage.emulator.github_variables();
    let [url, request_token] =
        [&github[0], &github[1]].map(|(name, value)| (*name, value.as_str()));
    stage
        .succeeds(&[id, url, request_token], AuthKind::GithubOidc, app)
        .await;

    // From Azure DevOps.
    let pipeline = stage.emulator.azure_devops_variables();
    let pipeline = pipeline
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let job: Vec<(&str, &str)> = pipeline.into_iter().chain([id]).collect();
    stage.succeeds(&job, AuthKind::AzureDevOpsOidc, app).await;
    let stranger: Vec<(&str, &str)> = job
        .iter()
        .copied()
        .chain([("SYSTEM_ACCESSTOKEN", "hunter2")])
        .collect();
    let words = ["Azure DevOps gave no token", "$(System.AccessToken)"];
    stage.fails(&stranger, Refused, &words).await;

    // Failures.
    stage.file("empty", " \n");
    let missing = stage.scratch.path().join("nowhere").display().to_string();
    let empty = stage.scratch.path().join("empty").display().to_string();
    let other = identity(&identities.stranger);
    let expired = stage
        .emulator
        .identity_token_for(app, Duration::ZERO)
        .unwrap();
    let policy = format!(
        "the federation policy of the service principal `{}`",
        app.name
    );
    let subject = format!("sub `{}`", identities.stranger.name);
    for (variables, kind, words) in [
        (
            &[id, ("DATABRICKS_OIDC_TOKEN_FILEPATH", missing.as_str())][..],
            Unavailable,
            &[
                "cannot read the identity token",
                "`DATABRICKS_OIDC_TOKEN_FILEPATH`",
                "Kubernetes",
            ][..],
        ),
        (
            &[id, ("DATABRICKS_OIDC_TOKEN_FILE", empty.as_str())],
            Unavailable,
            &["is empty", "`DATABRICKS_OIDC_TOKEN_FILE`"],
        ),
        (
            &[id, ("DATABRICKS_OIDC_TOKEN", "hunter2")],
            Refused,
            &[
                "did not accept the identity token (env-oidc)",
                &policy,
                "it is not a JWT",
            ],
        ),
        (
            &[id, ("DATABRICKS_OIDC_TOKEN", &other)],
            Refused,
            &[
                &policy,
                &subject,
                "aud `federation`",
                "No federation policy",
            ],
        ),
        (
            &[id, ("DATABRICKS_OIDC_TOKEN", &expired)],
            Refused,
            &["has expired"],
        ),
        (
            &[("DATABRICKS_OIDC_TOKEN", &token)],
            Refused,
            &["the account's federation policy", "DATABRICKS_CLIENT_ID"],
        ),
        (
            &[id, url, ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "hunter2")],
            Refused,
            &["GitHub's identity service gave no token", "id-token: write"],
        ),
        (
            &[
                id,
                url,
                request_token,
                ("DATABRICKS_TOKEN_AUDIENCE", "other"),
            ],
            Refused,
            &["did not accept the identity token (github-oidc)"],
        ),
    ] {
        stage.fails(variables, kind, words).await;
    }
    let faults = stage.emulator.faults();
    faults.once(Site::Voucher, Action::Respond(Response::status(503)));
    stage
        .fails(
            &[id, url, request_token],
            Unavailable,
            &["GitHub's identity service failed"],
        )
        .await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entra_id_vouches_for_its_applications_or_the_refusal_is_explained() {
    let stage = Stage::new().await;
    let app = stage.emulator.identities().app.clone();
    let secret = app.client_secret.as_ref().unwrap().expose_secret();
    let id = ("ARM_CLIENT_ID", app.name.as_str());
    let secret = ("ARM_CLIENT_SECRET", secret);
    let tenant = ("ARM_TENANT_ID", stage.emulator.tenant());
    // The emulator requires rights on the named resource: the second token.
    let resource = (
        "DATABRICKS_AZURE_RESOURCE_ID",
        "/subscriptions/s-1/resourceGroups/g/providers/x",
    );

    stage
        .succeeds(
            &[id, secret, tenant, resource],
            AuthKind::AzureClientSecret,
            &app,
        )
        .await;
    // The workspace knows its tenant.
    stage
        .succeeds(&[id, secret], AuthKind::AzureClientSecret, &app)
        .await;
    stage
        .succeeds(
            &[("ARM_USE_MSI", "true"), resource],
            AuthKind::AzureMsi,
            &app,
        )
        .await;
    stage
        .succeeds(&[("ARM_USE_MSI", "1"), id], AuthKind::AzureMsi, &app)
        .await;

    for (variables, kind, words) in [
        (
            &[id, ("ARM_CLIENT_SECRET", "hunter2"), tenant][..],
            Refused,
            &[
                "Microsoft Entra ID gave no token",
                "AADSTS7000215",
                "use its value, not its id",
            ][..],
        ),
        (
            &[("ARM_CLIENT_ID", "unknown"), secret, tenant],
            Refused,
            &["AADSTS700016", "`ARM_CLIENT_ID`"],
        ),
        (
            &[id, secret, ("ARM_TENANT_ID", "elsewhere")],
            Refused,
            &["AADSTS90002", "check `ARM_TENANT_ID`"],
        ),
        (
            &[("ARM_USE_MSI", "true"), ("ARM_CLIENT_ID", "unknown")],
            Refused,
            &[
                "instance metadata service gave no token",
                "assign the managed identity `unknown`",
            ],
        ),
    ] {
        stage.fails(variables, kind, words).await;
    }
    let faults = stage.emulator.faults();
    faults.once(Site::Voucher, Action::Respond(Response::status(200)));
    stage
        .fails(
            &[id, secret],
            Refused,
            &["does not name its tenant", "ARM_TENANT_ID"],
        )
        .await;
    faults.once(Site::Voucher, Action::Respond(Response::status(503)));
    stage
        .fails(
            &[id, secret, tenant],
            Unavailable,
            &["Microsoft Entra ID failed"],
        )
        .await;
    faults.once(Site::Voucher, Action::Reset);
    stage
        .fails(
            &[("ARM_USE_MSI", "true")],
            Unavailable,
            &[
                "cannot reach Azure's instance metadata service",
                "machines in Azure",
            ],
        )
        .await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_of_the_azure_cli_signs_in_or_is_explained() {
    let stage = Stage::new().await;
    let identities = stage.emulator.identities().clone();
    let cli = ("DATABRICKS_AUTH_TYPE", "azure-cli");
    let local = |hours: i64| {
        let zoned = Zoned::now()
            .checked_add(SignedDuration::from_hours(hours))
            .unwrap();
        zoned.strftime("%Y-%m-%d %H:%M:%S.%6f").to_string()
    };
    let person = r#"{"name":"ada@example.com","type":"user"}"#;
    let printed = |who: &Identity, more: &str| {
        format!(
            "echo '{{\"accessToken\":\"{}\",\"expiresOn\":\"{}\",\"tokenType\":\"Bearer\"{more}}}'",
            stage.token(who),
            local(1)
        )
    };
    stage.az(person, &printed(&identities.user, ""));
    stage
        .succeeds(&[cli], AuthKind::AzureCli, &identities.user)
        .await;
    let requested =
        "account get-access-token --resource 2ff814a6-3304-4ab8-85cb-cd0e6f879c1d --output json";
    assert_eq!(
        stage.logged(),
        format!("{requested} --tenant {}\n", stage.emulator.tenant())
    );
    let unstartable = stage.workspace(&[cli]);
    stage.unstartable("az");
    let error = stage.mint(&unstartable).await.unwrap_err();
    assert_eq!(error.kind, Refused, "{error:?}");
    assert!(error.hint.unwrap().contains("may execute it"));
    stage.az(person, &printed(&identities.user, ""));
    // It is not used when it has expired, in local time.
    let facts = stage.workspace(&[cli]).token_facts().await.unwrap();
    let left = facts.expires_at.unwrap().duration_since(Timestamp::now());
    assert!(
        left > SignedDuration::from_mins(58) && left < SignedDuration::from_mins(61),
        "{left}"
    );

    // A managed identity takes no tenant; what is not a person brings its rights on the resource.
    let resource = (
        "DATABRICKS_AZURE_RESOURCE_ID",
        "/subscriptions/s-1/resourceGroups/g",
    );
    let management = stage.scratch.path().join("management");
    fs::write(&management, "").unwrap();
    fs::remove_file(stage.scratch.path().join("log")).unwrap();
    let epoch = format!(",\"expires_on\":{}", Timestamp::now().as_second() + 3600);
    stage.az(
        r#"{"name":"systemAssignedIdentity","type":"servicePrincipal"}"#,
        &printed(&identities.app, &epoch),
    );
    // The emulator refuses a workspace token in place of the management token, so it was sent.
    stage
        .fails(
            &[cli, resource],
            Refused,
            &["refused the token that azure-cli gave"],
        )
        .await;
    let log = stage.logged();
    assert!(
        log.contains("https://management.core.windows.net/") && !log.contains("--tenant"),
        "{log}"
    );
    assert!(log.contains("--subscription s-1"), "{log}");

    for (script, kind, words) in [
        (
            "echo \"ERROR: Please run 'az login' to setup account.\" >&2; exit 1",
            Refused,
            &["the Azure CLI is not logged in", "run `az login`"][..],
        ),
        (
            "echo 'ERROR: AADSTS700082: The refresh token has expired' >&2; exit 1",
            Refused,
            &["login has expired", "run `az login`"],
        ),
        (
            "echo 'ERROR: AADSTS50076: you must use multi-factor' >&2; exit 1",
            Refused,
            &["another factor", "az login --scope"],
        ),
        (
            "echo 'Max retries exceeded with url' >&2; exit 1",
            Unavailable,
            &["does not reach Microsoft Entra ID"],
        ),
        ("echo '{}'", Malformed, &["did not print a token"]),
        (
            "echo boom >&2; exit 1",
            Refused,
            &["the Azure CLI returned no token", "boom"],
        ),
    ] {
        stage.az(person, script);
        stage.fails(&[cli], kind, words).await;
    }
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_metadata_service_signs_in_or_is_explained() {
    let stage = Stage::new().await;
    let user = stage.emulator.identities().user.clone();
    let url = stage.emulator.metadata_service_url();
    let name = "DATABRICKS_METADATA_SERVICE_URL";
    stage
        .succeeds(&[(name, &url)], AuthKind::MetadataService, &user)
        .await;
    let other = format!(
        "{}/metadata-service/hunter2",
        stage.emulator.workspace_url()
    );
    let words = [
        "the local metadata service gave no token",
        "has no session",
        "DATABRICKS_HOST",
    ];
    stage.fails(&[(name, &other)], Refused, &words).await;
    let words = ["cannot reach the local metadata service", "start the tool"];
    stage
        .fails(&[(name, "http://localhost:1/hunter2")], Unavailable, &words)
        .await;
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn model_serving_signs_in_by_its_file_or_is_explained() {
    let stage = Stage::new().await;
    let app = stage.emulator.identities().app.clone();
    let directory = stage.scratch.path().display().to_string();
    let serving = [
        ("IS_IN_DATABRICKS_MODEL_SERVING_ENV", "true"),
        ("SERVING_CREDENTIALS_DIR", directory.as_str()),
        ("DATABRICKS_HOST", ""),
        (
            "DATABRICKS_MODEL_SERVING_HOST_URL",
            stage.emulator.workspace_url(),
        ),
    ];
    let file = "model-dependencies-oauth-token";
    let content = |token: &str| format!(r#"{{"OAUTH_TOKEN":[{{"oauthTokenValue":"{token}"}}]}}"#);
    stage.file(file, &content(&stage.token(&app)));
    stage.succeeds(&serving, AuthKind::ModelServing, &app).await;

    // A token that the workspace does not take any more is read again.
    let signed_in = stage.workspace(&serving);
    stage.mint(&signed_in).await.unwrap();
    stage.emulator.revoke_workspace_tokens();
    stage.file(file, &content(&stage.token(&app)));
    stage.mint(&signed_in).await.unwrap();

    let words = [
        "refused the token that model-serving gave",
        "resources that it uses",
    ];
    stage.emulator.revoke_workspace_tokens();
    stage.fails(&serving, Refused, &words).await;
    for broken in ["", r#"{"OAUTH_TOKEN":[]}"#, r#"{"OAUTH_TOKEN":"hunter2"}"#] {
        stage.file(file, broken);
        let words = ["cannot read the token of model-serving in `", file];
        stage.fails(&serving, Unavailable, &words).await;
    }
    stage.emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kinds_found_on_the_machine_are_tried_until_one_works() {
    let stage = Stage::new().await;
    let app = stage.emulator.identities().app.clone();
    let token = stage.emulator.identity_token_for(&app, HOUR).unwrap();
    let id = ("DATABRICKS_CLIENT_ID", app.name.as_str());
    stage.databricks(
        "0.296.0",
        "echo 'Error: databricks OAuth is not configured for this host' >&2; exit 1",
    );
    let variables = [id, ("DATABRICKS_OIDC_TOKEN", token.as_str())];
    let workspace = stage.workspace(&variables);
    assert_eq!(workspace.service_principal(), None, "not known before");
    stage.mint(&workspace).await.unwrap();
    assert_eq!(workspace.auth_kind(), AuthKind::EnvOidc);
    assert_eq!(workspace.service_principal(), Some(app.name.as_str()));
    assert_eq!(stage.logged().lines().count(), 1);
    // The way that worked is kept.
    stage.emulator.revoke_workspace_tokens();
    stage
        .fails(
            &[id, ("DATABRICKS_OIDC_TOKEN", "hunter2")],
            Refused,
            &[
                "none of the ways to sign in works: databricks-cli, env-oidc",
                "databricks-cli: the Databricks CLI is not logged in",
                "env-oidc: the workspace",
                "databricks auth login",
                "federation policy",
            ],
        )
        .await;
    // A way that may work in a moment is waited for: another could be another identity.
    stage.databricks("0.296.0", "echo 'dial tcp: connection refused' >&2; exit 1");
    stage
        .fails(
            &variables,
            Unavailable,
            &["the Databricks CLI does not reach"],
        )
        .await;
    stage.emulator.stop().await;
}
