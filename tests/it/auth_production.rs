//! Every way to sign in as in production: an https workspace of a private authority under a name that is not loopback,
//! the services of clouds under their own names and addresses, with and without an HTTP proxy.
//!
//! This takes an `/etc/hosts` and addresses of its own, so the test runs itself again inside a network and a mount
//! namespace. Where neither root nor a user namespace may make them, it fails; `auth_network` has what runs without.

use std::{
    collections::BTreeSet, env, net::SocketAddr, path::Path, process::Stdio, sync::Arc,
    time::Duration,
};

use std::os::unix::fs::MetadataExt;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use lakebase_proxy::{
    emulator::{Emulator, EmulatorOptions, PostgresSource},
    workspace::AuthKind,
};
use secrecy::ExposeSecret;
use tokio::{net::TcpListener, process::Command, task::JoinSet};

use crate::{
    auth::program,
    harness::{
        self, binary,
        https::{Authority, Front, HttpProxy},
        within,
    },
};

/// Where the Postgres of the outer process is.
const POSTGRES: &str = "LAKEBASE_PROXY_TEST_POSTGRES";
/// In `/etc/hosts`.
const DIRECT: &str = "adb-1.2.azuredatabricks.net";
/// Known to the HTTP proxy alone.
const PROXIED: &str = "adb-3.4.azuredatabricks.net";
const ENTRA_ID: &str = "login.microsoftonline.com";
const GITHUB: &str = "pipelines.actions.githubusercontent.com";
const AZURE_DEVOPS: &str = "dev.azure.com";
/// Of the range for documentation (RFC 5737).
const PUBLIC: &str = "203.0.113.1";
const INSTANCE_METADATA: &str = "169.254.169.254";

/// The secret path of the local metadata service.
const METADATA_PATH: &str = "/metadata-service/session-1";

const SETUP: &str = r#"
set -e
ip link set lo up
ip address add 203.0.113.1/32 dev lo
ip address add 169.254.169.254/32 dev lo
mount --bind "$1" /etc/hosts
exec "$2" --exact auth_production::inside --ignored --nocapture
"#;

#[tokio::test(flavor = "multi_thread")]
async fn every_authentication_kind_works_with_a_remote_workspace() {
    let scratch = tempfile::tempdir().unwrap();
    let hosts = scratch.path().join("hosts");
    let public = [DIRECT, ENTRA_ID, GITHUB, AZURE_DEVOPS].join(" ");
    std::fs::write(&hosts, format!("127.0.0.1 localhost\n{PUBLIC} {public}\n")).unwrap();
    let socket = harness::server().await.directory().join("s");
    // A user namespace gives those rights to other users.
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let user: &[&str] = if is_root {
        &[]
    } else {
        &["--user", "--map-root-user"]
    };
    let output = Command::new("unshare")
        .args(user)
        .args(["--net", "--mount", "sh", "-c", SETUP, "sh"])
        .arg(&hosts)
        .arg(env::current_exe().unwrap())
        .env(POSTGRES, socket)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_mins(3), output)
        .await
        .expect("it ends")
        .expect("`unshare` of util-linux");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if errors.contains("ip: not found") {
        return; // A machine without iproute2, as minimal ones are.
    }
    if !is_root && errors.contains("Operation not permitted") {
        return; // No namespaces for other users here, such as in a container.
    }
    assert!(
        text.contains("running 1 test"),
        "namespaces need root or user namespaces: {text}{errors}"
    );
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{errors}"
    );
}

/// How the program reaches the world.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Route {
    Direct,
    /// `NO_PROXY` names what is called.
    Excepted,
    Proxied,
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the namespaces that `every_authentication_kind_works_with_a_remote_workspace` makes, and is run by it"]
async fn inside() {
    let socket = env::var(POSTGRES).expect("run by the test outside");
    let url = format!("postgresql:///postgres?host={socket}&user=databricks_control_plane");
    let emulator = Emulator::start(EmulatorOptions {
        postgres: PostgresSource::Url(url.into()),
        database: format!("production_{}", std::process::id()),
        ..EmulatorOptions::default()
    })
    .await
    .unwrap();
    let authority = Authority::new();
    let tools = tempfile::tempdir().unwrap();
    for route in [Route::Direct, Route::Excepted, Route::Proxied] {
        let mut world = World::open(&emulator, &authority, route).await;
        world.tools(tools.path());
        let ways = AuthKind::ALL
            .iter()
            .map(|&kind| world.signs_in(kind, tools.path()));
        let complaints: Vec<String> = join_all(ways).await.into_iter().flatten().collect();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
        // Which of them need a tunnel to whom.
        let heads = world.proxy.heads();
        let targets = heads.iter().filter_map(|head| head.lines().next());
        let targets: BTreeSet<&str> = targets.collect();
        let expected: &[&str] = match route {
            Route::Direct | Route::Excepted => &[],
            Route::Proxied => &[
                "CONNECT adb-3.4.azuredatabricks.net:443 HTTP/1.1",
                "CONNECT dev.azure.com:443 HTTP/1.1",
                "CONNECT login.microsoftonline.com:443 HTTP/1.1",
                "CONNECT pipelines.actions.githubusercontent.com:443 HTTP/1.1",
            ],
        };
        assert_eq!(
            targets.into_iter().collect::<Vec<_>>(),
            expected,
            "{route:?}"
        );
        let calls = world.front.calls.lock().unwrap().join("\n");
        for call in [
            "169.254.169.254 GET /metadata/identity/oauth2/token",
            " GET /metadata-service/",
            "login.microsoftonline.com POST /",
        ] {
            assert!(calls.contains(call), "{route:?}: no `{call}` in {calls}");
        }
        // The ports are free for the next.
        world.servers.shutdown().await;
    }
    emulator.stop().await;
}

struct World<'a> {
    emulator: &'a Emulator,
    front: Front,
    authority: &'a Authority,
    route: Route,
    name: &'static str,
    metadata_service: SocketAddr,
    proxy: HttpProxy,
    servers: JoinSet<()>,
}

impl<'a> World<'a> {
    async fn open(emulator: &'a Emulator, authority: &'a Authority, route: Route) -> Self {
        let name = if route == Route::Proxied {
            PROXIED
        } else {
            DIRECT
        };
        let front = Front {
            emulator: emulator.workspace_address(),
            origin: format!("https://{name}"),
            roots: &[
                (ENTRA_ID, "/entra"),
                (GITHUB, "/github"),
                (AZURE_DEVOPS, "/azure-devops"),
            ],
            calls: Arc::default(),
        };
        let mut servers = JoinSet::new();
        let listener = TcpListener::bind((PUBLIC, 443)).await.unwrap();
        let public = listener.local_addr().unwrap();
        let listener = authority.certify(listener, &[name, ENTRA_ID, GITHUB, AZURE_DEVOPS]);
        servers.spawn(front.clone().serve(listener));
        let listener = TcpListener::bind((INSTANCE_METADATA, 80)).await.unwrap();
        servers.spawn(front.clone().serve(listener));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let metadata_service = listener.local_addr().unwrap();
        servers.spawn(front.clone().serve(listener));
        let listener = TcpListener::bind((PUBLIC, 0)).await.unwrap();
        Self {
            emulator,
            front,
            authority,
            route,
            name,
            metadata_service,
            proxy: HttpProxy::start(listener, public),
            servers,
        }
    }

    /// The command-line tools of two people who are logged in.
    fn tools(&self, directory: &Path) {
        let user = &self.emulator.identities().user;
        let token = self
            .emulator
            .workspace_token_for(user, Duration::from_hours(1))
            .unwrap();
        let end = Timestamp::now() + SignedDuration::from_hours(1);
        program(
            &directory.join("databricks"),
            &format!(
                "#!/bin/sh\n[ \"$1\" = version ] && echo '{{\"Major\":0,\"Minor\":296,\"Patch\":0}}' && exit\n\
                 echo '{{\"access_token\":\"{token}\",\"expiry\":\"{end}\"}}'\n"
            ),
        );
        program(
            &directory.join("az"),
            &format!(
                "#!/bin/sh\n[ \"$2\" = show ] && echo '{{\"user\":{{\"name\":\"a\",\"type\":\"user\"}}}}' && exit\n\
                 echo '{{\"accessToken\":\"{token}\",\"expires_on\":{}}}'\n",
                end.as_second()
            ),
        );
    }

    /// What this way needs.
    fn settings(&self, kind: AuthKind, tools: &Path) -> Vec<(&'static str, String)> {
        let (app, user) = (
            &self.emulator.identities().app,
            &self.emulator.identities().user,
        );
        let secret = app
            .client_secret
            .as_ref()
            .unwrap()
            .expose_secret()
            .to_owned();
        let identity = || {
            self.emulator
                .identity_token_for(app, Duration::from_hours(1))
                .unwrap()
        };
        let id = ("DATABRICKS_CLIENT_ID", app.name.clone());
        let path = ("PATH", tools.display().to_string());
        match kind {
            AuthKind::Pat => {
                let pat = user.pat.as_ref().unwrap().expose_secret().to_owned();
                vec![("DATABRICKS_TOKEN", pat)]
            }
            AuthKind::OAuthM2m => vec![id, ("DATABRICKS_CLIENT_SECRET", secret)],
            AuthKind::DatabricksCli | AuthKind::AzureCli => vec![path],
            AuthKind::MetadataService => {
                let url = self.emulator.metadata_service_url();
                let local = format!("http://{}", self.metadata_service);
                let url = url.replace(self.emulator.workspace_url(), &local);
                vec![("DATABRICKS_METADATA_SERVICE_URL", url)]
            }
            AuthKind::GithubOidc => {
                let github = format!("{}/github", self.emulator.workspace_url());
                let [(name, url), token] = self.emulator.github_variables();
                let url = url.replace(&github, &format!("https://{GITHUB}"));
                vec![id, (name, url), token]
            }
            AuthKind::EnvOidc => vec![id, ("DATABRICKS_OIDC_TOKEN", identity())],
            AuthKind::FileOidc => {
                let file = tools.join("identity-token");
                std::fs::write(&file, identity()).unwrap();
                vec![
                    id,
                    ("DATABRICKS_OIDC_TOKEN_FILEPATH", file.display().to_string()),
                ]
            }
            AuthKind::AzureMsi => vec![("ARM_USE_MSI", "true".to_owned())],
            AuthKind::AzureDevOpsOidc => {
                let here = format!("{}/azure-devops", self.emulator.workspace_url());
                let variables = self.emulator.azure_devops_variables();
                let there = format!("https://{AZURE_DEVOPS}");
                let variables = variables.map(|(name, value)| (name, value.replace(&here, &there)));
                variables.into_iter().chain([id]).collect()
            }
            AuthKind::ModelServing => {
                let token = self
                    .emulator
                    .workspace_token_for(app, Duration::from_hours(1))
                    .unwrap();
                let content = format!(r#"{{"OAUTH_TOKEN":[{{"oauthTokenValue":"{token}"}}]}}"#);
                std::fs::write(tools.join("model-dependencies-oauth-token"), content).unwrap();
                vec![
                    ("IS_IN_DATABRICKS_MODEL_SERVING_ENV", "true".to_owned()),
                    ("SERVING_CREDENTIALS_DIR", tools.display().to_string()),
                ]
            }
            // The tenant is found out at the workspace.
            AuthKind::AzureClientSecret => vec![
                ("ARM_CLIENT_ID", app.name.clone()),
                ("ARM_CLIENT_SECRET", secret),
            ],
        }
    }

    /// `token` mints a credential; what goes wrong is returned.
    async fn signs_in(&self, kind: AuthKind, tools: &Path) -> Option<String> {
        let proxy = format!("http://{}", self.proxy.address);
        let mut command = binary::command(&["token"]);
        command
            .env_clear()
            .env("DATABRICKS_HOST", self.name)
            .env("DATABRICKS_AUTH_TYPE", kind.label())
            .env("ENDPOINT_NAME", self.emulator.endpoint_name())
            .env("PGHOST", "ep-1.database.example.com")
            .env("PGUSER", "me")
            .env("LAKEBASE_PROXY_LOG_FILTER", "trace")
            .env("SSL_CERT_FILE", self.authority.file())
            .envs(self.settings(kind, tools))
            .stdout(Stdio::piped());
        if self.route != Route::Direct {
            for name in [
                "HTTPS_PROXY",
                "https_proxy",
                "HTTP_PROXY",
                "http_proxy",
                "ALL_PROXY",
            ] {
                command.env(name, &proxy);
            }
        }
        if self.route == Route::Excepted {
            command.env(
                "NO_PROXY",
                format!("{DIRECT},.microsoftonline.com,.githubusercontent.com,{AZURE_DEVOPS}"),
            );
        }
        let output = within("a token", command.output()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(!log.contains(METADATA_PATH), "a secret path: {log}");
        assert!(log.contains("workspace answered"), "no log: {log}");
        (!output.status.success() || !text.starts_with("eyJ")).then(|| {
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(3)..].join("\n");
            format!("{} {:?}: {text} {last}", kind.label(), self.route)
        })
    }
}
