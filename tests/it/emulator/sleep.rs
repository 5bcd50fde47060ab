//! Scale-to-zero: what falls asleep, what is met meanwhile, what wakes.

use std::time::Duration;

use lakebase_proxy::emulator::{Emulator, OnSuspend, WhileAsleep};
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use super::workspace::{get, token};
use crate::harness::emulator::{TIMEOUT, config, connect, connect_as, start_with};

/// A suspend time short enough for a test and long enough for a login on a busy machine.
const SOON: Duration = Duration::from_millis(1500);

fn code(result: Result<Client, Error>) -> Option<String> {
    let error = result.expect_err("a sleeping compute to refuse");
    error.code().map(|code| code.code().to_owned())
}

async fn connect_until_awake(emulator: &Emulator) -> Client {
    let attempts = async {
        loop {
            if let Ok(client) = connect(emulator).await {
                return client;
            }
        }
    };
    tokio::time::timeout(TIMEOUT, attempts)
        .await
        .expect("the compute to wake")
}

async fn state(emulator: &Emulator) -> (String, Option<String>) {
    let path = format!("/api/2.0/postgres/{}", emulator.endpoint_name());
    let status = get(emulator, &path, &token(emulator).await).await.json()["status"].clone();
    (
        status["current_state"].as_str().unwrap().to_owned(),
        status["pending_state"].as_str().map(str::to_owned),
    )
}

#[tokio::test]
async fn a_sleeping_compute_refuses_and_the_first_connection_wakes_it() {
    let emulator = start_with(|settings| settings.wake_delay = Duration::from_millis(400)).await;
    assert_eq!(state(&emulator).await.0, "ACTIVE");
    emulator.suspend().await;
    assert_eq!(state(&emulator).await, ("IDLE".to_owned(), None));
    assert_eq!(code(connect(&emulator).await).as_deref(), Some("28000"));
    assert_eq!(
        state(&emulator).await,
        ("IDLE".to_owned(), Some("ACTIVE".to_owned()))
    );
    connect_until_awake(&emulator).await;
    assert_eq!(state(&emulator).await.0, "ACTIVE");
    let counts = emulator.counts();
    assert_eq!((counts.suspensions, counts.wakes), (1, 1));
}

#[tokio::test]
async fn a_silent_session_does_not_keep_it_awake_and_gets_57p01() {
    let emulator = start_with(|settings| settings.suspend_after = SOON).await;
    let client = connect(&emulator).await.unwrap();
    emulator
        .wait_for(TIMEOUT, |counts| {
            counts.suspensions == 1 && counts.sessions == 0
        })
        .await
        .unwrap();
    assert!(client.simple_query("select 1").await.is_err());
}

#[tokio::test]
async fn a_running_query_keeps_it_awake() {
    let emulator = start_with(|settings| settings.suspend_after = SOON).await;
    let client = connect(&emulator).await.unwrap();
    client
        .simple_query("select pg_sleep(3.5)")
        .await
        .expect("the query to finish");
    assert_eq!(emulator.counts().suspensions, 0);
}

#[tokio::test]
async fn an_open_transaction_keeps_it_awake_also_while_it_is_idle() {
    let emulator = start_with(|settings| settings.suspend_after = SOON).await;
    let client = connect(&emulator).await.unwrap();
    client.simple_query("begin").await.unwrap();
    tokio::time::sleep(SOON * 2).await;
    client.simple_query("commit").await.expect("the session");
    assert_eq!(emulator.counts().suspensions, 0);
    emulator
        .wait_for(TIMEOUT, |counts| counts.suspensions == 1)
        .await
        .expect("nothing keeps it awake any more");
}

/// Its monitor looks at backends, and a refused login has none.
#[tokio::test]
async fn refused_logins_do_not_keep_it_awake() {
    let emulator = start_with(|settings| settings.suspend_after = SOON).await;
    let mut wrong = config(&emulator);
    wrong.password("no token");
    let refused = async {
        loop {
            connect_as(&emulator, &wrong).await.unwrap_err();
        }
    };
    tokio::select! {
        () = refused => {}
        suspended = emulator.wait_for(TIMEOUT, |counts| counts.suspensions == 1) => {
            suspended.expect("it to be suspended");
        }
    }
}

#[tokio::test]
async fn sessions_see_the_administrators_command() {
    let emulator = start_with(|_| {}).await;
    let client = connect(&emulator).await.unwrap();
    let (ended, ()) = tokio::join!(client.simple_query("select pg_sleep(60)"), async {
        emulator
            .wait_for(TIMEOUT, |counts| counts.sessions == 1)
            .await
            .unwrap();
        emulator.suspend().await;
    });
    assert_eq!(ended.unwrap_err().code().unwrap().code(), "57P01");
}

#[tokio::test]
async fn sessions_are_reset_or_closed_on_request() {
    for manner in [OnSuspend::Reset, OnSuspend::Close] {
        let emulator = start_with(|settings| settings.on_suspend = manner).await;
        let client = connect(&emulator).await.unwrap();
        emulator.suspend().await;
        emulator
            .wait_for(TIMEOUT, |counts| counts.sessions == 0)
            .await
            .unwrap();
        let error = client.simple_query("select 1").await.unwrap_err();
        assert_eq!(error.code(), None, "{manner:?}: a message was sent");
    }
}

#[tokio::test]
async fn a_sleeping_endpoint_behaves_as_configured() {
    let emulator = start_with(|settings| settings.wake_delay = Duration::from_hours(1)).await;
    emulator.suspend().await;
    for (manner, expected) in [
        (WhileAsleep::ExternalAuthorization, Some("28000")),
        (WhileAsleep::StartingUp, Some("57P03")),
        (WhileAsleep::Reset, None),
        (WhileAsleep::Close, None),
    ] {
        emulator.configure(|settings| settings.while_asleep = manner);
        assert_eq!(
            code(connect(&emulator).await).as_deref(),
            expected,
            "{manner:?}"
        );
    }
}

#[tokio::test]
async fn a_held_connection_goes_on_once_the_compute_is_up() {
    let emulator = start_with(|settings| {
        settings.wake_delay = Duration::from_millis(300);
        settings.while_asleep = WhileAsleep::Hold;
    })
    .await;
    emulator.suspend().await;
    let client = connect(&emulator).await.unwrap();
    let messages = client.simple_query("select 'awake'").await.unwrap();
    assert!(messages.iter().any(
        |message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("awake"))
    ));
    assert_eq!(emulator.counts().dials, 1);
}

#[tokio::test]
async fn a_disabled_endpoint_reports_that_and_does_not_wake() {
    let emulator = start_with(|settings| settings.is_disabled = true).await;
    emulator.suspend().await;
    let error = connect(&emulator).await.unwrap_err();
    let message = error.as_db_error().unwrap().message().to_owned();
    assert_eq!(
        message,
        "Control plane request failed: endpoint is disabled"
    );
    assert!(!emulator.is_active());
}
