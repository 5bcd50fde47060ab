//! Faults: each place, each manner, as often as asked.

use std::{io::ErrorKind, time::Duration};

use lakebase_proxy::emulator::{
    Action, BadCertificate, Disruption, Emulator, Fault, Response, ServerError, Site,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout},
};
use tokio_postgres::Error;

use super::{
    edge::dial,
    workspace::{basic_token, mint, port, token},
};
use crate::harness::emulator::{PATIENCE, connect, http, start};

/// What a driver's failure comes down to.
async fn failure(emulator: &Emulator) -> Error {
    timeout(PATIENCE, connect(emulator))
        .await
        .expect("an end in time")
        .expect_err("the fault to strike")
}

fn io_kind(error: &Error) -> Option<ErrorKind> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        source = cause.source();
    }
    None
}

#[tokio::test]
async fn a_connection_ends_wherever_it_is_told_to() {
    let emulator = start().await;
    for site in [
        Site::Accept,
        Site::SslRequest,
        Site::Tls,
        Site::Startup,
        Site::Password,
    ] {
        for action in [Action::Close, Action::Reset] {
            emulator.faults().once(site, action.clone());
            let error = failure(&emulator).await;
            assert_eq!(error.code(), None, "{site:?} {action:?}");
            if action == Action::Reset {
                assert_eq!(
                    io_kind(&error),
                    Some(ErrorKind::ConnectionReset),
                    "{site:?}"
                );
            }
            assert!(
                emulator.faults().pending().is_empty(),
                "{site:?} was never reached"
            );
        }
    }
    connect(&emulator).await.expect("no fault is left");
}

#[tokio::test]
async fn a_stalled_connection_stays_until_the_fault_is_cleared() {
    let emulator = start().await;
    let sites = [
        Site::Accept,
        Site::SslRequest,
        Site::Tls,
        Site::Startup,
        Site::Password,
    ];
    for (site, count) in sites.into_iter().zip(1..) {
        emulator.faults().once(site, Action::Stall);
        let (result, ()) = tokio::join!(connect(&emulator), async {
            emulator.faults().struck(count).await;
            assert_eq!(emulator.counts().connections, 1);
            emulator.faults().clear();
        });
        assert_eq!(
            result
                .expect_err("a stalled connection never goes on")
                .code(),
            None
        );
        emulator
            .wait_for(PATIENCE, |counts| counts.connections == 0)
            .await
            .expect("the connection to end");
    }
}

#[tokio::test]
async fn a_client_that_gives_up_on_a_stall_leaves_nothing_behind() {
    let emulator = start().await;
    emulator.faults().always(Site::Startup, Action::Stall);
    assert!(
        timeout(Duration::from_millis(500), connect(&emulator))
            .await
            .is_err()
    );
    emulator
        .wait_for(PATIENCE, |counts| counts.connections == 0)
        .await
        .expect("the connection to end");
}

#[tokio::test]
async fn scripted_errors_reach_the_driver_word_for_word() {
    let emulator = start().await;
    let full = ServerError::fatal("53300", "sorry, too many clients already").detail("try later");
    emulator
        .faults()
        .times(2, Site::Password, Action::Error(full));
    for _ in 0..2 {
        let error = failure(&emulator).await;
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "53300");
        assert_eq!(
            (error.message(), error.detail()),
            ("sorry, too many clients already", Some("try later"))
        );
    }
    connect(&emulator).await.unwrap();
}

#[tokio::test]
async fn bad_certificates_are_not_trusted_and_good_ones_are_again() {
    let emulator = start().await;
    for bad in [
        BadCertificate::Expired,
        BadCertificate::OtherAuthority,
        BadCertificate::WrongName,
    ] {
        emulator
            .faults()
            .once(Site::SslRequest, Action::Certificate(bad));
        let text = format!("{:?}", failure(&emulator).await);
        let expected = match bad {
            BadCertificate::Expired => "Expired",
            BadCertificate::OtherAuthority => "UnknownIssuer",
            BadCertificate::WrongName => "NotValidForName",
        };
        assert!(text.contains(expected), "{bad:?}: {text}");
    }
    connect(&emulator).await.unwrap();
}

#[tokio::test]
async fn tls_can_be_refused_and_other_protocols_spoken() {
    let emulator = start().await;
    emulator.faults().once(Site::SslRequest, Action::NoTls);
    assert!(failure(&emulator).await.to_string().contains("TLS"));

    emulator.faults().once(
        Site::Accept,
        Action::Answer("HTTP/1.1 400 Bad Request\r\n\r\n".to_owned()),
    );
    let mut tcp = dial(&emulator).await;
    let mut text = String::new();
    tcp.write_all(b"\0").await.unwrap();
    tcp.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "HTTP/1.1 400 Bad Request\r\n\r\n");
}

#[tokio::test]
async fn delays_come_before_what_follows_them() {
    let emulator = start().await;
    emulator.faults().once(Site::Startup, Action::Delay(300));
    let before = Instant::now();
    connect(&emulator).await.unwrap();
    assert!(before.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn a_session_breaks_after_as_many_bytes_as_asked() {
    let emulator = start().await;
    emulator.faults().add(Fault {
        at: Site::Session,
        action: Action::Reset,
        times: Some(1),
        after_bytes: 100_000,
    });
    let client = connect(&emulator).await.unwrap();
    client
        .simple_query("select 1")
        .await
        .expect("few bytes to pass");
    let error = client
        .simple_query("select repeat('x', 1000000)")
        .await
        .unwrap_err();
    assert_eq!(error.code(), None);
    connect(&emulator)
        .await
        .unwrap()
        .simple_query("select repeat('x', 1000000)")
        .await
        .unwrap();
}

#[tokio::test]
async fn running_sessions_stall_move_again_and_end() {
    let emulator = start().await;
    let client = connect(&emulator).await.unwrap();
    client.simple_query("select 1").await.unwrap();
    emulator.disrupt_sessions(Disruption::Stall);
    let query = client.simple_query("select 2");
    tokio::pin!(query);
    assert!(
        timeout(Duration::from_millis(300), &mut query)
            .await
            .is_err()
    );
    emulator.disrupt_sessions(Disruption::None);
    query.await.unwrap();
    emulator.disrupt_sessions(Disruption::Reset);
    emulator
        .wait_for(PATIENCE, |counts| counts.sessions == 0)
        .await
        .unwrap();
    assert!(client.simple_query("select 3").await.is_err());

    let client = connect(&emulator).await.unwrap();
    let (ended, ()) = tokio::join!(
        client.simple_query("select pg_sleep(60)"),
        emulator.terminate_sessions()
    );
    assert_eq!(
        ended
            .unwrap_err()
            .code()
            .map(tokio_postgres::error::SqlState::code),
        Some("57P01")
    );
}

#[tokio::test]
async fn the_port_can_be_closed_and_opened_again() {
    let emulator = start().await;
    emulator.configure(|settings| settings.is_listening = false);
    let refused = async {
        loop {
            if io_kind(&failure(&emulator).await) == Some(ErrorKind::ConnectionRefused) {
                return;
            }
        }
    };
    timeout(PATIENCE, refused).await.expect("the port to close");
    emulator.configure(|settings| settings.is_listening = true);
    let back = async { while connect(&emulator).await.is_err() {} };
    timeout(PATIENCE, back).await.expect("the port to open");
}

#[tokio::test]
async fn the_mint_fails_as_scripted_and_then_works() {
    let emulator = start().await;
    let token = token(&emulator).await;
    emulator.faults().once(
        Site::Mint,
        Action::Respond(Response::status(429).retry_after("7")),
    );
    emulator.faults().once(
        Site::Mint,
        Action::Respond(Response::body(200, "<html>sign in</html>")),
    );
    let answer = mint(&emulator, &token).await.unwrap();
    assert_eq!(
        (answer.status, answer.headers["retry-after"].as_str()),
        (429, "7")
    );
    assert_eq!(answer.json()["error_code"], "RESOURCE_EXHAUSTED");
    let answer = mint(&emulator, &token).await.unwrap();
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, "<html>sign in</html>")
    );
    emulator.faults().once(Site::Mint, Action::Reset);
    assert_eq!(
        mint(&emulator, &token).await.unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    emulator.faults().once(Site::Mint, Action::Close);
    assert_eq!(
        mint(&emulator, &token).await.unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
    assert_eq!(mint(&emulator, &token).await.unwrap().status, 200);
    let counts = emulator.counts();
    assert_eq!((counts.mint_requests, counts.credentials_issued), (5, 1));
}

#[tokio::test]
async fn the_token_endpoint_can_be_slow_and_down() {
    let emulator = start().await;
    emulator.faults().once(Site::Token, Action::Delay(200));
    emulator
        .faults()
        .once(Site::Token, Action::Respond(Response::status(503)));
    let before = Instant::now();
    assert_eq!(basic_token(&emulator).await.status, 503);
    assert!(before.elapsed() >= Duration::from_millis(200));
    assert_eq!(basic_token(&emulator).await.status, 200);
}

#[tokio::test]
async fn people_script_faults_over_http() {
    let emulator = start().await;
    let port = port(&emulator);
    let script = r#"{"faults":[{"at":"startup","do":{"error":{"severity":"FATAL","code":"57P03","message":"the database system is starting up"}},"times":1}]}"#;
    let answer = http(port, "PUT /emulator/faults", script).await.unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["faults"][0]["times"], 1);
    assert_eq!(failure(&emulator).await.code().unwrap().code(), "57P03");
    assert_eq!(
        http(port, "GET /emulator/faults", "").await.unwrap().json()["faults"]
            .as_array()
            .unwrap()
            .len(),
        0
    );

    let answer = http(port, "PATCH /emulator/settings", r#"{"wake_delay": 0.25}"#)
        .await
        .unwrap();
    assert_eq!(answer.status, 200);
    assert_eq!(emulator.settings().wake_delay, Duration::from_millis(250));
    for bad in [r#"{"wake_delay": -1}"#, r#"{"no_such_thing": 1}"#, "[]"] {
        assert_eq!(
            http(port, "PATCH /emulator/settings", bad)
                .await
                .unwrap()
                .status,
            400,
            "{bad}"
        );
    }

    assert_eq!(
        http(port, "POST /emulator/events", r#"{"event":"suspend"}"#)
            .await
            .unwrap()
            .status,
        204
    );
    assert_eq!(
        http(port, "GET /emulator", "").await.unwrap().json()["state"],
        "idle"
    );
    emulator.faults().always(Site::Mint, Action::Stall);
    assert_eq!(
        http(port, "DELETE /emulator/faults", "")
            .await
            .unwrap()
            .status,
        204
    );
    assert!(emulator.faults().pending().is_empty());
}

#[tokio::test]
async fn web_pages_of_other_sites_get_nothing() {
    let emulator = start().await;
    let port = port(&emulator);
    let answer = http(port, "GET /emulator\nHost: evil.example", "")
        .await
        .unwrap();
    assert_eq!(answer.status, 421);
    for header in ["Origin: https://evil.example", "Sec-Fetch-Site: cross-site"] {
        let answer = http(port, &format!("DELETE /emulator/faults\n{header}"), "")
            .await
            .unwrap();
        assert_eq!(answer.status, 403, "{header}");
    }
}
