//! Limits, and starts that must not succeed.

use std::net::TcpListener;

use crate::harness::{
    self, Proxy,
    binary::{Binary, command},
    eventually, millis,
    port::ReservedPort,
    until_running,
    wire::{Wire, cancel, text},
    within,
};
use futures_util::{FutureExt, future::join_all};
use lakebase_proxy::{app::App, config::PortSetting, telemetry::labels::Reason};

#[tokio::test]
async fn one_client_too_many_is_refused_and_cancels_still_pass() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| settings.max_connections = Some(3)).await;
    let mut first = proxy.dial().await;
    first.startup(&[("user", "anyone")]).await;
    let key = first.welcome().await.key;
    let others = [proxy.session().await, proxy.session().await];
    // Connections without a StartupMessage take no permit.
    let unfinished = [proxy.dial().await, proxy.dial().await];

    let dials = emulator.counts().dials;
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "53300");
    assert!(refusal.message.contains("takes 3"), "{refusal:?}");
    assert!(
        refusal
            .hint
            .as_deref()
            .unwrap()
            .contains("--max-connections"),
        "{refusal:?}"
    );
    assert_eq!(emulator.counts().dials, dials);
    assert_eq!(
        proxy.metrics().clients_refused[Reason::MaxConnections].get(),
        1
    );

    first.send(&text('Q', "select pg_sleep(60)")).await;
    until_running(&emulator.identities().app.name, 1).await;
    cancel(proxy.address(), key).await;
    let reply = first.until('Z').await;
    assert!(
        reply
            .iter()
            .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
    );

    drop((others, unfinished));
    let active = &proxy.metrics().clients_active;
    eventually("they are gone", async || (active.get() == 1).then_some(())).await;
    drop((proxy.session().await, proxy.session().await));
}

#[tokio::test]
async fn silent_clients_do_not_delay_others() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        settings.client_login_timeout = Some(millis(600_000));
    })
    .await;
    let mut busy = proxy.dial().await;
    busy.startup(&[("user", "anyone")]).await;
    let key = busy.welcome().await.key;
    busy.send(&text('Q', "select pg_sleep(60)")).await;
    until_running(&emulator.identities().app.name, 1).await;

    let mut silent = join_all((0..300).map(|_| Wire::dial(proxy.address()))).await;
    let cancelled = async {
        cancel(proxy.address(), key).await;
        busy.until('Z').await
    };
    let (reply, _) = within("both get through", async {
        tokio::join!(cancelled, proxy.client())
    })
    .await;
    assert!(
        reply
            .iter()
            .any(|reply| reply.tag == 'E' && reply.error().code == "57014")
    );
    assert!(
        silent[0].stream.readable().now_or_never().is_none(),
        "no client had to be refused for that"
    );
    // They are old enough for eviction by and by, and each newer client evicts what is too many.
    eventually("the oldest is refused", async || {
        drop(proxy.session().await);
        silent[0].stream.readable().now_or_never()
    })
    .await
    .unwrap();
    let refusal = silent[0].refusal().await;
    assert_eq!(refusal.code, "08P01");
    assert!(
        refusal.message.contains("while other clients waited"),
        "{refusal:?}"
    );
    let last = silent.last_mut().unwrap();
    last.startup(&[("user", "anyone")]).await;
    last.welcome().await;
    drop((busy, silent));
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_proxy_in_front_of_itself_does_not_start() {
    let emulator = harness::emulator().await;
    for host in ["localhost", "127.0.0.1", "::1"] {
        let reserved = ReservedPort::new();
        let port = reserved.number();
        let text = port.to_string();
        let config = harness::config(
            &emulator,
            &[("PGHOST", host), ("PGPORT", &text)],
            |settings| {
                settings.port = Some(PortSetting::Port(port));
            },
        );
        let running = App::start(config).await.unwrap();
        let error = within("the end", running.found()).await.unwrap_err();
        let expected = format!("PGHOST `{host}` with PGPORT {port} is this proxy itself");
        assert!(error.to_string().contains(&expected), "{error}");
        assert!(error.hint().unwrap().contains("PGHOST"));
    }
}

/// Runs the program to its end: exit code and standard error.
async fn run(arguments: &[&str], variables: &[(&'static str, String)]) -> (Option<i32>, String) {
    let child = command(arguments)
        .envs(variables.iter().cloned())
        .spawn()
        .unwrap();
    let output = within("the program ends", child.wait_with_output())
        .await
        .unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[tokio::test]
async fn an_invalid_configuration_exits_with_1_and_a_hint() {
    let emulator = harness::emulator().await;
    let good = emulator.environment();
    let with = |name: &'static str, value: &str| {
        let mut variables = good.clone();
        variables.retain(|(found, _)| *found != name);
        variables.push((name, value.to_owned()));
        variables
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let free = ["--port", "0", "--http-port", "none"];

    let rows: [(&[&str], _, &[&str]); 10] = [
        (
            &["--port", &port, "--http-port", "none"],
            good.clone(),
            &[&port, "--port", "hint: "],
        ),
        (
            &["--port", "0", "--http-port", &port],
            good.clone(),
            &[&port, "--http-port", "hint: "],
        ),
        (
            &[
                "--port",
                "0",
                "--http-port",
                "none",
                "--notes",
                "--notes-port",
                &port,
            ],
            good.clone(),
            &["--notes-port"],
        ),
        (
            &["--port", "0", "--http-port", "none", "--address", "0.0.0.0"],
            good.clone(),
            &["0.0.0.0", "--allow-remote"],
        ),
        (
            &["--port", "0", "--http-port", "none", "--address", "::"],
            good.clone(),
            &["--allow-remote"],
        ),
        (&free, Vec::new(), &["ENDPOINT_NAME", "hint: "]),
        (
            &free,
            with("PGHOST", "ep-x.us-east-2.aws.neon.tech"),
            &["Neon", "hint: "],
        ),
        (
            &free,
            with("PGHOSTADDR", "db.example.com"),
            &["PGHOSTADDR", "IP address"],
        ),
        (
            &free,
            with("PGSSLROOTCERT", "/does/not/exist.pem"),
            &["/does/not/exist.pem", "PGSSLROOTCERT"],
        ),
        (&["--no-such-flag"], good.clone(), &["--no-such-flag"]),
    ];
    for (arguments, variables, words) in rows {
        let (code, reply) = run(arguments, &variables).await;
        assert_eq!(code, Some(1), "{arguments:?}: {reply}");
        for word in words {
            assert!(
                reply.contains(word),
                "{arguments:?}: no `{word}` in {reply}"
            );
        }
        assert!(!reply.contains("panicked"), "{reply}");
        for (name, secret) in &variables {
            assert!(*name != "DATABRICKS_CLIENT_SECRET" || !reply.contains(secret));
        }
    }
}

#[tokio::test]
async fn a_public_address_must_be_allowed_and_causes_a_warning() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--address", "0.0.0.0", "--allow-remote"]).await;
    assert!(binary.postgres.ip().is_unspecified());
    let warning = binary.find("is the Lakebase identity").await;
    assert_eq!(warning["level"], "WARN");
    assert_eq!(warning["address"], binary.postgres.to_string());
}

#[tokio::test]
async fn the_limit_follows_from_the_descriptors_unless_set() {
    let emulator = harness::emulator().await;
    let limit = async |flags: &[&str]| {
        let binary = Binary::serve(&emulator, flags).await;
        let line = binary
            .lines
            .iter()
            .find(|line| line["message"] == "listening for Postgres clients")
            .unwrap();
        line["max_connections"].as_u64().unwrap()
    };
    let (_, hard) = rlimit::getrlimit(rlimit::Resource::NOFILE).unwrap();
    assert_eq!(
        limit(&["--max-connections", "0"]).await,
        ((hard - 100) / 2).min(1 << 20)
    );
    assert_eq!(limit(&["--max-connections", "42"]).await, 42);
}

/// It was refused as a loop.
#[tokio::test]
async fn another_loopback_address_with_the_port_of_the_proxy_is_an_upstream() {
    let emulator = harness::emulator().await;
    let port = ReservedPort::new();
    let text = port.number().to_string();
    let variables = [("PGHOST", "127.0.0.2"), ("PGPORT", &*text)];
    let config = harness::config(&emulator, &variables, |settings| {
        settings.port = Some(PortSetting::Port(port.number()));
    });
    let running = App::start(config).await.unwrap();
    within("the end of discovery", running.found())
        .await
        .unwrap();
    running.end(std::future::pending()).await;
}
