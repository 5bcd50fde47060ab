//! From the first byte to ReadyForQuery: what clients may send, and what of it is in force at the server.

use std::time::Duration;

use lakebase_proxy::{
    config::{ClientTlsSetting, DatabaseMapping, PortSetting},
    telemetry::labels::Reason,
};
use tokio::io::AsyncWriteExt;

use crate::harness::{
    self, Proxy,
    binary::Binary,
    wire::{
        GSSENC_REQUEST, PROTOCOL_3_0, PROTOCOL_3_2, SSL_REQUEST, Wire, message, packet, startup,
        text,
    },
    within,
};

#[tokio::test]
async fn packets_may_come_byte_by_byte_or_all_at_once() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        settings.client_tls = Some(ClientTlsSetting::Off);
    })
    .await;

    // Each request, then each byte of the StartupMessage and of a query, in a segment of its own.
    let mut wire = proxy.dial().await;
    for request in [GSSENC_REQUEST, SSL_REQUEST] {
        for byte in request {
            wire.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(wire.byte().await, 'N');
    }
    for byte in startup(PROTOCOL_3_0, &[("user", "anyone")]) {
        wire.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    wire.welcome().await;
    for byte in text('Q', "select 'in pieces'") {
        wire.send(&[byte]).await;
        tokio::task::yield_now().await;
    }
    assert_eq!(wire.tags().await, "TDCZ");

    // StartupMessage, query and Terminate in one segment.
    wire = proxy.dial().await;
    let all = [
        startup(PROTOCOL_3_0, &[("user", "anyone")]),
        text('Q', "select 'at once'"),
        message('X', b""),
    ]
    .concat();
    wire.send(&all).await;
    wire.welcome().await;
    assert_eq!(wire.until('Z').await[1].value(), "at once");
    wire.closed().await;
    proxy.until_quiet().await;
}

#[tokio::test]
async fn invalid_first_messages_are_refused_and_never_reach_the_endpoint() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        settings.client_login_timeout = Some(harness::millis(700));
        settings.client_tls = Some(ClientTlsSetting::Off);
    })
    .await;
    let refused = async |bytes: &[u8]| {
        let mut wire = proxy.dial().await;
        wire.send(bytes).await;
        wire.refusal().await
    };

    let stuffed =
        refused(&[&SSL_REQUEST[..], &startup(PROTOCOL_3_0, &[("user", "a")])].concat()).await;
    assert_eq!(stuffed.code, "08P01");
    assert!(stuffed.message.contains("SSLRequest"), "{stuffed:?}");
    assert!(stuffed.detail.unwrap().contains("lakebase-proxy session"));
    assert_eq!(
        refused(&[&GSSENC_REQUEST[..], b"x"].concat()).await.code,
        "08P01"
    );

    let mut wire = proxy.dial().await;
    wire.send(&SSL_REQUEST).await;
    assert_eq!(wire.byte().await, 'N');
    wire.send(&SSL_REQUEST).await;
    assert_eq!(wire.refusal().await.code, "08P01", "requested twice");

    assert_eq!(refused(&packet(2 << 16, b"\0")).await.code, "0A000");
    assert_eq!(
        refused(&packet(PROTOCOL_3_0, b"user\0a\0")).await.code,
        "08P01"
    );
    assert_eq!(
        refused(&packet(PROTOCOL_3_0, b"user\0\xff\0\0")).await.code,
        "22021"
    );

    // Not Postgres at all: no answer that could be taken for one.
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    for bytes in [
        &hello[..],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &[0, 0, 0, 7, 0, 0, 0],
        &[0, 0, 0x27, 0x10, 0, 3, 0, 0],
    ] {
        let mut wire = proxy.dial().await;
        wire.send(bytes).await;
        wire.closed().await;
    }

    // Too slow, and silent.
    for beginning in [&b""[..], &startup(PROTOCOL_3_0, &[("user", "a")])[..12]] {
        let late = refused(beginning).await;
        assert_eq!(late.code, "08P01");
        assert!(late.message.contains("in time"), "{late:?}");
    }
    assert_eq!(emulator.counts().dials, 0);
    let refusals = &proxy.metrics().clients_refused;
    assert_eq!(refusals[Reason::ClientTls].get(), 1);
    assert_eq!(refusals[Reason::Timeout].get(), 2);
    proxy.until_quiet().await;
}

#[tokio::test]
async fn a_startup_message_as_long_as_the_edge_takes_passes_and_a_longer_one_is_refused() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let long = |length: usize| {
        let empty = startup(PROTOCOL_3_0, &[("user", "a"), ("application_name", "")]).len();
        startup(
            PROTOCOL_3_0,
            &[
                ("user", "a"),
                ("application_name", &"x".repeat(length - empty)),
            ],
        )
    };
    // Room for the longer user name that we put in the place of theirs, and for the database's.
    let mut wire = proxy.dial().await;
    wire.send(&long(9_800)).await;
    wire.welcome().await;

    // What fits on the way in may not on the way out.
    let dials = emulator.counts().dials;
    let mut wire = proxy.dial().await;
    wire.send(&long(9_999)).await;
    let refusal = wire.refusal().await;
    assert!(refusal.message.contains("limit of 9999"), "{refusal:?}");
    assert_eq!(emulator.counts().dials, dials, "nothing is dialed for it");

    // Nor what is longer only because of how we send it: each blank is escaped.
    let mut wire = proxy.dial().await;
    let blanks = " ".repeat(6_000);
    wire.startup(&[("user", "a"), ("search_path", &blanks)])
        .await;
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "08P01");
    assert!(
        refusal.message.contains("startup message to the endpoint"),
        "{refusal:?}"
    );
    assert!(refusal.hint.unwrap().contains("ALTER ROLE"));
    assert_eq!(emulator.counts().dials, dials);

    let mut wire = proxy.dial().await;
    wire.send(&long(10_000)).await;
    wire.closed().await;
}

#[tokio::test]
async fn newer_clients_get_a_version_negotiation() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.dial().await;
    let parameters = [
        ("user", "anyone"),
        ("_pq_.something", "1"),
        ("_pq_.else", "2"),
    ];
    wire.send(&startup(PROTOCOL_3_2, &parameters)).await;
    let first = wire.next().await;
    assert_eq!(first.tag, 'v', "before anything else");
    assert_eq!(
        &first.body[..],
        b"\0\x03\0\0\0\0\0\x02_pq_.something\0_pq_.else\0"
    );
    wire.welcome().await;
    assert_eq!(wire.value("select 1").await, "1");

    // An option alone, and a version alone.
    let mut wire = proxy.dial().await;
    wire.send(&startup(PROTOCOL_3_0, &parameters[..2])).await;
    assert!(wire.welcome().await.negotiation.is_some());
    let mut wire = proxy.dial().await;
    wire.send(&startup(PROTOCOL_3_2, &parameters[..1])).await;
    assert!(wire.welcome().await.negotiation.is_some());
}

#[tokio::test]
async fn any_user_and_any_password_will_do() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let app = &emulator.identities().app.name;
    for user in [
        "anyone",
        "postgres",
        "ünïcödé",
        "o'hara; drop table notes",
        "",
    ] {
        let mut wire = proxy.dial().await;
        // An unrequested password, in two segments, behind it a query.
        let startup = startup(
            PROTOCOL_3_0,
            &[("user", user), ("password", "in the startup")][..1],
        );
        let password = text('p', "sesame-of-the-client");
        wire.send(&[&startup[..], &password[..9]].concat()).await;
        wire.welcome().await;
        wire.send(&password[9..]).await;
        assert_eq!(wire.value("select current_user").await, *app, "{user}");
        assert_eq!(wire.value("select session_user").await, *app);
    }
    // A driver with a password set.
    let mut config = proxy.client_config();
    config.password("sesame-of-the-client");
    let client = proxy.try_client(&config).await.unwrap();
    client.simple_query("select 1").await.unwrap();
    assert_eq!(emulator.counts().logins, 6);
}

/// `postgres://temporal@localhost/temporal`, and Keycloak, Airflow and n8n alike: user and database have one name. Such
/// clients were all sent to the default database, even where their own existed.
#[tokio::test]
async fn a_database_that_exists_wins_over_the_default() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| settings.admin_console = Some(true)).await;
    let database = async |name: &str| {
        let mut config = proxy.client_config();
        config.user(name).dbname(name);
        let client = proxy.try_client(&config).await.unwrap();
        let row = client.query_one("select current_database()", &[]).await;
        row.unwrap().get::<_, String>(0)
    };
    let default = "databricks_postgres";
    let attempts = emulator.counts().dials;
    assert_eq!(database("temporal").await, default);
    assert_eq!(emulator.counts().dials, attempts + 2);
    // It is known by now not to exist.
    assert_eq!(database("temporal").await, default);
    assert_eq!(emulator.counts().dials, attempts + 3);

    let mut config = proxy.client_config();
    config.dbname("lakebase_proxy");
    let console = proxy.try_client(&config).await.unwrap();
    let shown = console.query("SHOW DATABASES", &[]).await.unwrap();
    let shown: Vec<(String, String)> = shown
        .iter()
        .map(|row| (row.get("name"), row.get("database")))
        .collect();
    assert!(
        shown.contains(&("temporal".to_owned(), default.to_owned())),
        "{shown:?}"
    );

    for statement in ["drop database if exists n8n", "create database n8n"] {
        emulator.execute(statement).await.unwrap();
    }
    assert_eq!(database("n8n").await, "n8n");
    let shown = console.query("SHOW DATABASES", &[]).await.unwrap();
    assert!(shown.iter().all(|row| row.get::<_, &str>("name") != "n8n"));
}

#[tokio::test]
async fn the_database_is_the_clients_or_else_the_configured_one() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let exact = Proxy::with(&emulator, |settings| {
        settings.database_mapping = Some(DatabaseMapping::Exact);
    })
    .await;
    let database = async |proxy: &Proxy, parameters: &[(&str, &str)]| {
        let mut wire = proxy.dial().await;
        wire.startup(parameters).await;
        wire.welcome().await;
        wire.value("select current_database()").await
    };
    let default = "databricks_postgres";
    assert_eq!(database(&proxy, &[("user", "a")]).await, default);
    assert_eq!(
        database(&proxy, &[("user", "a"), ("database", "a")]).await,
        default
    );
    assert_eq!(
        database(&proxy, &[("user", "a"), ("database", "")]).await,
        default
    );
    assert_eq!(
        database(&proxy, &[("user", "a"), ("database", "postgres")]).await,
        "postgres"
    );
    assert_eq!(
        database(&exact, &[("user", "a"), ("database", "postgres")]).await,
        "postgres"
    );

    let mut wire = exact.dial().await;
    wire.startup(&[("user", "nosuch"), ("database", "nosuch")])
        .await;
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "3D000");
    assert!(
        refusal
            .message
            .contains("database \"nosuch\" does not exist"),
        "{refusal:?}"
    );
}

#[tokio::test]
async fn every_startup_setting_is_in_force_and_survives_resets_as_startup_values_do() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let settings = [
        (
            "search_path",
            "\"my schema\", public",
            "\"my schema\", public",
        ),
        ("TimeZone", "America/New_York", "America/New_York"),
        ("DateStyle", "SQL, DMY", "SQL, DMY"),
        ("statement_timeout", "7s", "7s"),
        ("extra_float_digits", "2", "2"),
        ("lock_timeout", "1500", "1500ms"),
        ("application_name", "my app", "my app"),
        ("myapp.note", "a\\b 'c' \"d\"\te", "a\\b 'c' \"d\"\te"),
        ("intervalstyle", "iso_8601", "iso_8601"),
        ("work_mem", "5MB", "5MB"),
        ("enable_seqscan", "off", "off"),
    ];
    let mut parameters = vec![
        ("user", "anyone"),
        (
            "options",
            "-c geqo=off -c work_mem=6MB --random_page_cost=3",
        ),
    ];
    parameters.extend(settings.iter().map(|&(name, value, _)| (name, value)));
    let mut wire = proxy.dial().await;
    wire.startup(&parameters).await;
    let welcome = wire.welcome().await;
    assert_eq!(welcome.parameters["TimeZone"], "America/New_York");
    assert_eq!(welcome.parameters["application_name"], "my app");
    assert_eq!(welcome.parameters["DateStyle"], "SQL, DMY");

    for reset in ["select 1", "reset all", "discard all"] {
        for (name, _, _) in settings.iter().filter(|_| reset != "select 1") {
            // What a session changes is undone by the reset, to what it began with.
            let other = match *name {
                "TimeZone" => "UTC",
                "DateStyle" => "ISO",
                "intervalstyle" => "postgres",
                "search_path" | "application_name" | "myapp.note" => "other",
                _ => "1",
            };
            if !name.ends_with("mem") {
                wire.query(&format!("set {name} to '{other}'")).await;
            }
        }
        wire.query(reset).await;
        for (name, _, expected) in settings {
            assert_eq!(
                wire.value(&format!("show {name}")).await,
                expected,
                "{name} after {reset}"
            );
        }
        assert_eq!(wire.value("show geqo").await, "off", "after {reset}");
        assert_eq!(
            wire.value("show random_page_cost").await,
            "3",
            "after {reset}"
        );
    }
}

#[tokio::test]
async fn the_client_encoding_is_in_force() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("client_encoding", "LATIN1")])
        .await;
    assert_eq!(wire.welcome().await.parameters["client_encoding"], "LATIN1");
    wire.send(&message('Q', b"select 'caf\xe9'\0")).await;
    let reply = wire.until('Z').await;
    assert_eq!(&reply[1].body[6..], b"caf\xe9");
    assert_eq!(wire.value("select length('caf' || chr(233))").await, "4");

    // The edge forces UTF8 as the value to begin with, so a reset leads to that; the client gets a ParameterStatus.
    wire.send(&text('Q', "reset client_encoding")).await;
    let reported = wire.until('Z').await;
    let status = reported
        .iter()
        .find(|reply| reply.tag == 'S')
        .expect("a ParameterStatus");
    assert_eq!(&status.body[..], b"client_encoding\0UTF8\0");

    // A name the server does not know is the server's to refuse.
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("client_encoding", "NOSUCH")])
        .await;
    let refusal = wire.refusal().await;
    assert_eq!(refusal.code, "22023", "{refusal:?}");
    assert!(refusal.message.contains("client_encoding"), "{refusal:?}");
}

#[tokio::test]
async fn the_servers_notice_about_a_setting_reaches_the_client() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    for (name, value, code) in [
        ("TimeZone", "Mars/Olympus", "22023"),
        ("options", "-c no_such_setting=1", "42704"),
        ("options", "-c fsync=off", "55P02"),
        ("options", "-c log_statement=all", "42501"),
    ] {
        let mut wire = proxy.dial().await;
        wire.startup(&[("user", "anyone"), (name, value)]).await;
        let refusal = wire.refusal().await;
        assert_eq!(refusal.code, code, "{refusal:?}");
        assert!(
            value.contains(refusal.message.split('"').nth(1).unwrap()) || name == "TimeZone",
            "{refusal:?}"
        );
    }
}

/// pgx, postgres.js and asyncpg send the words of a connection string that they do not know as startup parameters. The
/// edge drops them, so that the string works without the proxy.
#[tokio::test]
async fn unknown_parameters_are_dropped_and_settings_kept() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let parameters = [
        ("user", "anyone"),
        ("database", "databricks_postgres"),
        ("pgbouncer", "true"),
        ("max_conns", "20"),
        ("Schema", "app"),
        ("fsync", "off"),
        ("log_statement", "all"),
        ("pool-mode", "x"),
        ("app.9x", "1"),
        ("TimeZone", "Asia/Tokyo"),
        ("app.tenant", "7"),
        ("search_path", "mine"),
    ];
    for dials in [7, 1, 1] {
        let before = emulator.counts().dials;
        let mut wire = proxy.dial().await;
        wire.startup(&parameters).await;
        let welcome = wire.welcome().await;
        assert_eq!(welcome.parameters["TimeZone"], "Asia/Tokyo");
        let settings = "select current_setting('app.tenant') || current_setting('search_path')";
        assert_eq!(wire.value(settings).await, "7mine");
        assert_eq!(emulator.counts().dials - before, dials);
    }

    // Who sends too many is refused in the server's words.
    let names: Vec<String> = (0..20).map(|number| format!("nosuch_{number}")).collect();
    let mut parameters = vec![("user", "anyone")];
    parameters.extend(names.iter().map(|name| (name.as_str(), "1")));
    let mut wire = proxy.dial().await;
    wire.startup(&parameters).await;
    assert_eq!(wire.refusal().await.code, "42704");
}

#[tokio::test]
async fn a_dropped_word_is_logged_once() {
    let emulator = harness::emulator().await;
    let mut binary = Binary::serve(&emulator, &[]).await;
    for (name, value) in [("schema", "a"), ("SCHEMA", "b"), ("max_conns", "20")] {
        let mut wire = Wire::dial(binary.postgres).await;
        wire.startup(&[("user", "anyone"), (name, value)]).await;
        wire.welcome().await;
    }
    let line = binary.until("a startup parameter is dropped").await;
    assert_eq!(
        (&line["level"], &line["parameter"]),
        (&"WARN".into(), &"schema".into())
    );
    let line = binary.until("a startup parameter is dropped").await;
    assert_eq!(line["parameter"], "max_conns");
}

#[tokio::test]
async fn localhost_reaches_it_by_either_family() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let port = proxy.address().port();
    let mut addresses = vec![([127, 0, 0, 1], port).into()];
    if std::net::TcpListener::bind("[::1]:0").is_ok() {
        addresses.push(format!("[::1]:{port}").parse().unwrap());
    }
    for address in addresses {
        let mut wire = Wire::dial(address).await;
        wire.startup(&[("user", "anyone")]).await;
        wire.welcome().await;
        assert_eq!(wire.value("select 1").await, "1");
    }
}

#[tokio::test]
async fn clients_that_connect_and_leave_cost_nothing() {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        settings.http_port = Some(PortSetting::None);
        settings.client_tls = Some(ClientTlsSetting::Off);
    })
    .await;
    for bytes in [&b""[..], &SSL_REQUEST, &[0, 0]] {
        let mut wire = proxy.dial().await;
        wire.send(bytes).await;
        within("half-close", wire.stream.shutdown()).await.unwrap();
        if bytes.len() == 8 {
            assert_eq!(wire.byte().await, 'N');
        }
        wire.closed().await;
        proxy.dial().await.reset();
    }
    proxy.until_quiet().await;
    assert_eq!(emulator.counts().dials, 0);
    tokio::time::timeout(Duration::from_secs(30), proxy.client())
        .await
        .unwrap();
}
