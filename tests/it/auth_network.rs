//! The way to the workspace: through an HTTP proxy or not, and whose certificates are trusted.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use lakebase_proxy::{
    clock::Clock,
    credential::{Mint, MintError, MintErrorKind},
    telemetry::Metrics,
    tls::{self, Roots},
    workspace::{CredentialMinter, Settings, Target, Workspace},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use crate::harness::{binary, within};

const ENDPOINT: &str = "projects/p/branches/production/endpoints/primary";
const NAME: &str = "workspace.example.invalid";
const CREDENTIAL: &str = r#"{"token":"eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZXN0In0.c2ln","expire_time":"2099-01-01T00:00:00Z"}"#;

/// A workspace that mints a credential for whoever asks, by TLS with a certificate of an authority of its own.
struct TlsWorkspace {
    port: u16,
    authority: PathBuf,
    _scratch: TempDir,
    _tasks: JoinSet<()>,
}

impl TlsWorkspace {
    async fn start() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = [NAME.to_owned(), "localhost".to_owned()];
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let authority = scratch.path().join("ca.pem");
        std::fs::write(&authority, issuer.pem()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                clients.spawn(async move {
                    // A client that does not trust us ends here.
                    let Ok(mut stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    head(&mut stream).await;
                    let answer = format!(
                        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{CREDENTIAL}",
                        CREDENTIAL.len()
                    );
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self {
            port,
            authority,
            _scratch: scratch,
            _tasks: tasks,
        }
    }
}

/// An HTTP proxy that takes every tunnel to one port of this machine.
struct HttpProxy {
    address: String,
    heads: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl HttpProxy {
    async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let heads = Arc::<Mutex<Vec<String>>>::default();
        let seen = Arc::clone(&heads);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut tunnels = JoinSet::new();
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let seen = Arc::clone(&seen);
                tunnels.spawn(async move {
                    let head = head(&mut client).await;
                    seen.lock().unwrap().push(head);
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                    let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self {
            address,
            heads,
            _tasks: tasks,
        }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

async fn head(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn mint(
    host: &str,
    variables: &[(&str, &str)],
    authority: Option<&Path>,
) -> Result<(), MintError> {
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
    let settings = Settings::from_variables(variables);
    let metrics = Metrics::new().unwrap();
    let workspace = Workspace::new(settings, &tls, Clock::system(), metrics).unwrap();
    let target = Target::Endpoint(ENDPOINT.parse().unwrap());
    let minter = CredentialMinter::new(workspace, target);
    within("a mint", minter.mint()).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_workspace_is_reached_through_the_proxy_that_the_environment_names() {
    let workspace = TlsWorkspace::start().await;
    let proxy = HttpProxy::start(workspace.port).await;
    let authority = Some(workspace.authority.as_path());
    let url = format!("http://me:pass@{}", proxy.address);
    for (variable, value) in [
        ("HTTPS_PROXY", url.as_str()),
        ("https_proxy", &proxy.address),
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
            MintErrorKind::Unavailable,
            "{except}: {error:?}"
        );
    }
    // Nor for this machine.
    let local = format!("https://localhost:{}", workspace.port);
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
        let settings = Settings::from_variables(variables.into_iter().collect());
        let metrics = Metrics::new().unwrap();
        let error = Workspace::new(settings, &tls, Clock::system(), metrics).unwrap_err();
        let told = error.to_string();
        assert!(
            told.contains("`HTTPS_PROXY`") && told.contains(words),
            "{told}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_an_unknown_authority_is_refused_and_one_of_ssl_cert_file_is_taken() {
    let workspace = TlsWorkspace::start().await;
    let host = format!("https://localhost:{}", workspace.port);
    let error = mint(&host, &[], None).await.unwrap_err();
    let told = format!("{error} {:?}", error.hint);
    assert!(
        told.contains("certificate is not trusted") && told.contains("SSL_CERT_FILE"),
        "{told}"
    );

    // The system's roots are read by the environment of the process, so it takes one of its own.
    let mut command = binary::command(&["token"]);
    command
        .env("DATABRICKS_HOST", &host)
        .env("DATABRICKS_TOKEN", "dapi-hunter2")
        .env("ENDPOINT_NAME", ENDPOINT)
        .env("PGHOST", "ep-1.database.example.com")
        .env("PGUSER", "me")
        .env("SSL_CERT_FILE", &workspace.authority)
        .stdout(std::process::Stdio::piped());
    let output = within("a token", command.output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.starts_with("eyJ"),
        "{text} {log}"
    );
}
