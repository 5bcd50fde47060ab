//! Each way in which a login fails: what the client sees, and what it costs the workspace and the endpoint.

use std::time::Duration;

use futures_util::future::join_all;
use lakebase_proxy::{
    config::Settings,
    emulator::{
        Action, BadCertificate, Counts, Emulator, Response, ServerError, Site, WhileAsleep,
    },
    protocol::error::ErrorFields,
    telemetry::labels::Reason,
};
use tokio::time::Instant;

use crate::harness::{self, Proxy, binary::Binary, eventually, millis, wire::Wire, within};

/// Well beyond what an answer takes that waits for nothing, well below any wait.
const AT_ONCE: Duration = Duration::from_secs(2);
const SLEEPING: &str = "This could be due to paused instances, disabling readable secondaries, IP ACLs or private link configuration.";
const IP_ACL: &str =
    "Source IP address: 203.0.113.7 is blocked by Databricks IP ACL for workspace: 1234567890";

/// An error of the edge's front, or of Postgres.
fn fatal(code: &str, message: &str) -> ServerError {
    ServerError::fatal(code, message)
}

/// An error of the proxy behind the front: ERROR, XX000.
fn inner(message: &str) -> ServerError {
    ServerError::proxy(message)
}

/// What happened at the emulator between two looks.
fn since(before: &Counts, emulator: &Emulator) -> (u64, u64, u64) {
    let now = emulator.counts();
    (
        now.dials - before.dials,
        now.mint_requests - before.mint_requests,
        now.api_requests() - before.api_requests(),
    )
}

/// What is true of every refusal that an endpoint's failure leads to.
fn check_refusal(refusal: &ErrorFields, emulator: &Emulator) {
    assert!(
        refusal.message.contains(emulator.endpoint_name()),
        "names the endpoint: {refusal:?}"
    );
    let detail = refusal.detail.as_deref().unwrap_or_default();
    assert!(
        detail.contains("lakebase-proxy session "),
        "an id to find the log line by: {refusal:?}"
    );
}

/// The same for one whose cause the server put into words.
fn check_words(refusal: &ErrorFields, reply: &ServerError, emulator: &Emulator) {
    check_refusal(refusal, emulator);
    let detail = refusal.detail.as_deref().unwrap();
    assert!(refusal.message.contains(&reply.message), "{refusal:?}");
    assert!(detail.contains(&reply.message), "{refusal:?}");
    assert!(
        detail.contains(reply.detail.as_deref().unwrap_or_default()),
        "{refusal:?}"
    );
}

/// Budgets that a test can wait for. A client is refused once no further attempt fits into what is left of them.
fn short(settings: &mut Settings) {
    settings.connect_timeout = Some(millis(800));
    settings.capacity_timeout = Some(millis(500));
}

#[tokio::test]
async fn permanent_errors_are_refused_after_one_dial() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let rows = [
        // The credential is of the wrong kind.
        (
            inner("Provided authentication token is not a valid JWT encoding"),
            Reason::WrongKind,
            "28000",
            "OAuth",
        ),
        (
            inner("Failed to decode token for role \"x\""),
            Reason::WrongKind,
            "28000",
            "OAuth",
        ),
        (
            fatal(
                "28P01",
                "Failed to decode token for role \"x\" and native postgres login was either not attempted due to configuration or failed.",
            ),
            Reason::WrongKind,
            "28P01",
            "personal access token",
        ),
        (
            fatal("08P01", "SASL authentication failed"),
            Reason::WrongKind,
            "08P01",
            "OAuth",
        ),
        // A grant or a setting is missing.
        (
            fatal("28000", "role \"x\" does not exist"),
            Reason::Permission,
            "28000",
            "databricks_create_role",
        ),
        (
            fatal("28P01", "role \"x\" does not exist"),
            Reason::Permission,
            "28P01",
            "databricks_create_role",
        ),
        (
            fatal("3D000", "database \"x\" does not exist"),
            Reason::Permission,
            "3D000",
            "PGDATABASE",
        ),
        (
            fatal("42501", "permission denied for database \"x\""),
            Reason::Permission,
            "42501",
            "GRANT CONNECT",
        ),
        (
            fatal("42501", "whatever"),
            Reason::Permission,
            "42501",
            "Grant",
        ),
        (
            fatal("28000", "External authorization failed.").detail(IP_ACL),
            Reason::Permission,
            "28000",
            "IP access list",
        ),
        (
            fatal("28000", IP_ACL),
            Reason::Permission,
            "28000",
            "IP access list",
        ),
        (
            fatal("28000", "External authorization failed.")
                .detail("Unauthorized network access to workspace 1234567890"),
            Reason::Permission,
            "28000",
            "lakebase_runtime",
        ),
        (
            fatal("28000", "External authorization failed.")
                .detail("The address is not in the network policy"),
            Reason::Permission,
            "28000",
            "lakebase_runtime",
        ),
        (
            inner("This IP address 203.0.113.7 is not allowed to connect to this endpoint"),
            Reason::Permission,
            "28000",
            "IP access list",
        ),
        (
            inner("Control plane request failed: endpoint is disabled"),
            Reason::Permission,
            "28000",
            "Enable the compute",
        ),
        (
            inner("Control plane request failed: endpoint cannot be found"),
            Reason::Permission,
            "28000",
            "ENDPOINT_NAME",
        ),
        // Not our dialect.
        (
            fatal(
                "08P01",
                "Invalid protocol version. Protocol version: 196608",
            ),
            Reason::Protocol,
            "08P01",
            "PGHOST",
        ),
        (
            fatal("08006", "Connection does not have SNI."),
            Reason::Protocol,
            "08006",
            "host name",
        ),
        (
            fatal(
                "0A000",
                "Unsupported frontend protocol 3.2. Server supports 3.0 to 3.0",
            ),
            Reason::Protocol,
            "0A000",
            "PGHOST",
        ),
        (
            fatal("08P01", "unsupported startup parameter: search_path"),
            Reason::Protocol,
            "08P01",
            "pooler",
        ),
        (
            inner("Endpoint ID is not specified. Either please upgrade the client library"),
            Reason::Protocol,
            "08P01",
            "PGHOST",
        ),
        (
            inner("Inconsistent project name inferred from SNI"),
            Reason::Protocol,
            "08P01",
            "PGHOST",
        ),
        (
            inner("connection is insecure (try using `sslmode=require`)"),
            Reason::Protocol,
            "08P01",
            "PGHOST",
        ),
        // Unknown errors: the server's own message, code and hint.
        (
            ServerError {
                hint: Some("Call an administrator.".to_owned()),
                ..fatal("58030", "the disk is on fire")
            },
            Reason::Other,
            "58030",
            "Call an administrator.",
        ),
        (
            inner("a text never seen before"),
            Reason::Other,
            "XX000",
            "",
        ),
    ];
    for (reply, reason, code, hint) in rows {
        for site in [Site::Startup, Site::Password] {
            let before = emulator.counts();
            let refused = &proxy.metrics().clients_refused[reason];
            let refused_before = refused.get();
            emulator.faults().always(site, Action::Error(reply.clone()));
            let began = Instant::now();
            let refusal = proxy.refusal().await;
            assert!(
                began.elapsed() < AT_ONCE,
                "{reply:?} took {:?}",
                began.elapsed()
            );
            emulator.faults().clear();
            assert_eq!(refusal.code, code, "{refusal:?}");
            assert!(
                refusal.hint.as_deref().unwrap_or_default().contains(hint),
                "{refusal:?}"
            );
            assert_eq!(refusal.hint.is_some(), !hint.is_empty(), "{refusal:?}");
            check_words(&refusal, &reply, &emulator);
            assert_eq!(
                since(&before, &emulator),
                (1, 0, 0),
                "dials, mints, calls for {reply:?}"
            );
            assert_eq!(refused.get(), refused_before + 1, "counted as {reason:?}");
        }
    }
    proxy.client().await;
    proxy.until_quiet().await;
}

#[tokio::test]
async fn an_error_before_tls_is_handled_too() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let reply = fatal(
        "08P01",
        "Invalid protocol version. Protocol version: 80877103",
    );
    emulator
        .faults()
        .once(Site::SslRequest, Action::Error(reply.clone()));
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "08P01");
    // It is unauthenticated, so that it is passed on but not believed.
    assert!(refusal.message.contains(&reply.message), "{refusal:?}");
    check_refusal(&refusal, &emulator);
    emulator
        .faults()
        .once(Site::SslRequest, Action::Error(ServerError::starting_up()));
    proxy.client().await;
    assert_eq!(emulator.counts().dials, 3);
}

#[tokio::test]
async fn a_server_that_is_not_to_be_trusted_gets_no_credential() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let http = Action::Answer("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_owned());
    let rows = [
        (
            Site::SslRequest,
            Action::Certificate(BadCertificate::Expired),
            "08001",
            "certificate",
        ),
        (
            Site::SslRequest,
            Action::Certificate(BadCertificate::OtherAuthority),
            "08001",
            "certificate",
        ),
        (
            Site::SslRequest,
            Action::Certificate(BadCertificate::WrongName),
            "08001",
            "certificate",
        ),
        (
            Site::SslRequest,
            Action::NoTls,
            "08P01",
            "does not offer TLS",
        ),
        (Site::SslRequest, http.clone(), "08P01", "is it Postgres?"),
        (Site::Startup, http, "08P01", "does not speak Postgres"),
        (
            Site::Startup,
            Action::Answer("R\0\0\0\x03".to_owned()),
            "08P01",
            "does not speak Postgres",
        ),
        (
            Site::Startup,
            Action::Answer("D\0\0\0\x06\0\0".to_owned()),
            "08P01",
            "unexpected message",
        ),
        (
            Site::Startup,
            Action::Answer("R\0\0\0\x08\0\0\0\x07".to_owned()),
            "08P01",
            "authentication method 7",
        ),
    ];
    for (site, action, code, message) in rows {
        let before = emulator.counts();
        emulator.faults().always(site, action.clone());
        let began = Instant::now();
        let refusal = proxy.refusal().await;
        assert!(began.elapsed() < AT_ONCE, "{action:?}");
        emulator.faults().clear();
        assert_eq!(refusal.code, code, "{action:?}: {refusal:?}");
        assert!(refusal.message.contains(message), "{action:?}: {refusal:?}");
        assert!(
            refusal.hint.as_deref().unwrap().contains("PGSSLROOTCERT"),
            "{refusal:?}"
        );
        check_refusal(&refusal, &emulator);
        assert_eq!(since(&before, &emulator), (1, 0, 0), "{action:?}");
    }
    assert_eq!(emulator.counts().passwords, 0);
    let refused = &proxy.metrics().clients_refused[Reason::Protocol];
    assert_eq!(refused.get(), 9);
}

#[tokio::test]
async fn errors_of_a_waking_endpoint_are_retried() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for reply in [
        ServerError::external_authorization(),
        fatal("28000", "External authorization failed.").detail(SLEEPING),
        fatal("57P03", "the database system is starting up"),
        fatal(
            "57P03",
            "the database system is not yet accepting connections",
        ),
        fatal("57P03", "le système de bases de données se lance"),
        fatal(
            "57P01",
            "terminating connection due to administrator command",
        ),
        fatal("08006", "Client handshake timeout."),
        fatal("08006", "Insecure connection."),
        inner("Couldn't connect to compute node"),
        inner("Control plane request failed"),
        inner(
            "Control plane request failed: endpoint is temporarily unavailable. Check your quotas",
        ),
        inner("endpoint is idle, retry request"),
        inner("timed out while waiting for endpoint to become active"),
        inner("Authentication timed out"),
    ] {
        let before = emulator.counts();
        emulator
            .faults()
            .times(2, Site::Startup, Action::Error(reply.clone()));
        let mut wire = proxy.session().await;
        assert_eq!(wire.value("select 1").await, "1", "{reply:?}");
        assert_eq!(since(&before, &emulator), (3, 0, 0), "{reply:?}");
    }
    for action in [Action::Close, Action::Reset] {
        for site in [
            Site::Accept,
            Site::SslRequest,
            Site::Tls,
            Site::Startup,
            Site::Password,
        ] {
            let before = emulator.counts();
            emulator.faults().times(2, site, action.clone());
            drop(proxy.session().await);
            assert_eq!(
                since(&before, &emulator),
                (3, 0, 0),
                "{action:?} at {site:?}"
            );
        }
    }
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_stall_costs_one_attempt() {
    join_all(
        [
            Site::Accept,
            Site::SslRequest,
            Site::Tls,
            Site::Startup,
            Site::Password,
        ]
        .map(async |site| {
            let emulator = harness::emulator().await;
            let proxy = Proxy::with(&emulator, |settings| {
                settings.server_connect_timeout = Some(millis(1500));
            })
            .await;
            emulator.faults().once(site, Action::Stall);
            let began = Instant::now();
            drop(proxy.session().await);
            assert!(began.elapsed() >= Duration::from_millis(1500), "{site:?}");
            assert_eq!(emulator.counts().dials, 2, "{site:?}");
        }),
    )
    .await;
}

#[tokio::test]
async fn an_endpoint_that_does_not_wake_is_given_up_after_the_budget() {
    let rows = [
        (
            Some((
                Site::Startup,
                Action::Error(ServerError::external_authorization()),
            )),
            "28000",
            "External authorization failed.",
        ),
        (
            Some((Site::Password, Action::Error(ServerError::starting_up()))),
            "57P03",
            "starting up",
        ),
        (
            Some((
                Site::Startup,
                Action::Error(inner("Couldn't connect to compute node")),
            )),
            "57P03",
            "compute node",
        ),
        (
            Some((Site::Startup, Action::Close)),
            "08006",
            "closed the connection unexpectedly",
        ),
        // The kernel may report the reset during the connect or after it.
        (Some((Site::Accept, Action::Reset)), "08", "cannot reach"),
        (
            Some((Site::Startup, Action::Stall)),
            "08006",
            "did not answer in time",
        ),
        (None, "08001", "refused"),
    ];
    join_all(rows.map(async |(fault, code, message)| {
        let emulator = harness::emulator().await;
        let proxy = Proxy::with(&emulator, short).await;
        match fault {
            Some((site, action)) => drop(emulator.faults().always(site, action)),
            None => emulator.configure(|settings| settings.is_listening = false),
        }
        let before = emulator.counts();
        let began = Instant::now();
        let (one, other) = tokio::join!(proxy.refusal(), proxy.refusal());
        let took = began.elapsed();
        assert!(
            took >= Duration::from_millis(400) && took < Duration::from_secs(3),
            "{code}: {took:?}"
        );
        for refusal in [one, other] {
            assert!(refusal.code.starts_with(code), "{refusal:?}");
            assert!(refusal.message.contains(message), "{refusal:?}");
            assert!(refusal.hint.is_some(), "{refusal:?}");
            check_refusal(&refusal, &emulator);
        }
        let (dials, mints, _) = since(&before, &emulator);
        // Pauses grow from 50 ms: two first attempts and a handful of the leader's.
        assert!(
            dials <= 10 && mints == 0,
            "{code}: {dials} dials, {mints} mints"
        );
        // It heals by itself.
        emulator.faults().clear();
        emulator.configure(|settings| settings.is_listening = true);
        proxy.client().await;
    }))
    .await;
}

#[tokio::test]
async fn an_attempt_cut_short_by_the_budget_does_not_hide_the_servers_error() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, short).await;
    let reply = ServerError::external_authorization();
    emulator
        .faults()
        .once(Site::Startup, Action::Error(reply.clone()));
    emulator.faults().always(Site::Startup, Action::Stall);
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "28000");
    check_words(&refusal, &reply, &emulator);
    assert_eq!(emulator.counts().dials, 2);
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_given_up_sooner() {
    let emulator = harness::emulator().await;
    let variables = [("PGHOST", "does-not-exist.invalid")];
    let proxy = Proxy::cold(&emulator, &variables, |_| {}).await.unwrap();
    proxy.warm().await;
    let began = Instant::now();
    let refusal = proxy.refusal().await;
    let took = began.elapsed();
    // Not after `connect_timeout`, which is 60 s. How soon depends on this machine's resolver, too.
    assert!(
        took >= Duration::from_secs(7) && took < Duration::from_secs(45),
        "{took:?}"
    );
    assert_eq!(refusal.code, "08001");
    assert!(
        refusal.message.contains("`does-not-exist.invalid`"),
        "{refusal:?}"
    );
    assert!(refusal.hint.as_deref().unwrap().contains("PGHOST"));
    check_refusal(&refusal, &emulator);
    assert_eq!(emulator.counts().dials, 0);
}

#[tokio::test]
async fn clients_of_a_sleeping_endpoint_are_held_and_get_a_notice() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    emulator.configure(|settings| settings.wake_delay = Duration::from_millis(1700));
    emulator.suspend().await;
    let leader = async {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "leader"), ("database", harness::DATABASE)])
            .await;
        wire.welcome().await
    };
    let followers = async {
        emulator
            .wait_for(harness::TIMEOUT, |counts| counts.refusals > 0)
            .await
            .unwrap();
        join_all((0..40).map(async |_| {
            let mut wire = proxy.dial().await;
            wire.startup(&[("user", "follower"), ("database", harness::DATABASE)])
                .await;
            wire.welcome().await
        }))
        .await
    };
    let (leader, mut welcomes) = tokio::join!(leader, followers);
    welcomes.push(leader);
    for welcome in &welcomes {
        let notice = welcome.notices.last().expect("a notice");
        assert_eq!(notice.severity, "NOTICE");
        let expected = format!(
            "Lakebase endpoint `{}` woke after ",
            emulator.endpoint_name()
        );
        assert!(notice.message.starts_with(&expected), "{notice:?}");
    }
    let counts = emulator.counts();
    assert_eq!(
        (counts.wakes, counts.logins, counts.mint_requests),
        (1, 41, 1)
    );
    assert!(
        counts.dials <= 41 + 20,
        "the waiting made {} dials",
        counts.dials - 41
    );
    // A prompt login is not spoken of.
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("database", harness::DATABASE)])
        .await;
    assert_eq!(wire.welcome().await.notices, []);
}

#[tokio::test]
async fn every_answer_of_a_sleeping_endpoint_ends_in_a_session() {
    let answers = [
        WhileAsleep::ExternalAuthorization,
        WhileAsleep::StartingUp,
        WhileAsleep::Reset,
        WhileAsleep::Close,
        WhileAsleep::Hold,
    ];
    join_all(answers.map(async |while_asleep| {
        let emulator = harness::emulator().await;
        let proxy = Proxy::start(&emulator).await;
        emulator.configure(|settings| {
            settings.wake_delay = Duration::from_millis(400);
            settings.while_asleep = while_asleep;
        });
        emulator.suspend().await;
        let client = proxy.client().await;
        client.simple_query("select 1").await.unwrap();
        assert!(
            emulator.counts().dials <= 12,
            "{while_asleep:?}: {:?}",
            emulator.counts()
        );
    }))
    .await;
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_its_wait() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    emulator.faults().always(
        Site::Startup,
        Action::Error(ServerError::external_authorization()),
    );
    let mut leader = proxy.dial().await;
    leader
        .startup(&[("user", "leader"), ("database", harness::DATABASE)])
        .await;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.dials >= 2)
        .await
        .unwrap();
    let mut follower = proxy.dial().await;
    follower
        .startup(&[("user", "follower"), ("database", harness::DATABASE)])
        .await;
    let active = &proxy.metrics().clients_active;
    eventually("both are in", async || (active.get() == 2).then_some(())).await;

    // The leader goes, the other takes over.
    drop(leader);
    eventually("the leader is gone", async || {
        (active.get() == 1).then_some(())
    })
    .await;
    let dials = emulator.counts().dials;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.dials > dials + 1)
        .await
        .expect("another client dials on");

    // No client is left: no dial.
    follower.reset();
    proxy.until_quiet().await;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.connections == 0)
        .await
        .unwrap();
    let dials = emulator.counts().dials;
    // Longer than the longest pause between two attempts.
    let more = emulator
        .wait_for(Duration::from_millis(2500), |counts| counts.dials > dials)
        .await;
    assert_eq!(more, None, "a dial without a client");

    // One that stalls, rather than fails, is let go as well.
    emulator.faults().clear();
    emulator.faults().always(Site::Startup, Action::Stall);
    let mut stalled = proxy.dial().await;
    stalled
        .startup(&[("user", "anyone"), ("database", harness::DATABASE)])
        .await;
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.connections == 1)
        .await
        .unwrap();
    drop(stalled);
    emulator
        .wait_for(harness::TIMEOUT, |counts| counts.connections == 0)
        .await
        .expect("the upstream dial ends");
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_full_endpoint_is_waited_for_a_little() {
    let texts = [
        fatal("53300", "sorry, too many clients already"),
        fatal("53300", "too many connections for role \"x\""),
        fatal("53300", "too many connections for database \"x\""),
        fatal(
            "53300",
            "remaining connection slots are reserved for non-replication superuser connections",
        ),
        fatal("08P01", "no more connections allowed (max_client_conn)"),
        inner("Too many connections to this endpoint. Please try again later."),
        inner(
            "Failed to acquire permit to connect to the database. Too many database connection attempts are currently ongoing.",
        ),
    ];
    join_all(texts.map(async |reply| {
        let emulator = harness::emulator().await;
        let proxy = Proxy::start(&emulator).await;
        emulator
            .faults()
            .times(2, Site::Password, Action::Error(reply.clone()));
        drop(proxy.session().await);
        assert_eq!(emulator.counts().dials, 3, "{reply:?}");

        emulator
            .faults()
            .always(Site::Password, Action::Error(reply.clone()));
        let proxy = Proxy::with(&emulator, short).await;
        let before = emulator.counts();
        let began = Instant::now();
        let refusal = proxy.refusal().await;
        let took = began.elapsed();
        assert!(
            took >= Duration::from_millis(250) && took < Duration::from_secs(3),
            "{took:?}"
        );
        assert_eq!(
            refusal.code,
            if reply.code == "XX000" {
                "53300"
            } else {
                &reply.code
            }
        );
        assert!(
            refusal.hint.as_deref().unwrap().contains("pools"),
            "{refusal:?}"
        );
        check_words(&refusal, &reply, &emulator);
        let (dials, mints, _) = since(&before, &emulator);
        assert!(dials <= 7 && mints == 0, "{dials} dials");
    }))
    .await;
}

#[tokio::test]
async fn a_rejected_credential_is_replaced_once_behind_the_clients_back() {
    let texts = [
        inner("JWT token has expired (exp=1700000000)"),
        inner("JWT token is not yet ready to use (nbf=1900000000)"),
        inner("invalid JWT token audience"),
        inner("jwk not found"),
        inner("missing key id"),
        inner("signature error: signature verification failed"),
        inner("password authentication failed for user 'x'"),
        fatal("28P01", "password authentication failed for user \"x\""),
        fatal(
            "28000",
            "Invalid authorization for databricks identity login",
        ),
        fatal(
            "28P01",
            "Invalid authorization for databricks identity login",
        ),
        fatal("28000", "token has expired"),
        fatal("28000", "an unknown error"),
    ];
    join_all(texts.map(async |reply| {
        let emulator = harness::emulator().await;
        let proxy = Proxy::start(&emulator).await;
        // A credential that was never accepted would be tried again first.
        drop(proxy.session().await);
        let before = emulator.counts();
        emulator
            .faults()
            .once(Site::Password, Action::Error(reply.clone()));
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone"), ("database", harness::DATABASE)])
            .await;
        assert_eq!(wire.welcome().await.notices, [], "{reply:?}");
        assert_eq!(since(&before, &emulator), (2, 1, 1), "{reply:?}");
    }))
    .await;
}

/// Freshly issued credentials were seen refused for a few seconds.
#[tokio::test]
async fn a_young_credential_that_is_refused_is_tried_again_before_another_is_minted() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let before = emulator.counts();
    let refusal = ServerError::fatal("28P01", "password authentication failed for user \"me\"");
    emulator
        .faults()
        .once(Site::Password, Action::Error(refusal));
    let wire = proxy.session().await;
    assert_eq!(since(&before, &emulator), (2, 0, 0));
    drop(wire);
}

#[tokio::test]
async fn fifty_clients_with_a_revoked_credential_cost_one_mint() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    drop(proxy.session().await);
    emulator.revoke_credentials();
    let before = emulator.counts();
    let sessions = join_all((0..50).map(async |_| {
        let mut wire = proxy.session().await;
        assert_eq!(wire.value("select 1").await, "1");
        wire
    }))
    .await;
    assert_eq!(sessions.len(), 50);
    let (dials, mints, calls) = since(&before, &emulator);
    assert_eq!((mints, calls), (1, 1));
    assert!(dials <= 100, "{dials} dials");
}

#[tokio::test]
async fn an_identity_that_does_not_fit_is_refused_and_does_not_hammer_the_workspace() {
    let emulator = harness::emulator().await;
    let variables = [("PGUSER", emulator.identities().user.name.as_str())];
    let proxy = Proxy::cold(&emulator, &variables, |_| {}).await.unwrap();
    proxy.warm().await;
    let refusals = join_all((0..25).map(|_| proxy.refusal())).await;
    let first = emulator.counts();
    assert_eq!(first.mint_requests, 2, "one forced refresh for all");
    // Each client's two, and those of the grace for a young credential, which all share.
    assert!(first.dials <= 50 + 6, "{}", first.dials);
    for refusal in &refusals {
        assert_eq!(refusal.code, "28000");
        assert!(
            refusal
                .message
                .contains("Invalid authorization for databricks identity login"),
            "{refusal:?}"
        );
        assert!(
            refusal.hint.as_deref().unwrap().contains("PGUSER"),
            "{refusal:?}"
        );
        check_refusal(refusal, &emulator);
    }
    // Those who come at once get the same answer for a dial each, and not one more mint.
    for _ in 0..10 {
        let refusal = proxy.refusal().await;
        assert!(
            refusal.message.contains("Invalid authorization"),
            "{refusal:?}"
        );
        assert!(
            refusal
                .detail
                .as_deref()
                .unwrap()
                .contains("No other credential could be tried"),
            "{refusal:?}"
        );
    }
    let (dials, mints, calls) = since(&first, &emulator);
    assert!(
        (10..=16).contains(&dials),
        "{dials}: a few more for the second credential's grace"
    );
    assert_eq!((mints, calls), (0, 0));
}

#[tokio::test]
async fn a_role_that_was_never_made_is_named_with_the_statement_that_makes_it() {
    let emulator = harness::emulator().await;
    let stranger = emulator.identities().stranger.clone();
    let secret =
        secrecy::ExposeSecret::expose_secret(stranger.client_secret.as_ref().unwrap()).to_owned();
    let variables = [
        ("PGUSER", stranger.name.as_str()),
        ("DATABRICKS_CLIENT_ID", &stranger.name),
        ("DATABRICKS_CLIENT_SECRET", &secret),
    ];
    let proxy = Proxy::cold(&emulator, &variables, |_| {}).await.unwrap();
    proxy.warm().await;
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "28000");
    assert!(
        refusal
            .message
            .contains(&format!("role \"{}\" does not exist", stranger.name)),
        "{refusal:?}"
    );
    assert!(
        refusal
            .hint
            .as_deref()
            .unwrap()
            .contains("databricks_create_role"),
        "{refusal:?}"
    );
    assert!(!format!("{refusal:?}").contains(&secret));
    assert_eq!(emulator.counts().dials, 1);
}

/// Without any credential a mint that time may heal is waited for.
#[tokio::test]
async fn a_failing_workspace_is_retried() {
    let rows = [
        (Action::Respond(Response::status(429).retry_after("1")), 2),
        (Action::Respond(Response::status(500)), 2),
        (Action::Respond(Response::status(503).retry_after("1")), 2),
        (Action::Respond(Response::body(200, "{}")), 2),
        (
            Action::Respond(Response::body(200, "<html>log in</html>")),
            2,
        ),
        (Action::Close, 2),
        (Action::Reset, 2),
        (Action::Delay(900), 1),
    ];
    join_all(rows.map(async |(action, mints)| {
        let emulator = harness::emulator().await;
        emulator.faults().once(Site::Mint, action.clone());
        let proxy = Proxy::cold(&emulator, &[], |_| {}).await.unwrap();
        let began = Instant::now();
        drop(proxy.session().await);
        assert!(
            began.elapsed() >= Duration::from_millis(450),
            "{action:?}: {:?}",
            began.elapsed()
        );
        let counts = emulator.counts();
        assert_eq!(
            (counts.dials, counts.mint_requests),
            (1, mints),
            "{action:?}"
        );
    }))
    .await;
}

/// Without any credential, a permanent refusal is reported, and not requested again by each client.
#[tokio::test]
async fn a_workspace_that_refuses_is_quoted() {
    let denied = |status: u16, code: &str, message: &str| {
        Action::Respond(Response::body(
            status,
            format!(r#"{{"error_code":"{code}","message":"{message}"}}"#),
        ))
    };
    let rows = [
        (
            Site::Mint,
            denied(
                400,
                "INVALID_PARAMETER_VALUE",
                "Field 'endpoint' is required",
            ),
            "Field 'endpoint' is required",
        ),
        (
            Site::Mint,
            denied(401, "UNAUTHENTICATED", "Credential was not sent"),
            "Credential was not sent",
        ),
        (
            Site::Mint,
            denied(
                403,
                "PERMISSION_DENIED",
                "API is disabled for users without workspace-access entitlement",
            ),
            "workspace-access",
        ),
        (
            Site::Mint,
            denied(404, "NOT_FOUND", "endpoint id not found"),
            "endpoint id not found",
        ),
        (
            Site::Token,
            denied(401, "invalid_client", "Client authentication failed"),
            "Client authentication failed",
        ),
    ];
    join_all(rows.map(async |(site, action, words)| {
        let emulator = harness::emulator().await;
        emulator.faults().always(site, action.clone());
        let proxy = Proxy::cold(&emulator, &[], |_| {}).await.unwrap();
        let began = Instant::now();
        let refusals = join_all((0..10).map(|_| proxy.refusal())).await;
        assert!(
            began.elapsed() < Duration::from_secs(9),
            "{words}: {:?}",
            began.elapsed()
        );
        for refusal in refusals {
            assert_eq!(refusal.code, "28000");
            let all = format!("{refusal:?}");
            assert!(all.contains(words), "{refusal:?}");
            assert!(refusal.hint.is_some(), "{refusal:?}");
            check_refusal(&refusal, &emulator);
        }
        let counts = emulator.counts();
        assert_eq!(counts.dials, 0);
        assert!(
            counts.mint_requests <= 4 && counts.token_requests <= 4,
            "{words}: {counts:?}"
        );
    }))
    .await;
}

#[tokio::test]
async fn a_workspace_that_never_answers_costs_the_client_its_budget() {
    let emulator = harness::emulator().await;
    emulator.faults().always(Site::Mint, Action::Stall);
    let proxy = Proxy::cold(&emulator, &[], short).await.unwrap();
    let began = Instant::now();
    let refusal = proxy.refusal().await;
    assert!(
        began.elapsed() >= Duration::from_millis(800) && began.elapsed() < Duration::from_secs(3)
    );
    assert_eq!(refusal.code, "28000");
    assert!(
        refusal
            .message
            .contains("no database credential was minted in time"),
        "{refusal:?}"
    );
    assert!(
        refusal.hint.as_deref().unwrap().contains("workspace"),
        "{refusal:?}"
    );
    check_refusal(&refusal, &emulator);
}

#[tokio::test]
async fn a_refusal_is_found_in_the_log_by_its_id() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    let reply = fatal("3D000", "database \"x\" does not exist");
    emulator.faults().once(Site::Startup, Action::Error(reply));
    let mut wire = Wire::dial(binary.postgres).await;
    wire.startup(&[("user", "anyone"), ("database", harness::DATABASE)])
        .await;
    let refusal = within("a refusal", wire.refusal()).await;
    let line = binary.until("client refused").await;
    let id = format!("(lakebase-proxy session {})", line["session"]);
    assert!(
        refusal.detail.as_deref().unwrap().ends_with(&id),
        "{refusal:?} {line}"
    );
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["sqlstate"], "3D000");
    assert_eq!(line["hint"].as_str(), refusal.hint.as_deref());
    assert_eq!(line["reason"], "permission");
}

/// A server repeats a bad value. Once that made this client the leader of retries with its own bad value, for which all
/// others waited, and `token x has expired` used up the forced refreshes of all clients.
#[tokio::test]
async fn a_clients_invalid_settings_affect_that_client_only() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let texts = [
        "endpoint is idle",
        "the database system is starting up",
        "token x has expired",
        "password authentication failed",
        "too many connections",
    ];
    let mut rows = Vec::new();
    for text in texts {
        let escaped = text.replace(' ', "\\ ");
        let user = ("user", "anyone");
        rows.push((vec![user, ("work_mem", text)], "22023"));
        rows.push((vec![user, ("database", text)], "3D000"));
        let options = format!("-c work_mem={escaped}");
        let mut wire = proxy.dial().await;
        wire.startup(&[user, ("options", &options)]).await;
        let refusal = wire.refusal().await;
        assert_eq!(refusal.code, "22023", "{refusal:?}");
        assert!(refusal.message.contains(text), "{refusal:?}");
    }
    let before = emulator.counts();
    let began = Instant::now();
    for (parameters, code) in &rows {
        let mut wire = proxy.dial().await;
        wire.startup(parameters).await;
        let refusal = wire.refusal().await;
        assert_eq!(&refusal.code, code, "{parameters:?}: {refusal:?}");
        drop(proxy.session().await);
    }
    let dials = 2 * u64::try_from(rows.len()).unwrap();
    assert_eq!(since(&before, &emulator), (dials, 0, 0), "one dial each");
    assert!(began.elapsed() < AT_ONCE * 4, "{:?}", began.elapsed());
    proxy.until_quiet().await;
}

/// PGUSER set by hand to another identity: the hint named neither identity, and each client had a new credential minted.
#[tokio::test]
async fn a_credential_of_another_identity_is_renewed_once_and_both_are_named() {
    let emulator = harness::emulator().await;
    let app = emulator.identities().app.name.clone();
    let other = [("PGUSER", "other@example.com")];
    let proxy = Proxy::cold(&emulator, &other, |_| {}).await.unwrap();
    proxy.warm().await;
    let reply = fatal(
        "28P01",
        "token's identity \"x\" did not match the security label configured for role \"other@example.com\"",
    );
    for reply in [reply, fatal("28000", "role \"y\" has no security label")] {
        emulator.faults().clear();
        emulator
            .faults()
            .always(Site::Password, Action::Error(reply.clone()));
        let before = emulator.counts();
        for _ in 0..3 {
            let refusal = proxy.refusal().await;
            assert_eq!(refusal.code, reply.code, "{refusal:?}");
            check_words(&refusal, &reply, &emulator);
            let hint = refusal.hint.unwrap();
            assert!(hint.contains(&app), "{hint}");
            assert!(
                hint.contains("ON ROLE \"other@example.com\" IS 'id="),
                "{hint}"
            );
            assert!(hint.contains("type=USER"), "{hint}");
        }
        let (dials, mints, _) = since(&before, &emulator);
        assert!(mints <= 1 && dials <= 4, "{mints} mints, {dials} dials");
    }
    let refused = &proxy.metrics().clients_refused[Reason::WrongIdentity];
    assert_eq!(refused.get(), 6);

    // The same without that message of the edge.
    emulator.faults().clear();
    let refusal = proxy.refusal().await;
    assert_eq!(refusal.code, "28000");
    let hint = refusal.hint.unwrap();
    assert!(
        hint.contains("`other@example.com` (PGUSER)") && hint.contains(&format!("`{app}`")),
        "{hint}"
    );
    assert!(!hint.contains("create_role"), "it would not help: {hint}");
}

#[tokio::test]
async fn a_hint_is_about_the_database_that_the_client_named() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let refusal = async |database: &str| {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone"), ("database", database)])
            .await;
        wire.refusal().await
    };
    let missing = refusal("nosuch").await;
    assert_eq!(missing.code, "3D000");
    let hint = missing.hint.unwrap();
    assert!(
        hint.contains("`nosuch`") && !hint.contains("PGDATABASE"),
        "{hint}"
    );

    // A plain CREATE DATABASE leaves the extension out, and logins fail there.
    let failed = fatal("28P01", "password authentication failed for user \"x\"");
    emulator
        .faults()
        .always(Site::Password, Action::Error(failed));
    let hint = refusal("raw").await.hint.unwrap();
    assert!(
        hint.contains("run in `raw`: CREATE EXTENSION IF NOT EXISTS databricks_auth"),
        "{hint}"
    );
    let hint = refusal("databricks_postgres").await.hint.unwrap();
    assert!(!hint.contains("CREATE EXTENSION"), "{hint}");
}

/// The pooler may be opened to OAuth credentials one day, so that its host is tried, and the direct one named.
#[tokio::test]
async fn a_pooler_that_refuses_the_credential_leads_to_the_direct_host() {
    let emulator = harness::emulator().await;
    let pooler = emulator.pooler_host();
    let proxy = Proxy::cold(&emulator, &[("PGHOST", &pooler)], |_| {})
        .await
        .unwrap();
    proxy.warm().await;
    let before = emulator.counts();
    let refusal = proxy.refusal().await;
    assert_eq!(since(&before, &emulator), (1, 0, 0));
    assert_eq!(refusal.code, "08P01");
    let direct = pooler.replace("-pooler", "");
    assert!(
        refusal.message.contains("SASL authentication failed")
            && refusal.message.contains(&format!("`{direct}`")),
        "{refusal:?}"
    );
    assert!(refusal.hint.unwrap().contains(&direct));
    check_counted(&proxy, Reason::WrongKind, 1);

    emulator.configure(|settings| settings.pooler_oauth = true);
    assert_eq!(proxy.session().await.value("select 1").await, "1");
}

fn check_counted(proxy: &Proxy, reason: Reason, count: u64) {
    let refused = &proxy.metrics().clients_refused;
    assert_eq!(refused[reason].get(), count, "{reason:?}");
}

/// What resolves to an address that does not let us in (serverless compute, a private link) is dialed elsewhere, and the
/// certificate must still be for the name.
#[tokio::test]
async fn the_address_of_pghostaddr_is_dialed_and_the_name_verified() {
    let emulator = harness::emulator().await;
    let with = async |host: &str, address: &str| {
        let variables = [("PGHOST", host), ("PGHOSTADDR", address)];
        let proxy = Proxy::cold(&emulator, &variables, short).await.unwrap();
        proxy.warm().await;
        proxy
    };
    let proxy = with("localhost", "127.0.0.1").await;
    assert_eq!(proxy.session().await.value("select 1").await, "1");

    let before = emulator.counts();
    let refusal = with("localhost", "127.0.0.2").await.refusal().await;
    assert_eq!(refusal.code, "08001");
    assert!(refusal.message.contains("refused"), "{refusal:?}");
    assert!(
        refusal.hint.unwrap().contains("firewall"),
        "not that it sleeps"
    );
    assert_eq!(since(&before, &emulator).0, 0);

    let refusal = with("elsewhere.example.com", "127.0.0.1").await;
    let refusal = refusal.refusal().await;
    assert!(refusal.message.contains("certificate"), "{refusal:?}");
}
