//! All password methods of a real Postgres.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use lakebase_proxy::{
    clock::Clock,
    config::{Keepalive, Timeouts},
    credential::{CredentialCell, Minted},
    protocol::options::LoginParameters,
    status::Label,
    telemetry::{Metrics, labels::Reason},
    upstream::{
        Addresses, ConnectSettings, Connection, DroppedParameters, Endpoint, Refusal, Security,
        Upstream,
    },
};
use secrecy::SecretString;
use tokio::time::timeout;

use crate::postgres::Cluster;

async fn log_in(front: SocketAddr, user: &str, password: &str) -> Result<Connection, Refusal> {
    let credentials = CredentialCell::new(Clock::system());
    credentials.publish(
        Minted {
            secret: SecretString::from(password),
            expires_at: None,
        },
        0.0,
    );
    let endpoint = Endpoint {
        label: Label::new("local"),
        host: front.ip().to_string(),
        port: front.port(),
        addresses: Addresses::default(),
        user: user.to_owned(),
        database: "postgres".to_owned(),
        security: Security::Plain,
        dropped: DroppedParameters::default(),
    };
    let connect = ConnectSettings {
        timeouts: Timeouts {
            connect_timeout: Duration::from_secs(10),
            ..Timeouts::default()
        },
        keepalive: Keepalive::default(),
    };
    let metrics: Arc<Metrics> = Metrics::new().unwrap();
    let upstream = Upstream::new(endpoint, credentials, metrics);
    let settings = LoginParameters {
        database: "postgres".to_owned(),
        fallback_database: None,
        parameters: vec![("options".to_owned(), "-c extra_float_digits=0".to_owned())],
        client_encoding: Some("LATIN1".to_owned()),
        replication: false,
        ..LoginParameters::default()
    };
    let connected = upstream.connect(&settings, &connect).await?;
    assert!(connected.woke_after.is_none());
    Ok(connected.connection)
}

#[tokio::test]
async fn all_password_methods_of_the_server_work() {
    let cluster = Cluster::start().await;
    let admin = cluster.connect("postgres").await;
    admin
        .batch_execute(
            "SET password_encryption = 'scram-sha-256';
             CREATE ROLE \"scram-sha-256\" LOGIN PASSWORD 'pässword';
             CREATE ROLE password LOGIN PASSWORD 'pässword';
             SET password_encryption = 'md5';
             CREATE ROLE md5 LOGIN PASSWORD 'pässword';",
        )
        .await
        .unwrap();
    let rules: String = admin.query_one("SHOW hba_file", &[]).await.unwrap().get(0);
    std::fs::write(
        rules,
        "local all scram-sha-256 scram-sha-256\nlocal all password password\nlocal all md5 md5\n",
    )
    .unwrap();
    admin
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    let front = cluster.front().await;
    for user in ["scram-sha-256", "password", "md5"] {
        // The reload reaches the postmaster in its own time; until then every password is right.
        let refused = async {
            loop {
                match log_in(front.address, user, "wrong").await {
                    Err(refusal) => break refusal,
                    Ok(connection) => drop(connection),
                }
            }
        };
        let refusal = timeout(Duration::from_secs(30), refused).await.unwrap();
        assert_eq!(
            (refusal.reason, refusal.report.sqlstate.as_str()),
            (Reason::Identity, "28P01"),
            "{user}"
        );
        let connection = log_in(front.address, user, "pässword").await.unwrap();
        assert!(connection.greeting.key.is_some(), "{user}");
        let reported = String::from_utf8_lossy(&connection.greeting.parameter_status).into_owned();
        assert!(reported.contains("server_version\0"), "{user}: {reported}");
        assert!(
            reported.contains("client_encoding\0LATIN1\0"),
            "{user}: {reported}"
        );
        assert!(connection.greeting.leftover.is_empty());
    }
}
