//! Several sockets at once, and sockets that a service manager has opened.

use std::{
    net::{SocketAddr, TcpListener},
    os::{fd::OwnedFd, unix::net::UnixListener},
    process::Stdio,
};

use lakebase_proxy::{
    config::{PortSetting, Settings},
    emulator::Emulator,
};
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
};

use crate::{
    harness::{self, Proxy, binary, eventually, wire::Wire, within},
    process::{Signal, signal},
};

async fn is_served(address: SocketAddr) {
    let mut wire = Wire::dial(address).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    assert_eq!(wire.value("select 1").await, "1");
}

fn has_ipv6() -> bool {
    TcpListener::bind("[::1]:0").is_ok()
}

/// `serve` as a service manager starts it: these sockets passed, from descriptor 0 on, and settings that would be taken
/// without them.
fn activated(
    emulator: &Emulator,
    sockets: [Option<OwnedFd>; 2],
    variables: &[(&str, &str)],
) -> Command {
    let count = sockets.iter().flatten().count().to_string();
    let [first, second] = sockets;
    let mut command = binary::command(&["serve", "--port", "1", "--http-port", "none"]);
    command
        .envs(emulator.environment())
        .envs(variables.iter().copied())
        .env("LISTEN_FDS_FIRST_FD", "0")
        .env("LISTEN_FDS", count)
        .stdin(first.map_or(Stdio::null(), Stdio::from))
        .stdout(second.map_or(Stdio::null(), Stdio::from));
    command
}

async fn failure(mut command: Command) -> String {
    let output = within("it ends", command.output()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

fn start(mut command: Command) -> Child {
    command.stderr(Stdio::inherit()).spawn().unwrap()
}

#[tokio::test]
async fn every_address_is_listened_on_at_one_port() {
    let emulator = harness::emulator().await;
    let mut addresses = vec!["127.0.0.1", "127.0.0.2"];
    if has_ipv6() {
        addresses.push("[::1]");
    }
    // As in a file, where an IPv6 address may be in brackets.
    let listed: Settings = toml::from_str(&format!("address = {addresses:?}")).unwrap();
    let proxy = Proxy::with(&emulator, |settings| settings.address = listed.address).await;
    let port = proxy.address().port();
    for address in addresses {
        is_served(format!("{address}:{port}").parse().unwrap()).await;
    }
}

#[tokio::test]
async fn one_address_that_is_taken_is_named() {
    let emulator = harness::emulator().await;
    let taken = TcpListener::bind("127.0.0.2:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = Proxy::cold(&emulator, &[], |settings| {
        settings.port = Some(PortSetting::Port(address.port()));
        settings.address = Some(vec![
            "127.0.0.3".parse().unwrap(),
            "127.0.0.2".parse().unwrap(),
        ]);
    })
    .await
    .err()
    .unwrap();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert!(error.hint().unwrap().contains("--port"));
}

#[tokio::test]
async fn sockets_of_a_service_manager_take_the_place_of_our_own() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("any name");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    let mut proxy = start(activated(
        &emulator,
        [Some(tcp.into()), Some(unix.into())],
        &[],
    ));
    // No client is refused before it is up: the sockets are the manager's.
    is_served(address).await;
    let mut wire = Wire::of(UnixStream::connect(&path).await.unwrap());
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    drop(wire);
    signal(proxy.id().unwrap(), Signal::TERM);
    let ended = within("it ends", proxy.wait()).await.unwrap();
    assert_eq!(ended.code(), Some(143));
    assert!(path.exists(), "not ours to remove");
}

#[tokio::test]
async fn each_endpoint_gets_the_socket_of_its_name() {
    let emulator = harness::emulator().await;
    let [one, two] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let addresses = [&one, &two].map(|socket| socket.local_addr().unwrap());
    // The second endpoint does not exist, so the error shows which one was used.
    let name = emulator
        .environment()
        .into_iter()
        .find_map(|(name, value)| (name == "ENDPOINT_NAME").then_some(value))
        .unwrap();
    let missing = format!("{name}-missing");
    let tables = [&name, &missing].map(|name| {
        format!(
            "[[endpoint]]\nname = '{name}'\nport = {}\n",
            emulator.pg_port()
        )
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, tables.concat()).unwrap();
    let mut command = activated(
        &emulator,
        [Some(one.into()), Some(two.into())],
        &[("LISTEN_FDNAMES", &format!("{missing}:{name}"))],
    );
    command.arg("--config-file").arg(file.path());
    let _proxy = start(command);
    is_served(addresses[1]).await;
    let refused = eventually("the first is refused", async || {
        let mut wire = Wire::dial(addresses[0]).await;
        wire.startup(&[("user", "anyone")]).await;
        Some(wire.refusal().await)
    });
    assert!(refused.await.message.contains("-missing"));
}

#[tokio::test]
async fn sockets_that_cannot_be_used_are_named() {
    let emulator = harness::emulator().await;
    let open = TcpListener::bind("0.0.0.0:0").unwrap();
    let reply = failure(activated(&emulator, [Some(open.into()), None], &[])).await;
    assert!(reply.contains("--allow-remote"), "{reply}");
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let reply = failure(activated(&emulator, [Some(one.into()), None], &[])).await;
    assert!(
        reply.contains("number 1") && reply.contains("Accept=no"),
        "{reply}"
    );
}

/// `localhost` may mean either: a client would reach the other program, and nothing was logged.
#[tokio::test]
async fn a_taken_ipv6_loopback_beside_a_free_ipv4_one_is_a_warning() {
    if !has_ipv6() {
        return;
    }
    let emulator = harness::emulator().await;
    let taken = TcpListener::bind("[::1]:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut binary = binary::Binary::serve(&emulator, &["--port", &port]).await;
    let line = binary.find("another program listens on this address").await;
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["address"], format!("[::1]:{port}"));
}
