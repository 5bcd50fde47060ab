//! HTTPS as in production: an authority of its own, the servers that it certifies, and an HTTP proxy that records calls.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::Response,
    serve::Listener,
};
use lakebase_proxy::net::tls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::http::forward;

/// A certificate authority that no system trusts.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: PathBuf,
    _scratch: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let file = scratch.path().join("ca.pem");
        std::fs::write(&file, issuer.pem()).unwrap();
        Self {
            issuer,
            file,
            _scratch: scratch,
        }
    }

    /// The file of its certificate.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// A server with a certificate for these names.
    pub(crate) fn certify(&self, tcp: TcpListener, names: &[&str]) -> TlsListener {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        let config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        TlsListener {
            tcp,
            acceptor: TlsAcceptor::from(Arc::new(config)),
        }
    }
}

/// A TCP listener with TLS; connections that do not complete the TLS handshake are dropped.
pub(crate) struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let (stream, address) = self.tcp.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Serves an emulator's workspace under public names. Each host of `roots` has its own root in the emulator.
#[derive(Clone)]
pub(crate) struct Front {
    /// The emulator's address.
    pub(crate) emulator: SocketAddr,
    /// The workspace's origin, which stands for the emulator's in all texts.
    pub(crate) origin: String,
    pub(crate) roots: &'static [(&'static str, &'static str)],
    /// `HOST METHOD PATH` of each call.
    pub(crate) calls: Arc<Mutex<Vec<String>>>,
}

impl Front {
    pub(crate) async fn serve<L>(self, listener: L)
    where
        L: Listener<Addr = SocketAddr>,
    {
        let app = Router::new().fallback(answer).with_state(self);
        axum::serve(listener, app).await.unwrap();
    }
}

async fn answer(State(front): State<Front>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let host = parts.headers["host"].to_str().unwrap().to_owned();
    let call = format!("{host} {} {}", parts.method, parts.uri.path());
    front.calls.lock().unwrap().push(call);
    let root = front.roots.iter().find(|(name, _)| *name == host);
    let root = root.map_or("", |(_, root)| root);
    let emulator = format!("http://{}", front.emulator);
    let mut head = format!("{} {root}{} HTTP/1.1\r\n", parts.method, parts.uri);
    for (name, value) in &parts.headers {
        if name != "connection" && name != "host" {
            head.extend([name.as_str(), ": ", value.to_str().unwrap(), "\r\n"]);
        }
    }
    let address = front.emulator.to_string();
    head.extend(["host: ", &address, "\r\nconnection: close\r\n\r\n"]);
    let encoded = |origin: &str| origin.replace(':', "%3A").replace('/', "%2F");
    let head = head
        .replace(&front.origin, &emulator)
        .replace(&encoded(&front.origin), &encoded(&emulator));
    let (status, headers, reply) = forward(&address, &head, &body).await;
    let reply = String::from_utf8(reply)
        .unwrap()
        .replace(&emulator, &front.origin);
    let mut answer = Response::new(Body::from(reply));
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// An HTTP proxy that connects every tunnel to one server, and answers nothing else.
pub(crate) struct HttpProxy {
    pub(crate) address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl HttpProxy {
    pub(crate) fn start(listener: TcpListener, to: SocketAddr) -> Self {
        let address = listener.local_addr().unwrap();
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
                    let is_tunnel = head.starts_with("CONNECT ");
                    seen.lock().unwrap().push(head);
                    if !is_tunnel {
                        let refusal = b"HTTP/1.1 502 No Tunnel\r\ncontent-length: 0\r\n\r\n";
                        client.write_all(refusal).await.unwrap();
                        return;
                    }
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                    let mut server = TcpStream::connect(to).await.unwrap();
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

    /// The head of each request so far.
    pub(crate) fn heads(&self) -> Vec<String> {
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
