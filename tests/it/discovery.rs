//! Finding the endpoint, against the emulator's workspace API.

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::get};
use lakebase_proxy::{
    clock::Clock,
    config::{EndpointConfig, Roots, WorkspaceSettings},
    emulator::{Action, AppResource, Emulator, Response, Site},
    net::tls,
    telemetry::Metrics,
    workspace::{LocateError, Located, Target, Workspace},
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{binary::Binary, emulator};

const BRANCH: &str = "projects/lakebase-local/branches/production";
const ENDPOINT: &str = "projects/lakebase-local/branches/production/endpoints/primary";
const APP: &str = "lakebase-local-app";

fn workspace(settings: WorkspaceSettings) -> Workspace {
    let tls = tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).unwrap();
    Workspace::new(settings, &tls, Clock::system(), Metrics::new().unwrap()).unwrap()
}

/// As the app's service principal.
fn app(emulator: &Emulator) -> Workspace {
    let identity = &emulator.identities().app;
    workspace(WorkspaceSettings {
        host: Some(emulator.workspace_url().to_owned()),
        client_id: Some(identity.name.clone()),
        client_secret: identity.client_secret.clone(),
        ..WorkspaceSettings::default()
    })
}

/// As a person with a personal access token.
fn person(emulator: &Emulator) -> Workspace {
    workspace(WorkspaceSettings {
        host: Some(emulator.workspace_url().to_owned()),
        token: emulator.identities().user.pat.clone(),
        ..WorkspaceSettings::default()
    })
}

fn named(name: &str) -> EndpointConfig {
    EndpointConfig {
        name: Some(name.to_owned()),
        ..EndpointConfig::default()
    }
}

fn on_host(host: &str) -> EndpointConfig {
    EndpointConfig {
        host: Some(host.to_owned()),
        ..EndpointConfig::default()
    }
}

fn of_app(app: &str) -> EndpointConfig {
    EndpointConfig {
        app: Some(app.to_owned()),
        ..EndpointConfig::default()
    }
}

async fn located(workspace: &Workspace, wanted: EndpointConfig) -> Located {
    let found = workspace.locate(&wanted, Duration::ZERO).await;
    found.unwrap_or_else(|error| panic!("{wanted:?}: {error}"))
}

async fn refused(workspace: &Workspace, wanted: EndpointConfig) -> LocateError {
    let found = workspace.locate(&wanted, Duration::ZERO).await;
    found.expect_err("it was located")
}

/// The API's answer at this path.
async fn api(emulator: &Emulator, path: &str) -> Value {
    let token = emulator.identities().user.pat.clone().unwrap();
    let client = reqwest::Client::builder()
        .tls_backend_preconfigured(
            (*tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1).unwrap()).clone(),
        )
        .build()
        .unwrap();
    let answer = client
        .get(format!("{}/api/2.0/{path}", emulator.workspace_url()))
        .bearer_auth(token.expose_secret())
        .send()
        .await
        .unwrap();
    serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap()
}

fn endpoint(located: &Located) -> &str {
    assert!(matches!(located.target, Target::Endpoint(_)), "{located:?}");
    located.target.as_str()
}

fn instance(located: &Located) -> &str {
    assert!(matches!(located.target, Target::Instance(_)), "{located:?}");
    located.target.as_str()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_one_thing_that_names_an_endpoint_leads_to_it() {
    let emulator = emulator().await;
    let app = app(&emulator);
    let uid = api(&emulator, &format!("postgres/{ENDPOINT}")).await["uid"].clone();
    let uid = uid.as_str().unwrap();

    for name in [
        ENDPOINT,
        BRANCH,
        "projects/lakebase-local",
        uid,
        &format!("{uid}.database.us-east-1.cloud.databricks.com"),
    ] {
        let found = located(&app, named(name)).await;
        assert_eq!(endpoint(&found), ENDPOINT, "{name}");
        assert_eq!(found.target.as_str(), ENDPOINT);
        assert_eq!(found.user, emulator.identities().app.name, "{name}");
        let host = if name.contains("databricks.com") {
            name
        } else {
            "localhost"
        };
        assert_eq!(found.host, host, "{name}");
        assert_eq!(found.database, None, "{name}");
    }
    // A host alone, in each of its shapes: by uid, and by looking who answers on it.
    for host in [
        format!("{uid}.database.azuredatabricks.net"),
        format!("{uid}-ro.localhost"),
        "localhost".to_owned(),
    ] {
        let found = located(&app, on_host(&host)).await;
        assert_eq!((endpoint(&found), &found.host), (ENDPOINT, &host));
    }
    // Another branch's endpoint is not taken for this one.
    let other = "projects/lakebase-local/branches/development/endpoints/primary";
    let other_host =
        api(&emulator, &format!("postgres/{other}")).await["status"]["hosts"]["host"].clone();
    let found = located(&app, on_host(other_host.as_str().unwrap())).await;
    assert_eq!(endpoint(&found), other);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provisioned_instance_is_found_by_name_and_by_host() {
    let emulator = emulator().await;
    let app = app(&emulator);
    let found = located(&app, named(emulator.instance_name())).await;
    assert_eq!(instance(&found), emulator.instance_name());
    assert_eq!(found.host, "localhost");

    let listed = api(&emulator, "database/instances").await;
    let uid = listed["database_instances"][0]["uid"].as_str().unwrap();
    for host in [
        format!("instance-{uid}.database.cloud.databricks.com"),
        format!("instance-ro-{uid}.database.azuredatabricks.net"),
    ] {
        let found = located(&app, on_host(&host)).await;
        assert_eq!(
            (instance(&found), &found.host),
            (emulator.instance_name(), &host)
        );
    }

    // One word that is no instance may be a project; the emulator has one of which only that is true.
    let found = located(&app, named("another-project")).await;
    assert_eq!(
        endpoint(&found),
        "projects/another-project/branches/production/endpoints/primary"
    );
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_knows_its_database() {
    let emulator = emulator().await;
    let app = app(&emulator);
    let found = located(&app, of_app(APP)).await;
    assert_eq!(endpoint(&found), ENDPOINT);
    assert_eq!(
        found.database.as_deref(),
        Some("databricks_postgres"),
        "the resource's id has a hyphen"
    );
    let found = located(&app, of_app("lakebase-local-app-provisioned")).await;
    assert_eq!(instance(&found), emulator.instance_name());
    assert_eq!(found.database.as_deref(), Some("databricks_postgres"));

    // With the host that the platform injects, the app's branch is looked at before everything else.
    let before = emulator.counts().lookups;
    let wanted = EndpointConfig {
        app: Some(APP.to_owned()),
        ..on_host("localhost")
    };
    assert_eq!(endpoint(&located(&app, wanted).await), ENDPOINT);
    // The app, the endpoints of its branch, the name of its database.
    assert_eq!(emulator.counts().lookups - before, 3);

    let error = refused(&app, of_app("lakebase-local-app-without-database")).await;
    assert!(matches!(error, LocateError::NoResource { .. }), "{error}");
    assert!(error.hint().unwrap().contains("api-key"));
    let error = refused(&app, of_app("unknown")).await;
    assert!(matches!(error, LocateError::NotFound { .. }), "{error}");
    let error = refused(&app, of_app("../credentials")).await;
    assert!(matches!(error, LocateError::NotFound { .. }), "{error}");
    emulator.stop().await;
}

/// A workspace in which an app may see its own resources and nothing else.
async fn strict_workspace() -> (Workspace, JoinSet<()>) {
    let resource =
        json!({"postgres": {"branch": BRANCH, "database": format!("{BRANCH}/databases/notes-db")}});
    let app = json!({"name": "my-app", "resources": [resource]}).to_string();
    let router = Router::new()
        .route("/api/2.0/apps/my-app", get(|| async { app }))
        .fallback(|| async { (StatusCode::FORBIDDEN, "PERMISSION_DENIED: no") });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
    let settings = WorkspaceSettings {
        host: Some(host),
        token: Some("dapi-test".into()),
        ..WorkspaceSettings::default()
    };
    (workspace(settings), tasks)
}

#[tokio::test]
async fn an_app_without_lookup_rights_uses_the_injected_variables() {
    let (workspace, _tasks) = strict_workspace().await;
    let wanted = EndpointConfig {
        app: Some("my-app".to_owned()),
        user: Some("0f7d".to_owned()),
        ..on_host("ep-a-1.database.cloud.databricks.com")
    };
    let found = located(&workspace, wanted).await;
    assert_eq!(endpoint(&found), ENDPOINT);
    assert_eq!(found.host, "ep-a-1.database.cloud.databricks.com");
    assert_eq!(found.database.as_deref(), Some("notes_db"));
}

/// The app's instance was taken, and its credentials were then for another instance than the host's.
#[tokio::test(flavor = "multi_thread")]
async fn the_instance_of_an_app_does_not_replace_that_of_the_host() {
    let emulator = emulator().await;
    let app = app(&emulator);
    let of_app = |host: &str| EndpointConfig {
        app: Some("lakebase-local-app-provisioned".to_owned()),
        ..on_host(host)
    };
    let other = "instance-00000000-0000-4000-8000-000000000000.database.cloud.databricks.com";
    let error = refused(&app, of_app(other)).await;
    assert!(matches!(error, LocateError::NotFound { .. }), "{error}");

    let listed = api(&emulator, "database/instances").await;
    let uid = listed["database_instances"][0]["uid"].as_str().unwrap();
    let own = format!("instance-{uid}.database.cloud.databricks.com");
    let found = located(&app, of_app(&own)).await;
    assert_eq!(instance(&found), emulator.instance_name());
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_resource_is_reported_with_the_existing_ones() {
    let emulator = emulator().await;
    let app = app(&emulator);
    for (wanted, exists) in [
        (
            named("projects/lakebase-local/branches/production/endpoints/primery"),
            ENDPOINT,
        ),
        (named("projects/lakebase-local/branches/prod"), BRANCH),
        (
            named("projects/lakebase-local/branches/prod/endpoints/primary"),
            BRANCH,
        ),
        (named("projects/lakebase"), "projects/lakebase-local"),
        (named("lakebase"), "projects/another-project"),
        (on_host("ep-none-1.database.cloud.databricks.com"), ENDPOINT),
        (
            on_host("instance-00000000-0000-4000-8000-000000000000.database.cloud.databricks.com"),
            emulator.instance_name(),
        ),
        (EndpointConfig::default(), "projects/lakebase-local"),
    ] {
        let error = refused(&app, wanted.clone()).await;
        let hint = error.hint().unwrap_or_default();
        assert!(hint.contains(exists), "{wanted:?}: {error}; {hint}");
        assert!(hint.contains("ENDPOINT_NAME="), "{hint}");
    }
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_endpoint_is_refused_with_the_command_that_enables_it() {
    let emulator = emulator().await;
    let app = app(&emulator);
    emulator.configure(|settings| settings.is_disabled = true);
    for wanted in [named(ENDPOINT), named(BRANCH), on_host("localhost")] {
        let error = refused(&app, wanted).await;
        assert!(matches!(error, LocateError::Disabled { .. }), "{error}");
        let hint = error.hint().unwrap();
        assert!(
            hint.contains(&format!("update-endpoint {ENDPOINT} spec.disabled")),
            "{hint}"
        );
        assert!(hint.contains("endpoints/replica"), "{hint}");
    }
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_only_listed_is_found() {
    let emulator = emulator().await;
    let name = "projects/lakebase-local/branches/development/endpoints/recreated";
    let found = located(&app(&emulator), named(name)).await;
    assert_eq!(endpoint(&found), name);
    assert_eq!(emulator.counts().lookups, 2);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_rights_do_not_matter_with_complete_settings() {
    let emulator = emulator().await;
    let app = app(&emulator);
    emulator
        .faults()
        .always(Site::Lookup, Action::Respond(Response::status(403)));
    for (name, target) in [
        (ENDPOINT, ENDPOINT),
        (BRANCH, ENDPOINT),
        ("projects/lakebase-local", ENDPOINT),
        ("lakebase-local", "lakebase-local"),
    ] {
        let wanted = EndpointConfig {
            host: Some("localhost".to_owned()),
            ..named(name)
        };
        let found = located(&app, wanted).await;
        assert_eq!(found.target.as_str(), target, "{name}");
        assert_eq!(found.host, "localhost");
    }
    // If they do not, the error names the ones that would.
    for wanted in [
        named(ENDPOINT),
        named(BRANCH),
        on_host("localhost"),
        of_app(APP),
    ] {
        let error = refused(&app, wanted.clone()).await;
        assert!(
            matches!(error, LocateError::Call { .. }),
            "{wanted:?}: {error}"
        );
        let hint = error.hint().unwrap();
        assert!(
            hint.contains("ENDPOINT_NAME") && hint.contains("PGHOST"),
            "{hint}"
        );
    }
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_name_host_and_user_no_request_is_sent() {
    let emulator = emulator().await;
    let wanted = EndpointConfig {
        host: Some("localhost".to_owned()),
        user: Some("me@example.com".to_owned()),
        database: Some("databricks_postgres".to_owned()),
        ..named(ENDPOINT)
    };
    let found = located(&person(&emulator), wanted).await;
    assert_eq!(found.user, "me@example.com");
    assert_eq!(emulator.counts().api_requests(), 0);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_user_setting_is_looked_up() {
    let emulator = emulator().await;
    let found = located(&person(&emulator), named(ENDPOINT)).await;
    assert_eq!(found.user, emulator.identities().user.name);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_databases_resource_id_becomes_its_name_in_postgres() {
    let emulator = emulator().await;
    let app = app(&emulator);
    for (given, expected) in [
        ("databricks_postgres", "databricks_postgres"),
        ("databricks-postgres", "databricks_postgres"),
        (
            "projects/lakebase-local/branches/production/databases/databricks-postgres",
            "databricks_postgres",
        ),
        // Neither an id nor a name that is known: for the server to judge.
        ("with-hyphens", "with-hyphens"),
    ] {
        let wanted = EndpointConfig {
            database: Some(given.to_owned()),
            ..named(ENDPOINT)
        };
        assert_eq!(
            located(&app, wanted).await.database.as_deref(),
            Some(expected)
        );
    }
    let wanted = EndpointConfig {
        database: Some(format!("{BRANCH}/databases/none")),
        ..named(ENDPOINT)
    };
    let error = refused(&app, wanted).await;
    assert!(
        error.hint().unwrap().contains("databricks_postgres"),
        "{error}"
    );
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_uses_the_replicas_host() {
    let emulator = emulator().await;
    let app = app(&emulator);
    let read_only = |wanted: EndpointConfig| EndpointConfig {
        read_only: true,
        ..wanted
    };
    for wanted in [
        named(ENDPOINT),
        named(BRANCH),
        named("projects/lakebase-local"),
    ] {
        let found = located(&app, read_only(wanted)).await;
        assert_eq!(endpoint(&found), ENDPOINT);
        assert!(found.host.ends_with("-ro.localhost"), "{}", found.host);
    }
    let replica = format!("{BRANCH}/endpoints/replica");
    let found = located(&app, read_only(named(&replica))).await;
    assert_eq!(endpoint(&found), replica);
    // An explicit host is the endpoint's; its replicas' follows from it.
    let wanted = EndpointConfig {
        host: Some("ep-a-1.database.cloud.databricks.com".to_owned()),
        ..named(ENDPOINT)
    };
    let found = located(&app, read_only(wanted)).await;
    assert_eq!(found.host, "ep-a-1-ro.database.cloud.databricks.com");
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_host_finds_its_endpoint_and_stays_the_address() {
    let emulator = emulator().await;
    let pooler = emulator.pooler_host();
    let found = located(&app(&emulator), on_host(&pooler)).await;
    assert_eq!(endpoint(&found), ENDPOINT);
    assert_eq!(found.host, pooler);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_neon_is_refused_without_a_request() {
    let emulator = emulator().await;
    let host = "ep-cool-breeze-1.us-east-2.aws.neon.tech";
    for wanted in [on_host(host), named(host)] {
        let error = refused(&app(&emulator), wanted).await;
        assert!(
            matches!(&error, LocateError::Name(name) if name.to_string().contains("Neon")),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("Lakebase"));
    }
    assert_eq!(emulator.counts().api_requests(), 0);
    emulator.stop().await;
}

/// The uid is what people see: it is the first part of the host.
#[tokio::test(flavor = "multi_thread")]
async fn the_error_for_an_endpoint_uid_contains_its_name() {
    let emulator = emulator().await;
    let host = emulator.pooler_host();
    let (uid, _) = host.split_once("-pooler").unwrap();
    let wrong = ENDPOINT.replace("primary", uid);
    let error = refused(&app(&emulator), named(&wrong)).await;
    assert!(matches!(error, LocateError::Uid { .. }), "{error}");
    assert!(
        error
            .hint()
            .unwrap()
            .contains(&format!("ENDPOINT_NAME={ENDPOINT}"))
    );
    let other = ENDPOINT.replace("primary", "ep-other-1");
    let error = refused(&app(&emulator), named(&other)).await;
    assert!(matches!(error, LocateError::NotFound { .. }), "{error}");
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_errors_are_retried_and_permanent_ones_are_not() {
    let emulator = emulator().await;
    let app = app(&emulator);
    emulator
        .faults()
        .once(Site::Lookup, Action::Respond(Response::status(503)));
    let found = app
        .locate(&named(ENDPOINT), Duration::from_mins(1))
        .await
        .unwrap();
    assert_eq!(endpoint(&found), ENDPOINT);
    assert_eq!(emulator.counts().lookups, 2);

    emulator
        .faults()
        .always(Site::Lookup, Action::Respond(Response::status(400)));
    let before = emulator.counts().lookups;
    app.locate(&named(ENDPOINT), Duration::from_mins(1))
        .await
        .unwrap_err();
    assert_eq!(emulator.counts().lookups - before, 1);
    emulator.stop().await;
}

/// The log did not name the served database of an app.
#[tokio::test(flavor = "multi_thread")]
async fn an_app_with_two_databases_has_its_choice_logged() {
    let emulator = emulator().await;
    emulator.configure(|settings| {
        settings.app_resources = vec![
            AppResource::postgres("orders", "databricks_postgres"),
            AppResource::postgres("archive", "history"),
        ];
    });
    let variables = [("ENDPOINT_NAME", ""), ("DATABRICKS_APP_NAME", APP)];
    let mut binary = Binary::serve_with(&emulator, &[], &variables).await;
    let line = binary
        .find("the app `lakebase-local-app` has several databases")
        .await;
    let message = line["message"].as_str().unwrap();
    assert!(
        message.contains("`orders` is served") && message.contains("valueFrom"),
        "{message}"
    );
    emulator.stop().await;
}
