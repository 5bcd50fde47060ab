//! An emulator for one test, over a Postgres that all tests of this process share.

#[path = "../../drivers/tokio_postgres/tls.rs"]
#[allow(dead_code, reason = "shared with the driver, which uses other parts")]
mod tls;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use lakebase_proxy::emulator::{
    Emulator, EmulatorOptions, Identity, LocalPostgres, PostgresSource, Settings,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::OnceCell,
    time::timeout,
};
use tokio_postgres::{Client, Config, Error};
use tokio_util::task::TaskTracker;

pub(crate) use tls::Tls;

/// Longer than anything a test waits for should take, also on a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_mins(1);

/// Apart from the proxy's tests, as these tests write rows. Ends with the process: its watchdog sees to that.
static SERVER: OnceCell<Arc<LocalPostgres>> = OnceCell::const_new();

/// An emulator with its own identities, ports, faults and settings.
pub(crate) async fn start() -> Emulator {
    start_with(|_| {}).await
}

/// The same, with settings changed before it starts.
pub(crate) async fn start_with(change: impl FnOnce(&mut Settings)) -> Emulator {
    let server = SERVER.get_or_init(super::another_server).await;
    let mut options = EmulatorOptions {
        postgres: PostgresSource::Shared(Arc::clone(server)),
        ..EmulatorOptions::default()
    };
    change(&mut options.settings);
    Emulator::start(options).await.unwrap()
}

/// A credential for the app, good for an hour.
pub(crate) fn credential(emulator: &Emulator) -> String {
    credential_of(emulator, &emulator.identities().app)
}

/// A credential for `identity`, good for an hour.
pub(crate) fn credential_of(emulator: &Emulator, identity: &Identity) -> String {
    emulator
        .credential_for(identity, Duration::from_hours(1))
        .unwrap()
}

/// A driver's configuration to connect as the app.
pub(crate) fn config(emulator: &Emulator) -> Config {
    let mut config = Config::new();
    config
        .host("localhost")
        .port(emulator.pg_port())
        .user(&emulator.identities().app.name)
        .dbname("databricks_postgres")
        .password(credential(emulator))
        .ssl_mode(tokio_postgres::config::SslMode::Require);
    config
}

/// Connects straight to the edge, as the app.
pub(crate) async fn connect(emulator: &Emulator) -> Result<Client, Error> {
    connect_as(emulator, &config(emulator)).await
}

/// Connects straight to the edge with `config`.
pub(crate) async fn connect_as(emulator: &Emulator, config: &Config) -> Result<Client, Error> {
    let (client, connection) = config.connect(trust(emulator)).await?;
    TaskTracker::new().spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

/// TLS that trusts this emulator's authority alone.
pub(crate) fn trust(emulator: &Emulator) -> Tls {
    Tls::new(Some(emulator.ca_file().to_owned())).unwrap()
}

/// An answer of an HTTP server.
#[derive(Debug)]
pub(crate) struct HttpAnswer {
    pub(crate) status: u16,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl HttpAnswer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// One request on a connection of its own; `head` is `GET /path` and any header lines.
pub(crate) async fn http(port: u16, head: &str, body: &str) -> std::io::Result<HttpAnswer> {
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let (request, headers) = head.split_once('\n').unwrap_or((head, ""));
        let headers: String = headers
            .lines()
            .map(|line| line.trim().to_owned() + "\r\n")
            .collect();
        let host = if headers.to_lowercase().contains("host:") {
            String::new()
        } else {
            format!("host: 127.0.0.1:{port}\r\n")
        };
        let length = body.len();
        let text = format!(
            "{request} HTTP/1.1\r\n{host}{headers}connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(text.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        let mut lines = head.lines();
        let status = lines
            .next()
            .and_then(|line| line.split(' ').nth(1))
            .unwrap();
        Ok(HttpAnswer {
            status: status.parse().unwrap(),
            headers: lines
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                .collect(),
            body: body.to_owned(),
        })
    };
    timeout(TIMEOUT, exchange).await.expect("an answer in time")
}
