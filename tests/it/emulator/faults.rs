//! Faults: each site, each action, each number of times.

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
use crate::harness::emulator::{TIMEOUT, config, connect, connect_as, http, start};

/// What a driver's failure comes down to.
async fn failure(emulator: &Emulator) -> Error {
    timeout(TIMEOUT, connect(emulator))
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
async fn a_connection_ends_at_the_site_of_the_fault() {
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
            .wait_for(TIMEOUT, |counts| counts.connections == 0)
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
        .wait_for(TIMEOUT, |counts| counts.connections == 0)
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
async fn a_session_breaks_after_the_requested_number_of_bytes() {
    let emulator = start().await;
    let fault = Fault::new(Site::Session, Action::Reset);
    emulator
        .faults()
        .add(fault.times(1).after_bytes(100_000))
        .unwrap();
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

/// A client behind a firewall that drops packets sees neither an answer nor an end, wherever it has got to.
#[tokio::test]
async fn a_lost_network_path_shows_neither_an_answer_nor_an_end() {
    let emulator = start().await;
    for site in [
        Site::Accept,
        Site::SslRequest,
        Site::Tls,
        Site::Startup,
        Site::Password,
    ] {
        let struck = emulator.faults().once(site, Action::Blackhole);
        let login = connect(&emulator);
        tokio::pin!(login);
        tokio::select! {
            _ = &mut login => panic!("{site:?}: it ended"),
            () = struck.reach(1) => {}
        }
        let waited = timeout(Duration::from_millis(200), &mut login).await;
        assert!(waited.is_err(), "{site:?}: it ended");
        assert_eq!(emulator.counts().connections, 1, "{site:?}");
        emulator.faults().clear();
        let error = timeout(TIMEOUT, login).await.unwrap().unwrap_err();
        assert_eq!(
            io_kind(&error),
            Some(ErrorKind::ConnectionReset),
            "{site:?}"
        );
        emulator
            .wait_for(TIMEOUT, |counts| counts.connections == 0)
            .await
            .unwrap();
    }
    connect(&emulator).await.unwrap();
}

/// What a peer's kernel acknowledges, keepalive and TCP_USER_TIMEOUT take for alive; a lost packet is not acknowledged.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn lost_packets_are_not_acknowledged() {
    let everything = socket2::SockFilter::new(0x06, 0, 0, u32::MAX);
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let permitted = socket.attach_filter(&[everything]);
    if permitted.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied) {
        return; // To root only, by this kernel.
    }
    let emulator = start().await;
    let struck = emulator.faults().once(Site::Accept, Action::Blackhole);
    let mut tcp = dial(&emulator).await;
    struck.reach(1).await;
    // The site is reached a moment before the packets are dropped.
    let unacknowledged = async {
        loop {
            tcp.write_all(&[0]).await.unwrap();
            let socket = socket2::SockRef::from(&tcp);
            socket
                .set_tcp_user_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            let mut byte = [0];
            if let Ok(ended) = timeout(Duration::from_secs(2), tcp.read(&mut byte)).await {
                return ended;
            }
        }
    };
    let ended = timeout(TIMEOUT, unacknowledged).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::TimedOut);
}

#[tokio::test]
async fn a_session_loses_its_path_in_the_middle_of_a_query_and_gets_it_back() {
    let emulator = start().await;
    let client = connect(&emulator).await.unwrap();
    let query = client.simple_query("select pg_sleep(0.2)");
    tokio::pin!(query);
    // Polled once, so that the query is on its way.
    let _ = timeout(Duration::from_millis(20), &mut query).await;
    emulator.disrupt_sessions(Disruption::Blackhole);
    let waited = timeout(Duration::from_millis(600), &mut query).await;
    assert!(waited.is_err(), "an answer came through");
    assert_eq!(emulator.counts().sessions, 1);
    emulator.disrupt_sessions(Disruption::None);
    timeout(TIMEOUT, query).await.unwrap().unwrap();

    let fault = Fault::new(Site::Session, Action::Blackhole).after_bytes(1000);
    let struck = emulator.faults().add(fault).unwrap();
    let client = connect(&emulator).await.unwrap();
    client.simple_query("select 1").await.unwrap();
    let query = client.simple_query("select repeat('x', 2000)");
    tokio::pin!(query);
    struck.reach(1).await;
    let waited = timeout(Duration::from_millis(300), &mut query).await;
    assert!(waited.is_err(), "an answer came through");
    emulator.faults().clear();
    timeout(TIMEOUT, query).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn the_workspace_can_be_lost_too() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let struck = emulator.faults().always(Site::Mint, Action::Blackhole);
    let minted = mint(&emulator, &token);
    tokio::pin!(minted);
    tokio::select! {
        _ = &mut minted => panic!("it ended"),
        () = struck.reach(1) => {}
    }
    let waited = timeout(Duration::from_millis(200), &mut minted).await;
    assert!(waited.is_err(), "it ended");
    emulator.faults().clear();
    let error = timeout(TIMEOUT, minted).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_session_ends_with_the_requested_error() {
    let emulator = start().await;
    let reply = ServerError::fatal(
        "57P01",
        "terminating connection due to administrator command",
    );
    emulator.faults().once(Site::Session, Action::Error(reply));
    let client = connect(&emulator).await.unwrap();
    let error = timeout(TIMEOUT, client.simple_query("select 1")).await;
    let error = error.unwrap().unwrap_err();
    assert!(
        error.is_closed() || error.code().is_some_and(|code| code.code() == "57P01"),
        "{error:?}"
    );
}

#[tokio::test]
async fn faults_choose_user_database_and_age_of_the_credential() {
    let emulator = start().await;
    let app = emulator.identities().app.name.clone();
    let refused = |code: &str| Action::Error(ServerError::fatal(code, "as scripted"));
    let faults = emulator.faults();
    let add = |fault: Fault| faults.add(fault).unwrap();
    let other_user = add(Fault::new(Site::Startup, refused("28000")).user("ada"));
    let other_database = add(Fault::new(Site::Startup, refused("3D000")).database("elsewhere"));
    let old = add(Fault::new(Site::Password, refused("28P01")).credential_older_than(3000));
    connect(&emulator)
        .await
        .expect("none of them is for this login");

    let mut elsewhere = config(&emulator);
    elsewhere.dbname("elsewhere");
    let error = connect_as(&emulator, &elsewhere).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "3D000");
    let mut ada = config(&emulator);
    ada.user("ada");
    let error = connect_as(&emulator, &ada).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "28000");
    assert_eq!(
        (other_user.count(), other_database.count(), old.count()),
        (1, 1, 0)
    );

    // Newly minted, and not known everywhere yet.
    let young = add(Fault::new(Site::Password, refused("28P01")).credential_younger_than(60));
    assert_eq!(failure(&emulator).await.code().unwrap().code(), "28P01");
    assert_eq!(young.count(), 1);

    let tally = emulator.tally();
    assert_eq!(tally.accepted(&app, "databricks_postgres"), 1);
    assert_eq!(tally.refused(&app, "databricks_postgres"), 1);
    assert_eq!(tally.refused(&app, "elsewhere"), 1);
    assert_eq!(tally.refused("ada", "databricks_postgres"), 1);
}

#[tokio::test]
async fn real_answers_can_be_bent() {
    let emulator = start().await;
    let far = serde_json::json!({"expire_time": "9999-12-31T23:59:59Z"});
    emulator.faults().once(Site::Mint, Action::Merge(far));
    emulator.faults().once(Site::Token, Action::QuoteNumbers);
    let bearer = basic_token(&emulator).await.json();
    assert_eq!(bearer["expires_in"], "3600");
    let minted = mint(&emulator, bearer["access_token"].as_str().unwrap()).await;
    let minted = minted.unwrap().json();
    assert_eq!(minted["expire_time"], "9999-12-31T23:59:59Z");
    let mut config = config(&emulator);
    config.password(minted["token"].as_str().unwrap());
    connect_as(&emulator, &config)
        .await
        .expect("the token is real");
    let tally = emulator.tally();
    assert_eq!(tally.credentials_for(emulator.endpoint_name()), 1);
}

/// `"time": 1` was taken for a fault that strikes for ever, and `no_tls` at the mint for a closed connection.
#[tokio::test]
async fn impossible_faults_are_refused_and_change_nothing() {
    let emulator = start().await;
    let port = port(&emulator);
    let before = emulator.faults().once(Site::Lookup, Action::Close);
    for (fault, words) in [
        (r#"{"at":"mint","do":"close","time":1}"#, "`times`"),
        (r#"{"at":"mint","do":"no_tls"}"#, "possible there: respond,"),
        (
            r#"{"at":"accept","do":{"respond":{"status":500}}}"#,
            "possible there: error,",
        ),
        (
            r#"{"at":"mint","do":{"respond":{"status":500,"retryafter":"1"}}}"#,
            "`retry_after`",
        ),
        (
            r#"{"at":"mint","do":"close","user":"ada"}"#,
            "no conditions",
        ),
        (r#"{"at":"mint","do":"close","times":0}"#, "at least 1"),
        (r#"{"at":"sleep","do":"close"}"#, "`startup`"),
    ] {
        let script = format!(r#"{{"faults":[{{"at":"token","do":"close"}},{fault}]}}"#);
        for request in ["PUT /emulator/faults", "POST /emulator/faults"] {
            let answer = http(port, request, &script).await.unwrap();
            assert_eq!(answer.status, 400, "{fault}");
            let json = answer.json();
            assert!(json["message"].as_str().unwrap().contains(words), "{json}");
        }
    }
    assert_eq!((emulator.faults().pending().len(), before.count()), (1, 0));
}

#[tokio::test]
async fn the_state_shows_faults_and_logins() {
    let emulator = start().await;
    let port = port(&emulator);
    let app = emulator.identities().app.name.clone();
    emulator.faults().once(Site::Startup, Action::Close);
    emulator.faults().always(Site::Mint, Action::Close);
    failure(&emulator).await;
    connect(&emulator).await.unwrap();
    let faults = http(port, "GET /emulator/faults", "").await.unwrap().json();
    assert_eq!(faults["faults"][0]["struck"], 0, "{faults}");
    assert_eq!(faults["spent"][0]["struck"], 1, "{faults}");
    let counts = http(port, "GET /emulator/counts", "").await.unwrap().json();
    assert_eq!(
        (&counts["logins"], &counts["refusals"]),
        (&1.into(), &1.into())
    );
    assert_eq!(
        counts["logins_by"],
        serde_json::json!([{
            "host": "localhost",
            "user": app,
            "database": "databricks_postgres",
            "accepted": 1,
            "refused": 1,
        }])
    );
    let answer = http(
        port,
        "POST /emulator/events",
        r#"{"event":"blackhole_sessions"}"#,
    );
    assert_eq!(answer.await.unwrap().status, 204);
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
        .wait_for(TIMEOUT, |counts| counts.sessions == 0)
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
    timeout(TIMEOUT, refused).await.expect("the port to close");
    emulator.configure(|settings| settings.is_listening = true);
    let back = async { while connect(&emulator).await.is_err() {} };
    timeout(TIMEOUT, back).await.expect("the port to open");
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

/// Every fault of the guide can be set, and every site and action is in it.
#[tokio::test]
async fn the_guide_lists_all_settings() {
    let guide = include_str!("../../../deploy/guides/emulator.md");
    for site in Site::ALL {
        for name in [&[site.name()], site.actions(), site.conditions()].concat() {
            let quoted = [
                format!("`{name}`"),
                format!("\"{name}\""),
                format!("`{{\"{name}\""),
            ];
            assert!(quoted.iter().any(|name| guide.contains(name)), "{name}");
        }
    }
    let (_, examples) = guide.split_once("Examples:").unwrap();
    let examples = examples.lines().filter_map(|line| line.split('`').nth(1));
    let examples: Vec<&str> = examples.filter(|text| text.starts_with('{')).collect();
    assert!(examples.len() >= 4, "{examples:?}");
    for text in examples {
        let fault: Fault = serde_json::from_str(text).unwrap();
        fault.check().unwrap();
    }
}
