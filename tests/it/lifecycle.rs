//! From the start to the end: tests before being ready, requests to end, delays, requests of other processes.

use std::time::Duration;

use lakebase_proxy::app::App;
use tokio::time::Instant;

use crate::process::Signal;
use crate::{
    harness::{
        self, Proxy,
        binary::{self, Binary},
        config, eventually, millis,
        port::ReservedPort,
        within,
    },
    web::{get, request},
};

/// Runs the program to its end: exit code and standard error.
async fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = within("the command ends", binary::command(arguments).output()).await;
    let output = output.unwrap();
    let reply = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), reply)
}

#[tokio::test]
async fn quitquitquit_drains_and_ends_with_zero() {
    let emulator = harness::emulator().await;
    let flags = ["--quitquitquit", "--admin-port", "0"];
    let mut binary = Binary::serve(&emulator, &flags).await;
    let admin = binary.logged("answering /quitquitquit").await;
    let admin: std::net::SocketAddr = admin["address"].as_str().unwrap().parse().unwrap();
    let own = admin.to_string();
    let host = ("Host", own.as_str());

    // Neither a page of somewhere else nor a mere look ends it.
    let foreign = [
        host,
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Mode", "navigate"),
        ("Sec-Fetch-Dest", "document"),
    ];
    assert_eq!(
        request(admin, "GET", "/quitquitquit", &foreign)
            .await
            .status,
        403
    );
    let origin = [host, ("Origin", "http://evil.example")];
    assert_eq!(
        request(admin, "POST", "/quitquitquit", &origin)
            .await
            .status,
        403
    );
    assert_eq!(
        request(
            admin,
            "POST",
            "/quitquitquit",
            &[("Host", "rebound.example")]
        )
        .await
        .status,
        421
    );
    assert_eq!(
        request(admin, "HEAD", "/quitquitquit", &[host])
            .await
            .status,
        405
    );
    assert_eq!(
        request(admin, "DELETE", "/quitquitquit", &[host])
            .await
            .status,
        405
    );
    // An image in any page; the browser does not send the origin of a page that requests 0.0.0.0, which leads here as well.
    assert_eq!(get(admin, "/quitquitquit").await.status, 405);
    for address in ["0.0.0.0", "[::]", "8.8.8.8"] {
        let host = format!("{address}:{}", admin.port());
        for method in ["GET", "POST"] {
            let headers = [("Host", host.as_str()), ("X-Requested-With", "x")];
            let refused = request(admin, method, "/quitquitquit", &headers).await;
            assert_eq!(refused.status, 421, "{method} {host}");
        }
    }
    assert_eq!(get(admin, "/").await.status, 404);

    // A transaction that has begun may finish.
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(binary.postgres.port())
        .user("anyone");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio_util::task::TaskTracker::new().spawn(connection);
    client.batch_execute("begin; select 1").await.unwrap();
    let meant = [host, ("X-Requested-With", "preStop")];
    let answer = request(admin, "GET", "/quitquitquit", &meant).await;
    assert_eq!(answer.status, 200);
    binary.until("shutting down").await;
    let row = client.query_one("select 6 * 7", &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 42);
    client.batch_execute("commit").await.unwrap();
    assert_eq!(binary.exit_code().await, Some(0));
}

/// Tools that rotate logs send SIGUSR1 to whatever they know by its process id; by default it ends a process.
#[tokio::test]
async fn signals_without_a_meaning_do_not_end_it() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    for signal in [
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        #[cfg(target_os = "linux")]
        Signal::POWER,
        Signal::XFSZ,
        Signal::PIPE,
    ] {
        binary.signal(signal);
    }
    let reply = binary.until("signal ignored").await;
    assert!(reply["signal"].is_number(), "{reply}");
    let health = get(binary.http, "/readiness").await;
    assert_eq!(health.status, 200);
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
}

#[tokio::test]
async fn the_shutdown_command_ends_a_proxy_that_allows_it() {
    let emulator = harness::emulator().await;
    let reserved = ReservedPort::new();
    let port = reserved.number().to_string();
    let (code, reply) = run(&["shutdown", "--admin-port", &port]).await;
    assert_eq!(code, Some(1));
    assert!(
        reply.starts_with("lakebase-proxy: cannot request the shutdown: cannot reach 127.0.0.1:")
            && reply.contains("\nhint: start the proxy with --quitquitquit"),
        "{reply}"
    );

    let flags = ["--quitquitquit", "--admin-port", &port];
    let binary = Binary::serve(&emulator, &flags).await;
    assert_eq!(
        run(&["shutdown", "--admin-port", &port]).await,
        (Some(0), String::new())
    );
    assert_eq!(binary.exit_code().await, Some(0));
}

#[tokio::test]
async fn wait_returns_once_the_proxy_has_started() {
    let emulator = harness::emulator().await;
    let reserved = ReservedPort::new();
    let port = reserved.number().to_string();
    let began = Instant::now();
    let (code, reply) = run(&["wait", "--max", "0.3", "--http-port", &port]).await;
    assert_eq!(code, Some(1));
    assert!(
        reply.contains("has not started within 300ms: cannot reach 127.0.0.1:"),
        "{reply}"
    );
    assert!(began.elapsed() >= Duration::from_millis(300));

    let waiting = ["wait", "--http-port", &port];
    let serving = ["--http-port", port.as_str()];
    let (waited, _binary) = tokio::join!(run(&waiting), Binary::serve(&emulator, &serving));
    assert_eq!(waited, (Some(0), String::new()));

    let (code, reply) = run(&["wait", "--http-port", "none"]).await;
    assert_eq!(code, Some(1));
    assert!(reply.contains("--http-port is `none`"), "{reply}");
}

#[tokio::test]
async fn a_job_that_has_gone_ends_the_proxy() {
    let emulator = harness::emulator().await;
    let binary = Binary::serve(&emulator, &["--exit-when-idle", "0.5"]).await;
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(binary.postgres.port())
        .user("anyone");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio_util::task::TaskTracker::new().spawn(connection);
    // Longer than the limit, with a client that does nothing.
    tokio::time::sleep(Duration::from_millis(700)).await;
    client.simple_query("select 1").await.unwrap();
    let left = Instant::now();
    drop(client);
    assert_eq!(binary.exit_code().await, Some(0));
    assert!(left.elapsed() >= Duration::from_millis(400));
}

#[tokio::test]
async fn min_sigterm_delay_goes_on_accepting_and_stays_ready() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--min-sigterm-delay", "1h"]).await;
    binary.signal(Signal::TERM);
    binary.until("accepting clients for the delay").await;
    assert_eq!(get(binary.http, "/readiness").await.status, 200);
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(binary.postgres.port())
        .user("anyone");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio_util::task::TaskTracker::new().spawn(connection);
    client.simple_query("begin").await.unwrap();
    // The second signal waits for nothing: neither the delay nor the transaction.
    binary.signal(Signal::TERM);
    assert_eq!(binary.exit_code().await, Some(143));
    client.simple_query("commit").await.unwrap_err();
}

#[tokio::test]
async fn after_the_delay_the_drain_begins() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &["--min-sigterm-delay", "0.3"]).await;
    let reported = Instant::now();
    binary.signal(Signal::TERM);
    binary.until("shutting down").await;
    assert!(reported.elapsed() >= Duration::from_millis(300));
    assert_eq!(binary.exit_code().await, Some(143));

    // SIGINT is a person's, who does not want to wait.
    let binary = Binary::serve(&emulator, &["--min-sigterm-delay", "1h"]).await;
    binary.signal(Signal::INT);
    assert_eq!(binary.exit_code().await, Some(130));
}

#[tokio::test]
async fn the_connection_test_comes_before_started() {
    let emulator = harness::emulator().await;
    let superuser = harness::superuser().await;
    let app = App::start(config(&emulator, &[], |settings| {
        settings.run_connection_test = Some(true);
        settings.http_port = Some("0".parse().unwrap());
    }));
    let running = app.await.unwrap();
    let http = running.addresses().http.unwrap();
    assert_eq!(get(http, "/startup").await.status, 503);
    assert_eq!(get(http, "/readiness").await.status, 503);
    within("the test", running.ready()).await.unwrap();
    assert_eq!(get(http, "/startup").await.status, 200);
    assert_eq!(get(http, "/readiness").await.status, 200);
    let role = &emulator.identities().app.name;
    eventually("the test's session is gone", async || {
        (harness::backends(&superuser, role).await == 0).then_some(())
    })
    .await;
    running.end(std::future::pending()).await;
}

#[tokio::test]
async fn a_connection_test_that_fails_ends_the_start() {
    let emulator = harness::emulator().await;
    let app = App::start(config(
        &emulator,
        &[("PGDATABASE", "nowhere")],
        |settings| {
            settings.run_connection_test = Some(true);
        },
    ));
    let running = app.await.unwrap();
    let error = within("the test", running.ready()).await.unwrap_err();
    assert!(
        error.to_string().starts_with("connection test failed: ")
            && error.to_string().contains("nowhere"),
        "{error}"
    );
    running.end(std::future::pending()).await;

    let mut command = binary::command(&[
        "--port",
        "0",
        "--http-port",
        "none",
        "--run-connection-test",
    ]);
    command
        .envs(emulator.environment())
        .env("PGDATABASE", "nowhere");
    let output = within("it ends", command.output()).await.unwrap();
    let reply = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{reply}");
    assert!(
        reply.contains("\nlakebase-proxy: connection test failed: "),
        "{reply}"
    );
}

#[tokio::test]
async fn no_transaction_that_had_begun_is_lost_within_the_grace_time() {
    const CLIENTS: usize = 8;
    let emulator = harness::emulator().await;
    let superuser = harness::superuser().await;
    let table = format!("drain_{}", std::process::id());
    superuser
        .batch_execute(&format!(
            "create table {table} (client int, number int); grant all on {table} to public"
        ))
        .await
        .unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.max_sigterm_delay = Some(millis(20_000));
    })
    .await;
    let mut clients = tokio::task::JoinSet::new();
    let began = std::sync::Arc::new(tokio::sync::Barrier::new(CLIENTS + 1));
    for number in 0..CLIENTS {
        let mut client = proxy.client().await;
        let (table, began) = (table.clone(), std::sync::Arc::clone(&began));
        clients.spawn(async move {
            let mut committed = 0;
            loop {
                // Refused once the drain has begun, and nothing has been done then.
                let Ok(transaction) = client.transaction().await else {
                    return committed;
                };
                if committed == 3 {
                    began.wait().await;
                }
                for _ in 0..5 {
                    let insert = format!("insert into {table} values ($1, $2)");
                    let number = i32::try_from(number).unwrap();
                    // A transaction whose BEGIN was answered is finished.
                    transaction
                        .execute(&insert, &[&number, &committed])
                        .await
                        .unwrap();
                }
                transaction.commit().await.unwrap();
                committed += 1;
            }
        });
    }
    // All are within a transaction when the end begins.
    within("the clients are at work", began.wait()).await;
    within("the drain", proxy.end(std::future::pending())).await;
    let committed: i32 = clients.join_all().await.into_iter().sum();
    assert!(committed >= i32::try_from(CLIENTS * 4).unwrap());
    let count = format!("select count(*) from {table}");
    let rows: i64 = superuser.query_one(&count, &[]).await.unwrap().get(0);
    superuser
        .batch_execute(&format!("drop table {table}"))
        .await
        .unwrap();
    assert_eq!(
        rows,
        i64::from(committed) * 5,
        "all that was committed, and nothing else"
    );
}
