//! `psql lakebase_proxy`: what the console shows, to whom, by which drivers, and when nothing else works.

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use lakebase_proxy::{
    config::{PoolMode, PortSetting, Settings},
    emulator::{Action, Emulator, Response, Site},
    telemetry::labels::{PoolClose, PoolServer},
};
use tokio::process::Command;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage, SimpleQueryRow};
use tokio_util::task::TaskTracker;

use crate::harness::{
    self, DATABASE, Proxy,
    binary::{self, Binary},
    emulator,
    emulator::http,
    eventually, millis, until_running,
    wire::{self, Wire},
    within,
};

fn open(settings: &mut Settings) {
    settings.admin_console = Some(true);
}

async fn proxy(emulator: &Emulator) -> Proxy {
    Proxy::with(emulator, open).await
}

pub(crate) async fn console(proxy: &Proxy) -> Client {
    let mut config = proxy.client_config();
    config.dbname("lakebase_proxy");
    within("the console", proxy.try_client(&config))
        .await
        .unwrap()
}

/// The rows of a simple query.
pub(crate) async fn rows(console: &Client, query: &str) -> Vec<SimpleQueryRow> {
    let reply = within(query, console.simple_query(query)).await.unwrap();
    reply
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        })
        .collect()
}

async fn error(console: &Client, query: &str) -> tokio_postgres::error::DbError {
    let error = within(query, console.simple_query(query))
        .await
        .unwrap_err();
    error.as_db_error().unwrap().clone()
}

/// Names that clients give themselves, on a terminal and on the status page: control characters and those that reorder
/// text made rows that were none.
#[tokio::test]
async fn names_are_shown_on_one_line_whatever_they_hold() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        open(settings);
        settings.http_port = Some(PortSetting::Port(0));
    })
    .await;
    let words = "x\n\u{1b}[2K\u{9b}\u{2028}\u{202e}y";
    let escaped = "x\\n\\u{1b}[2K\\u{9b}\\u{2028}\\u{202e}y";
    let mut config = proxy.client_config();
    config.user(words).application_name(words);
    let _client = proxy.try_client(&config).await.unwrap();
    config.dbname(format!("{words}z"));
    assert!(proxy.try_client(&config).await.is_err());
    let console = console(&proxy).await;
    let clients = rows(&console, "SHOW CLIENTS").await;
    assert_eq!(clients[0].get("user"), Some(escaped));
    let failures = rows(&console, "SHOW FAILURES").await;
    assert!(failures[0].get("message").unwrap().contains(escaped));
    let page = http(proxy.http().port(), "GET /\naccept: text/html", "").await;
    let page = page.unwrap().body;
    assert!(page.matches(escaped).count() >= 2, "{page}");
    assert!(!page.contains(['\u{1b}', '\u{9b}', '\u{2028}', '\u{202e}']));
}

#[tokio::test]
async fn it_shows_clients_their_activity_and_their_servers() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let mut config = proxy.client_config();
    config.application_name("the app");
    let client = proxy.try_client(&config).await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let console = console(&proxy).await;
    let clients = eventually("the session is seen in its transaction", async || {
        let clients = rows(&console, "SHOW CLIENTS").await;
        let state = clients[0].get("state")?.to_owned();
        (state != "active").then_some(clients)
    })
    .await;
    let seen = &clients[0];
    assert_eq!(clients.len(), 1, "the console is not in its own list");
    let get = |name| seen.get(name).unwrap();
    assert_eq!(get("state"), "idle in transaction");
    assert_eq!(
        (get("type"), get("user"), get("application_name")),
        ("C", "anyone", "the app")
    );
    assert_eq!(get("addr"), "127.0.0.1");
    assert!(get("bytes_received").parse::<u64>().unwrap() > 0);

    let servers = rows(&console, "show servers;").await;
    assert_eq!(servers.len(), 1);
    let get = |name| servers[0].get(name).unwrap();
    assert!(
        get("remote_pid").parse::<u32>().is_ok(),
        "what the endpoint calls its process"
    );
    assert_eq!(get("database"), "databricks_postgres");
    assert_eq!(get("user"), emulator.identities().app.name);
    assert_eq!(get("tls"), "verify-full");
    assert_eq!(get("link"), seen.get("id").unwrap());

    drop(client);
    eventually("the session is gone", async || {
        rows(&console, "SHOW CLIENTS")
            .await
            .is_empty()
            .then_some(())
    })
    .await;
    let stats = rows(&console, "SHOW STATS").await;
    assert_eq!(stats[0].get("total_server_assignment_count"), Some("1"));
    assert_eq!(stats[0].get("total_query_count"), Some("1"));
}

#[tokio::test]
async fn pgbouncers_monitoring_queries_are_answered() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let client = proxy.client().await;
    client.simple_query("select pg_sleep(0.02)").await.unwrap();
    let console = console(&proxy).await;
    // As its exporter for Prometheus writes them.
    let pool = &rows(&console, "SHOW pools;").await[0];
    let user = &emulator.identities().app.name;
    assert_eq!(pool.get("user"), Some(user.as_str()));
    for (column, value) in [
        ("cl_active", "1"),
        ("cl_waiting", "0"),
        ("sv_active", "1"),
        ("sv_idle", "0"),
        ("maxwait", "0"),
        ("pool_mode", "none"),
    ] {
        assert_eq!(pool.get(column), Some(value), "{column}");
    }
    let lists = rows(&console, "SHOW LISTS;").await;
    let items = |list: &str| {
        let row = lists.iter().find(|row| row.get("list") == Some(list));
        row.unwrap().get("items").unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(
        (items("databases"), items("pools"), items("users")),
        (1, 1, 1)
    );
    assert_eq!((items("used_clients"), items("used_servers")), (1, 1));
    assert!(items("free_clients") > 1);
    let database = &rows(&console, "SHOW databases;").await[0];
    assert_eq!(database.get("name"), pool.get("database"));
    assert_eq!(database.get("force_user"), Some(user.as_str()));
    assert_eq!(database.get("current_connections"), Some("1"));
    // An answer is passed on before it is counted.
    let (totals, stats) = eventually("the query is counted", async || {
        let totals = rows(&console, "SHOW stats_totals;").await.remove(0);
        let stats = rows(&console, "SHOW STATS").await.remove(0);
        (totals.get("query_count") == Some("1")).then_some((totals, stats))
    })
    .await;
    for column in ["xact_count", "query_count", "server_assignment_count"] {
        assert_eq!(totals.get(column), stats.get(&*format!("total_{column}")));
    }
    for column in ["xact_time", "query_time", "wait_time"] {
        let micros = totals.get(column);
        assert_eq!(micros, stats.get(&*format!("total_{column}")));
        let micros: u64 = micros.unwrap().parse().unwrap();
        let least = if column == "wait_time" { 1 } else { 20_000 };
        assert!(micros >= least, "{column}: {micros}");
    }
    assert_eq!(totals.get("bytes_received"), stats.get("total_received"));
}

fn pooled(settings: &mut Settings) {
    open(settings);
    settings.pool_mode = Some(PoolMode::Session);
    settings.default_pool_size = Some(1.try_into().unwrap());
    settings.reserve_pool_size = Some(2);
    // No client gets the reserve in the time of the test.
    settings.reserve_pool_timeout = Some(millis(3_600_000));
    settings.spare_pool_size = Some(0);
}

/// The row of a table whose first column is `name`, in the columns named.
async fn cells(console: &Client, table: &str, name: &str, columns: &str) -> Vec<String> {
    let rows = rows(console, &format!("SHOW {table}")).await;
    let row = rows.iter().find(|row| row.get(0) == Some(name));
    let row = row.unwrap_or_else(|| panic!("{table} without {name}"));
    let cell = |column| row.get(column).unwrap_or("NULL").to_owned();
    columns.split(' ').map(cell).collect()
}

#[tokio::test]
async fn a_pool_is_shown_with_its_clients_and_its_connections() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings);
        settings.http_port = Some(PortSetting::Port(0));
    })
    .await;
    let console = console(&proxy).await;
    let name = rows(&console, "SHOW ENDPOINTS").await[0]
        .get(0)
        .unwrap()
        .to_owned();
    let columns = "cl_active cl_waiting sv_active sv_idle sv_tested sv_login sv_limit pool_mode";
    let pool = async |name: &str| cells(&console, "POOLS", name, columns).await.join(" ");
    assert_eq!(pool(&name).await, "0 0 0 0 0 0 NULL session");

    let client = proxy.client().await;
    let mut waiting = proxy.dial().await;
    waiting
        .startup(&[("user", "anyone"), ("database", DATABASE)])
        .await;
    eventually("the queue is seen", async || {
        (pool(&name).await == "1 1 1 0 0 0 1 session").then_some(())
    })
    .await;
    let wait = cells(&console, "POOLS", &name, "maxwait maxwait_us").await;
    assert_ne!(wait, ["0", "0"]);

    let mut config = proxy.client_config();
    config.dbname("postgres");
    let other = proxy.try_client(&config).await.unwrap();
    let other_name = format!("{name}/postgres");
    assert_eq!(pool(&other_name).await, "1 0 1 0 0 0 1 session");
    assert_eq!(pool(&name).await, "1 1 1 0 0 0 1 session");

    let columns = "database pool_size min_pool_size reserve_pool_size pool_mode max_connections current_connections current_client_connections paused";
    let shown = cells(&console, "DATABASES", &name, columns).await;
    assert_eq!(shown.join(" "), "databricks_postgres 1 0 2 session 0 1 2 0");
    let shown = cells(&console, "DATABASES", &other_name, columns).await;
    assert_eq!(shown.join(" "), "postgres 1 0 2 session 0 1 1 0");

    let clients = rows(&console, "SHOW CLIENTS").await;
    let links: BTreeSet<_> = clients.iter().map(|client| client.get("link")).collect();
    assert_eq!(links.len(), 3, "one waits: {clients:?}");
    let is_other = |client: &&SimpleQueryRow| client.get("database") == Some("postgres");
    let other_link = clients.iter().find(is_other).unwrap().get("link");

    drop(other);
    eventually("the connection is idle", async || {
        (pool(&other_name).await == "0 0 0 1 0 0 1 session").then_some(())
    })
    .await;
    let servers = rows(&console, "SHOW SERVERS").await;
    assert_eq!(servers.len(), 2, "{servers:?}");
    let (linked, idle) = (&servers[0], &servers[1]);
    assert!(linked.get("link").is_some());
    assert!(links.contains(&linked.get("id")) && linked.get("id") != other_link);
    assert_eq!(idle.get("id"), other_link, "the same for each client");
    assert_eq!(linked.get("database"), Some("databricks_postgres"));
    assert_eq!((idle.get("state"), idle.get("link")), (Some("idle"), None));
    assert_eq!(idle.get("database"), Some("postgres"));
    assert_eq!(idle.get("addr"), linked.get("addr"));
    assert!(idle.get("remote_pid").unwrap().parse::<u32>().is_ok());

    let page = http(proxy.http().port(), "GET /\naccept: text/html", "").await;
    let page = page.unwrap().body;
    let row = page.split("<tr").find(|row| row.contains(">postgres</td>"));
    assert!(
        row.unwrap()
            .contains("data-label=\"Idle\" class=\"number\">1<")
    );
    assert!(page.contains("</span> 1, up to "), "the client that waits");
    assert_eq!(proxy.metrics().pool_limit.get(), 2, "of two databases");

    for (list, items) in [
        ("databases", "2"),
        ("pools", "2"),
        ("used_clients", "2"),
        ("free_servers", "1"),
        ("used_servers", "1"),
    ] {
        assert_eq!(cells(&console, "LISTS", list, "items").await, [items]);
    }
    let assigned = cells(&console, "STATS", &name, "total_server_assignment_count").await;
    assert_eq!(assigned, ["2"]);
    drop(client);
    eventually("the one that waited has it", async || {
        let assigned = cells(&console, "STATS", &name, "total_server_assignment_count").await;
        (assigned == ["3"]).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_pause_waits_for_the_clients_and_holds_new_ones_until_resume() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings);
        settings.query_wait_timeout = Some(millis(300));
    })
    .await;
    let (one, other) = (console(&proxy).await, console(&proxy).await);
    let client = proxy.client().await;
    let name = rows(&one, "SHOW POOLS").await[0].get(0).unwrap().to_owned();
    let pause = format!("PAUSE {name}");
    let pausing = TaskTracker::new().spawn(async move { one.batch_execute(&pause).await });
    let columns = "cl_active cl_waiting sv_active sv_idle";
    let pool = async || cells(&other, "POOLS", &name, columns).await.join(" ");
    eventually("it is paused", async || {
        let paused = cells(&other, "DATABASES", &name, "paused").await;
        (paused == ["1"]).then_some(())
    })
    .await;
    let config = proxy.client_config();
    let waiting = TaskTracker::new().spawn(async move {
        let (client, connection) = config.connect(NoTls).await?;
        TaskTracker::new().spawn(connection);
        client.simple_query("select 1").await
    });
    eventually("the new client waits", async || {
        (pool().await == "1 1 1 0").then_some(())
    })
    .await;
    client.batch_execute("select 1").await.unwrap();
    assert!(!pausing.is_finished(), "a client has its connection yet");
    let error = error(&other, "PAUSE databricks_postgres").await;
    assert_eq!(error.code().code(), "55000");
    drop(client);
    within("PAUSE returns", pausing).await.unwrap().unwrap();
    assert_eq!(pool().await, "0 1 0 0");
    assert_eq!(proxy.metrics().pool_closes[PoolClose::Retired].get(), 1);
    // The wait timeout does not count a pause. It is shorter than this sleep: no event shows that it does not pass.
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!waiting.is_finished());
    other
        .batch_execute("RESUME databricks_postgres")
        .await
        .unwrap();
    within("the client is served", waiting)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(cells(&other, "DATABASES", &name, "paused").await, ["0"]);
}

#[tokio::test]
async fn all_pools_are_paused_at_once_those_to_come_included() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, pooled).await;
    let console = console(&proxy).await;
    let state = async || cells(&console, "STATE", "paused", "value").await;
    assert_eq!(state().await, ["no"]);
    console.batch_execute("PAUSE").await.unwrap();
    assert_eq!(state().await, ["yes"]);
    let config = proxy.client_config();
    let waiting = TaskTracker::new().spawn(async move { config.connect(NoTls).await.map(drop) });
    eventually("it waits", async || {
        (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
    })
    .await;
    assert_eq!(emulator.counts().logins, 0);
    console.batch_execute("RESUME").await.unwrap();
    within("it is served", waiting).await.unwrap().unwrap();
    assert_eq!(state().await, ["no"]);
    for (command, code) in [
        ("RESUME", "55000"),
        ("PAUSE no_such_database", "3D000"),
        ("RECONNECT no_such_database", "3D000"),
        ("KILL", "42601"),
    ] {
        assert_eq!(
            error(&console, command).await.code().code(),
            code,
            "{command}"
        );
    }
}

#[tokio::test]
async fn reconnect_replaces_idle_connections_now_and_others_when_they_are_returned() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings);
        settings.default_pool_size = Some(2.try_into().unwrap());
    })
    .await;
    let console = console(&proxy).await;
    let (used, idle) = (proxy.client().await, proxy.client().await);
    drop(idle);
    let metrics = proxy.metrics();
    let until = async |state, count| {
        eventually("the connections", async || {
            (metrics.pool_servers[state].get() == count).then_some(())
        })
        .await;
    };
    until(PoolServer::Idle, 1).await;
    console.batch_execute("RECONNECT").await.unwrap();
    until(PoolServer::Idle, 0).await;
    assert_eq!(metrics.pool_servers[PoolServer::Leased].get(), 1);
    used.batch_execute("select 1").await.unwrap();
    drop(used);
    until(PoolServer::Leased, 0).await;
    eventually("both are closed", async || {
        (metrics.pool_closes[PoolClose::Retired].get() == 2).then_some(())
    })
    .await;
    let _client = proxy.client().await;
    assert_eq!(emulator.counts().logins, 3);
}

#[tokio::test]
async fn kill_ends_the_sessions_of_one_database() {
    let emulator = emulator().await;
    for mode in [PoolMode::None, PoolMode::Session] {
        let proxy = Proxy::with(&emulator, |settings| {
            pooled(settings);
            settings.pool_mode = Some(mode);
        })
        .await;
        let console = console(&proxy).await;
        let mut killed = proxy.session().await;
        let mut config = proxy.client_config();
        config.dbname("postgres");
        let other = proxy.try_client(&config).await.unwrap();
        killed
            .send(&wire::text('Q', "begin; select pg_sleep(60)"))
            .await;
        let role = &emulator.identities().app.name;
        until_running(role, 1).await;
        console
            .batch_execute("KILL databricks_postgres")
            .await
            .unwrap();
        let fatal = killed.refusal().await;
        assert_eq!(fatal.code, "57P01");
        assert!(fatal.message.contains("administrator command"), "{fatal:?}");
        until_running(role, 0).await;
        other.batch_execute("select 1").await.unwrap();
        let config = proxy.client_config();
        let next = TaskTracker::new().spawn(async move { config.connect(NoTls).await.map(drop) });
        if mode == PoolMode::Session {
            eventually("it waits", async || {
                (proxy.metrics().pool_clients_waiting.get() == 1).then_some(())
            })
            .await;
            console
                .batch_execute("RESUME databricks_postgres")
                .await
                .unwrap();
        }
        within("the next client", next).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_client_that_waits_is_seen_to_wait() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    emulator.faults().always(Site::Accept, Action::Stall);
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone")]).await;
    let console = console(&proxy).await;
    eventually("it waits", async || {
        let pool = &rows(&console, "SHOW POOLS").await[0];
        let waited = pool.get("maxwait_us") != Some("0") || pool.get("maxwait") != Some("0");
        (pool.get("cl_waiting") == Some("1") && waited).then_some(())
    })
    .await;
}

/// Who comes by the Unix socket is known, and our own user may always look.
#[tokio::test]
async fn by_the_unix_socket_it_is_open_to_our_own_user() {
    let emulator = emulator().await;
    let directory = tempfile::TempDir::new().unwrap();
    let proxy = Proxy::with(&emulator, |settings| {
        settings.unix_socket = Some(directory.path().to_owned());
    })
    .await;
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(directory.path())
        .port(proxy.address().port())
        .user("me")
        .dbname("lakebase_proxy");
    let console = within("the console", proxy.try_client(&config))
        .await
        .unwrap();
    assert!(rows(&console, "SHOW CLIENTS").await.is_empty());
}

#[tokio::test]
async fn the_extended_protocol_and_transactions_work() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let _client = proxy.client().await;
    let mut console = console(&proxy).await;
    let row = within("a query", console.query_one("SHOW CLIENTS", &[]))
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>("type"), "C");
    assert!(row.get::<_, i64>("id") >= 1, "numbers are numbers");
    assert_eq!(row.get::<_, Option<i64>>("remote_pid"), None);
    let transaction = console.transaction().await.unwrap();
    let statement = transaction.prepare("SHOW VERSION").await.unwrap();
    let version: String = transaction.query_one(&statement, &[]).await.unwrap().get(0);
    assert_eq!(
        version,
        concat!("lakebase-proxy ", env!("CARGO_PKG_VERSION"))
    );
    transaction.commit().await.unwrap();
    let error = console.query("SELECT 1", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "0A000");
    // And on it goes.
    assert_eq!(console.query("SHOW HELP", &[]).await.unwrap().len(), 22);
}

#[tokio::test]
async fn it_changes_no_settings_and_runs_no_sql() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let console = console(&proxy).await;
    for query in ["SUSPEND", "SHUTDOWN", "RELOAD", "SET max_connections = 1"] {
        let error = error(&console, query).await;
        assert_eq!(error.code().code(), "0A000", "{query}");
        assert!(
            error.message().contains("no command"),
            "{query}: {}",
            error.message()
        );
        assert!(error.hint().is_some(), "{query}");
    }
    // What psql sends for \d.
    let error = error(&console, "SELECT n.nspname FROM pg_catalog.pg_class c").await;
    assert!(error.hint().unwrap().contains("SHOW HELP"));
    let _still = proxy.client().await;
}

#[tokio::test]
async fn it_works_without_a_credential_and_shows_the_reason_and_the_fix() {
    let emulator = emulator().await;
    emulator
        .faults()
        .always(Site::Mint, Action::Respond(Response::status(403)));
    let proxy = Proxy::cold(&emulator, &[], |settings| {
        open(settings);
        settings.connect_timeout = Some(millis(500));
    })
    .await
    .unwrap();
    let reported = proxy.refusal().await;
    assert_eq!(reported.code, "28000");

    let console = console(&proxy).await;
    let failures = rows(&console, "SHOW FAILURES").await;
    assert_eq!(failures[0].get("sqlstate"), Some("28000"));
    assert_eq!(failures[0].get("message"), Some(reported.message.as_str()));
    assert_eq!(failures[0].get("hint"), reported.hint.as_deref());
    let tokens = rows(&console, "SHOW TOKENS").await;
    assert_eq!(tokens[0].get("state"), Some("none"));
    assert!(tokens[0].get("last_error").is_some());
    let refreshes = rows(&console, "SHOW REFRESHES").await;
    assert_eq!(refreshes[0].get("outcome"), Some("refused"));
    let state = rows(&console, "SHOW STATE").await;
    let ready = state
        .iter()
        .find(|row| row.get("key") == Some("ready"))
        .unwrap();
    assert_eq!(ready.get("value"), Some("no"));
}

#[tokio::test]
async fn it_shows_the_expiry_of_a_credential_but_never_its_value() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let console = console(&proxy).await;
    let token = &rows(&console, "SHOW TOKENS").await[0];
    assert_eq!(
        (token.get("state"), token.get("source")),
        (Some("fresh"), Some("workspace"))
    );
    assert!(token.get("seconds_left").unwrap().parse::<u64>().unwrap() > 0);
    let secret =
        secrecy::ExposeSecret::expose_secret(&proxy.credentials().current().unwrap().secret)
            .to_owned();
    for show in [
        "HELP",
        "CLIENTS",
        "CONFIG",
        "DATABASES",
        "ENDPOINTS",
        "FAILURES",
        "LISTS",
        "POOLS",
        "REFRESHES",
        "SERVERS",
        "STATE",
        "STATS",
        "STATS_TOTALS",
        "TOKENS",
        "VERSION",
        "WAKES",
    ] {
        for row in rows(&console, &format!("SHOW {show}")).await {
            for column in 0..row.len() {
                let value = row.get(column).unwrap_or_default();
                assert!(
                    !value.contains(&secret) && !value.contains("eyJ"),
                    "{show}: {value}"
                );
            }
        }
    }
    let settings = rows(&console, "SHOW CONFIG").await;
    let setting = settings
        .iter()
        .find(|row| row.get("key") == Some("admin_console"))
        .unwrap();
    assert_eq!(
        (setting.get("value"), setting.get("default")),
        (Some("true"), Some("false"))
    );
}

#[tokio::test]
async fn the_console_and_doctor_name_where_each_setting_was_given() {
    let emulator = emulator().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    // The variable goes before the file, and the flag before both.
    let text = "capacity_timeout = \"7s\"\nconnect_timeout = \"70s\"\nadmin_console = false";
    std::fs::write(file.path(), text).unwrap();
    let flags = ["--admin-console", "--config-file", path];
    let variables = [
        ("LAKEBASE_PROXY_CONNECT_TIMEOUT", "50s"),
        ("LAKEBASE_PROXY_ADMIN_CONSOLE", "false"),
    ];
    let proxy = Binary::serve_with(&emulator, &flags, &variables).await;
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(proxy.postgres.port())
        .user("anyone")
        .dbname("lakebase_proxy");
    let (console, connection) = config.connect(NoTls).await.unwrap();
    TaskTracker::new().spawn(connection);
    let settings = rows(&console, "SHOW CONFIG").await;
    let of_file = format!("file {path}");
    let expected = [
        ("admin_console", "true", "flag"),
        ("capacity_timeout", "7s", of_file.as_str()),
        (
            "connect_timeout",
            "50s",
            "variable LAKEBASE_PROXY_CONNECT_TIMEOUT",
        ),
        ("client_login_timeout", "15s", "default"),
    ];
    for (key, value, source) in expected {
        let row = settings.iter().find(|row| row.get("key") == Some(key));
        let row = row.unwrap();
        assert_eq!(
            (row.get("value"), row.get("source")),
            (Some(value), Some(source))
        );
    }

    let mut doctor = binary::command(&["doctor", "--json"]);
    doctor
        .args(flags)
        .envs(emulator.environment())
        .envs(variables)
        .stdout(Stdio::piped());
    let output = within("doctor ends", doctor.output()).await.unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let settings = report["settings"].as_array().unwrap();
    let find = |name: &str| {
        let setting = settings.iter().find(|setting| setting["name"] == name);
        setting.map(|setting| setting["source"].as_str().unwrap())
    };
    for (key, _, source) in &expected[..3] {
        let flag = format!("--{}", key.replace('_', "-"));
        assert_eq!(find(&flag), Some(*source), "{flag}");
    }
    assert_eq!(find("--client-login-timeout"), None, "a default");
    assert_eq!(find("--config-file"), Some("flag"));
    assert_eq!(
        find("LAKEBASE_PROXY_ADMIN_CONSOLE"),
        Some("not in force: --admin-console is from the flag")
    );
}

#[tokio::test]
async fn over_tcp_it_must_be_enabled() {
    let emulator = emulator().await;
    let proxy = Proxy::start(&emulator).await;
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("database", "lakebase_proxy")])
        .await;
    let reported = wire.refusal().await;
    assert_eq!(
        reported.code, "3D000",
        "a database of the endpoint, and there is none: {reported:?}"
    );
    assert!(reported.hint.unwrap().contains("--admin-console"));
}

#[tokio::test]
async fn the_name_of_the_user_is_no_console() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    // What libpq makes of `psql -U pgbouncer` without a database.
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "pgbouncer"), ("database", "pgbouncer")])
        .await;
    wire.welcome().await;
    assert_eq!(
        wire.value("select current_database()").await,
        "databricks_postgres"
    );
}

#[tokio::test]
async fn it_needs_no_room_and_takes_none() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        open(settings);
        settings.max_connections = Some(1);
    })
    .await;
    let first = console(&proxy).await;
    let _only = proxy.client().await;
    assert_eq!(proxy.refusal().await.code, "53300");
    let second = console(&proxy).await;
    for console in [&first, &second] {
        assert_eq!(rows(console, "SHOW CLIENTS").await.len(), 1);
    }
    assert_eq!(
        rows(&first, "SHOW FAILURES").await[0].get("reason"),
        Some("max_connections")
    );
}

async fn raw_console(proxy: &Proxy) -> (Wire, wire::Welcome) {
    let mut wire = proxy.dial().await;
    wire.startup(&[("user", "anyone"), ("database", "pgbouncer")])
        .await;
    let welcome = wire.welcome().await;
    (wire, welcome)
}

#[tokio::test]
async fn a_statement_too_long_ends_it_and_a_cancel_does_nothing() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let (mut patient, welcome) = raw_console(&proxy).await;
    wire::cancel(proxy.address(), welcome.key).await;
    assert_eq!(
        patient.value("SHOW VERSION").await,
        concat!("lakebase-proxy ", env!("CARGO_PKG_VERSION"))
    );

    let (mut wire, _) = raw_console(&proxy).await;
    wire.send(&wire::message('Q', &vec![b' '; 100_000])[..70_000])
        .await;
    assert_eq!(wire.refusal().await.code, "54000");
}

#[tokio::test]
async fn the_end_of_the_program_ends_it_at_once() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let (mut wire, _) = raw_console(&proxy).await;
    within("the end", proxy.end(std::future::pending())).await;
    assert_eq!(wire.refusal().await.code, "57P01");
}

#[tokio::test]
async fn psql_shows_its_tables_without_a_warning() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    let psql = |arguments: &[&str]| {
        let mut psql = Command::new("psql");
        psql.args([
            "-X",
            "-h",
            "127.0.0.1",
            "-p",
            &proxy.address().port().to_string(),
            "-U",
            "me",
            "-d",
            "lakebase_proxy",
        ])
        .args(arguments)
        .env_clear()
        .env("PATH", harness::path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
        async move { within("psql", psql.output()).await.unwrap() }
    };
    let output = psql(&["-c", "SHOW VERSION", "-c", "show endpoints"]).await;
    let (reply, complaints) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success() && complaints.is_empty(),
        "{reply}{complaints}"
    );
    assert!(
        reply.contains("lakebase-proxy") && reply.contains("cl_waiting"),
        "{reply}"
    );

    let output = psql(&["-c", "\\d"]).await;
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        complaints.contains("runs no SQL") && complaints.contains("HINT:"),
        "{complaints}"
    );
}

#[tokio::test]
async fn a_wake_is_remembered() {
    let emulator = emulator().await;
    let proxy = proxy(&emulator).await;
    emulator.suspend().await;
    let _client = proxy.client().await;
    let console = console(&proxy).await;
    let wakes = rows(&console, "SHOW WAKES").await;
    assert_eq!(wakes.len(), 1);
    assert_eq!(wakes[0].get("clients"), Some("1"));
    let seconds: f64 = wakes[0].get("seconds").unwrap().parse().unwrap();
    assert!(Duration::from_secs_f64(seconds) > Duration::ZERO);
}

/// 32 forgotten psql sessions locked out everyone, the exporter included.
#[tokio::test]
async fn idle_consoles_do_not_block_others() {
    let emulator = emulator().await;
    let proxy = Proxy::with(&emulator, |settings| settings.admin_console = Some(true)).await;
    let mut consoles = Vec::new();
    for _ in 0..33 {
        consoles.push(console(&proxy).await);
    }
    for console in &consoles[1..] {
        rows(console, "SHOW VERSION").await;
    }
    within("the oldest is closed", async {
        while !consoles[0].is_closed() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
