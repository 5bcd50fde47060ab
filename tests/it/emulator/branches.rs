//! Branches by the API: a copy of their source's data, an endpoint of their own, and nothing left once they are deleted. The SDK
//! does more of this in `tests/sdk/branches.py`.

use std::{path::PathBuf, time::Duration};

use lakebase_proxy::emulator::{Emulator, EmulatorOptions, Identity, PostgresSource};
use serde_json::{Value, json};
use tokio_postgres::{Client, Config, Error, config::SslMode, error::SqlState};

use super::workspace::{port, token};
use crate::harness::{
    Proxy, another_server,
    emulator::{connect, connect_as, credential_of, http, start},
    eventually, own_server, within,
};

const PROJECT: &str = "projects/lakebase-local";
const BRANCH: &str = "projects/lakebase-local/branches/pr-7";

async fn call(emulator: &Emulator, head: &str, body: &Value) -> (u16, Value) {
    let token = token(emulator).await;
    let (method, path) = head.split_once(' ').unwrap();
    let head = format!("{method} /api/2.0/postgres/{path}\nAuthorization: Bearer {token}");
    let answer = http(port(emulator), &head, &body.to_string())
        .await
        .unwrap();
    (answer.status, answer.json())
}

/// Begins an operation and waits for it; its response, or the message of its error.
async fn done(emulator: &Emulator, head: &str, body: &Value) -> Result<Value, Value> {
    let (status, operation) = call(emulator, head, body).await;
    assert_eq!(status, 200, "{operation}");
    assert_eq!(operation["done"], false, "the work comes after the answer");
    let name = format!("GET {}", operation["name"].as_str().unwrap());
    let ended = eventually("the operation ends", async || {
        let (_, operation) = call(emulator, &name, &json!({})).await;
        (operation["done"] == true).then_some(operation)
    })
    .await;
    match ended.get("response") {
        Some(response) => Ok(response.clone()),
        None => Err(ended["error"]["message"].clone()),
    }
}

async fn make_branch(emulator: &Emulator, spec: Value) -> Value {
    let head = format!("POST {PROJECT}/branches?branch_id=pr-7");
    let made = done(emulator, &head, &json!({ "spec": spec })).await;
    made.unwrap()
}

async fn delete_branch(emulator: &Emulator) {
    let deleted = done(emulator, &format!("DELETE {BRANCH}"), &json!({})).await;
    assert_eq!(
        deleted.unwrap()["@type"],
        "type.googleapis.com/google.protobuf.Empty"
    );
}

async fn host(emulator: &Emulator) -> String {
    let path = format!("GET {BRANCH}/endpoints/primary");
    let (_, endpoint) = call(emulator, &path, &json!({})).await;
    let host = endpoint["status"]["hosts"]["host"].as_str();
    host.unwrap_or_else(|| panic!("{endpoint}")).to_owned()
}

/// Connects to a host that resolvers need not know.
async fn connect_to(emulator: &Emulator, host: &str, who: &Identity) -> Result<Client, Error> {
    let mut config = Config::new();
    config
        .host(host)
        .hostaddr([127, 0, 0, 1].into())
        .port(emulator.pg_port())
        .user(&who.name)
        .dbname("databricks_postgres")
        .password(credential_of(emulator, who))
        .ssl_mode(SslMode::Require);
    connect_as(emulator, &config).await
}

/// Where the server of the branch has its files, which only its owner may know.
async fn data_directory(emulator: &Emulator) -> PathBuf {
    let owner = &emulator.identities().user;
    let client = connect_to(emulator, &host(emulator).await, owner).await;
    let row = client.unwrap().query_one("show data_directory", &[]).await;
    row.unwrap().get::<_, String>(0).into()
}

async fn notes(client: &Client) -> i64 {
    let row = client.query_one("select count(*) from notes", &[]).await;
    row.unwrap().get(0)
}

async fn insert(client: &Client) {
    let insert = "insert into notes (content) values ('another')";
    client.execute(insert, &[]).await.unwrap();
}

#[tokio::test]
async fn a_branch_is_a_copy_of_a_database_in_use_and_apart_from_it() {
    let (_server, emulator) = own_server().await;
    let app = emulator.identities().app.clone();
    let source = connect(&emulator).await.unwrap();
    source.batch_execute("begin").await.unwrap();
    insert(&source).await;
    let branch = make_branch(&emulator, json!({})).await;
    assert_eq!(branch["status"]["current_state"], "READY");
    assert_eq!(
        branch["status"]["source_branch"],
        format!("{PROJECT}/branches/production")
    );
    let host = host(&emulator).await;
    let copy = connect_to(&emulator, &host, &app).await.unwrap();
    assert_eq!(notes(&copy).await, 3, "what was committed");
    insert(&copy).await;
    insert(&copy).await;
    source.batch_execute("commit").await.unwrap();
    assert_eq!((notes(&source).await, notes(&copy).await), (4, 5));

    // A branch of the branch has what that has.
    let head = format!("POST {PROJECT}/branches?branch_id=pr-8");
    let spec = json!({ "spec": { "source_branch": BRANCH } });
    done(&emulator, &head, &spec).await.unwrap();
    let path = format!("GET {PROJECT}/branches/pr-8/endpoints/primary");
    let (_, endpoint) = call(&emulator, &path, &json!({})).await;
    let other = endpoint["status"]["hosts"]["host"].as_str().unwrap();
    let other = connect_to(&emulator, other, &app).await.unwrap();
    assert_eq!(notes(&other).await, 5);

    let overview = http(port(&emulator), "GET /emulator", "").await.unwrap();
    let overview = overview.json();
    let endpoints = overview["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 3, "{overview}");
    assert_eq!(endpoints[1]["host"], host.as_str());
    assert_eq!(endpoints[1]["sessions"], 1);

    // One compute sleeps, the others do not.
    emulator.suspend().await;
    assert_eq!(notes(&copy).await, 5);
    emulator.configure(|settings| settings.suspend_after = Duration::from_millis(200));
    eventually("the branch sleeps", async || {
        let path = format!("GET {BRANCH}/endpoints/primary");
        let (_, endpoint) = call(&emulator, &path, &json!({})).await;
        (endpoint["status"]["current_state"] == "IDLE").then_some(())
    })
    .await;
    let refused = connect_to(&emulator, &host, &app).await.unwrap_err();
    assert_eq!(
        refused.code(),
        Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
    );
    emulator.stop().await;
}

#[tokio::test]
async fn the_proxy_reaches_a_branch_and_cancels_there() {
    let (_server, emulator) = own_server().await;
    make_branch(&emulator, json!({})).await;
    let endpoint = format!("{BRANCH}/endpoints/primary");
    let host = host(&emulator).await;
    let variables = [("PGHOST", host.as_str()), ("ENDPOINT_NAME", &endpoint)];
    let proxy = Proxy::cold(&emulator, &variables, |_| {}).await.unwrap();
    let client = proxy.client().await;
    insert(&client).await;
    assert_eq!(notes(&connect(&emulator).await.unwrap()).await, 3);

    let token = client.cancel_token();
    let watcher = connect_to(&emulator, &host, &emulator.identities().app).await;
    let watcher = watcher.unwrap();
    let cancelling = async {
        let running =
            "select from pg_stat_activity where query = 'select pg_sleep(60)' and state = 'active'";
        eventually("the query runs", async || {
            let rows = watcher.query(running, &[]).await.unwrap();
            (rows.len() == 1).then_some(())
        })
        .await;
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    let query = client.simple_query("select pg_sleep(60)");
    let (cancelled, ()) = tokio::join!(within("the query", query), cancelling);
    assert_eq!(
        cancelled.unwrap_err().code(),
        Some(&SqlState::QUERY_CANCELED)
    );
    let tally = emulator.tally();
    assert_eq!(tally.credentials_for(&endpoint), 1);
    assert!(tally.logins.iter().any(|login| login.host == host));
    emulator.stop().await;
}

#[tokio::test]
async fn nothing_is_left_of_a_branch_that_was_deleted_or_has_expired() {
    let (_server, emulator) = own_server().await;
    let app = emulator.identities().app.clone();
    for is_deleted in [true, false] {
        make_branch(&emulator, json!({})).await;
        let directory = data_directory(&emulator).await;
        let host = host(&emulator).await;
        let session = connect_to(&emulator, &host, &app).await.unwrap();
        if is_deleted {
            delete_branch(&emulator).await;
        } else {
            let spec = json!({ "spec": { "ttl": "1s" } });
            let update = format!("PATCH {BRANCH}?update_mask=spec.expiration");
            done(&emulator, &update, &spec).await.unwrap();
        }
        eventually("its files are gone", async || {
            (!directory.exists()).then_some(())
        })
        .await;
        assert!(session.simple_query("select 1").await.is_err());
        let (status, answer) = call(&emulator, &format!("GET {BRANCH}"), &json!({})).await;
        assert_eq!((status, &answer["error_code"]), (404, &json!("NOT_FOUND")));
        let refused = connect_to(&emulator, &host, &app).await.unwrap_err();
        // The certificate of another endpoint comes first.
        assert!(
            refused
                .to_string()
                .contains("error performing TLS handshake"),
            "{refused}"
        );
    }
    // And so with all branches when the emulator stops.
    make_branch(&emulator, json!({})).await;
    let directory = data_directory(&emulator).await;
    emulator.stop().await;
    assert!(!directory.exists());
}

/// The texts are those of the API.
#[tokio::test]
async fn impossible_changes_are_refused() {
    let emulator = start().await;
    let production = format!("{PROJECT}/branches/production");
    let branches = format!("POST {PROJECT}/branches");
    for (head, body, status, code, message) in [
        (
            branches.clone(),
            json!({}),
            400,
            "INVALID_PARAMETER_VALUE",
            "Field 'branch_id' is required, expected non-default value (not \"\")!",
        ),
        (
            format!("{branches}?branch_id=production"),
            json!({}),
            409,
            "ALREADY_EXISTS",
            "branch with such id already exists",
        ),
        (
            "POST projects?project_id=lakebase-local".to_owned(),
            json!({}),
            409,
            "ALREADY_EXISTS",
            "project with such id already exists in the workspace",
        ),
        (
            format!("DELETE {production}"),
            json!({}),
            400,
            "BAD_REQUEST",
            "Cannot delete root branch 'projects/lakebase-local/branches/production'. Root branches cannot be deleted independently.",
        ),
        (
            format!("DELETE {production}/endpoints/primary"),
            json!({}),
            400,
            "BAD_REQUEST",
            "Cannot delete read-write endpoint 'projects/lakebase-local/branches/production/endpoints/primary'. Read-write endpoints \
             cannot be deleted.",
        ),
        (
            format!("PATCH {production}?update_mask=spec.ttl"),
            json!({ "spec": { "ttl": "60s" } }),
            400,
            "INVALID_PARAMETER_VALUE",
            "Unknown field path in update_mask: 'spec.ttl'",
        ),
        (
            format!("PATCH {production}/endpoints/primary?update_mask=spec.disabled"),
            json!({ "spec": { "endpoint_type": "ENDPOINT_TYPE_READ_WRITE" } }),
            400,
            "INVALID_PARAMETER_VALUE",
            "Field 'spec.disabled' is in update_mask but not provided in request",
        ),
        (
            format!("POST {production}/databases?database_id=another"),
            json!({ "spec": { "postgres_database": "another" } }),
            400,
            "INVALID_PARAMETER_VALUE",
            "Field 'database.spec.role' is required, expected non-default value (not \"\")!",
        ),
        (
            format!("POST {production}/roles?role_id=owner"),
            json!({ "spec": { "postgres_role": "owner" } }),
            400,
            "BAD_REQUEST",
            "role with that name already exists",
        ),
        (
            format!("POST {production}/roles?role_id=Owner"),
            json!({ "spec": { "postgres_role": "owner" } }),
            400,
            "INVALID_PARAMETER_VALUE",
            "Field 'role_id' must be 4-63 characters, start with a lowercase letter, and contain only lowercase letters, numbers and \
             hyphens (RFC 1123).",
        ),
        (
            format!("{branches}?branch_id=b"),
            json!({ "spec": { "ttl": "60s", "no_expiry": true } }),
            400,
            "INVALID_PARAMETER_VALUE",
            "Only one of 'ttl', 'expire_time' and 'no_expiry' may be set.",
        ),
        (
            "POST projects/nowhere/branches?branch_id=b".to_owned(),
            json!({}),
            404,
            "NOT_FOUND",
            "project id not found",
        ),
    ] {
        let (found, answer) = call(&emulator, &head, &body).await;
        assert_eq!(
            (found, &answer["error_code"]),
            (status, &json!(code)),
            "{head}: {answer}"
        );
        let text = answer["message"].as_str().unwrap();
        assert_eq!(text.split(" [TraceId").next(), Some(message), "{head}");
    }
    let (_, answer) = call(&emulator, &format!("DELETE {production}"), &json!({})).await;
    assert_eq!(
        answer["details"][0]["metadata"]["declarative_context"],
        "MANAGED_BY_PARENT"
    );
}

#[tokio::test]
async fn a_postgres_named_by_url_has_one_branch() {
    let server = another_server().await;
    let url = format!(
        "host={} user=databricks_control_plane dbname=postgres",
        server.directory().join("s").display()
    );
    let options = EmulatorOptions {
        postgres: PostgresSource::Url(url.into()),
        ..EmulatorOptions::default()
    };
    let emulator = Emulator::start(options).await.unwrap();
    let head = format!("POST {PROJECT}/branches?branch_id=pr-7");
    let (status, answer) = call(&emulator, &head, &json!({})).await;
    let message = answer["message"].as_str().unwrap();
    assert!(
        status == 400 && message.contains("--postgres-url"),
        "{answer}"
    );
    emulator.stop().await;
}
