//! `transaction` mode and clients of all kinds: encrypted ones, the function-call protocol, psql, and every reason for a pin.

use std::{process::Stdio, sync::Arc};

use lakebase_proxy::{
    config::Roots,
    net::tls,
    telemetry::labels::{CancelOutcome, PinReason},
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::Command,
    time::{Duration, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    misuse::answers,
    statements::{execute, prepare, request},
    transaction::{shared, sharing},
    *,
};
use crate::harness::wire::{SSL_REQUEST, Wire, cancel_request};

/// A call of the function with this OID, with texts as arguments and a text as its result.
fn call(oid: u32, arguments: &[&str]) -> Vec<u8> {
    let mut body = oid.to_be_bytes().to_vec();
    body.extend(b"\0\0");
    body.extend(u16::try_from(arguments.len()).unwrap().to_be_bytes());
    for argument in arguments {
        body.extend(u32::try_from(argument.len()).unwrap().to_be_bytes());
        body.extend(argument.as_bytes());
    }
    body.extend(b"\0\0");
    message('F', &body)
}

/// As libpq's functions for large objects send it.
#[tokio::test]
async fn a_function_call_is_answered_and_keeps_its_connection() {
    let (_emulator, proxy) = sharing(2).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let oid = |name: &str| format!("select oid::int8 from pg_proc where proname = '{name}'");
    let add: u32 = other.value(&oid("int4pl")).await.parse().unwrap();
    one.send(&call(add, &["40", "2"])).await;
    let replies = one.until('Z').await;
    assert_eq!(
        (replies[0].tag, &replies[0].body[..]),
        ('V', &b"\0\0\0\x0242"[..])
    );
    // What a function leaves cannot be seen.
    eventually("the pin", async || {
        (proxy.pins(PinReason::UnknownState) == 1).then_some(())
    })
    .await;
    one.send(&call(1, &[])).await;
    assert_eq!(answers(&mut one, 1).await, ["42883"]);
    one.send(
        &[
            call(add, &["1", "1"]),
            text('Q', "select 3"),
            call(add, &["2", "2"]),
        ]
        .concat(),
    )
    .await;
    assert_eq!(answers(&mut one, 3).await, ["3"]);
    let open = other.value(&oid("lo_open")).await.parse().unwrap();
    let object = one.value("select lo_creat(-1)").await;
    one.query("begin").await;
    one.send(&call(open, &[&object, "131072"])).await;
    let replies = one.until('Z').await;
    assert_eq!(
        (replies[0].tag, &replies[0].body[..]),
        ('V', &b"\0\0\0\x010"[..])
    );
    one.query("commit").await;
    one.query(&format!("select lo_unlink({object})")).await;
    drop(one);
    assert_eq!(other.value("select 1").await, "1");
}

/// One for each reason besides those of `state_that_outlives_a_transaction_stays_the_clients_own`.
#[tokio::test]
async fn every_reason_keeps_the_connection_until_the_client_leaves() {
    let (emulator, proxy) = sharing(2).await;
    let role = emulator.identities().app.name.clone();
    let superuser = harness::superuser().await;
    let grant = format!(
        "grant execute on all functions in schema pg_catalog to \"{role}\"; create sequence if not exists pin_sequence; \
         grant usage on pin_sequence to \"{role}\""
    );
    superuser.batch_execute(&grant).await.unwrap();
    let mut other = proxy.session().await;
    for (statement, reason) in [
        ("select nextval('pin_sequence')", PinReason::Sequence),
        ("select setseed(0.5)", PinReason::Setseed),
        ("select 1 as dblink_", PinReason::UnknownState),
        (
            "do $$ begin execute 'select 1'; end $$",
            PinReason::UnknownState,
        ),
        (
            "select u&\"\\0061\" from (select 1 as a) t",
            PinReason::UnknownState,
        ),
        (
            "select 'pg_replication_origin_session_reset'",
            PinReason::ReplicationOrigin,
        ),
        ("declare c cursor with hold for select 1", PinReason::Cursor),
        ("prepare p as select 1", PinReason::SqlPrepare),
        (
            "select set_config('app.a', 'b', false)",
            PinReason::SetConfig,
        ),
        ("listen a", PinReason::Listen),
        ("create temp table t (a int)", PinReason::Temp),
        ("select pg_advisory_lock(1)", PinReason::AdvisoryLock),
    ] {
        let before = proxy.pins(reason);
        let mut one = proxy.session().await;
        one.query(statement).await;
        let own = one.value("select pg_backend_pid()").await;
        for _ in 0..3 {
            assert_ne!(
                other.value("select pg_backend_pid()").await,
                own,
                "{statement}"
            );
        }
        assert_eq!(
            one.value("select pg_backend_pid()").await,
            own,
            "{statement}"
        );
        assert_eq!(proxy.pins(reason), before + 1, "{statement}");
        eventually("the other client has parted with its own", async || {
            (proxy.servers(PoolServer::Leased) == 1).then_some(())
        })
        .await;
        drop(one);
        proxy.until_at_rest().await;
    }
    superuser
        .batch_execute("drop sequence pin_sequence")
        .await
        .unwrap();
}

async fn encrypted(proxy: &Proxy, authority: &std::path::Path) -> Wire<TlsStream<TcpStream>> {
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    stream.write_all(&SSL_REQUEST).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'S');
    let config = tls::client_config(&Roots::File(authority.to_owned()), tls::ALPN_POSTGRESQL);
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(config.unwrap())
        .connect(name, stream)
        .await
        .unwrap();
    let mut wire = Wire::of(stream);
    wire.startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    wire.welcome().await;
    wire
}

#[tokio::test]
async fn encrypted_clients_share_connections_with_others() {
    let emulator = harness::emulator().await;
    let directory = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (certificate, key) = (
        directory.path().join("tls.crt"),
        directory.path().join("tls.key"),
    );
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        shared(settings, 1);
        settings.client_tls_cert = Some(certificate.clone());
        settings.client_tls_key = Some(key);
    })
    .await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(encrypted(&proxy, &certificate).await);
    }
    let mut plain = proxy.session().await;
    let long = "x".repeat(100_000);
    for round in 0..5 {
        for (number, client) in clients.iter_mut().enumerate() {
            let sum = format!("select {number} + {round}");
            assert_eq!(client.value(&sum).await, (number + round).to_string());
            // Several TLS records, in both directions.
            assert_eq!(client.value(&format!("select '{long}'")).await, long);
            assert_eq!(plain.value("select 'plain'").await, "plain");
            // Requests in one record.
            client
                .send(&[text('Q', "select 1"), text('Q', "select 2"), sync()].concat())
                .await;
            for expected in ["TDCZ", "TDCZ", "Z"] {
                assert_eq!(client.tags().await, expected);
            }
        }
    }
    assert_eq!(emulator.counts().logins, 1);
    // One that is at rest ends by its close_notify, and with a shutdown.
    let mut left = clients.pop().unwrap();
    left.stream.shutdown().await.unwrap();
    // With or without one of the proxy's.
    let _ = within("the end", left.stream.read_to_end(&mut Vec::new())).await;
    assert_eq!(plain.value("select 1").await, "1");
    let ended = proxy.end(async {
        for client in &mut clients {
            assert_eq!(client.until('E').await[0].error().code, "57P01");
        }
    });
    within("the shutdown", ended).await;
}

#[tokio::test]
async fn a_cancel_whose_sender_hangs_up_at_once_reaches_its_request() {
    let (emulator, proxy) = sharing(1).await;
    let mut one = proxy.dial().await;
    one.startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    let key = one.welcome().await.key;
    one.send(&text('Q', "select pg_sleep(60)")).await;
    harness::until_running(&emulator.identities().app.name, 1).await;
    let mut requester = proxy.dial().await;
    requester.send(&cancel_request(key)).await;
    requester.reset();
    assert_eq!(answers(&mut one, 1).await, ["57014"]);
    eventually("the cancel is counted", async || {
        (proxy.metrics().cancels[CancelOutcome::Forwarded].get() == 1).then_some(())
    })
    .await;
}

/// A client that pipelines without end delays no other for longer than one request.
#[tokio::test]
async fn a_pipeline_yields_to_a_client_that_waits() {
    const REQUESTS: usize = 1000;
    let (_emulator, proxy) = sharing(1).await;
    let (mut one, mut other) = (proxy.session().await, proxy.session().await);
    let unit = [
        prepare("", "select pg_sleep(0.005)"),
        execute("", &[]),
        sync(),
    ]
    .concat();
    one.send(&unit.repeat(REQUESTS)).await;
    one.until('Z').await;
    let served = Arc::new(std::sync::atomic::AtomicUsize::new(1));
    let pipeline = async {
        for _ in 1..REQUESTS {
            one.until('Z').await;
            served.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let between = async {
        assert_eq!(other.value("select 1").await, "1");
        served.load(std::sync::atomic::Ordering::Relaxed)
    };
    let ((), before) = tokio::join!(pipeline, between);
    assert!(before < REQUESTS / 2, "after {before} requests");
}

/// psql repeats a query on one connection, which has no transaction between.
#[tokio::test]
async fn psql_watches_a_query_beside_other_clients() {
    let (emulator, proxy) = sharing(1).await;
    let psql = || {
        let mut psql = Command::new("psql")
            .args(["-XAtq", "-h", "127.0.0.1", "-U", "anyone", "-p"])
            .arg(proxy.address().port().to_string())
            .arg(DATABASE)
            .env("PATH", harness::path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let output = BufReader::new(psql.stdout.take().unwrap()).lines();
        (psql, output)
    };
    let mut watching = Vec::new();
    for number in 0..2 {
        let (mut psql, output) = psql();
        let input = psql.stdin.as_mut().unwrap();
        let watch = format!("select 'seen by {number}' \\watch 0.1\n");
        input.write_all(watch.as_bytes()).await.unwrap();
        watching.push((psql, output));
    }
    let mut other = proxy.session().await;
    for (number, (_, output)) in watching.iter_mut().enumerate() {
        let mut seen = 0;
        while seen < 5 {
            let line = within("a line", output.next_line()).await.unwrap().unwrap();
            // With the time above each result.
            seen += usize::from(line == format!("seen by {number}"));
            assert_eq!(
                request(&mut other, &[prepare("", "select 1"), execute("", &[])]).await,
                ["1"]
            );
        }
    }
    assert_eq!(emulator.counts().logins, 1);
    for (mut psql, _) in watching {
        psql.kill().await.unwrap();
    }
    timeout(Duration::from_secs(10), other.query("select 1"))
        .await
        .unwrap();
}
