//! A scripted Postgres server, over TLS: thousands of sessions cost it little, and none of it is random.
//!
//! It runs as a process of its own, started from the program that includes this module with [`WORD`] as its argument, so
//! that neither its memory nor its system calls are counted for the proxy.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
};

use lakebase_proxy::net::tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

/// The argument that turns a program into the server; the directory for its certificate follows.
pub(crate) const WORD: &str = "scripted-upstream";

/// What a real server reports at login, more or less.
const PARAMETERS: [(&str, &str); 14] = [
    ("application_name", "measure"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("default_transaction_read_only", "off"),
    ("in_hot_standby", "off"),
    ("integer_datetimes", "on"),
    ("IntervalStyle", "postgres"),
    ("is_superuser", "off"),
    ("scram_iterations", "4096"),
    ("server_encoding", "UTF8"),
    ("server_version", "17.5"),
    ("session_authorization", "app"),
    ("standard_conforming_strings", "on"),
    ("TimeZone", "Etc/UTC"),
];

/// A running scripted server; killed when dropped.
pub(crate) struct Upstream {
    child: Child,
    /// Where it listens on 127.0.0.1.
    pub(crate) port: u16,
    /// What its clients must trust.
    pub(crate) authority: PathBuf,
}

impl Upstream {
    /// Starts this very program as the server.
    pub(crate) fn start(directory: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a program has a path"))
            .arg(WORD)
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the scripted upstream starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it is piped"))
            .read_line(&mut line)
            .expect("the scripted upstream prints its port");
        Self {
            port: line.trim().parse().expect("a port"),
            authority: directory.join("ca.pem"),
            child,
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is the server until standard input ends, which it does with its parent.
pub(crate) fn serve(directory: &Path) -> ExitCode {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let acceptor = TlsAcceptor::from(certificate(directory));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        println!("{}", listener.local_addr().expect("it is bound").port());
        let sessions = TaskTracker::new();
        let mut gone =
            tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
        loop {
            tokio::select! {
                _ = &mut gone => return ExitCode::SUCCESS,
                accepted = listener.accept() => {
                    let Ok((stream, _)) = accepted else { continue };
                    let acceptor = acceptor.clone();
                    sessions.spawn(async move {
                        // A client that breaks off is the measurement's business, not the server's.
                        let _ = session(stream, &acceptor).await;
                    });
                }
            }
        }
    })
}

fn certificate(directory: &Path) -> Arc<ServerConfig> {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(params, key).expect("an authority");
    std::fs::write(directory.join("ca.pem"), authority.pem())
        .expect("the directory can be written");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &authority).expect("a certificate");
    let config = ServerConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone(), authority.der().clone()],
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .expect("key and certificate belong together");
    Arc::new(config)
}

async fn session(mut stream: TcpStream, acceptor: &TlsAcceptor) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.read_exact(&mut [0; 8]).await?;
    stream.write_all(b"S").await?;
    let mut stream = acceptor.accept(stream).await?;
    let length = stream.read_u32().await?;
    read_body(&mut stream, length).await?;
    stream.write_all(b"R\0\0\0\x08\0\0\0\x03").await?;
    let _password_tag = stream.read_u8().await?;
    let length = stream.read_u32().await?;
    read_body(&mut stream, length).await?;
    stream.write_all(&greeting()).await?;
    let answer = answer();
    loop {
        let Ok(tag) = stream.read_u8().await else {
            return Ok(());
        };
        let length = stream.read_u32().await?;
        read_body(&mut stream, length).await?;
        match tag {
            b'Q' => stream.write_all(&answer).await?,
            b'X' => return stream.shutdown().await,
            _ => {}
        }
    }
}

async fn read_body(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
    length: u32,
) -> std::io::Result<()> {
    let mut body = vec![
        0;
        usize::try_from(length)
            .unwrap_or_default()
            .saturating_sub(4)
    ];
    stream.read_exact(&mut body).await.map(drop)
}

fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).expect("a short body");
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

fn greeting() -> Vec<u8> {
    let mut reply = frame(b'R', &[0; 4]);
    for (name, value) in PARAMETERS {
        reply.extend(frame(b'S', format!("{name}\0{value}\0").as_bytes()));
    }
    reply.extend(frame(b'K', &[0, 0, 0, 7, 0, 0, 0, 9]));
    reply.extend(frame(b'Z', b"I"));
    reply
}

/// What Postgres answers to `SELECT 1`.
fn answer() -> Vec<u8> {
    let column = b"\0\x01?column?\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0";
    [
        frame(b'T', column),
        frame(b'D', b"\0\x01\0\0\0\x011"),
        frame(b'C', b"SELECT 1\0"),
        frame(b'Z', b"I"),
    ]
    .concat()
}
