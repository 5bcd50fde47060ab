//! Clients that come by a Unix socket.

use std::{
    fs,
    num::NonZeroU16,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use lakebase_proxy::{
    config::{EndpointSettings, ModeSetting, PortSetting},
    telemetry::labels::Reason,
};
use tempfile::TempDir;
use tokio::net::UnixStream;

use crate::process::Signal;
use crate::{
    harness::{
        self, Proxy,
        binary::{self, Binary},
        eventually,
        wire::{SSL_REQUEST, Wire, cancel_request, text},
        within,
    },
    web,
};

/// A user that owns nothing here.
const OTHER_UID: u32 = 65_534;

fn socket(directory: &TempDir, port: u16) -> PathBuf {
    directory.path().join(format!(".s.PGSQL.{port}"))
}

async fn dial(path: &Path) -> Wire<UnixStream> {
    Wire::of(UnixStream::connect(path).await.unwrap())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn libpq_finds_it_beside_tcp_and_it_goes_with_the_proxy() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.unix_socket = Some(directory.path().to_owned());
    })
    .await;
    let port = proxy.address().port();
    let path = socket(&directory, port);
    assert_eq!(mode(&path), 0o600);

    let mut config = tokio_postgres::Config::new();
    config.host_path(directory.path()).port(port).user("anyone");
    let client = proxy.try_client(&config).await.unwrap();
    let row = client.query_one("select current_user::text", &[]).await;
    assert_eq!(
        row.unwrap().get::<_, String>(0),
        emulator.identities().app.name
    );
    drop(client);
    // The same sessions, whichever way a client comes: a key works from either.
    let mut wire = dial(&path).await;
    wire.send(&SSL_REQUEST).await;
    assert_eq!(wire.byte().await, 'N', "no TLS on a Unix socket");
    wire.startup(&[("user", "anyone")]).await;
    let key = wire.welcome().await.key;
    wire.send(&text('Q', "select pg_sleep(60)")).await;
    harness::until_running(&emulator.identities().app.name, 1).await;
    let mut cancel = dial(&path).await;
    cancel.send(&cancel_request(key)).await;
    cancel.closed().await;
    let reply = wire.until('Z').await;
    assert!(
        reply
            .iter()
            .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
    );
    drop(wire);

    proxy.end(std::future::pending()).await;
    eventually("the socket is removed", async || {
        (!path.exists()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn it_may_be_the_only_listener_for_a_child_and_the_notes_page() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let place = directory.path().to_str().unwrap();
    let flags = [
        "--port",
        "none",
        "--unix-socket",
        place,
        "--notes",
        "--notes-port",
        "0",
    ];
    let mut binary = Binary::serve(&emulator, &flags).await;
    let path = socket(&directory, 5432);
    let line = binary.logged("listening for Postgres clients").await;
    assert_eq!(line["socket"], path.to_str().unwrap());
    let mut wire = dial(&path).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    assert_eq!(wire.value("select 1").await, "1");
    let notes = binary.logged("serving the notes page").await;
    let page = web::get(notes["address"].as_str().unwrap().parse().unwrap(), "/").await;
    assert!(page.body.contains("Recent Notes"), "{}", page.body);
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
    assert!(!path.exists());

    let script = "echo \"$PGHOST $PGPORT $DATABASE_URL\"; psql -XAtc 'select 6 * 7' \"$DATABASE_URL\"; psql -XAtc 'select 7 * 7'";
    let mut exec = binary::command(&["exec", "--port", "none", "--unix-socket", place]);
    exec.args(["--", "sh", "-c", script])
        .stdout(std::process::Stdio::piped())
        .envs(emulator.environment());
    let output = within("exec ends", exec.output()).await.unwrap();
    let reply = String::from_utf8(output.stdout).unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(
        reply.starts_with(&format!("{place} 5432 postgresql://")),
        "{reply}{log}"
    );
    assert!(reply.ends_with("\n42\n49\n"), "{reply}{log}");
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let place = directory.path().to_str().unwrap();
    let path = socket(&directory, 5432);
    drop(UnixListener::bind(&path).unwrap());
    let flags = ["--port", "none", "--unix-socket", place];
    let binary = Binary::serve(&emulator, &flags).await;
    drop(UnixStream::connect(&path).await.unwrap());

    let refused = async |place: &str| {
        let mut second = binary::command(&["serve", "--port", "none", "--http-port", "none"]);
        second
            .args(["--unix-socket", place])
            .envs(emulator.environment());
        let output = within("it ends", second.output()).await.unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let reply = refused(place).await;
    assert!(
        reply.contains("--unix-socket") && reply.contains("\nhint: "),
        "{reply}"
    );
    assert!(
        UnixStream::connect(&path).await.is_ok(),
        "the first still serves"
    );
    assert!(refused(&"x".repeat(120)).await.contains("bytes long"));
    assert!(
        refused("/no/such/place")
            .await
            .contains("make the directory")
    );

    // One that another has put there is not ours to remove.
    fs::remove_file(&path).unwrap();
    let _successor = UnixListener::bind(&path).unwrap();
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
    assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
}

/// By a cleaner of /tmp, or with its directory: the proxy listened on, and no client found it.
#[tokio::test]
async fn a_removed_socket_is_recreated_and_fails_readiness_until_then() {
    let emulator = harness::emulator().await;
    let parent = TempDir::new().unwrap();
    let directory = parent.path().join("sockets");
    fs::create_dir(&directory).unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.unix_socket = Some(directory.clone());
        settings.unix_socket_mode = Some(ModeSetting(0o660));
        settings.http_port = Some(PortSetting::Port(0));
    })
    .await;
    let path = directory.join(format!(".s.PGSQL.{}", proxy.address().port()));
    let mut early = dial(&path).await;
    early.startup(&[("user", "anyone")]).await;
    early.welcome().await;
    let readiness = async || web::get(proxy.http(), "/readiness").await;
    assert_eq!(readiness().await.status, 200);

    fs::remove_file(&path).unwrap();
    eventually("it is there again", async || path.exists().then_some(())).await;
    let mut late = eventually("a client finds it", async || {
        UnixStream::connect(&path).await.ok().map(Wire::of)
    })
    .await;
    late.startup(&[("user", "anyone")]).await;
    late.welcome().await;
    assert_eq!(mode(&path), 0o660);
    assert_eq!(early.value("select 1").await, "1", "sessions go on");

    fs::remove_dir_all(&directory).unwrap();
    let words = format!("the Unix socket `{}` is gone", path.display());
    eventually("readiness fails", async || {
        let answer = readiness().await;
        (answer.status == 503 && answer.body.contains(&words)).then_some(())
    })
    .await;
    fs::create_dir(&directory).unwrap();
    eventually("it is ready again", async || {
        (readiness().await.status == 200).then_some(())
    })
    .await;
    drop(UnixStream::connect(&path).await.unwrap());
    proxy.end(std::future::pending()).await;
    eventually("the socket is removed", async || {
        (!path.exists()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn every_endpoint_has_a_socket_of_its_own_number() {
    let emulator = harness::emulator().await;
    let directory = TempDir::new().unwrap();
    let name = emulator
        .environment()
        .into_iter()
        .find_map(|(name, value)| (name == "ENDPOINT_NAME").then_some(value))
        .unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.port = Some(PortSetting::None);
        settings.unix_socket = Some(directory.path().to_owned());
        settings.unix_socket_mode = Some(ModeSetting(0o660));
        let endpoints = [name.clone(), format!("{name}?port=7000")];
        settings.endpoints = endpoints
            .map(|text| EndpointSettings {
                port: NonZeroU16::new(emulator.pg_port()),
                ..text.parse().unwrap()
            })
            .into();
    })
    .await;
    for port in [5432, 7000] {
        let path = socket(&directory, port);
        assert_eq!(mode(&path), 0o660);
        let mut wire = dial(&path).await;
        wire.startup(&[("user", "anyone")]).await;
        wire.welcome().await;
    }
    proxy.until_quiet().await;
}

#[tokio::test]
async fn the_user_is_identified_by_the_kernel() {
    if !is_root() {
        // Only root can connect as another user.
        return;
    }
    let emulator = harness::emulator().await;
    let as_other = async |directory: &TempDir| {
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut psql = tokio::process::Command::new("psql");
        psql.args(["-XAtc", "select 42", "-p", "5432", "-h"])
            .arg(directory.path())
            .env("PATH", harness::path())
            .env("PGUSER", "anyone")
            .env("PGCONNECT_TIMEOUT", "30")
            .current_dir("/")
            .uid(OTHER_UID)
            .gid(OTHER_UID);
        let output = within("psql ends", psql.output()).await.unwrap();
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    let with = async |directory: &TempDir, uids: Option<Vec<u32>>| {
        Proxy::with(&emulator, |settings| {
            settings.port = Some(PortSetting::None);
            settings.unix_socket = Some(directory.path().to_owned());
            settings.unix_socket_allowed_uids = uids;
        })
        .await
    };

    let directory = TempDir::new().unwrap();
    let proxy = with(&directory, Some(vec![OTHER_UID - 1])).await;
    let reply = as_other(&directory).await;
    assert!(reply.contains("the user with uid 65534 may not"), "{reply}");
    assert!(reply.contains("--unix-socket-allowed-uids"), "{reply}");
    let refused = &proxy.metrics().clients_refused[Reason::LocalAuth];
    assert_eq!(refused.get(), 1);
    assert_eq!(emulator.counts().dials, 0);
    // Our own user is not on the list either.
    let mut wire = dial(&socket(&directory, 5432)).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;

    let directory = TempDir::new().unwrap();
    let _proxy = with(&directory, Some(vec![OTHER_UID])).await;
    assert_eq!(as_other(&directory).await, "42\n");

    let directory = TempDir::new().unwrap();
    let _proxy = with(&directory, None).await;
    let reply = as_other(&directory).await;
    assert!(reply.contains("Permission denied"), "0600: {reply}");
}

fn is_root() -> bool {
    // Only root may give a file away.
    let file = tempfile::NamedTempFile::new().unwrap();
    chown(file.path(), Some(OTHER_UID), None).is_ok()
}
