//! The workspace API: who gets a token, which requests are refused and how, what the resources look like.

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use lakebase_proxy::emulator::{AppResource, Emulator, Identity};
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use crate::harness::emulator::{HttpAnswer, config, connect_as, http, start, start_with};

pub(super) fn port(emulator: &Emulator) -> u16 {
    emulator
        .workspace_url()
        .rsplit_once(':')
        .unwrap()
        .1
        .parse()
        .unwrap()
}

fn secret(identity: &Identity) -> &str {
    identity.client_secret.as_ref().unwrap().expose_secret()
}

/// Requests a workspace token as in the tutorial.
pub(super) async fn basic_token(emulator: &Emulator) -> HttpAnswer {
    token_of(emulator, &emulator.identities().app).await
}

async fn token_of(emulator: &Emulator, identity: &Identity) -> HttpAnswer {
    let basic = STANDARD.encode(format!("{}:{}", identity.name, secret(identity)));
    let head = format!(
        "POST /oidc/v1/token\nAuthorization: Basic {basic}\nContent-Type: application/x-www-form-urlencoded"
    );
    http(
        port(emulator),
        &head,
        "grant_type=client_credentials&scope=all-apis",
    )
    .await
    .unwrap()
}

/// A workspace token for the app.
pub(super) async fn token(emulator: &Emulator) -> String {
    access_token(&basic_token(emulator).await)
}

fn access_token(answer: &HttpAnswer) -> String {
    answer.json()["access_token"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer:?}"))
        .to_owned()
}

pub(super) async fn get(emulator: &Emulator, path: &str, token: &str) -> HttpAnswer {
    let head = format!("GET {path}\nAuthorization: Bearer {token}");
    http(port(emulator), &head, "").await.unwrap()
}

pub(super) async fn mint(emulator: &Emulator, token: &str) -> std::io::Result<HttpAnswer> {
    let body = json!({ "endpoint": emulator.endpoint_name() });
    post(emulator, "/api/2.0/postgres/credentials", token, &body).await
}

async fn post(
    emulator: &Emulator,
    path: &str,
    token: &str,
    body: &Value,
) -> std::io::Result<HttpAnswer> {
    let head =
        format!("POST {path}\nAuthorization: Bearer {token}\nContent-Type: application/json");
    http(port(emulator), &head, &body.to_string()).await
}

fn seconds_from_now(text: &Value) -> i64 {
    let time: Timestamp = text.as_str().unwrap().parse().unwrap();
    time.as_second() - Timestamp::now().as_second()
}

#[tokio::test]
async fn the_two_step_recipe_yields_a_credential_that_opens_the_database() {
    let emulator = start().await;
    let answer = basic_token(&emulator).await.json();
    assert_eq!(
        (answer["token_type"].as_str(), answer["expires_in"].as_i64()),
        (Some("Bearer"), Some(3600))
    );
    let minted = mint(&emulator, answer["access_token"].as_str().unwrap())
        .await
        .unwrap()
        .json();
    assert!(
        (3590..=3600).contains(&seconds_from_now(&minted["expire_time"])),
        "{minted}"
    );
    let password = minted["token"].as_str().unwrap();
    assert_eq!(password.split('.').count(), 3);
    connect_as(&emulator, config(&emulator).password(password))
        .await
        .unwrap();
}

/// As Databricks Apps does it: the first database resource fills `PG*`, the others come by `valueFrom`.
#[tokio::test]
async fn an_app_with_several_databases_finds_the_first_in_its_environment() {
    let emulator = start_with(|settings| {
        settings.app_resources = vec![
            AppResource::Secret {
                key: "api-key".to_owned(),
            },
            AppResource::postgres("orders", "databricks_postgres"),
            AppResource::Postgres {
                key: "archive".to_owned(),
                branch: "projects/another-project/branches/production".to_owned(),
                database: "history".to_owned(),
            },
        ];
    })
    .await;
    let variables = emulator.app_environment(&[
        ("ARCHIVE_ENDPOINT", "archive"),
        ("LAKEBASE_ENDPOINT", "orders"),
    ]);
    let of = |wanted: &str| {
        let found = variables.iter().find(|(name, _)| name == wanted);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(
        (of("PGHOST"), of("PGDATABASE")),
        (Some("localhost"), Some("databricks_postgres"))
    );
    assert_eq!(of("LAKEBASE_ENDPOINT"), Some(emulator.endpoint_name()));
    assert_eq!(
        of("ARCHIVE_ENDPOINT"),
        Some("projects/another-project/branches/production/endpoints/primary")
    );
    assert_eq!((of("PGPASSWORD"), of("ENDPOINT_NAME")), (None, None));

    let path = format!("/api/2.0/apps/{}", emulator.app_name());
    let app = get(&emulator, &path, &token(&emulator).await).await.json();
    let resources = app["resources"].as_array().unwrap();
    let names: Vec<&str> = resources
        .iter()
        .map(|resource| resource["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["api-key", "orders", "archive"]);
    assert_eq!(
        resources[2]["postgres"]["database"],
        "projects/another-project/branches/production/databases/history"
    );

    // People set them as the API's settings.
    let body =
        r#"{"app_resources":[{"database":{"key":"db","instance_name":"i","database_name":"d"}}]}"#;
    let answer = http(port(&emulator), "PATCH /emulator/settings", body).await;
    assert_eq!(answer.unwrap().status, 200);
    assert_eq!(emulator.settings().app_resources.len(), 1);
    let body = r#"{"app_resources":[{"postgres":{"key":"k","branch":"b","data_base":"d"}}]}"#;
    let answer = http(port(&emulator), "PATCH /emulator/settings", body).await;
    assert_eq!(answer.unwrap().status, 400);
}

#[tokio::test]
async fn the_secret_may_also_come_in_the_body() {
    let emulator = start().await;
    let app = &emulator.identities().app;
    let form = |secret: &str| {
        format!(
            "grant_type=client_credentials&scope=all-apis&client_id={}&client_secret={secret}",
            app.name
        )
    };
    let head = "POST /oidc/v1/token\nContent-Type: application/x-www-form-urlencoded";
    assert_eq!(
        http(port(&emulator), head, &form(secret(app)))
            .await
            .unwrap()
            .status,
        200
    );
    let answer = http(port(&emulator), head, &form("wrong")).await.unwrap();
    assert_eq!(
        (answer.status, answer.json()["error"].as_str()),
        (401, Some("invalid_client"))
    );
    let answer = http(port(&emulator), head, "grant_type=client_credentials")
        .await
        .unwrap();
    assert_eq!(answer.status, 401);
    assert_eq!(
        answer.json()["error_description"],
        "Missing client authentication"
    );
    let answer = http(port(&emulator), head, "grant_type=password")
        .await
        .unwrap();
    assert_eq!(
        (answer.status, answer.json()["error"].as_str()),
        (400, Some("unsupported_grant_type"))
    );
}

#[tokio::test]
async fn discovery_leads_to_the_token_endpoint() {
    let emulator = start().await;
    let metadata = get(&emulator, "/.well-known/databricks-config", "")
        .await
        .json();
    let root = metadata["oidc_endpoint"]
        .as_str()
        .unwrap()
        .strip_prefix(emulator.workspace_url())
        .unwrap();
    let document = get(
        &emulator,
        &format!("{root}/.well-known/oauth-authorization-server"),
        "",
    )
    .await
    .json();
    assert_eq!(
        document["token_endpoint"],
        format!("{}/oidc/v1/token", emulator.workspace_url())
    );
}

#[tokio::test]
async fn a_request_without_a_good_token_is_refused_in_the_apis_shape() {
    let emulator =
        start_with(|settings| settings.workspace_token_ttl = std::time::Duration::from_mins(1))
            .await;
    let token = token(&emulator).await;
    let unentitled = access_token(&token_of(&emulator, &emulator.identities().unentitled).await);
    let database = emulator
        .credential_for(
            &emulator.identities().app,
            std::time::Duration::from_mins(5),
        )
        .unwrap();
    for (bearer, status, code) in [
        ("garbage", 403, "403"),
        ("dapi00000000", 403, "403"),
        (database.as_str(), 403, "403"),
        (unentitled.as_str(), 403, "PERMISSION_DENIED"),
    ] {
        let answer = mint(&emulator, bearer).await.unwrap();
        assert_eq!(
            (answer.status, answer.json()["error_code"].as_str()),
            (status, Some(code))
        );
    }
    assert_eq!(mint(&emulator, &token).await.unwrap().status, 200);
    emulator.configure(|settings| settings.clock_skew_seconds = 61);
    let answer = mint(&emulator, &token).await.unwrap();
    assert_eq!(
        (answer.status, answer.json()["error_code"].as_str()),
        (401, Some("UNAUTHENTICATED"))
    );
    let request_id = answer.json()["details"][0]["request_id"].clone();
    assert_eq!(request_id, answer.headers["x-request-id"].as_str());
    assert!(!answer.body.contains(&token));
}

#[tokio::test]
async fn revoked_workspace_tokens_stop_working_and_new_ones_do() {
    let emulator = start().await;
    let before = token(&emulator).await;
    emulator.revoke_workspace_tokens();
    assert_eq!(mint(&emulator, &before).await.unwrap().status, 401);
    assert_eq!(
        mint(&emulator, &token(&emulator).await)
            .await
            .unwrap()
            .status,
        200
    );
}

#[tokio::test]
async fn a_personal_access_token_mints_for_its_user() {
    let emulator = start().await;
    let user = &emulator.identities().user;
    let pat = user.pat.as_ref().unwrap().expose_secret();
    let me = get(&emulator, "/api/2.0/preview/scim/v2/Me", pat).await;
    assert_eq!(me.json()["userName"], user.name.as_str());
    assert_eq!(me.json()["emails"][0]["value"], user.name.as_str());
    assert!(!me.headers["x-databricks-org-id"].is_empty());
    let minted = mint(&emulator, pat).await.unwrap().json();
    let password = minted["token"].as_str().unwrap();
    connect_as(
        &emulator,
        config(&emulator).user(&user.name).password(password),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn each_field_of_a_mint_has_its_rule() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let endpoint = emulator.endpoint_name();
    let from_now = |seconds: i64| {
        Timestamp::from_second(Timestamp::now().as_second() + seconds)
            .unwrap()
            .to_string()
    };
    let cases = [
        (
            json!({}),
            400,
            "Field 'endpoint' is required, expected non-default value (not \"\")!",
        ),
        (
            json!({ "endpoint": "ep-1" }),
            400,
            "Field 'endpoint' expects",
        ),
        (
            json!({ "endpoint": "projects/nope/branches/production/endpoints/primary" }),
            404,
            "project id not found",
        ),
        (
            json!({ "endpoint": "projects/lakebase-local/branches/br-x/endpoints/primary" }),
            404,
            "branch id not found",
        ),
        (
            json!({ "endpoint": "projects/lakebase-local/branches/production/endpoints/x" }),
            404,
            "endpoint id not found",
        ),
        (
            json!({ "endpoint": endpoint, "ttl": "299s" }),
            400,
            "Field 'ttl'",
        ),
        (
            json!({ "endpoint": endpoint, "ttl": "3601s" }),
            400,
            "Field 'ttl'",
        ),
        (
            json!({ "endpoint": endpoint, "ttl": "900" }),
            400,
            "Field 'ttl'",
        ),
        (
            json!({ "endpoint": endpoint, "expire_time": from_now(200) }),
            400,
            "Field 'expire_time'",
        ),
        (
            json!({ "endpoint": endpoint, "expire_time": "tomorrow" }),
            400,
            "Field 'expire_time'",
        ),
        (
            json!({ "endpoint": endpoint, "ttl": "900s", "expire_time": from_now(900) }),
            400,
            "Only one of",
        ),
        (
            json!({ "endpoint": endpoint, "claims": [{ "permission_set": "ALL" }] }),
            400,
            "Invalid permission set",
        ),
    ];
    for (body, status, text) in cases {
        let answer = post(&emulator, "/api/2.0/postgres/credentials", &token, &body)
            .await
            .unwrap();
        assert_eq!(answer.status, status, "{body}");
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.starts_with(text), "{body}: {message}");
    }
    for (body, expected) in [
        (json!({ "endpoint": endpoint, "ttl": "300s" }), 300),
        (
            json!({ "endpoint": endpoint, "expire_time": from_now(1200) }),
            1200,
        ),
        (
            json!({ "endpoint": endpoint, "claims": [{ "permission_set": "READ_ONLY", "resources": [] }] }),
            3600,
        ),
    ] {
        let answer = post(&emulator, "/api/2.0/postgres/credentials", &token, &body)
            .await
            .unwrap();
        let left = seconds_from_now(&answer.json()["expire_time"]);
        assert!((expected - 10..=expected).contains(&left), "{body}: {left}");
    }
}

#[tokio::test]
async fn the_provisioned_api_calls_its_expiry_by_another_name() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let path = "/api/2.0/database/credentials";
    let body = json!({ "instance_names": [emulator.instance_name()], "request_id": "r" });
    let minted = post(&emulator, path, &token, &body).await.unwrap().json();
    assert!(minted.get("expire_time").is_none());
    assert!(seconds_from_now(&minted["expiration_time"]) > 3500);
    connect_as(
        &emulator,
        config(&emulator).password(minted["token"].as_str().unwrap()),
    )
    .await
    .unwrap();
    let answer = post(
        &emulator,
        path,
        &token,
        &json!({ "instance_names": ["nope"] }),
    )
    .await
    .unwrap();
    assert_eq!(
        (answer.status, answer.json()["error_code"].as_str()),
        (404, Some("NOT_FOUND"))
    );
    assert_eq!(
        post(&emulator, path, &token, &json!({}))
            .await
            .unwrap()
            .status,
        400
    );

    let instance = get(
        &emulator,
        "/api/2.0/database/instances/lakebase-local",
        &token,
    )
    .await
    .json();
    assert_eq!(
        (
            instance["read_write_dns"].as_str(),
            instance["state"].as_str()
        ),
        (Some("localhost"), Some("AVAILABLE"))
    );
    let uid = instance["uid"].as_str().unwrap();
    let path = format!("/api/2.0/database/instances:findByUid?uid={uid}");
    assert_eq!(
        get(&emulator, &path, &token).await.json()["name"],
        "lakebase-local"
    );
}

#[tokio::test]
async fn the_endpoint_is_found_by_name_and_in_lists() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let endpoint = get(
        &emulator,
        &format!("/api/2.0/postgres/{}", emulator.endpoint_name()),
        &token,
    )
    .await
    .json();
    assert_eq!(endpoint["name"], emulator.endpoint_name());
    assert_eq!(endpoint["status"]["hosts"]["host"], "localhost");
    assert_eq!(
        endpoint["status"]["endpoint_type"],
        "ENDPOINT_TYPE_READ_WRITE"
    );
    let branch = emulator
        .endpoint_name()
        .rsplit_once("/endpoints")
        .unwrap()
        .0;
    for (path, key, count) in [
        ("projects".to_owned(), "projects", 2),
        ("projects/lakebase-local/branches".to_owned(), "branches", 3),
        (format!("{branch}/endpoints"), "endpoints", 2),
        (format!("{branch}/roles"), "roles", 2),
        (format!("{branch}/databases"), "databases", 1),
    ] {
        let list = get(&emulator, &format!("/api/2.0/postgres/{path}"), &token)
            .await
            .json();
        let items = list[key].as_array().unwrap().clone();
        assert_eq!(items.len(), count, "{path}");
        for item in items {
            let name = item["name"].as_str().unwrap();
            let one = get(&emulator, &format!("/api/2.0/postgres/{name}"), &token)
                .await
                .json();
            assert_eq!(one["name"], name);
        }
    }
    assert_eq!(
        get(
            &emulator,
            &format!("/api/2.0/postgres/{branch}/endpoints/x"),
            &token
        )
        .await
        .status,
        404
    );
    assert_eq!(
        get(&emulator, "/api/2.0/nothing/here", &token).await.json()["error_code"],
        "ENDPOINT_NOT_FOUND"
    );
}

#[tokio::test]
async fn an_endpoint_made_again_under_its_old_name_is_listed_but_not_found() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let parent = "/api/2.0/postgres/projects/lakebase-local/branches/development/endpoints";
    let list = get(&emulator, parent, &token).await.json();
    let ids: Vec<&str> = list["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|endpoint| endpoint["endpoint_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["primary", "recreated"]);
    assert_eq!(
        get(&emulator, &format!("{parent}/primary"), &token)
            .await
            .status,
        200
    );
    assert_eq!(
        get(&emulator, &format!("{parent}/recreated"), &token)
            .await
            .status,
        404
    );
}

#[tokio::test]
async fn lists_come_in_pages_of_the_requested_size() {
    let emulator = start().await;
    let token = token(&emulator).await;
    let mut names = Vec::new();
    let mut page_token = String::new();
    loop {
        let path = format!("/api/2.0/postgres/projects?page_size=1&page_token={page_token}");
        let page = get(&emulator, &path, &token).await.json();
        assert_eq!(page["projects"].as_array().unwrap().len(), 1);
        names.push(page["projects"][0]["name"].clone());
        match page["next_page_token"].as_str() {
            Some(next) => next.clone_into(&mut page_token),
            None => break,
        }
    }
    assert_eq!(
        names,
        ["projects/lakebase-local", "projects/another-project"]
    );
    let path = "/api/2.0/postgres/projects?page_token=nonsense";
    assert_eq!(get(&emulator, path, &token).await.status, 400);
}

#[tokio::test]
async fn the_date_header_is_the_workspaces_clock() {
    let emulator = start_with(|settings| settings.clock_skew_seconds = 600).await;
    let answer = basic_token(&emulator).await;
    let date = jiff::fmt::rfc2822::parse(&answer.headers["date"])
        .unwrap()
        .timestamp();
    let ahead = date.as_second() - Timestamp::now().as_second();
    assert!((590..=601).contains(&ahead), "{ahead}");
}
