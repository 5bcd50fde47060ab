//! A workspace that is not there when the proxy starts, or for minutes: served from the first second, recovered in a few.

use std::time::Duration;

use futures_util::future::join_all;
use lakebase_proxy::{
    app::App,
    config::{Config, Environment, PortSetting, Settings},
    emulator::{Action, Emulator, Response, Site},
};
use tokio::{
    io::{AsyncReadExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::Instant,
};

use crate::{
    harness::{self, Proxy, binary, eventually, millis, wire::Wire, within},
    web::get,
};

/// From the workspace's coming to service: generous, since the machine may be busy; seconds are meant.
const RECOVERY: Duration = Duration::from_secs(10);

/// The way to an emulator's workspace, closed until it is opened.
struct Network {
    url: String,
    is_open: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Network {
    async fn closed(emulator: &Emulator) -> Self {
        let workspace = emulator.workspace_url();
        let target = workspace.strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (is_open, opened) = watch::channel(false);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                if !*opened.borrow() {
                    continue;
                }
                let target = target.clone();
                connections.spawn(async move {
                    let mut server = TcpStream::connect(target).await.unwrap();
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self {
            url,
            is_open,
            _tasks: tasks,
        }
    }

    fn open(&self) {
        self.is_open.send_replace(true);
    }

    /// Nothing but the endpoint's name, so that the rest is looked up.
    fn variables(&self) -> [(&str, &str); 3] {
        [
            ("DATABRICKS_HOST", &self.url),
            ("PGHOST", ""),
            ("PGUSER", ""),
        ]
    }
}

fn with_http(settings: &mut Settings) {
    settings.http_port = Some(PortSetting::Port(0));
    settings.credential_timeout = Some(millis(4000));
}

/// A sidecar starts before its network: once it exited after 55 s, with ports bound and not served until then.
#[tokio::test]
async fn a_proxy_started_before_its_workspace_serves_at_once_and_recovers_within_seconds() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    for is_looked_up in [true, false] {
        network.is_open.send_replace(false);
        let variables = network.variables();
        let variables = if is_looked_up {
            &variables[..]
        } else {
            &variables[..1]
        };
        let began = Instant::now();
        let proxy = Proxy::unfound(&emulator, variables, with_http)
            .await
            .unwrap();
        assert_eq!(get(proxy.http(), "/startup").await.status, 200);
        assert_eq!(get(proxy.http(), "/liveness").await.status, 200);
        assert_eq!(get(proxy.http(), "/readiness").await.status, 503);
        // None of them waits for the workspace.
        assert!(began.elapsed() < Duration::from_secs(4));

        // Held for a while, then refused with the reason.
        let began = Instant::now();
        let refusal = proxy.refusal().await;
        let held = began.elapsed();
        assert!(
            held >= Duration::from_secs(3) && held < Duration::from_secs(9),
            "{held:?}"
        );
        assert!(
            refusal.message.contains("cannot reach the workspace"),
            "{refusal:?}"
        );
        let code = if is_looked_up { "08001" } else { "28000" };
        assert_eq!(refusal.code, code);
        assert!(refusal.hint.is_some());
        let readiness = get(proxy.http(), "/readiness").await;
        assert!(
            readiness.body.contains("cannot reach the workspace"),
            "{}",
            readiness.body
        );

        // No client connects before readiness.
        network.open();
        let began = Instant::now();
        eventually("it is ready", async || {
            (get(proxy.http(), "/readiness").await.status == 200).then_some(())
        })
        .await;
        assert!(began.elapsed() < RECOVERY, "{:?}", began.elapsed());
        let mut wire = proxy.session().await;
        assert_eq!(wire.value("select 1").await, "1");
    }
}

#[tokio::test]
async fn a_client_that_is_held_while_the_workspace_comes_gets_its_session() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    let proxy = Proxy::unfound(&emulator, &network.variables(), |_| {})
        .await
        .unwrap();
    let client = async {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone")]).await;
        wire.welcome().await;
    };
    let opening = async {
        eventually("the client waits", async || {
            (proxy.metrics().clients_waiting.get() == 1).then_some(())
        })
        .await;
        network.open();
    };
    let ((), ()) = tokio::join!(client, opening);
}

#[tokio::test]
async fn each_of_several_endpoints_is_found_once_the_workspace_is_there() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    let name = emulator.endpoint_name();
    let table = format!(
        "[[endpoint]]\nname = \"{name}\"\nport = {}\n",
        emulator.pg_port()
    );
    let settings = Settings {
        port: Some(PortSetting::Port(0)),
        http_port: Some(PortSetting::None),
        ..toml::from_str(&table.repeat(2)).unwrap()
    };
    let mut variables = vec![("DATABRICKS_HOST", network.url.clone())];
    variables.extend(emulator.environment());
    let variables = variables
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let config = Config::resolve(settings, Environment::from_variables(variables)).unwrap();
    let running = App::start(config).await.unwrap();
    within("it is ready to be tried", running.ready())
        .await
        .unwrap();
    network.open();
    for bound in &running.addresses().endpoints {
        assert_ne!(bound.tcp[0].port(), 0);
        eventually("a session", async || {
            let mut wire = Wire::dial(bound.tcp[0]).await;
            wire.startup(&[("user", "anyone")]).await;
            let first = wire.next().await;
            (first.tag == 'R').then_some(())
        })
        .await;
    }
    running.end(std::future::pending()).await;
}

/// What waiting does not cure ends the program, however late it is learned.
#[tokio::test]
async fn an_endpoint_that_does_not_exist_ends_the_program_once_the_workspace_is_there() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    let missing = format!("{}-missing", emulator.endpoint_name());
    let [host, address, user] = network.variables();
    let variables = [host, address, user, ("ENDPOINT_NAME", &missing)];
    let proxy = Proxy::unfound(&emulator, &variables, |_| {}).await.unwrap();
    within("ready", proxy.running().ready()).await.unwrap();
    network.open();
    let error = within("the end", proxy.running().found())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("-missing"), "{error}");
    assert!(error.hint().unwrap().contains("ENDPOINT_NAME"));

    let mut command = binary::command(&["--port", "0", "--http-port", "none"]);
    command
        .envs(emulator.environment())
        .envs(variables.iter().copied());
    let output = within("it ends", command.output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("-missing") && text.contains("hint: "),
        "{text}"
    );
}

#[tokio::test]
async fn exec_starts_its_child_once_the_workspace_is_there() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    let mut command = binary::command(&["exec", "--structured-logs", "--", "sh", "-c"]);
    let mut child = command
        .arg("echo $PGHOST $PGUSER")
        .envs(emulator.environment())
        .envs(network.variables())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = tokio::io::BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("cannot look up the endpoint") {
        let line = tokio::io::AsyncBufReadExt::read_line(&mut log, &mut text);
        assert_ne!(within("a line", line).await.unwrap(), 0, "{text}");
    }
    network.open();
    let rest = async { log.read_to_string(&mut text).await };
    let (output, _) = within("the child ends", async {
        tokio::join!(child.wait_with_output(), rest)
    })
    .await;
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    let user = &emulator.identities().app.name;
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("127.0.0.1 {user}\n")
    );
}

#[tokio::test]
async fn a_connection_test_waits_for_the_workspace() {
    let emulator = harness::emulator().await;
    let network = Network::closed(&emulator).await;
    let proxy = Proxy::unfound(&emulator, &network.variables(), |settings| {
        with_http(settings);
        settings.run_connection_test = Some(true);
    })
    .await
    .unwrap();
    let testing = async { within("the test", proxy.running().ready()).await };
    let opening = async {
        // Longer than a client is held without a credential.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(get(proxy.http(), "/startup").await.status, 503);
        network.open();
    };
    let (tested, ()) = tokio::join!(testing, opening);
    tested.unwrap();
    assert_eq!(get(proxy.http(), "/startup").await.status, 200);
}

/// Clients with a connect timeout below `connect_timeout` once never learned why.
#[tokio::test]
async fn a_workspace_that_fails_is_reported_to_clients_before_they_stop_waiting() {
    let emulator = harness::emulator().await;
    let failure = Response::body(500, r#"{"error_code":"X","message":"the disk is full"}"#);
    emulator
        .faults()
        .always(Site::Mint, Action::Respond(failure));
    let proxy = Proxy::cold(&emulator, &[], |settings| {
        settings.http_port = Some(PortSetting::Port(0));
    })
    .await
    .unwrap();
    let began = Instant::now();
    let refusal = proxy.refusal().await;
    let held = began.elapsed();
    assert!(
        held >= Duration::from_secs(7) && held < Duration::from_secs(12),
        "{held:?}"
    );
    let all = format!("{refusal:?}");
    assert!(all.contains("the disk is full"), "{all}");
    emulator.faults().clear();
    let began = Instant::now();
    eventually("it is ready", async || {
        (get(proxy.http(), "/readiness").await.status == 200).then_some(())
    })
    .await;
    assert!(began.elapsed() < RECOVERY, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_retry_after_of_minutes_is_reported_at_once() {
    let emulator = harness::emulator().await;
    let limit = Response::status(429).retry_after("300");
    emulator.faults().always(Site::Mint, Action::Respond(limit));
    let proxy = Proxy::cold(&emulator, &[], |_| {}).await.unwrap();
    // Waits for the attempt itself, however long that takes on a busy machine.
    proxy.refusal().await;
    let began = Instant::now();
    let refusals = join_all((0..10).map(|_| proxy.refusal())).await;
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    for refusal in refusals {
        let all = format!("{refusal:?}");
        assert!(all.contains("429"), "{all}");
    }
    assert!(emulator.counts().mint_requests <= 2);
    // The limit is lifted; a client that comes is what it takes.
    emulator.faults().clear();
    let began = Instant::now();
    eventually("a session", async || {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone")]).await;
        (wire.next().await.tag == 'R').then_some(())
    })
    .await;
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
}
