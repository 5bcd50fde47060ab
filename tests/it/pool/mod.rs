//! Pooling in `session` mode: connections go from client to client, and nothing else does.

mod auto;
mod definitions;
mod differential;
mod follow;
mod leaving;
mod misuse;
mod queue;
mod refuse;
mod reset;
mod scope;
mod servers;
mod settings;
mod share;
mod sleep;
mod statements;
mod strict;
mod transaction;
mod verify;

use std::collections::BTreeSet;

use lakebase_proxy::{
    config::{PoolMode, Settings},
    emulator::Emulator,
    telemetry::labels::{PoolClose, PoolLease, PoolReset, PoolServer},
};
use tokio::task::JoinSet;
use tokio_postgres::{AsyncMessage, Client, NoTls, error::SqlState};
use tokio_util::task::TaskTracker;

use crate::harness::{
    self, DATABASE, Proxy, eventually, millis,
    wire::{message, sync, terminate, text},
    within,
};

/// One connection, so that every client gets the same one.
fn one(settings: &mut Settings) {
    pooled(settings, 1);
}

fn pooled(settings: &mut Settings, size: usize) {
    settings.pool_mode = Some(PoolMode::Session);
    settings.default_pool_size = Some(size.try_into().unwrap());
    settings.spare_pool_size = Some(0);
}

async fn proxy(size: usize) -> (Emulator, Proxy) {
    proxy_in(PoolMode::Session, size).await
}

async fn proxy_in(mode: PoolMode, size: usize) -> (Emulator, Proxy) {
    let emulator = harness::emulator().await;
    let proxy = Proxy::with(&emulator, |settings| {
        pooled(settings, size);
        settings.pool_mode = Some(mode);
    })
    .await;
    (emulator, proxy)
}

async fn connect(config: &tokio_postgres::Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    TaskTracker::new().spawn(connection);
    client
}

async fn value(client: &Client, sql: &str) -> String {
    let rows = client.simple_query(sql).await.unwrap();
    let row = rows.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.unwrap().get(0).unwrap_or("NULL").to_owned()
}

async fn pid(client: &Client) -> String {
    value(client, "select pg_backend_pid()").await
}

impl Proxy {
    fn servers(&self, state: PoolServer) -> i64 {
        self.metrics().pool_servers[state].get()
    }

    async fn until_idle(&self, count: i64) {
        self.until_idle_beside(count, 0).await;
    }

    async fn until_idle_beside(&self, count: i64, leased: i64) {
        eventually("connections return", async || {
            let busy = [
                PoolServer::Leased,
                PoolServer::Resetting,
                PoolServer::Opening,
            ];
            let busy: i64 = busy.iter().map(|state| self.servers(*state)).sum();
            (busy == leased && self.servers(PoolServer::Idle) == count).then_some(())
        })
        .await;
    }

    /// Why connections were closed, for messages of failed tests.
    fn close_reasons(&self) -> String {
        let metrics = self.metrics().render();
        let closes = metrics
            .lines()
            .filter(|line| line.contains("pool_server_closes_total{") && !line.ends_with(" 0"));
        closes.collect::<Vec<_>>().join(", ")
    }

    fn closes(&self, reason: PoolClose) -> u64 {
        self.metrics().pool_closes[reason].get()
    }
}

#[tokio::test]
async fn a_connection_goes_from_one_client_to_the_next() {
    let (emulator, proxy) = proxy(1).await;
    let mut pids = BTreeSet::new();
    for _ in 0..20 {
        pids.insert(pid(&proxy.client().await).await);
    }
    assert_eq!(pids.len(), 1);
    assert_eq!(emulator.counts().logins, 1);
    proxy.until_idle(1).await;
    assert_eq!(proxy.metrics().pool_leases[PoolLease::Opened].get(), 1);
    assert_eq!(proxy.metrics().clients_active.get(), 0);
}

#[tokio::test]
async fn a_client_gets_its_own_application_name_and_encoding() {
    let (emulator, proxy) = proxy(1).await;
    for (name, encoding) in [("one", "UTF8"), ("two", "LATIN1"), ("it's \\ 3", "UTF8")] {
        let mut wire = proxy.dial().await;
        wire.startup(&[
            ("user", "anyone"),
            ("database", DATABASE),
            ("application_name", name),
            ("client_encoding", encoding),
        ])
        .await;
        let welcome = wire.welcome().await;
        assert_eq!(welcome.parameters["application_name"], name);
        assert_eq!(welcome.parameters["client_encoding"], encoding);
        assert_eq!(wire.value("show application_name").await, name);
        assert_eq!(wire.value("show client_encoding").await, encoding);
    }
    let client = proxy.client().await;
    assert_eq!(value(&client, "show client_encoding").await, "UTF8");
    assert_eq!(emulator.counts().logins, 1, "{}", proxy.close_reasons());
}

#[tokio::test]
async fn other_startup_parameters_have_connections_of_their_own() {
    let (emulator, proxy) = proxy(1).await;
    let with = async |options: &str| {
        let mut config = proxy.client_config();
        config.options(options);
        proxy.try_client(&config).await.unwrap()
    };
    for (options, work_mem) in [("-c work_mem=5MB", "5MB"), ("-c work_mem=6MB", "6MB")] {
        for _ in 0..2 {
            let client = with(options).await;
            assert_eq!(value(&client, "show work_mem").await, work_mem);
            client
                .batch_execute("set work_mem = '9MB'; reset work_mem")
                .await
                .unwrap();
            assert_eq!(value(&client, "show work_mem").await, work_mem);
        }
    }
    assert_eq!(emulator.counts().logins, 2, "one for each");
    assert_eq!(proxy.closes(PoolClose::Surplus), 1, "the first gave way");
}

#[tokio::test]
async fn replication_and_other_databases_never_share_a_connection() {
    let (emulator, proxy) = proxy(1).await;
    let role = emulator.identities().app.name.clone();
    let replicates = format!("alter role \"{role}\" replication");
    let superuser = harness::superuser().await;
    superuser.batch_execute(&replicates).await.unwrap();
    let one = proxy.client().await;
    let mut config = proxy.client_config();
    config.dbname("postgres");
    let other = proxy.try_client(&config).await.unwrap();
    assert_eq!(value(&other, "select current_database()").await, "postgres");
    assert_eq!(value(&one, "select current_database()").await, DATABASE);
    let mut wire = proxy.dial().await;
    wire.startup(&[
        ("user", "anyone"),
        ("replication", "database"),
        ("database", DATABASE),
    ])
    .await;
    wire.welcome().await;
    assert_eq!(proxy.servers(PoolServer::Leased), 2, "replication has none");
}

#[tokio::test]
async fn many_clients_share_few_connections() {
    let (emulator, proxy) = proxy(5).await;
    let mut clients = JoinSet::new();
    for number in 0..200_u32 {
        let config = proxy.client_config();
        clients.spawn(async move {
            for _ in 0..5 {
                let client = connect(&config).await;
                let answer: i32 = client
                    .query_one("select $1::int4", &[&number.cast_signed()])
                    .await
                    .unwrap()
                    .get(0);
                assert_eq!(answer, number.cast_signed());
            }
        });
    }
    within("all clients", async {
        while let Some(served) = clients.join_next().await {
            served.unwrap();
        }
    })
    .await;
    proxy.until_idle(5).await;
    assert_eq!(emulator.counts().logins, 5);
}
