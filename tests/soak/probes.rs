//! Probes beside thousands of clients, in front of a scripted server.

use std::{io::Write as _, net::SocketAddr, path::Path, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{process::Process, wire::Wire};

const CLIENTS: usize = 3000;
/// Clients that query all the time.
const BUSY: usize = 100;
const PROBES: usize = 100;
/// What a probe may take.
const PROMPT: Duration = Duration::from_millis(100);
const TIMEOUT: Duration = Duration::from_mins(1);

/// AuthenticationOk, a cancel key, ReadyForQuery.
const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x07\0\0\0\x09Z\0\0\0\x05I";
/// An empty answer to every query.
const ANSWER: &[u8] = b"C\0\0\0\x0dSELECT 0\0Z\0\0\0\x05I";

/// A server that accepts every client and answers each message.
async fn server(listener: TcpListener) {
    let mut sessions = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        sessions.spawn(async move {
            let length = stream.read_u32().await?;
            let mut startup = vec![
                0;
                usize::try_from(length)
                    .unwrap_or_default()
                    .saturating_sub(4)
            ];
            stream.read_exact(&mut startup).await?;
            stream.write_all(WELCOME).await?;
            while stream.read_u8().await? == b'Q' {
                let length = stream.read_u32().await?;
                let mut query = vec![
                    0;
                    usize::try_from(length)
                        .unwrap_or_default()
                        .saturating_sub(4)
                ];
                stream.read_exact(&mut query).await?;
                stream.write_all(ANSWER).await?;
            }
            Ok::<_, std::io::Error>(())
        });
        while sessions.try_join_next().is_some() {}
    }
}

/// How long one probe takes.
async fn probe(http: SocketAddr, path: &str) -> Duration {
    let began = Instant::now();
    let exchange = async {
        let mut stream = TcpStream::connect(http).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    };
    timeout(TIMEOUT, exchange)
        .await
        .expect("a probe is answered");
    began.elapsed()
}

pub(crate) async fn beside_thousands(program: &Path) {
    rlimit::increase_nofile_limit(u64::MAX).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut background = JoinSet::new();
    background.spawn(server(listener));
    let mut settings = tempfile::NamedTempFile::new().unwrap();
    writeln!(
        settings,
        "[[endpoint]]\nhost = \"127.0.0.1\"\nport = {port}\nuser = \"soak\"\ncredential = {{ password_env = \"SOAK_PASSWORD\" }}"
    )
    .unwrap();
    let file = settings.path().to_str().unwrap().to_owned();
    let variables = [("SOAK_PASSWORD", "secret"), ("PGSSLMODE", "disable")];
    let arguments = [
        "serve",
        "--port",
        "0",
        "--http-port",
        "0",
        "--max-connections",
        "5000",
        "--config-file",
        &file,
    ];
    let proxy = Process::spawn(program, variables, &arguments);
    let postgres = proxy.address("listening for Postgres clients").await;
    let http = proxy.address("serving health and metrics").await;

    let mut clients = Vec::with_capacity(CLIENTS);
    for _ in 0..CLIENTS {
        clients.push(Wire::connect(postgres).await.unwrap());
    }
    for mut client in clients.split_off(CLIENTS - BUSY) {
        background.spawn(async move { while let Ok(Ok(_)) = client.query("SELECT 1").await {} });
    }
    for path in ["/liveness", "/readiness", "/metrics"] {
        let mut took = Vec::with_capacity(PROBES);
        for _ in 0..PROBES {
            took.push(probe(http, path).await);
        }
        took.sort();
        let (median, most) = (took[PROBES / 2], took[PROBES - 1]);
        println!(
            "   {path} beside {CLIENTS} clients, {BUSY} of them busy: median {median:?}, longest {most:?}"
        );
        assert!(median < PROMPT, "{path} takes {median:?}");
    }
    drop(clients);
    background.shutdown().await;
    let (status, reply) = proxy.end().await;
    assert_eq!(status.code(), Some(143), "{reply}");
}
