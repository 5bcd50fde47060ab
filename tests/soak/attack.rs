//! Ordinary logins beside a client that tries to make the endpoint look asleep or its credential refused.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_postgres::{Config, NoTls};

use crate::Stage;

const CLIENTS: u32 = 200;
const TIME: Duration = Duration::from_mins(2);
/// What an ordinary login may take.
const PROMPT: Duration = Duration::from_millis(200);
/// What the server repeats in its error, reads like an error of the edge, or makes a login slow.
const ATTACKS: [&str; 4] = [
    "-c work_mem=endpoint\\ is\\ idle",
    "-c work_mem=token\\ x\\ has\\ expired",
    "-c search_path=couldn't\\ connect\\ to\\ compute\\ node -c work_mem=x",
    "-c post_auth_delay=40",
];

fn config(postgres: SocketAddr) -> Config {
    let mut config = Config::new();
    config
        .host("127.0.0.1")
        .port(postgres.port())
        .user("anyone")
        .dbname("databricks_postgres");
    config
}

pub(crate) async fn beside_logins(stage: &Stage) {
    let postgres = stage.postgres;
    let mut background = JoinSet::new();
    for options in ATTACKS {
        background.spawn(async move {
            let mut config = config(postgres);
            config
                .options(options)
                .connect_timeout(Duration::from_mins(1));
            loop {
                let _ = config.connect(NoTls).await;
            }
        });
    }
    let began = Instant::now();
    let (mut sessions, mut took) = (Vec::new(), Vec::new());
    for number in 0..CLIENTS {
        sleep_until(began + TIME * number / CLIENTS).await;
        let started = Instant::now();
        let (client, connection) = config(postgres).connect(NoTls).await.unwrap();
        took.push(started.elapsed());
        sessions.push(client);
        background.spawn(async move {
            let _ = connection.await;
        });
    }
    took.sort();
    let longest = took[took.len() - 1];
    println!(
        "   {CLIENTS} logins beside {} attacks in {:?}: median {:?}, longest {longest:?}",
        ATTACKS.len(),
        began.elapsed(),
        took[took.len() / 2],
    );
    assert!(longest < PROMPT, "a login takes {longest:?}");
    drop(sessions);
    background.shutdown().await;
}
