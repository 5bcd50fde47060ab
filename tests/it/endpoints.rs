//! Several endpoints in one process, and servers whose credential no workspace mints.

use std::time::Duration;

use lakebase_proxy::{
    app::App,
    config::{Config, Environment, PortSetting, Settings},
};
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};
use tokio_util::task::TaskTracker;

use crate::{
    harness::{emulator, eventually},
    postgres::Cluster,
};

/// A proxy with these `[[endpoint]]` tables.
async fn proxy(tables: &str, variables: &[(&str, String)]) -> App {
    let settings = Settings {
        port: Some(PortSetting::Port(0)),
        http_port: Some(PortSetting::None),
        max_connections: Some(100),
        ..toml::from_str(tables).unwrap()
    };
    let variables = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()));
    let config = Config::resolve(settings, Environment::from_variables(variables)).unwrap();
    App::start(config).await.unwrap()
}

async fn connect(port: u16) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user("anyone");
    let (client, connection) = config.connect(NoTls).await?;
    TaskTracker::new().spawn(connection);
    Ok(client)
}

async fn user(client: &Client) -> String {
    client
        .query_one("SELECT session_user::text", &[])
        .await
        .unwrap()
        .get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_endpoint_that_cannot_be_found_does_not_stop_the_other() {
    let emulator = emulator().await;
    let name = emulator.endpoint_name();
    let tables = format!(
        "[[endpoint]]\nname = \"{name}-of-another-name\"\n[[endpoint]]\nname = \"{name}\"\nhost = \"localhost\"\nport = {}",
        emulator.pg_port()
    );
    // PGHOST and the other variables define the endpoint only without a table: here they must be ignored.
    let mut variables = emulator.environment();
    variables.push(("PGHOST", "nowhere.invalid".to_owned()));
    let running = proxy(&tables, &variables).await;
    let [lost, found] = &running.addresses().endpoints[..] else {
        panic!("two endpoints")
    };
    let (lost, found) = (lost.tcp[0], found.tcp[0]);

    let client = connect(found.port()).await.unwrap();
    assert_eq!(user(&client).await, emulator.identities().app.name);
    let error = connect(lost.port()).await.err().unwrap();
    let error = error.as_db_error().unwrap();
    assert!(error.message().contains("-of-another-name"), "{error:?}");
    assert!(
        error.hint().is_some_and(|hint| hint.contains(name)),
        "it lists the existing ones: {error:?}"
    );

    let text = running.metrics().render();
    assert!(
        text.contains(&format!(
            "client_connections_opened_total{{endpoint=\"{name}\"}} 1"
        )),
        "{text}"
    );
    drop(client);
    running.end(std::future::pending()).await;
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_postgres_is_reached_with_a_password_of_its_own() {
    let Some((cluster, port)) = Cluster::start_with_tls().await else {
        return;
    };
    let admin = cluster.connect("postgres").await;
    let rules: String = admin.query_one("SHOW hba_file", &[]).await.unwrap().get(0);
    let rule = |user: &str, how: &str| format!("hostssl all {user} 127.0.0.1/32 {how}\n");
    let ours = rule("scram", "scram-sha-256") + &rule("md5", "md5") + &rule("clear", "password");
    std::fs::write(rules, format!("local all all trust\n{ours}")).unwrap();
    admin
        .batch_execute(
            "SET password_encryption = 'scram-sha-256'; CREATE ROLE scram LOGIN PASSWORD 'one'; CREATE ROLE clear LOGIN PASSWORD 'three';
             SET password_encryption = 'md5'; CREATE ROLE md5 LOGIN PASSWORD 'two'; SELECT pg_reload_conf();",
        )
        .await
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    std::fs::write(&file, "two\n").unwrap();
    let table = |user: &str, credential: &str| {
        format!(
            "[[endpoint]]\nhost = \"localhost\"\nport = {}\nuser = \"{user}\"\ndatabase = \"postgres\"\ncredential = {{ {credential} }}\n",
            port.number()
        )
    };
    let tables = [
        table("scram", "password_env = \"APP_DB_PASSWORD\""),
        table("md5", &format!("password_file = \"{}\"", file.display())),
        table("clear", "command = [\"echo\", '{\"token\": \"three\"}']"),
    ]
    .concat();
    // Postgres owns its key file, so the authority is read by us as root or as the same user.
    let trust = cluster.ca_file().display().to_string();
    let variables = [
        ("APP_DB_PASSWORD", "one".to_owned()),
        ("PGSSLROOTCERT", trust),
    ];
    let running = proxy(&tables, &variables).await;
    for (bound, expected) in running
        .addresses()
        .endpoints
        .iter()
        .zip(["scram", "md5", "clear"])
    {
        // The server takes its new rules up in its own time.
        let client = eventually("the server requires passwords", async || {
            connect(bound.tcp[0].port()).await.ok()
        })
        .await;
        assert_eq!(user(&client).await, expected);
        let query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let encrypted: bool = client.query_one(query, &[]).await.unwrap().get(0);
        assert!(encrypted, "{expected}");
    }

    // A password changed on both sides is taken up without a restart.
    admin
        .batch_execute("SET password_encryption = 'md5'; ALTER ROLE md5 PASSWORD 'another'")
        .await
        .unwrap();
    std::fs::write(&file, "another\n").unwrap();
    let changed = running.addresses().endpoints[1].tcp[0].port();
    let renewed = eventually("the new password is used", async || {
        connect(changed).await.ok()
    });
    timeout(Duration::from_secs(30), renewed).await.unwrap();
    running.end(std::future::pending()).await;
}
