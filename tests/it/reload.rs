//! Settings that change while the proxy serves: who notices, and who must not.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use lakebase_proxy::{
    app::{App, AppError, Reloader},
    config::{Change, Environment, PortSetting, Settings, Source},
    emulator::Emulator,
    protocol::error::ErrorFields,
    telemetry::labels::{PoolClose, PoolServer, ReloadOutcome},
};
use tempfile::TempDir;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    harness::{
        self, TIMEOUT,
        binary::Binary,
        eventually,
        port::ReservedPort,
        until_running,
        wire::{SSL_REQUEST, Wire, cancel, message, sync, text},
        within,
    },
    process::Signal,
};

/// A proxy with a file of settings, in this process.
struct Setup {
    running: App,
    reloader: Reloader,
    file: PathBuf,
    _directory: TempDir,
}

/// The password that the proxy gives to its own clients.
async fn known_password(running: &App) -> String {
    let password = running.proxy_address().await.unwrap().password;
    secrecy::ExposeSecret::expose_secret(&password.unwrap()).to_owned()
}

impl Setup {
    async fn start(emulator: &Emulator, file: &str) -> Self {
        Self::with(emulator, file, &[]).await
    }

    async fn with(emulator: &Emulator, text: &str, variables: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("proxy.toml");
        fs::write(&file, text).unwrap();
        let flags = Settings {
            port: Some(PortSetting::Port(0)),
            http_port: Some(PortSetting::None),
            config_file: Some(file.clone()),
            ..Settings::default()
        };
        let theirs = emulator.environment().into_iter();
        let theirs = theirs.map(|(name, value)| (name.to_owned(), value));
        let ours = variables.iter();
        let ours = ours.map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let environment = Environment::from_variables(theirs.chain(ours));
        let source = Source::new(flags, environment);
        let config = source.load().unwrap();
        let running = App::start(config.clone()).await.unwrap();
        let credentials = running.credentials().get(Instant::now() + TIMEOUT);
        credentials.await.unwrap();
        Self {
            reloader: running.reloader(source, config),
            running,
            file,
            _directory: directory,
        }
    }

    async fn reload(&mut self, text: &str) -> Result<Option<Change>, AppError> {
        fs::write(&self.file, text).unwrap();
        within("the reload", self.reloader.reload()).await
    }

    /// Reloads, and something must change.
    async fn change(&mut self, text: &str) -> Change {
        let change = self.reload(text).await.unwrap();
        change.expect("something has changed")
    }

    fn address(&self) -> SocketAddr {
        self.running.addresses().postgres().expect("by TCP")
    }

    fn reloads(&self, outcome: ReloadOutcome) -> u64 {
        self.running.metrics().process.config_reloads[outcome].get()
    }
}

async fn session(address: SocketAddr) -> Wire {
    let mut wire = Wire::dial(address).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.welcome().await;
    wire
}

async fn refusal(address: SocketAddr) -> ErrorFields {
    let mut wire = Wire::dial(address).await;
    wire.startup(&[("user", "anyone")]).await;
    wire.refusal().await
}

fn table(emulator: &Emulator, listen: u16) -> String {
    let variables = emulator.environment();
    let of = |wanted: &str| {
        let found = variables.iter().find(|(name, _)| *name == wanted);
        found.map(|(_, value)| value.clone()).unwrap()
    };
    format!(
        "[[endpoint]]\nname = \"{}\"\nhost = \"{}\"\nport = {}\nuser = \"{}\"\nlisten = {listen}\n",
        of("ENDPOINT_NAME"),
        of("PGHOST"),
        of("PGPORT"),
        of("PGUSER"),
    )
}

#[tokio::test]
async fn a_new_limit_applies_to_new_clients() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "max_connections = 2").await;
    let mut held = [
        session(setup.address()).await,
        session(setup.address()).await,
    ];
    assert_eq!(refusal(setup.address()).await.code, "53300");

    assert_eq!(
        setup.change("max_connections = 1").await.applied,
        ["max_connections"]
    );
    for wire in &mut held {
        assert_eq!(wire.value("select 1").await, "1");
    }
    let refused = refusal(setup.address()).await;
    assert!(refused.message.contains("takes 1"), "{refused:?}");

    setup.change("max_connections = 3").await;
    let mut third = session(setup.address()).await;
    assert_eq!(third.value("select 3").await, "3");
    assert_eq!(setup.reloads(ReloadOutcome::Applied), 2);
    setup.running.end_within(TIMEOUT, async {}).await;
}

#[tokio::test]
async fn times_change_for_the_next_client() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "").await;
    let change = setup
        .change("client_login_timeout = 0.05\nmax_sigterm_delay = 3\nexit_zero_on_sigterm = true")
        .await;
    let applied = [
        "client_login_timeout",
        "max_sigterm_delay",
        "exit_zero_on_sigterm",
    ];
    assert_eq!(change.applied, applied);
    let mut silent = Wire::dial(setup.address()).await;
    assert!(
        silent
            .refusal()
            .await
            .message
            .contains("startup message in time")
    );
    assert_eq!(setup.running.grace().as_secs(), 3);
    assert!(setup.running.is_zero_on_sigterm());

    // No client is connected, and the time starts with the reload.
    setup.change("exit_when_idle = 0.05").await;
    within("the end", setup.running.shutdown_requested()).await;
}

#[tokio::test]
async fn a_file_that_cannot_be_used_changes_nothing() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "max_connections = 2").await;
    let port = setup.address().port();
    let taken = format!("max_connections = 1\n{}", table(&emulator, port).repeat(2));
    for (file, reply) in [
        (
            "max_connections = 1\nprot = 7",
            "line 2: unknown field `prot`",
        ),
        ("max_connections = \"many\"", "line 1: "),
        ("max_connections = 1\nlog_filter = \"x=loud\"", "`x=loud`"),
        (
            "max_connections = 1\naddress = \"0.0.0.0\"",
            "other machines",
        ),
        (taken.as_str(), "would both listen on"),
        ("max_connections = 1\nlog_filter = \"\"", "filter is empty"),
        (
            "max_connections = 1\nclient_tls_cert = \"/c\"\nclient_tls_key = \"/k\"",
            "`/c`",
        ),
    ] {
        let error = setup.reload(file).await.unwrap_err();
        assert!(error.to_string().contains(reply), "{error}");
        assert_eq!(
            setup
                .running
                .metrics()
                .process
                .config_last_reload_successful
                .get(),
            0
        );
    }
    assert_eq!(setup.reloads(ReloadOutcome::Refused), 7);
    assert_eq!(setup.running.endpoints().now().len(), 1);
    let _held = [
        session(setup.address()).await,
        session(setup.address()).await,
    ];

    let same = setup.reload("max_connections = 2").await.unwrap();
    assert!(same.is_none());
    assert_eq!(
        setup
            .running
            .metrics()
            .process
            .config_last_reload_successful
            .get(),
        1
    );
    let text = setup.running.metrics().render();
    assert!(
        text.contains("lakebase_proxy_config_reloads_total{outcome=\"unchanged\"} 1"),
        "{text}"
    );
}

#[tokio::test]
async fn settings_that_need_a_restart_are_reported_by_name() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "").await;
    let file = "structured_logs = true\nnotes = true\nnotes_port = 0\nmax_connections = 9";
    let change = setup.change(file).await;
    assert_eq!(change.restart, ["notes", "notes_port", "structured_logs"]);
    assert_eq!(change.applied, ["max_connections"]);
    // Until it is restarted, each time.
    assert_eq!(
        setup.change(file).await.restart,
        ["notes", "notes_port", "structured_logs"]
    );
    assert_eq!(setup.running.addresses().notes, None);
}

#[tokio::test]
async fn endpoints_come_and_go_and_their_sessions_stay() {
    let emulator = harness::emulator().await;
    let port = ReservedPort::new();
    let second = port.address();
    let one = table(&emulator, 0);
    let both = format!("{one}{}", table(&emulator, port.number()));
    let mut setup = Setup::start(&emulator, &one).await;
    let first = setup.address();
    let tasks = setup.running.tasks();

    let change = setup.change(&both).await;
    assert_eq!((change.added.len(), change.removed.len()), (1, 0));
    let mut wire = Wire::dial(second).await;
    wire.startup(&[("user", "anyone")]).await;
    let key = wire.welcome().await.key;
    assert_eq!(wire.value("select 1").await, "1");

    // Its session stays, and can be cancelled; others are sent away.
    setup.change(&one).await;
    let refused = refusal(second).await;
    assert_eq!(refused.code, "57P03");
    assert!(
        refused.message.contains("no longer among the settings"),
        "{refused:?}"
    );
    assert_eq!(wire.value("select 2").await, "2");
    wire.send(&text('Q', "select pg_sleep(60)")).await;
    until_running(&emulator.identities().app.name, 1).await;
    cancel(second, key).await;
    let reply = wire.until('Z').await;
    assert!(
        reply
            .iter()
            .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
    );

    // It may come back while a client is connected.
    setup.change(&both).await;
    assert_eq!(setup.running.endpoints().now().len(), 2);
    let mut another = session(second).await;
    assert_eq!(another.value("select 3").await, "3");

    // In another shape it takes the place of the old one, whose sessions stay.
    setup.change(&one).await;
    let read_only = format!("{both}database = \"postgres\"\n");
    setup.change(&read_only).await;
    let mut third = session(second).await;
    assert_eq!(third.value("select current_database()").await, "postgres");
    assert_eq!(wire.value("select 4").await, "4");

    // With the last session goes the rest of it.
    setup.change(&one).await;
    drop((wire, another, third));
    eventually("the endpoints are gone", async || {
        (setup.running.endpoints().now().len() == 1).then_some(())
    })
    .await;
    eventually("the port is free", async || {
        tokio::net::TcpStream::connect(second)
            .await
            .is_err()
            .then_some(())
    })
    .await;
    eventually("their tasks have ended", async || {
        (setup.running.tasks() == tasks).then_some(())
    })
    .await;
    let mut wire = session(first).await;
    assert_eq!(wire.value("select 5").await, "5");
}

#[tokio::test]
async fn a_removed_endpoint_releases_its_port_and_others_keep_theirs() {
    let emulator = harness::emulator().await;
    let reserved = ReservedPort::new();
    let second = reserved.address();
    let one = format!("allow_remote = true\n{}", table(&emulator, 0));
    let wide = |port: u16| {
        let table = table(&emulator, port);
        table.replace(
            &format!("listen = {port}"),
            &format!("listen = \"0.0.0.0:{port}\""),
        )
    };
    let both = format!("{one}{}", table(&emulator, second.port()));
    let mut setup = Setup::start(&emulator, &both).await;
    let mut held = session(second).await;

    let moved = setup.change(&format!("{one}{}", wide(second.port()))).await;
    assert!(
        moved.restart[0].starts_with("address, port or unix_socket of endpoint"),
        "{moved:?}"
    );
    assert!(moved.added.is_empty() && moved.removed.is_empty());
    assert_eq!(session(second).await.value("select 1").await, "1");

    setup.change(&one).await;
    let again = setup.change(&format!("{one}{}", wide(second.port()))).await;
    assert_eq!(again.added.len(), 1);
    assert_eq!(session(second).await.value("select 2").await, "2");
    assert_eq!(held.value("select 3").await, "3");
}

#[tokio::test]
async fn a_refused_reload_leaves_nothing_behind() {
    let emulator = harness::emulator().await;
    let holder = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = holder.local_addr().unwrap().port();
    let free = ReservedPort::new();
    let one = table(&emulator, 0);
    let mut setup = Setup::start(&emulator, &one).await;
    let file = format!(
        "{one}[[endpoint]]\nname = \"projects/nowhere/branches/b/endpoints/e\"\nlisten = {}\n\
         [[endpoint]]\nname = \"projects/else/branches/b/endpoints/e\"\nlisten = {taken}\n",
        free.number()
    );
    let error = setup.reload(&file).await.unwrap_err();
    assert!(error.to_string().contains(&taken.to_string()), "{error}");
    assert!(!setup.running.metrics().render().contains("nowhere"));
    assert!(std::net::TcpListener::bind(free.address()).is_ok());
}

#[tokio::test]
async fn changed_client_access_applies_to_the_next_client() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    let mut setup = Setup::start(&emulator, "").await;
    let mut before = session(setup.address()).await;
    let port = setup.address().port();
    let connect = async |password: Option<&str>| {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user("anyone");
        if let Some(password) = password {
            config.password(password);
        }
        let connected = within("a login", config.connect(tokio_postgres::NoTls)).await;
        connected.is_ok()
    };
    let file = format!("local_password_file = {password:?}");
    for word in ["sesame", "open"] {
        fs::write(&password, word).unwrap();
        assert!(setup.change(&file).await.applied.contains(&"local_auth"));
        assert!(connect(Some(word)).await);
        assert!(!connect(None).await && !connect(Some("wrong")).await);
        assert_eq!(known_password(&setup.running).await, word);
    }
    assert_eq!(before.value("select 1").await, "1");
    setup.change("").await;
    assert!(connect(None).await);

    for (file, answer) in [("client_tls = \"off\"", 'N'), ("", 'S')] {
        assert_eq!(setup.change(file).await.applied, ["client_tls"]);
        let mut wire = Wire::dial(setup.address()).await;
        wire.send(&SSL_REQUEST).await;
        assert_eq!(wire.byte().await, answer, "{file}");
    }
    assert_eq!(before.value("select 2").await, "2");
}

#[tokio::test]
async fn the_permissions_of_a_unix_socket_follow_the_settings() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("unix_socket = {:?}\n", directory.path());
    let mut setup = Setup::start(&emulator, &socket).await;
    let path = setup.running.addresses().endpoints[0].unix[0].clone();
    let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    for (more, expected) in [
        ("unix_socket_allowed_uids = [7]", 0o666),
        ("unix_socket_mode = \"0660\"", 0o660),
        ("", 0o600),
    ] {
        let change = setup.change(&format!("{socket}{more}")).await;
        assert!(change.applied.contains(&"unix_socket_mode"), "{change:?}");
        assert_eq!(mode(), expected, "{more}");
    }
}

#[tokio::test]
async fn a_pipe_in_the_place_of_the_file_is_refused_and_not_waited_for() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "max_connections = 2").await;
    fs::remove_file(&setup.file).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(&setup.file)
        .status();
    assert!(made.unwrap().success());
    let error = within("the reload", setup.reloader.reload())
        .await
        .unwrap_err();
    assert!(error.hint().unwrap().contains("not a pipe"), "{error}");
    assert_eq!(session(setup.address()).await.value("select 1").await, "1");
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_found_is_added_all_the_same() {
    let emulator = harness::emulator().await;
    let port = ReservedPort::new();
    let one = table(&emulator, 0);
    let mut setup = Setup::start(&emulator, &one).await;
    let lost = format!(
        "{one}[[endpoint]]\nname = \"projects/nowhere/branches/b/endpoints/e\"\nlisten = {}\n",
        port.number()
    );
    setup.change(&lost).await;
    let refused = refusal(port.address()).await;
    assert!(refused.message.contains("projects/nowhere"), "{refused:?}");
    assert_eq!(session(setup.address()).await.value("select 1").await, "1");
}

#[tokio::test]
async fn another_file_of_roots_is_for_the_next_connection() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let roots = directory.path().join("roots.pem");
    fs::copy(emulator.ca_file(), &roots).unwrap();
    let variables = [("PGSSLROOTCERT", roots.to_str().unwrap())];
    let mut setup = Setup::with(&emulator, "", &variables).await;
    let mut before = session(setup.address()).await;

    let stranger = rcgen::generate_simple_self_signed(vec!["stranger".to_owned()]).unwrap();
    fs::write(&roots, stranger.cert.pem()).unwrap();
    assert_eq!(setup.change("").await.applied, ["PGSSLROOTCERT"]);
    let refused = refusal(setup.address()).await;
    assert!(refused.message.contains("certificate"), "{refused:?}");
    assert_eq!(before.value("select 1").await, "1");

    fs::write(&roots, "nothing").unwrap();
    let error = setup.reload("").await.unwrap_err();
    assert!(
        error.to_string().starts_with("cannot set up TLS"),
        "{error}"
    );

    fs::copy(emulator.ca_file(), &roots).unwrap();
    setup.change("").await;
    assert_eq!(session(setup.address()).await.value("select 2").await, "2");
    assert!(setup.reload("").await.unwrap().is_none());
}

/// Each was once read to its end, or waited for, on a thread that serves clients.
#[tokio::test]
async fn a_device_or_a_pipe_in_the_place_of_any_file_is_refused_and_not_waited_for() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let pipe = at("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let roots = at("roots.pem");
    fs::copy(emulator.ca_file(), &roots).unwrap();
    let variables = [("PGSSLROOTCERT", roots.to_str().unwrap())];
    let mut setup = Setup::with(&emulator, "", &variables).await;
    let mut before = session(setup.address()).await;
    for other in [Path::new("/dev/zero"), &pipe] {
        fs::remove_file(&roots).unwrap();
        symlink(other, &roots).unwrap();
        let error = setup.reload("").await.unwrap_err();
        assert!(
            error.to_string().starts_with("cannot set up TLS"),
            "{error}"
        );
        fs::remove_file(&roots).unwrap();
        fs::copy(emulator.ca_file(), &roots).unwrap();
        for settings in [
            "client_tls_cert = PATH\nclient_tls_key = PATH",
            "local_password_file = PATH",
        ] {
            let settings = settings.replace("PATH", &format!("{other:?}"));
            let error = setup.reload(&settings).await.unwrap_err();
            assert!(!error.to_string().is_empty(), "{settings}");
        }
        assert_eq!(before.value("select 1").await, "1");
    }
    setup.reload("").await.unwrap();
    assert_eq!(session(setup.address()).await.value("select 2").await, "2");
}

/// Clients that query without a pause, and what became of them.
struct Load {
    stop: Arc<AtomicBool>,
    queries: Arc<AtomicUsize>,
    clients: JoinSet<()>,
}

impl Load {
    async fn start(address: SocketAddr, clients: usize) -> Self {
        let (stop, queries) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let mut set = JoinSet::new();
        for _ in 0..clients {
            let mut wire = session(address).await;
            let (stop, queries) = (Arc::clone(&stop), Arc::clone(&queries));
            set.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(wire.value("select 42").await, "42");
                    queries.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self {
            stop,
            queries,
            clients: set,
        }
    }

    /// Ends it; a client that was dropped on the way fails the test.
    async fn end(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = within("the clients", self.clients.join_next()).await {
            client.expect("no client is dropped");
        }
        self.queries.load(Ordering::Relaxed)
    }
}

fn descriptors(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}

#[tokio::test]
async fn a_hundred_reloads_under_load_drop_no_session_and_leak_nothing() {
    let emulator = harness::emulator().await;
    let one = table(&emulator, 0);
    let port = ReservedPort::new();
    let mut setup = Setup::start(&emulator, &one).await;
    let tasks = setup.running.tasks();
    let load = Load::start(setup.address(), 8).await;
    for round in 0..50 {
        let both = format!(
            "max_connections = {}\n{one}{}",
            100 + round,
            table(&emulator, port.number())
        );
        assert_eq!(setup.change(&both).await.added.len(), 1);
        if round % 10 == 0 {
            assert_eq!(session(port.address()).await.value("select 1").await, "1");
        }
        assert_eq!(setup.change(&one).await.removed.len(), 1);
    }
    assert!(load.end().await > 0);
    assert_eq!(setup.reloads(ReloadOutcome::Applied), 100);
    eventually("tasks and endpoints are what they were", async || {
        let is_back = setup.running.tasks() == tasks && setup.running.endpoints().now().len() == 1;
        is_back.then_some(())
    })
    .await;
    let text = setup.running.metrics().render();
    let shown = text
        .matches("lakebase_proxy_client_connections_opened_total{")
        .count();
    assert_eq!(shown, 1, "endpoints that are gone are not shown");
}

#[tokio::test]
async fn a_hundred_hangups_under_load_leave_no_descriptor_behind() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("proxy.toml");
    let base = table(&emulator, 0);
    fs::write(&file, format!("max_connections = 50\n{base}")).unwrap();
    let flags = ["--config-file", file.to_str().unwrap()];
    let mut binary = Binary::serve(&emulator, &flags).await;
    let load = Load::start(binary.postgres, 4).await;
    let port = ReservedPort::new();
    let reload = async |binary: &mut Binary, text: &str| {
        fs::write(&file, text).unwrap();
        binary.signal(Signal::HUP);
        binary.until("settings reloaded").await
    };
    let mut before = 0;
    for round in 0..50 {
        let both = format!("{base}{}", table(&emulator, port.number()));
        let reply = reload(
            &mut binary,
            &format!("max_connections = {}\n{both}", 60 + round),
        )
        .await;
        assert!(
            reply["applied"]
                .as_str()
                .unwrap()
                .contains("max_connections"),
            "{reply}"
        );
        reload(&mut binary, &format!("max_connections = 50\n{base}")).await;
        if round == 0 {
            binary.until("after its last session ended").await;
            before = descriptors(binary.process());
        }
    }
    eventually("no more descriptors than before", async || {
        (descriptors(binary.process()) <= before).then_some(())
    })
    .await;
    assert!(load.end().await > 0);
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
}

/// Writes a version of a file as the kubelet does, and turns the links to it.
fn mount(directory: &Path, version: &str, text: &str) {
    fs::create_dir(directory.join(version)).unwrap();
    fs::write(directory.join(version).join("proxy.toml"), text).unwrap();
    symlink(version, directory.join("..tmp")).unwrap();
    fs::rename(directory.join("..tmp"), directory.join("..data")).unwrap();
}

#[tokio::test]
async fn a_config_map_that_changes_is_read_again() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    mount(directory.path(), "1", "max_connections = 50");
    let file = directory.path().join("proxy.toml");
    symlink("..data/proxy.toml", &file).unwrap();
    let flags = ["--watch-config", "--config-file", file.to_str().unwrap()];
    let mut binary = Binary::serve(&emulator, &flags).await;
    mount(directory.path(), "2", "max_connections = 0.5");
    let error = binary.until("settings not reloaded").await;
    assert!(
        error["error"].as_str().unwrap().contains("line 1"),
        "{error}"
    );
    mount(
        directory.path(),
        "3",
        "max_connections = 1\nlog_filter = \"warn,lakebase_proxy=debug\"",
    );
    let reply = binary.until("settings reloaded").await;
    assert_eq!(reply["applied"], "max_connections, log_filter");
    let _one = session(binary.postgres).await;
    assert_eq!(refusal(binary.postgres).await.code, "53300");
    binary.find("session begins").await;
}

#[tokio::test]
async fn a_change_during_the_start_is_not_missed() {
    let emulator = harness::emulator().await;
    let file = |limit: u32| format!("watch_config = true\nmax_connections = {limit}");
    let setup = Setup::start(&emulator, &file(50)).await;
    fs::write(&setup.file, file(1)).unwrap();
    setup.running.reload_on(setup.reloader, None);
    let reloads = &setup.running.metrics().process.config_reloads;
    eventually("the change is in force", async || {
        (reloads[ReloadOutcome::Applied].get() == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_password_file_that_changes_is_read_again() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let password = directory.path().join("password");
    fs::write(&password, "sesame").unwrap();
    let file = format!("watch_config = true\nlocal_password_file = {password:?}");
    let setup = Setup::start(&emulator, &file).await;
    setup.running.reload_on(setup.reloader, None);
    fs::write(&password, "open").unwrap();
    eventually("the new one is known", async || {
        (known_password(&setup.running).await == "open").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_hangup_without_a_change_is_no_event() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    let mut wire = session(binary.postgres).await;
    binary.signal(Signal::HUP);
    binary.until("nothing has changed").await;
    assert_eq!(wire.value("select 1").await, "1");
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
}

#[tokio::test]
async fn a_smaller_pool_closes_what_is_idle_and_the_rest_as_it_returns() {
    let emulator = harness::emulator().await;
    let file = |size: u32| {
        format!("pool_mode = 'session'\nspare_pool_size = 0\ndefault_pool_size = {size}\n")
    };
    let mut setup = Setup::start(&emulator, &file(20)).await;
    let metrics = Arc::clone(setup.running.metrics());
    let until = async |idle: i64, leased: i64| {
        eventually("the connections", async || {
            let servers = &metrics.pool_servers;
            let now = (
                servers[PoolServer::Idle].get(),
                servers[PoolServer::Leased].get(),
            );
            (now == (idle, leased)).then_some(())
        })
        .await;
    };
    let mut sessions = Vec::new();
    for _ in 0..12 {
        sessions.push(session(setup.address()).await);
    }
    sessions.truncate(8);
    until(4, 8).await;
    setup.change(&file(5)).await;
    // More than the new size are in use.
    until(0, 8).await;
    for session in &mut sessions {
        assert_eq!(session.value("select 1").await, "1");
    }
    drop(sessions);
    until(5, 0).await;
    // Among them the first one, of a client whose database does not exist.
    eventually("seven are closed", async || {
        (metrics.pool_closes[PoolClose::Surplus].get() == 7).then_some(())
    })
    .await;
    let mut after = session(setup.address()).await;
    assert_eq!(after.value("select 1").await, "1");
    assert_eq!(emulator.counts().logins, 12);
}

#[tokio::test]
async fn another_pool_mode_is_for_new_clients() {
    let emulator = harness::emulator().await;
    let mut setup = Setup::start(&emulator, "spare_pool_size = 0").await;
    let metrics = Arc::clone(setup.running.metrics());
    let open = || {
        let servers = &metrics.pool_servers;
        servers.values().map(prometheus::IntGauge::get).sum::<i64>()
    };
    let before = session(setup.address()).await;
    setup
        .change("pool_mode = 'session'\nspare_pool_size = 0")
        .await;
    let mut pooled = session(setup.address()).await;
    assert_eq!(open(), 1);
    drop(before);
    eventually("it is closed", async || {
        (metrics.upstream_active.get() == 1).then_some(())
    })
    .await;
    setup.change("spare_pool_size = 0").await;
    let own = session(setup.address()).await;
    assert_eq!((open(), metrics.upstream_active.get()), (1, 2));
    assert_eq!(pooled.value("select 1").await, "1");
    drop((pooled, own));
    eventually("no connection is left without a use", async || {
        (metrics.upstream_active.get() == 0).then_some(())
    })
    .await;
}

/// The unnamed statement of a client that shared the connection.
#[tokio::test]
async fn what_was_prepared_in_one_pool_mode_is_no_clients_in_another() {
    let emulator = harness::emulator().await;
    let file =
        |mode: &str| format!("pool_mode = '{mode}'\nspare_pool_size = 0\ndefault_pool_size = 1\n");
    let mut setup = Setup::start(&emulator, &file("transaction")).await;
    let metrics = Arc::clone(setup.running.metrics());
    let mut one = session(setup.address()).await;
    one.send(&[message('P', b"\0select 'secret'\0\0\0"), sync()].concat())
        .await;
    one.until('Z').await;
    eventually("it is given back", async || {
        (metrics.pool_servers[PoolServer::Leased].get() == 0).then_some(())
    })
    .await;
    setup.change(&file("session")).await;
    let mut other = session(setup.address()).await;
    let execute = [
        message('B', b"\0\0\0\0\0\0\0\0"),
        message('E', b"\0\0\0\0\0"),
        sync(),
    ];
    other.send(&execute.concat()).await;
    assert_eq!(other.until('Z').await[0].error().code, "26000");
}

/// Connected clients keep their mode, and the connections of a larger pool close as they come to rest.
#[tokio::test]
async fn clients_that_share_connections_outlive_reloads() {
    let emulator = harness::emulator().await;
    let file = |mode: &str, size: u32| {
        format!("pool_mode = '{mode}'\nspare_pool_size = 0\ndefault_pool_size = {size}\n")
    };
    let mut setup = Setup::start(&emulator, &file("transaction", 6)).await;
    let metrics = Arc::clone(setup.running.metrics());
    let until = async |idle: i64, leased: i64| {
        eventually("the connections", async || {
            let servers = &metrics.pool_servers;
            let now = (
                servers[PoolServer::Idle].get(),
                servers[PoolServer::Leased].get(),
            );
            (now == (idle, leased)).then_some(())
        })
        .await;
    };
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(session(setup.address()).await);
    }
    for client in &mut clients[..6] {
        client.query("begin").await;
    }
    for client in &mut clients[..2] {
        client.query("commit").await;
    }
    until(2, 4).await;
    setup.change(&file("transaction", 2)).await;
    until(0, 4).await;
    for client in &mut clients[2..6] {
        assert_eq!(client.value("select 1").await, "1");
        client.query("commit").await;
    }
    until(2, 0).await;
    for client in &mut clients {
        assert_eq!(client.value("select 1").await, "1");
    }
    // A new client has a connection of its own, while the others go on as they were.
    for (mode, leased) in [("session", 1), ("none", 0), ("transaction", 0)] {
        setup.change(&file(mode, 2)).await;
        let mut own = session(setup.address()).await;
        own.query("select 1").await;
        // A client is answered before it parts with its connection.
        eventually(mode, async || {
            (metrics.pool_servers[PoolServer::Leased].get() == leased).then_some(())
        })
        .await;
        for client in &mut clients {
            assert_eq!(client.value("select 1").await, "1", "{mode}");
        }
    }
}
