//! Login: which token for which role, what reaches Postgres, what outlives the token.

use std::time::Duration;

use lakebase_proxy::emulator::{Emulator, Identity};
use tokio_postgres::{Error, SimpleQueryMessage};

use crate::harness::emulator::{
    config, connect, connect_as, credential, credential_of, start, start_with,
};

/// SQLSTATE, severity and message of a refused login.
fn refused(result: Result<tokio_postgres::Client, Error>) -> (String, String, String) {
    let error = result.expect_err("the login to be refused");
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    (
        error.code().code().to_owned(),
        error.severity().to_owned(),
        error.message().to_owned(),
    )
}

async fn attempt(emulator: &Emulator, user: &str, password: &str) -> (String, String, String) {
    refused(connect_as(emulator, config(emulator).user(user).password(password)).await)
}

async fn value(client: &tokio_postgres::Client, sql: &str) -> String {
    for message in client.simple_query(sql).await.unwrap() {
        if let SimpleQueryMessage::Row(row) = message {
            return row.get(0).unwrap_or_default().to_owned();
        }
    }
    panic!("no row");
}

fn proxy(message: impl Into<String>) -> (String, String, String) {
    ("XX000".to_owned(), "ERROR".to_owned(), message.into())
}

fn fatal(code: &str, message: impl Into<String>) -> (String, String, String) {
    (code.to_owned(), "FATAL".to_owned(), message.into())
}

#[tokio::test]
async fn the_app_logs_in_as_itself_and_reads_the_notes() {
    let emulator = start().await;
    let client = connect(&emulator).await.unwrap();
    let app = &emulator.identities().app.name;
    assert_eq!(&value(&client, "select session_user").await, app);
    assert_eq!(value(&client, "select count(*) >= 3 from notes").await, "t");
    assert_eq!(
        value(
            &client,
            "select rolsuper::text from pg_roles where rolname = current_user"
        )
        .await,
        "false"
    );
    client
        .simple_query("insert into notes (content) values ('mine')")
        .await
        .unwrap();
    client
        .simple_query("create table made_by_app (); drop table made_by_app")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_password_that_is_no_jwt_is_named_so() {
    let emulator = start().await;
    let app = emulator.identities().app.name.clone();
    for password in ["secret", "dapi0123456789abcdef"] {
        assert_eq!(
            attempt(&emulator, &app, password).await,
            proxy("Provided authentication token is not a valid JWT encoding")
        );
    }
}

#[tokio::test]
async fn a_credential_of_another_workspace_has_an_unknown_key() {
    let (emulator, other) = (start().await, start().await);
    let app = emulator.identities().app.name.clone();
    assert_eq!(
        attempt(&emulator, &app, &credential(&other)).await,
        proxy("jwk not found")
    );
}

#[tokio::test]
async fn expiry_is_enforced_at_login_and_only_there() {
    let emulator = start().await;
    let app = emulator.identities().app.clone();
    let token = emulator
        .credential_for(&app, Duration::from_mins(5))
        .unwrap();
    let mut config = config(&emulator);
    config.password(&token);
    let open = connect_as(&emulator, &config).await.unwrap();
    emulator.configure(|settings| settings.clock_skew_seconds = 301);
    let (code, _, message) = refused(connect_as(&emulator, &config).await);
    assert_eq!(code, "XX000");
    assert!(
        message.starts_with("JWT token has expired (exp="),
        "{message}"
    );
    assert_eq!(value(&open, "select 1").await, "1");
    connect(&emulator).await.expect("a new credential to work");
}

#[tokio::test]
async fn revoked_credentials_are_refused_and_new_ones_work() {
    let emulator = start().await;
    let before = config(&emulator);
    emulator.revoke_credentials();
    assert_eq!(
        refused(connect_as(&emulator, &before).await),
        fatal(
            "28000",
            "Invalid authorization for databricks identity login"
        )
    );
    connect(&emulator).await.unwrap();
}

#[tokio::test]
async fn a_token_opens_its_owners_role_and_no_other() {
    let emulator = start().await;
    let user = emulator.identities().user.name.clone();
    let identity = fatal(
        "28000",
        "Invalid authorization for databricks identity login",
    );
    assert_eq!(
        attempt(&emulator, &user, &credential(&emulator)).await,
        identity
    );
    assert_eq!(
        attempt(
            &emulator,
            "databricks_control_plane",
            &credential(&emulator)
        )
        .await,
        identity
    );
    let own = credential_of(&emulator, &emulator.identities().user);
    connect_as(&emulator, config(&emulator).user(&user).password(own))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_service_principal_without_a_role_gets_role_does_not_exist() {
    let emulator = start().await;
    let stranger = &emulator.identities().stranger;
    let token = credential_of(&emulator, stranger);
    assert_eq!(
        attempt(&emulator, &stranger.name, &token).await,
        fatal(
            "28000",
            format!("role \"{}\" does not exist", stranger.name)
        )
    );
}

#[tokio::test]
async fn a_role_made_by_plain_create_role_is_no_oauth_role() {
    let emulator = start().await;
    let stranger = emulator.identities().stranger.clone();
    emulator
        .execute(&format!("create role \"{}\" login", stranger.name))
        .await
        .unwrap();
    assert_eq!(
        attempt(
            &emulator,
            &stranger.name,
            &credential_of(&emulator, &stranger)
        )
        .await,
        proxy(format!(
            "password authentication failed for user '{}'",
            stranger.name
        ))
    );
}

#[tokio::test]
async fn a_missing_database_is_postgres_own_refusal() {
    let emulator = start().await;
    let result = connect_as(&emulator, config(&emulator).dbname("databricks-postgres")).await;
    assert_eq!(
        refused(result),
        fatal("3D000", "database \"databricks-postgres\" does not exist")
    );
}

async fn connect_user(emulator: &Emulator) -> tokio_postgres::Client {
    let Identity { name, .. } = &emulator.identities().user;
    let token = credential_of(emulator, &emulator.identities().user);
    connect_as(emulator, config(emulator).user(name).password(token))
        .await
        .unwrap()
}

#[tokio::test]
async fn the_owner_creates_oauth_roles_as_in_the_tutorial() {
    let emulator = start().await;
    let owner = connect_user(&emulator).await;
    let stranger = emulator.identities().stranger.clone();
    let script = format!(
        "create extension if not exists databricks_auth; \
         select databricks_create_role('{}', 'service_principal');",
        stranger.name
    );
    owner.simple_query(&script).await.unwrap();
    let token = credential_of(&emulator, &stranger);
    connect_as(
        &emulator,
        config(&emulator).user(&stranger.name).password(token),
    )
    .await
    .unwrap();

    let app = connect(&emulator).await.unwrap();
    let error = app
        .simple_query("select databricks_create_role('x', 'USER')")
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42501");
}

#[tokio::test]
async fn a_role_is_bound_to_one_identity_by_its_security_label() {
    let emulator = start().await;
    let app = emulator.identities().app.clone();
    let client = connect(&emulator).await.unwrap();
    let label = "select label from pg_seclabels where provider = 'databricks_auth' and objtype = 'role' \
        and objname = quote_ident(current_user)";
    let right = format!("id={},type=SERVICE_PRINCIPAL", app.id);
    assert_eq!(value(&client, label).await, right);

    emulator
        .label_role(&app.name, Some("id=1,type=USER"))
        .await
        .unwrap();
    let refused = attempt(&emulator, &app.name, &credential(&emulator)).await;
    let message = format!(
        "token's identity \"{0}\" did not match the security label configured for role \"{0}\"",
        app.name
    );
    assert_eq!(refused, fatal("28P01", message));
    emulator.label_role(&app.name, None).await.unwrap();
    let (code, _, message) = attempt(&emulator, &app.name, &credential(&emulator)).await;
    assert_eq!(code, "28P01");
    assert!(message.contains("no security label"), "{message}");
    emulator.label_role(&app.name, Some(&right)).await.unwrap();
    connect(&emulator).await.unwrap();
}

#[tokio::test]
async fn a_database_without_the_extension_refuses_tokens() {
    let emulator = start_with(|settings| {
        settings.databases_without_extension = vec!["postgres".to_owned()];
    })
    .await;
    let app = &emulator.identities().app.name;
    let mut config = config(&emulator);
    let refused = refused(connect_as(&emulator, config.dbname("postgres")).await);
    let message = format!("password authentication failed for user \"{app}\"");
    assert_eq!(refused, fatal("28P01", message));
    connect(&emulator).await.unwrap();
}

#[tokio::test]
async fn a_member_logs_in_under_the_role_of_its_group() {
    let emulator = start().await;
    let group = emulator.identities().user.groups[0].clone();
    let owner = connect_user(&emulator).await;
    owner
        .simple_query(&format!(
            "select databricks_create_role('{group}', 'GROUP')"
        ))
        .await
        .unwrap();
    let member = credential_of(&emulator, &emulator.identities().user);
    let client = connect_as(&emulator, config(&emulator).user(&group).password(member))
        .await
        .unwrap();
    assert_eq!(value(&client, "select session_user").await, group);
    assert_eq!(
        attempt(&emulator, &group, &credential(&emulator)).await.0,
        "28000",
        "accepted without membership"
    );
}

#[tokio::test]
async fn unknown_startup_parameters_are_dropped_and_options_survive() {
    let emulator = start().await;
    let mut config = config(&emulator);
    config
        .application_name("survivor")
        .options("-c statement_timeout=77s endpoint=ep-1");
    let client = connect_as(&emulator, &config).await.unwrap();
    assert_eq!(value(&client, "show statement_timeout").await, "77s");
    assert_eq!(value(&client, "show application_name").await, "survivor");
    assert_eq!(value(&client, "show client_encoding").await, "UTF8");
}

#[tokio::test]
async fn native_login_is_scram_with_postgres_where_it_is_switched_on() {
    let emulator = start_with(|settings| settings.native_login = true).await;
    let name = format!("native_{}", emulator.pg_port());
    emulator
        .create_native_role(&name, "s3cret'\\x")
        .await
        .unwrap();
    let mut config = config(&emulator);
    config.user(&name).password("s3cret'\\x");
    let client = connect_as(&emulator, &config).await.unwrap();
    assert_eq!(value(&client, "select session_user").await, name);
    assert_eq!(
        attempt(&emulator, &name, "wrong").await,
        fatal(
            "28P01",
            format!("password authentication failed for user \"{name}\"")
        )
    );
    emulator.configure(|settings| settings.native_login = false);
    assert!(
        refused(connect_as(&emulator, &config).await)
            .2
            .contains("not a valid JWT")
    );
}

#[tokio::test]
async fn the_counts_distinguish_dials_from_logins() {
    let emulator = start().await;
    let client = connect(&emulator).await.unwrap();
    let _ = attempt(&emulator, "unknown", "nothing").await;
    let counts = emulator.counts();
    assert_eq!(
        (
            counts.dials,
            counts.logins,
            counts.refusals,
            counts.sessions
        ),
        (2, 1, 1, 1)
    );
    drop(client);
    let counts = emulator
        .wait_for(crate::harness::emulator::TIMEOUT, |counts| {
            counts.connections == 0
        })
        .await;
    assert_eq!(counts.expect("the session to end").sessions, 0);
}
