//! The notifications to the service manager, at a real socket, and the units.

use std::{path::Path, time::Duration};

use lakebase_proxy::emulator::Emulator;
use tempfile::TempDir;
use tokio::net::UnixDatagram;

use crate::{
    harness::{
        self,
        binary::{Binary, command},
        eventually,
        port::ReservedPort,
        wire::Wire,
        within,
    },
    process::{Signal, signal},
};

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/systemd");

/// The service manager's end.
struct Manager {
    socket: UnixDatagram,
    path: String,
    _directory: TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        Self {
            socket: UnixDatagram::bind(&path).unwrap(),
            path: path.to_str().unwrap().to_owned(),
            _directory: directory,
        }
    }

    /// The next datagram that is of interest, signs of life left out.
    async fn next(&self) -> String {
        loop {
            let reply = self.anything().await;
            if reply != "WATCHDOG=1" {
                return reply;
            }
        }
    }

    async fn anything(&self) -> String {
        let mut buffer = [0; 4096];
        let length = within("a datagram", self.socket.recv(&mut buffer)).await;
        String::from_utf8(buffer[..length.unwrap()].to_vec()).unwrap()
    }

    /// Waits for this one; what comes before is returned.
    async fn until(&self, wanted: &str) -> Vec<String> {
        let mut before = Vec::new();
        loop {
            let reply = self.next().await;
            if reply.starts_with(wanted) {
                return before;
            }
            before.push(reply);
        }
    }

    async fn serve(&self, emulator: &Emulator, flags: &[&str]) -> Binary {
        let variables = [
            ("NOTIFY_SOCKET", self.path.as_str()),
            ("WATCHDOG_USEC", "300000"),
        ];
        Binary::serve_with(emulator, flags, &variables).await
    }
}

#[tokio::test]
async fn the_service_manager_is_notified_of_start_reload_credential_and_end() {
    let emulator = harness::emulator().await;
    let manager = Manager::new();
    let mut binary = manager.serve(&emulator, &[]).await;
    // The status may come before the start is over, or after.
    let mut before = manager.until("READY=1").await;
    while !before.iter().any(|reply| reply.contains("valid until")) {
        before.push(manager.next().await);
    }
    let last = before.last().unwrap();
    assert!(
        last.starts_with("STATUS=serving; database credential valid until 20"),
        "{before:?}"
    );

    for message in ["nothing has changed", "nothing has changed"] {
        binary.signal(Signal::HUP);
        binary.until(message).await;
        manager.until("RELOADING=1\nMONOTONIC_USEC=").await;
        assert_eq!(manager.next().await, "READY=1");
    }
    binary.signal(Signal::TERM);
    manager.until("STOPPING=1").await;
    assert_eq!(binary.exit_code().await, Some(143));
}

#[tokio::test]
async fn signs_of_life_come_thrice_in_the_time_given() {
    let emulator = harness::emulator().await;
    let manager = Manager::new();
    let binary = manager.serve(&emulator, &[]).await;
    let mut signs = 0;
    while signs < 5 {
        if manager.anything().await == "WATCHDOG=1" {
            signs += 1;
        }
    }
    // A program that stands still gives none.
    binary.signal(Signal::STOP);
    let silence = async {
        loop {
            let next = tokio::time::timeout(Duration::from_millis(600), manager.anything()).await;
            if next.is_err() {
                return;
            }
        }
    };
    within("silence", silence).await;
    binary.signal(Signal::CONT);
    while manager.anything().await != "WATCHDOG=1" {}
}

#[tokio::test]
async fn with_a_connection_test_it_is_ready_only_after_it() {
    let emulator = harness::emulator().await;
    let manager = Manager::new();
    let mut child = command(&[
        "--port",
        "0",
        "--http-port",
        "none",
        "--run-connection-test",
    ])
    .envs(emulator.environment())
    .env("PGDATABASE", "nowhere")
    .env("NOTIFY_SOCKET", &manager.path)
    .spawn()
    .unwrap();
    let reply = manager.until("STOPPING=1").await;
    assert!(
        !reply.iter().any(|reply| reply.contains("READY")),
        "{reply:?}"
    );
    let status = within("the end", child.wait()).await.unwrap();
    assert_eq!(status.code(), Some(1));
}

/// A unit that waits for the proxy must not wait for the network, which may come by that unit.
#[tokio::test]
async fn it_is_ready_without_its_workspace_and_the_status_has_the_reason() {
    let emulator = harness::emulator().await;
    let manager = Manager::new();
    let unused = ReservedPort::new();
    let workspace = format!("http://{}", unused.address());
    let mut command = command(&["serve", "--port", "0", "--http-port", "none"]);
    let _child = command
        .envs(emulator.environment())
        .envs([("DATABRICKS_HOST", workspace.as_str()), ("PGHOST", "")])
        .env("NOTIFY_SOCKET", &manager.path)
        .spawn()
        .unwrap();
    let is_reason = |text: &String| text.contains("cannot reach the workspace");
    let before = manager.until("READY=1").await;
    while !before.iter().any(is_reason) {
        if is_reason(&manager.next().await) {
            break;
        }
    }
}

#[tokio::test]
async fn a_missing_notify_socket_does_not_prevent_serving() {
    let emulator = harness::emulator().await;
    let variables = [("NOTIFY_SOCKET", "/nowhere/at/all")];
    let mut binary = Binary::serve_with(&emulator, &[], &variables).await;
    binary.find("cannot connect to NOTIFY_SOCKET").await;
}

#[tokio::test]
async fn systemd_opens_the_socket_and_the_first_client_starts_it() {
    const ACTIVATE: &str = "/usr/bin/systemd-socket-activate";
    if !Path::new(ACTIVATE).exists() {
        return;
    }
    let emulator = harness::emulator().await;
    let free = ReservedPort::new();
    let address = free.address();
    let program = command(&["--http-port", "none"]);
    let mut activate = tokio::process::Command::new(ACTIVATE);
    activate.arg(format!("--listen={address}"));
    for (name, value) in emulator.environment() {
        activate.arg(format!("--setenv={name}={value}"));
    }
    activate
        .arg(program.as_std().get_program())
        .args(program.as_std().get_args())
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true);
    let mut activated = activate.spawn().unwrap();
    let client = eventually("the port is open", async || {
        tokio::net::TcpStream::connect(address).await.ok()
    })
    .await;
    // Its place in the queue is what starts the proxy.
    let mut wire = Wire::of(client);
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    assert_eq!(wire.value("select 42").await, "42");
    signal(activated.id().expect("it runs"), Signal::TERM);
    let status = within("the end", activated.wait()).await.unwrap();
    assert_eq!(status.code(), Some(143));
}

/// Runs `systemd-analyze`, where there is one.
async fn analyze(arguments: &[&str]) -> Option<String> {
    let mut command = tokio::process::Command::new("systemd-analyze");
    let run = within("systemd-analyze", command.args(arguments).output()).await;
    let output = match run {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => panic!("{error}"),
    };
    let reply = [&output.stdout[..], &output.stderr[..]].concat();
    let reply = String::from_utf8_lossy(&reply).into_owned();
    assert!(output.status.success(), "{arguments:?}: {reply}");
    Some(reply)
}

#[tokio::test]
async fn the_units_are_valid_and_hardened() {
    // The program need not be installed to look at the unit.
    let directory = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let text = std::fs::read_to_string(Path::new(UNITS).join(name)).unwrap();
        let text = text.replace("/usr/local/bin/lakebase-proxy", "/bin/true");
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (service, socket) = (
        copy("lakebase-proxy.service"),
        copy("lakebase-proxy.socket"),
    );
    let Some(reply) = analyze(&["verify", "--man=no", &service, &socket]).await else {
        return;
    };
    // It prints nothing without problems, and some systems' own units have some.
    assert!(!reply.contains("lakebase-proxy"), "{reply}");
    analyze(&["security", "--offline=true", "--threshold=20", &service]).await;
}
