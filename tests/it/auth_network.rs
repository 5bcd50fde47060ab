//! The way to the workspace: through an HTTP proxy or not, and whose certificates are trusted.

use std::{net::SocketAddr, path::Path, sync::Arc};

use axum::Router;
use lakebase_proxy::{
    clock::Clock,
    config::{Roots, WorkspaceSettings},
    credential::{CallError, CallErrorKind},
    net::tls,
    telemetry::Metrics,
    workspace::{CredentialMinter, Target, Workspace},
};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{
    self, binary,
    https::{Authority, Front, HttpProxy},
    within,
};

const ENDPOINT: &str = "projects/p/branches/production/endpoints/primary";
const NAME: &str = "workspace.example.invalid";
const CREDENTIAL: &str = r#"{"token":"eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZXN0In0.c2ln","expire_time":"2099-01-01T00:00:00Z"}"#;

/// A workspace that mints a credential for every caller, with a certificate of an authority of its own.
struct TlsWorkspace {
    address: SocketAddr,
    authority: Authority,
    _tasks: JoinSet<()>,
}

impl TlsWorkspace {
    async fn start() -> Self {
        let authority = Authority::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = authority.certify(listener, &[NAME, "localhost", "0.0.0.0"]);
        let answer = || async { ([("content-type", "application/json")], CREDENTIAL) };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let app = Router::new().fallback(answer);
            axum::serve(listener, app).await.unwrap();
        });
        Self {
            address,
            authority,
            _tasks: tasks,
        }
    }

    async fn proxy(&self) -> HttpProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        HttpProxy::start(listener, self.address)
    }
}

async fn mint(
    host: &str,
    variables: &[(&str, &str)],
    authority: Option<&Path>,
) -> Result<(), CallError> {
    let base = [
        ("DATABRICKS_HOST", host),
        ("DATABRICKS_TOKEN", "dapi-hunter2"),
    ];
    let variables = base
        .iter()
        .chain(variables)
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    let roots = authority.map_or(Roots::System, |path| Roots::File(path.to_owned()));
    let tls = tls::client_config(&roots, tls::ALPN_HTTP_1_1).unwrap();
    let settings = WorkspaceSettings::from_variables(variables);
    mint_with(settings, &tls, ENDPOINT).await
}

async fn mint_with(
    settings: WorkspaceSettings,
    tls: &rustls::ClientConfig,
    endpoint: &str,
) -> Result<(), CallError> {
    let metrics = Metrics::new().unwrap();
    let workspace = Workspace::new(settings, tls, Clock::system(), metrics).unwrap();
    let target = Target::Endpoint(endpoint.parse().unwrap());
    let minter = CredentialMinter::new(workspace, target);
    within("a mint", minter.request_credential())
        .await
        .map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workspace_is_reached_through_the_proxy_that_the_environment_names() {
    let workspace = TlsWorkspace::start().await;
    let proxy = workspace.proxy().await;
    let authority = Some(workspace.authority.file());
    let address = proxy.address.to_string();
    let url = format!("http://me:pass@{address}");
    for (variable, value) in [
        ("HTTPS_PROXY", url.as_str()),
        ("https_proxy", &address),
        ("ALL_PROXY", &url),
    ] {
        let before = proxy.heads().len();
        mint(
            NAME,
            &[(variable, value), ("NO_PROXY", "localhost,.example.com")],
            authority,
        )
        .await
        .unwrap();
        let heads = proxy.heads();
        assert_eq!(heads.len(), before + 1, "{variable}");
        let head = heads.last().unwrap().to_ascii_lowercase();
        assert!(
            head.starts_with(&format!("connect {NAME}:443 http/1.1\r\n")),
            "{head}"
        );
        // me:pass
        let authorization = "proxy-authorization: basic bwu6cgfzcw==";
        assert_eq!(head.contains(authorization), value.contains('@'), "{head}");
        assert!(!head.contains("hunter2"), "{head}");
    }

    // Not for what NO_PROXY lists, so that the name must be resolved here, which it cannot.
    let seen = proxy.heads().len();
    for except in [NAME, ".example.invalid", "*"] {
        let variables = [("HTTPS_PROXY", url.as_str()), ("NO_PROXY", except)];
        let error = mint(NAME, &variables, authority).await.unwrap_err();
        assert_eq!(
            error.kind,
            CallErrorKind::Unavailable,
            "{except}: {error:?}"
        );
    }
    // Nor for this machine.
    let local = format!("https://localhost:{}", workspace.address.port());
    mint(&local, &[("HTTPS_PROXY", &url)], authority)
        .await
        .unwrap();
    assert_eq!(proxy.heads().len(), seen);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_cannot_be_one_is_refused_by_the_name_of_its_variable() {
    for (value, words) in [
        ("socks5://localhost:1", "neither http nor https"),
        ("http://", "not the address"),
    ] {
        let variables = [
            ("DATABRICKS_HOST", NAME),
            ("DATABRICKS_TOKEN", "t"),
            ("HTTPS_PROXY", value),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).unwrap();
        let settings = WorkspaceSettings::from_variables(variables.into_iter().collect());
        let metrics = Metrics::new().unwrap();
        let error = Workspace::new(settings, &tls, Clock::system(), metrics).unwrap_err();
        let reported = error.to_string();
        assert!(
            reported.contains("`HTTPS_PROXY`") && reported.contains(words),
            "{reported}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_an_unknown_authority_is_refused_and_one_of_ssl_cert_file_is_taken() {
    let workspace = TlsWorkspace::start().await;
    let host = format!("https://localhost:{}", workspace.address.port());
    let error = mint(&host, &[], None).await.unwrap_err();
    let reported = format!("{error} {:?}", error.hint);
    assert!(
        reported.contains("certificate is not trusted") && reported.contains("SSL_CERT_FILE"),
        "{reported}"
    );

    // The system's roots are read by the environment of the process, so it takes one of its own.
    let mut command = binary::command(&["token"]);
    command
        .env("DATABRICKS_HOST", &host)
        .env("DATABRICKS_TOKEN", "dapi-hunter2")
        .env("ENDPOINT_NAME", ENDPOINT)
        .env("PGHOST", "ep-1.database.example.com")
        .env("PGUSER", "me")
        .env("SSL_CERT_FILE", workspace.authority.file())
        .stdout(std::process::Stdio::piped());
    let output = within("a token", command.output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.starts_with("eyJ"),
        "{text} {log}"
    );
}

/// Once these calls went out on the https-only client with the HTTP proxy, and failed wherever the workspace is not on
/// this machine. Runs without namespaces: the HTTP proxy resolves one name, and 0.0.0.0 looks like no loopback address.
#[tokio::test(flavor = "multi_thread")]
async fn metadata_services_are_called_directly_beside_a_remote_workspace() {
    let emulator = harness::emulator().await;
    let authority = Authority::new();
    let tls = Roots::File(authority.file().to_owned());
    let tls = tls::client_config(&tls, tls::ALPN_HTTP_1_1).unwrap();
    for (host, is_behind_proxy) in [(NAME, true), ("0.0.0.0", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = authority.certify(listener, &[host]);
        let host = if is_behind_proxy {
            host.to_owned()
        } else {
            format!("{host}:{}", address.port())
        };
        let front = Front {
            emulator: emulator.workspace_address(),
            origin: format!("https://{host}"),
            roots: &[],
            calls: Arc::default(),
        };
        let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = format!("http://{}", plain.local_addr().unwrap());
        let mut servers = JoinSet::new();
        servers.spawn(front.clone().serve(listener));
        servers.spawn(front.clone().serve(plain));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = HttpProxy::start(listener, address);
        let proxy_url = format!("http://{}", proxy.address);
        let no_proxy = if is_behind_proxy { "" } else { "0.0.0.0" };
        let metadata_url = emulator
            .metadata_service_url()
            .replace(emulator.workspace_url(), &local);
        for way in [
            ("ARM_USE_MSI", "true"),
            ("DATABRICKS_METADATA_SERVICE_URL", metadata_url.as_str()),
        ] {
            let variables = [
                ("DATABRICKS_HOST", front.origin.as_str()),
                ("HTTPS_PROXY", &proxy_url),
                ("HTTP_PROXY", &proxy_url),
                ("ALL_PROXY", &proxy_url),
                ("NO_PROXY", no_proxy),
                way,
            ];
            let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
            let mut settings = WorkspaceSettings::from_variables(variables.into_iter().collect());
            settings.services.instance_metadata = Some(local.clone());
            let minted = mint_with(settings, &tls, emulator.endpoint_name()).await;
            minted.unwrap_or_else(|error| panic!("{host}, {way:?}: {error:?}"));
        }
        let heads = proxy.heads();
        assert_eq!(heads.is_empty(), !is_behind_proxy, "{heads:?}");
        let tunnel = format!("CONNECT {NAME}:443 ");
        assert!(
            heads.iter().all(|head| head.starts_with(&tunnel)),
            "{heads:?}"
        );
        let calls = front.calls.lock().unwrap().join("\n");
        assert!(calls.contains("/metadata/identity/oauth2/token"), "{calls}");
        assert!(calls.contains("/metadata-service/"), "{calls}");
    }
    emulator.stop().await;
}
