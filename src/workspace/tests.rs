//! The module against a scripted workspace in this process.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use jiff::{SignedDuration, Timestamp};
use rustls::{ClientConfig, RootCertStore};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket},
    task::JoinSet,
};

use super::*;
use crate::net::tls;

const ENDPOINT: &str = "projects/p/branches/production/endpoints/primary";
const CREDENTIALS: &str = "/api/2.0/postgres/credentials";
const TOKEN: &str = "/oidc/v1/token";
const DISCOVERY: &str = "/oidc/.well-known/oauth-authorization-server";
const JWT: &str = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ0ZXN0In0.c2lnbmF0dXJl";
const EXPIRY: &str = "2033-05-18T03:33:20Z";
const CLIENT_SECRET: &str = "dose0123456789abcdef0123456789abcdef";

#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    headers: HeaderMap,
    body: String,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

/// The answer to a call, the `n`th (from 0) to its path.
type Script = dyn Fn(&Seen, usize) -> Response + Send + Sync;

#[derive(Clone)]
struct Scripted {
    seen: Arc<Mutex<Vec<Seen>>>,
    script: Arc<Script>,
}

struct FakeWorkspace {
    host: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    _tasks: JoinSet<()>,
}

impl FakeWorkspace {
    async fn start(script: impl Fn(&Seen, usize) -> Response + Send + Sync + 'static) -> Self {
        async fn answer(State(scripted): State<Scripted>, request: Request) -> Response {
            let (parts, body) = request.into_parts();
            let body = to_bytes(body, 1 << 20).await.unwrap();
            let seen = Seen {
                method: parts.method.to_string(),
                path: parts.uri.to_string(),
                headers: parts.headers,
                body: String::from_utf8(body.to_vec()).unwrap(),
            };
            let n = {
                let mut all = scripted.seen.lock().unwrap();
                let n = all
                    .iter()
                    .filter(|earlier| earlier.path == seen.path)
                    .count();
                all.push(seen.clone());
                n
            };
            (scripted.script)(&seen, n)
        }
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let scripted = Scripted {
            seen: Arc::clone(&seen),
            script: Arc::new(script),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("http://{}", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        let app = Router::new().fallback(answer).with_state(scripted);
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            host,
            seen,
            _tasks: tasks,
        }
    }

    /// Calls to this path.
    fn calls(&self, path: &str) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|seen| seen.path == path)
            .cloned()
            .collect()
    }

    fn m2m(&self) -> WorkspaceSettings {
        WorkspaceSettings {
            host: Some(self.host.clone()),
            client_id: Some("sp-1".to_owned()),
            client_secret: Some(CLIENT_SECRET.into()),
            workspace_id: Some("4711".to_owned()),
            ..WorkspaceSettings::default()
        }
    }

    fn pat(&self) -> WorkspaceSettings {
        WorkspaceSettings {
            host: Some(self.host.clone()),
            token: Some("dapi-test".into()),
            ..WorkspaceSettings::default()
        }
    }
}

fn workspace(settings: WorkspaceSettings, clock: Clock) -> Workspace {
    let tls = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    Workspace::new(settings, &tls, clock, Metrics::new().unwrap()).unwrap()
}

async fn mint(settings: WorkspaceSettings) -> Result<Minted, CallError> {
    minter(&workspace(settings, Clock::system()))
        .request_credential()
        .await
}

fn minter(workspace: &Workspace) -> CredentialMinter {
    CredentialMinter::new(workspace.clone(), target())
}

fn target() -> Target {
    Target::Endpoint(ENDPOINT.parse().unwrap())
}

fn answer(status: u16, body: &Value) -> Response {
    raw(status, "application/json", body.to_string())
}

fn raw(status: u16, content_type: &str, body: String) -> Response {
    Response::builder()
        .status(StatusCode::from_u16(status).unwrap())
        .header("content-type", content_type)
        .body(Body::from(body))
        .unwrap()
}

fn token(n: usize) -> Response {
    answer(
        200,
        &json!({"access_token": format!("workspace-token-{n}"), "token_type": "Bearer", "expires_in": 3600}),
    )
}

fn credential() -> Response {
    answer(200, &json!({"token": JWT, "expire_time": EXPIRY}))
}

/// A workspace without faults.
fn good(seen: &Seen, n: usize) -> Response {
    match seen.path.as_str() {
        TOKEN => token(n),
        CREDENTIALS => credential(),
        _ => answer(
            404,
            &json!({"error_code": "ENDPOINT_NOT_FOUND", "message": "No API found"}),
        ),
    }
}

/// Once anything but a JWT of at most 9,000 bytes was refused here, and never reached the endpoint.
#[tokio::test]
async fn a_credential_of_any_shape_and_length_is_taken_byte_for_byte() {
    for token in ["opaque", " a b\t", "a.b", "é.ü", &"x".repeat(100_000)] {
        let text = token.to_owned();
        let fake = FakeWorkspace::start(move |seen, n| match seen.path.as_str() {
            CREDENTIALS => answer(200, &json!({"token": text, "expire_time": EXPIRY})),
            _ => good(seen, n),
        })
        .await;
        let minted = mint(fake.m2m()).await.unwrap();
        assert_eq!(minted.secret.expose_secret(), token);
    }
}

#[tokio::test]
async fn a_service_principal_mints_by_the_documented_two_steps() {
    let fake = FakeWorkspace::start(good).await;
    let minted = mint(fake.m2m()).await.unwrap();
    assert_eq!(minted.secret.expose_secret(), JWT);
    assert_eq!(minted.expires_at, Some(EXPIRY.parse().unwrap()));

    let token = &fake.calls(TOKEN)[0];
    assert_eq!(token.method, "POST");
    // sp-1:dose0123456789abcdef0123456789abcdef
    assert_eq!(
        token.header("authorization"),
        "Basic c3AtMTpkb3NlMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
    );
    assert_eq!(
        token.header("content-type"),
        "application/x-www-form-urlencoded"
    );
    assert_eq!(token.body, "grant_type=client_credentials&scope=all-apis");

    let credential = &fake.calls(CREDENTIALS)[0];
    assert_eq!(credential.method, "POST");
    assert_eq!(
        credential.header("authorization"),
        "Bearer workspace-token-0"
    );
    assert_eq!(credential.header("x-databricks-workspace-id"), "4711");
    assert_eq!(credential.header("content-type"), "application/json");
    assert_eq!(credential.header("accept"), "application/json");
    assert!(
        credential.header("user-agent").ends_with(" auth/oauth-m2m"),
        "{}",
        credential.header("user-agent")
    );
    assert_eq!(
        serde_json::from_str::<Value>(&credential.body).unwrap(),
        json!({ "endpoint": ENDPOINT })
    );
}

#[tokio::test]
async fn the_token_endpoint_is_discovered_once() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        DISCOVERY => answer(
            200,
            &json!({"token_endpoint": format!("http://{}/elsewhere", seen.header("host"))}),
        ),
        "/elsewhere" => answer(
            200,
            &json!({"access_token": format!("t{n}"), "expires_in": "1"}),
        ),
        _ => good(seen, n),
    })
    .await;
    let minter = minter(&workspace(fake.m2m(), Clock::system()));
    minter.request_credential().await.unwrap();
    minter.request_credential().await.unwrap();
    assert_eq!(fake.calls(DISCOVERY).len(), 1);
    assert_eq!(
        fake.calls("/elsewhere").len(),
        2,
        "a token of one second is not kept"
    );
    assert_eq!(
        fake.calls(CREDENTIALS)[1].header("authorization"),
        "Bearer t1"
    );
}

#[tokio::test]
async fn metadata_of_the_workspace_names_its_token_endpoint_and_id() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        "/.well-known/databricks-config" => answer(
            200,
            &json!({"oidc_endpoint": format!("http://{}/accounts/{{account_id}}/", seen.header("host")),
                "account_id": "a-1", "workspace_id": "815"}),
        ),
        "/accounts/a-1/.well-known/oauth-authorization-server" => answer(
            200,
            &json!({"token_endpoint": format!("http://{}/accounts/a-1/token", seen.header("host"))}),
        ),
        "/accounts/a-1/token" => token(n),
        _ => good(seen, n),
    })
    .await;
    let settings = WorkspaceSettings {
        workspace_id: None,
        ..fake.m2m()
    };
    mint(settings).await.unwrap();
    assert_eq!(fake.calls("/accounts/a-1/token").len(), 1);
    assert_eq!(
        fake.calls(CREDENTIALS)[0].header("x-databricks-workspace-id"),
        "815"
    );
    // Settings win.
    mint(fake.m2m()).await.unwrap();
    assert_eq!(
        fake.calls(CREDENTIALS)[1].header("x-databricks-workspace-id"),
        "4711"
    );
}

#[tokio::test]
async fn a_discovery_url_wins_over_metadata_of_the_workspace() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        "/mine" => answer(
            200,
            &json!({"token_endpoint": format!("http://{}/elsewhere", seen.header("host"))}),
        ),
        "/elsewhere" => token(n),
        _ => good(seen, n),
    })
    .await;
    let settings = WorkspaceSettings {
        discovery_url: Some(format!("{}/mine", fake.host)),
        scopes: Some("sql, postgres sql".to_owned()),
        group_id: Some("77".to_owned()),
        authorization_details: Some("[]".to_owned()),
        ..fake.m2m()
    };
    mint(settings).await.unwrap();
    assert_eq!(
        fake.calls("/elsewhere")[0].body,
        "grant_type=client_credentials&scope=postgres+sql&authorization_details=%5B%5D&assume_group=77"
    );
    assert_eq!(fake.calls("/.well-known/databricks-config").len(), 0);
}

#[tokio::test]
async fn the_client_secret_does_not_go_to_a_discovered_address_in_the_clear() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        DISCOVERY => answer(
            200,
            &json!({"token_endpoint": "http://attacker.example/token"}),
        ),
        _ => good(seen, n),
    })
    .await;
    mint(fake.m2m()).await.unwrap();
    assert_eq!(
        fake.calls(TOKEN).len(),
        1,
        "the documented endpoint is used instead"
    );
}

#[tokio::test]
async fn a_personal_access_token_is_sent_as_it_is() {
    let fake = FakeWorkspace::start(good).await;
    mint(fake.pat()).await.unwrap();
    assert_eq!(
        fake.calls(CREDENTIALS)[0].header("authorization"),
        "Bearer dapi-test"
    );
    assert_eq!(fake.calls(TOKEN).len(), 0);
    assert!(
        fake.calls(CREDENTIALS)[0]
            .header("user-agent")
            .ends_with(" auth/pat")
    );
}

#[tokio::test]
async fn a_provisioned_instance_has_its_own_path_and_field() {
    let fake = FakeWorkspace::start(|seen, _| match seen.path.as_str() {
        "/api/2.0/database/credentials" => {
            answer(200, &json!({"token": JWT, "expiration_time": EXPIRY}))
        }
        other => panic!("{other}"),
    })
    .await;
    let target = Target::Instance("my-instance".parse().unwrap());
    let minted = CredentialMinter::new(workspace(fake.pat(), Clock::system()), target)
        .request_credential()
        .await
        .unwrap();
    assert_eq!(minted.expires_at, Some(EXPIRY.parse().unwrap()));
    let body: Value =
        serde_json::from_str(&fake.calls("/api/2.0/database/credentials")[0].body).unwrap();
    assert_eq!(body["instance_names"], json!(["my-instance"]));
    assert_eq!(body["request_id"].as_str().unwrap().len(), 36);
}

#[tokio::test]
async fn many_at_once_share_one_workspace_token() {
    let fake = FakeWorkspace::start(good).await;
    let workspace = workspace(fake.m2m(), Clock::system());
    let mut mints = JoinSet::new();
    for _ in 0..20 {
        let minter = minter(&workspace);
        mints.spawn(async move { minter.request_credential().await.map(drop) });
    }
    while let Some(minted) = mints.join_next().await {
        minted.unwrap().unwrap();
    }
    assert_eq!(fake.calls(TOKEN).len(), 1);
    assert_eq!(fake.calls(CREDENTIALS).len(), 20);
}

#[tokio::test]
async fn the_workspace_token_is_renewed_early_and_kept_if_that_fails() {
    let fake = FakeWorkspace::start(|seen, n| match (seen.path.as_str(), n) {
        (TOKEN, 1) => answer(500, &json!({})),
        _ => good(seen, n),
    })
    .await;
    let clock = Clock::simulated(Timestamp::now());
    let minter = minter(&workspace(fake.m2m(), clock.clone()));
    let bearer = || {
        fake.calls(CREDENTIALS)
            .last()
            .unwrap()
            .header("authorization")
            .to_owned()
    };

    minter.request_credential().await.unwrap();
    clock.jump(SignedDuration::from_mins(39));
    minter.request_credential().await.unwrap();
    assert_eq!(fake.calls(TOKEN).len(), 1, "still fresh");
    clock.jump(SignedDuration::from_mins(2));
    minter.request_credential().await.unwrap();
    assert_eq!(
        (fake.calls(TOKEN).len(), bearer().as_str()),
        (2, "Bearer workspace-token-0"),
        "renewal failed"
    );
    minter.request_credential().await.unwrap();
    assert_eq!(fake.calls(TOKEN).len(), 2, "not tried again at once");
    clock.jump(SignedDuration::from_mins(2));
    minter.request_credential().await.unwrap();
    assert_eq!(
        (fake.calls(TOKEN).len(), bearer().as_str()),
        (3, "Bearer workspace-token-2")
    );
}

#[tokio::test]
async fn an_old_workspace_token_that_is_refused_is_replaced_once() {
    let fake =
        FakeWorkspace::start(
            |seen, n| match (seen.path.as_str(), seen.header("authorization")) {
                (CREDENTIALS, "Bearer workspace-token-0") if n > 0 => answer(
                    401,
                    &json!({"error_code": "UNAUTHENTICATED", "message": "expired"}),
                ),
                _ => good(seen, n),
            },
        )
        .await;
    let minter = minter(&workspace(fake.m2m(), Clock::system()));
    minter.request_credential().await.unwrap();
    minter.request_credential().await.unwrap();
    assert_eq!(
        (fake.calls(TOKEN).len(), fake.calls(CREDENTIALS).len()),
        (2, 3)
    );
}

#[tokio::test]
async fn a_refusal_of_a_new_workspace_token_is_final() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        CREDENTIALS => answer(
            401,
            &json!({"error_code": "UNAUTHENTICATED", "message": "no"}),
        ),
        _ => good(seen, n),
    })
    .await;
    let minter = minter(&workspace(fake.m2m(), Clock::system()));
    // The first mint gets a token and must not get another for the refusal; the second may, once.
    let error = minter.request_credential().await.unwrap_err();
    assert_eq!(error.kind, CallErrorKind::Refused);
    assert_eq!(
        (fake.calls(TOKEN).len(), fake.calls(CREDENTIALS).len()),
        (1, 1)
    );
    minter.request_credential().await.unwrap_err();
    assert_eq!(
        (fake.calls(TOKEN).len(), fake.calls(CREDENTIALS).len()),
        (2, 3)
    );

    let fake = FakeWorkspace::start(|_, _| answer(401, &json!({"message": "no"}))).await;
    let error = mint(fake.pat()).await.unwrap_err();
    assert!(error.hint.unwrap().contains("DATABRICKS_TOKEN"));
    assert_eq!(
        fake.calls(CREDENTIALS).len(),
        1,
        "there is no other token to try"
    );
}

#[tokio::test]
async fn wrong_client_credentials_are_reported() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        TOKEN => answer(401, &json!({"error": "invalid_client", "error_description": "Client authentication failed"})),
        _ => good(seen, n),
    })
    .await;
    let error = mint(fake.m2m()).await.unwrap_err();
    assert_eq!(error.kind, CallErrorKind::Refused);
    assert!(
        error.message.contains("client id or its secret"),
        "{error:?}"
    );
    assert!(error.hint.unwrap().contains("DATABRICKS_CLIENT_SECRET"));
    assert_eq!(fake.calls(CREDENTIALS).len(), 0);
}

#[tokio::test]
async fn each_bad_answer_is_a_failure_of_its_kind_and_repeats_no_secret() {
    use CallErrorKind::{Malformed, RateLimited, Refused, Unavailable};
    let leak = format!("the token {JWT} and the secret {CLIENT_SECRET}");
    let cases: Vec<(&str, Response, CallErrorKind)> = vec![
        (
            "json",
            answer(
                403,
                &json!({"error_code": "PERMISSION_DENIED", "message": leak}),
            ),
            Refused,
        ),
        (
            "scim",
            answer(404, &json!({"detail": leak, "status": "404"})),
            Refused,
        ),
        (
            "plain",
            raw(400, "text/plain", format!("BAD_REQUEST: {leak}")),
            Refused,
        ),
        (
            "html",
            raw(
                502,
                "text/html",
                format!("<html><title>{leak}</title></html>"),
            ),
            Unavailable,
        ),
        ("empty", raw(503, "text/plain", String::new()), Unavailable),
        ("rate", raw(429, "text/plain", String::new()), RateLimited),
        (
            "login page",
            raw(200, "text/html", format!("<html>{leak}</html>")),
            Malformed,
        ),
        (
            "half json",
            raw(200, "application/json", format!("{{\"token\": \"{JWT}\"")),
            Malformed,
        ),
        (
            "wrong type",
            answer(200, &json!({"token": 7, "expire_time": JWT})),
            Malformed,
        ),
        ("no expiry", answer(200, &json!({"token": JWT})), Malformed),
        (
            "bad expiry",
            answer(
                200,
                &json!({"token": JWT, "expire_time": format!("soon {JWT}")}),
            ),
            Malformed,
        ),
        (
            "empty",
            answer(200, &json!({"token": "", "expire_time": EXPIRY})),
            Malformed,
        ),
        (
            "huge",
            raw(
                200,
                "application/json",
                format!(
                    "{}{}",
                    " ".repeat(1 << 20),
                    json!({"token": JWT, "expire_time": EXPIRY})
                ),
            ),
            Malformed,
        ),
    ];
    for (name, response, kind) in cases {
        let response = Mutex::new(Some(response));
        let fake = FakeWorkspace::start(move |_, _| response.lock().unwrap().take().unwrap()).await;
        let error = mint(fake.pat()).await.unwrap_err();
        assert_eq!(error.kind, kind, "{name}: {error:?}");
        let shown = format!("{error:?} {error}");
        assert!(
            !shown.contains(JWT) && !shown.contains(CLIENT_SECRET),
            "{name}: {shown}"
        );
        assert!(
            error.message.starts_with(char::is_lowercase) && !error.message.ends_with('.'),
            "{name}"
        );
        assert!(error.detail.is_some(), "{name}");
    }
}

#[tokio::test]
async fn a_redirect_is_reported_with_its_reason_and_not_followed() {
    let fake = FakeWorkspace::start(|seen, _| {
        assert_eq!(seen.path, CREDENTIALS, "the redirect was followed");
        Response::builder()
            .status(307)
            .header(
                "location",
                "/login.html?next=secret&error=private-link-validation-error",
            )
            .body(Body::empty())
            .unwrap()
    })
    .await;
    let error = mint(fake.pat()).await.unwrap_err();
    assert_eq!(error.kind, CallErrorKind::Refused);
    assert!(error.hint.unwrap().contains("PrivateLink"));
    assert!(!error.detail.unwrap().contains("secret"));
}

#[tokio::test]
async fn retry_after_is_passed_on() {
    let fake = FakeWorkspace::start(|_, _| {
        Response::builder()
            .status(429)
            .header("retry-after", "17")
            .body(Body::from("{}"))
            .unwrap()
    })
    .await;
    assert_eq!(
        mint(fake.pat()).await.unwrap_err().retry_after,
        Some(Duration::from_secs(17))
    );
}

#[tokio::test]
async fn the_expiry_is_corrected_to_our_clock() {
    // The workspace is ten minutes ahead: what it calls 12:00 is 11:50 here.
    let ours: Timestamp = "2033-05-18T02:33:20Z".parse().unwrap();
    let fake = FakeWorkspace::start(|_, _| {
        let mut response = credential();
        response
            .headers_mut()
            .insert("date", "Wed, 18 May 2033 02:43:20 GMT".parse().unwrap());
        response
    })
    .await;
    let minted = minter(&workspace(fake.pat(), Clock::simulated(ours)))
        .request_credential()
        .await
        .unwrap();
    let corrected = minted.expires_at.unwrap().duration_since(ours);
    assert!(
        (corrected - SignedDuration::from_mins(50)).abs() < SignedDuration::from_secs(3),
        "{corrected}"
    );
}

#[tokio::test]
async fn a_workspace_that_cannot_be_reached_is_unavailable() {
    // Bound, so that no one else takes the port, and not listening.
    let closed = TcpSocket::new_v4().unwrap();
    closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let host = format!("http://{}", closed.local_addr().unwrap());
    let settings = WorkspaceSettings {
        host: Some(host),
        token: Some("dapi-test".into()),
        ..WorkspaceSettings::default()
    };
    let error = mint(settings).await.unwrap_err();
    assert_eq!(error.kind, CallErrorKind::Unavailable);
    assert!(error.detail.unwrap().to_lowercase().contains("refused"));
}

fn endpoint_body(name: &str) -> Value {
    json!({"name": name, "uid": "ep-1", "status": {
        "endpoint_type": "ENDPOINT_TYPE_READ_WRITE", "current_state": "IDLE", "disabled": false,
        "suspend_timeout_duration": "300s",
        "hosts": {"host": "ep-1.database.example.com", "read_only_host": "ep-1-ro.database.example.com"}}})
}

#[tokio::test]
async fn an_endpoint_is_looked_up_by_its_name() {
    let path = format!("/api/2.0/postgres/{ENDPOINT}");
    let expected = path.clone();
    let fake = FakeWorkspace::start(move |seen, _| {
        assert_eq!((seen.method.as_str(), &seen.path), ("GET", &expected));
        answer(200, &endpoint_body(ENDPOINT))
    })
    .await;
    let info = workspace(fake.pat(), Clock::system())
        .describe(&target())
        .await
        .unwrap();
    assert_eq!(
        info,
        EndpointInfo {
            name: ENDPOINT.to_owned(),
            uid: "ep-1".to_owned(),
            host: Some("ep-1.database.example.com".to_owned()),
            read_only_host: Some("ep-1-ro.database.example.com".to_owned()),
            state: EndpointState::Idle,
            disabled: false,
            endpoint_type: EndpointType::ReadWrite,
            suspend_timeout: Some(Duration::from_mins(5)),
        }
    );
    assert_eq!(fake.calls(&path).len(), 1);
}

#[tokio::test]
async fn an_endpoint_that_is_only_listed_is_found_on_any_page() {
    let list = "/api/2.0/postgres/projects/p/branches/production/endpoints?page_size=100";
    let fake = FakeWorkspace::start(move |seen, _| {
        if seen.path == list {
            answer(200, &json!({"endpoints": [endpoint_body("projects/p/branches/production/endpoints/other")],
                "next_page_token": "a b&c"}))
        } else if seen.path == format!("{list}&page_token=a+b%26c") {
            answer(200, &json!({"endpoints": [endpoint_body(ENDPOINT)]}))
        } else {
            answer(404, &json!({"error_code": "NOT_FOUND", "message": "endpoint id not found"}))
        }
    })
    .await;
    let info = workspace(fake.pat(), Clock::system())
        .describe(&target())
        .await
        .unwrap();
    assert_eq!(info.host.as_deref(), Some("ep-1.database.example.com"));
}

#[tokio::test]
async fn an_endpoint_that_does_not_exist_is_named() {
    let fake = FakeWorkspace::start(|_, _| {
        answer(404, &json!({"error_code": "NOT_FOUND", "message": "no"}))
    })
    .await;
    let error = workspace(fake.pat(), Clock::system())
        .describe(&target())
        .await
        .unwrap_err();
    assert_eq!(error.status, Some(404));
    assert!(error.message.contains(ENDPOINT));
    assert!(error.hint.unwrap().contains("ENDPOINT_NAME"));
}

#[tokio::test]
async fn temporary_failures_of_look_ups_are_retried() {
    let fake = FakeWorkspace::start(|_, n| {
        if n == 0 {
            return answer(
                503,
                &json!({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "soon"}),
            );
        }
        let mut response = answer(200, &json!({"userName": "me@example.com", "id": "1"}));
        response
            .headers_mut()
            .insert("x-databricks-org-id", "4711".parse().unwrap());
        response
    })
    .await;
    let workspace = workspace(fake.pat(), Clock::system());
    let lookup = discovery::Lookup::new(&workspace, Duration::from_mins(1));
    let profile = lookup.profile().await.unwrap();
    assert_eq!(
        profile,
        Profile {
            user_name: "me@example.com".to_owned(),
            id: "1".to_owned(),
            workspace_id: Some("4711".to_owned()),
            ..Profile::default()
        }
    );
}

#[tokio::test]
async fn minting_is_timed_by_step() {
    let fake = FakeWorkspace::start(good).await;
    let workspace = workspace(fake.m2m(), Clock::system());
    minter(&workspace).request_credential().await.unwrap();
    minter(&workspace).request_credential().await.unwrap();
    let count = |step: MintStep| workspace.0.metrics.process.mint_seconds[step].get_sample_count();
    assert_eq!(
        (count(MintStep::WorkspaceToken), count(MintStep::Credential)),
        (1, 2)
    );
}

#[test]
fn no_secret_prints() {
    let settings = WorkspaceSettings {
        host: Some("dbc-1.cloud.databricks.com".to_owned()),
        token: Some(SecretString::from("hunter2")),
        client_secret: Some(SecretString::from("hunter2")),
        auth_type: Some("pat".to_owned()),
        ..WorkspaceSettings::default()
    };
    let printed = format!(
        "{settings:?} {:?}",
        workspace(settings.clone(), Clock::system())
    );
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[tokio::test]
async fn an_expiry_above_the_range_is_far_away() {
    for end in [
        json!("9999-12-31T23:59:59Z"),
        json!("292278994-08-17T07:12:55.807Z"),
        json!(253_402_300_799_i64),
        json!("253402300799"),
    ] {
        let response = json!({"token": JWT, "expire_time": end});
        let fake = FakeWorkspace::start(move |seen, n| match seen.path.as_str() {
            CREDENTIALS => answer(200, &response),
            _ => good(seen, n),
        })
        .await;
        let minted = mint(fake.m2m()).await.unwrap();
        assert_eq!(minted.expires_at, Some(times::FAR), "{end}");
    }
    for lifetime in [json!("3600"), json!(1e300), json!("1e300")] {
        let response = json!({"access_token": "workspace-token", "expires_in": lifetime});
        let fake = FakeWorkspace::start(move |seen, n| match seen.path.as_str() {
            TOKEN => answer(200, &response),
            _ => good(seen, n),
        })
        .await;
        let minter = minter(&workspace(fake.m2m(), Clock::system()));
        for _ in 0..2 {
            minter.request_credential().await.unwrap();
        }
        assert_eq!(fake.calls(TOKEN).len(), 1, "{lifetime}");
    }
}

#[tokio::test]
async fn ids_and_delays_may_be_numbers() {
    let fake = FakeWorkspace::start(|seen, n| match seen.path.as_str() {
        "/.well-known/databricks-config" => answer(
            200,
            &json!({"oidc_endpoint": format!("http://{}/oidc", seen.header("host")), "workspace_id": 4711, "account_id": 7}),
        ),
        _ => good(seen, n),
    })
    .await;
    mint(fake.m2m()).await.unwrap();
    let calls = fake.calls(CREDENTIALS);
    assert_eq!(calls[0].header("x-databricks-workspace-id"), "4711");
}
