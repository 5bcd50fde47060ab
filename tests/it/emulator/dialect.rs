//! The emulator's errors, word for word: each row is one that clients of Lakebase meet, with the public source of its text. `*`
//! stands for what differs from case to case.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use lakebase_proxy::emulator::{Emulator, Identity, WhileAsleep};
use secrecy::ExposeSecret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    edge::{self, PROTOCOL_3_0, Refusal, SSL_REQUEST, dial, dial_tls, packet, refusal},
    workspace::port,
};
use crate::harness::emulator::{HttpAnswer, credential, credential_of, http, start, start_with};

/// The filters for Envoy, `contrib/databricks_sql_proxy`.
const ENVOY: &str = "databricks_sql_proxy for Envoy";
/// Neon's proxy, `proxy/src/auth` and `proxy/src/control_plane`.
const NEON: &str = "Neon's proxy";
/// Errors of PostgreSQL itself.
const POSTGRES: &str = "PostgreSQL";
/// docs.databricks.com, "Connect external apps" and "Authentication".
const DOCS: &str = "Databricks' documentation";
/// Issues and logs of several users.
const REPORTED: &str = "reports of users";

/// What a client does.
#[derive(Clone, Copy, Debug)]
enum Trigger {
    PlainStartup,
    GssRequest,
    EarlyData,
    NoServerName,
    OtherHost,
    Protocol(u32),
    LongStartup,
    SlowStartup,
    CancelOfWrongLength,
    Asleep,
    StartingUp,
    Disabled,
    Pooler,
    Password(Password),
    NoRole,
    PlainRole,
    NoDatabase,
    NoExtension,
    OtherLabel,
    NoLabel,
    RoleIsFull,
    Terminated,
}

/// What it sends as password.
#[derive(Clone, Copy, Debug)]
enum Password {
    Text,
    AccessToken,
    WorkspaceToken,
    WithoutKeyId,
    Forged,
    OfOtherWorkspace,
    Expired,
    FromTheFuture,
    Revoked,
    OfOtherIdentity,
}

#[derive(Clone, Copy)]
struct Row {
    trigger: Trigger,
    severity: &'static str,
    code: &'static str,
    message: &'static str,
    detail: &'static str,
    source: &'static str,
}

const fn row(
    source: &'static str,
    trigger: Trigger,
    severity: &'static str,
    code: &'static str,
    message: &'static str,
) -> Row {
    Row {
        trigger,
        severity,
        code,
        message,
        detail: "",
        source,
    }
}

const fn detailed(detail: &'static str, row: Row) -> Row {
    Row { detail, ..row }
}

const NEEDS_TLS: &str =
    "Ensure that connection is using SSL. Try using `sslmode=require` in the connection string.";
const PAUSED: &str = "This could be due to paused instances, disabling readable secondaries, IP ACLs or private link configuration.";
const UNAUTHORIZED: &str = "External authorization failed.";
const IDENTITY: &str = "Invalid authorization for databricks identity login";

#[rustfmt::skip]
const ROWS: &[Row] = &[
    detailed(NEEDS_TLS, row(ENVOY, Trigger::PlainStartup, "FATAL", "08P01", "Invalid protocol version. Protocol version: 196608")),
    detailed(NEEDS_TLS, row(ENVOY, Trigger::GssRequest, "FATAL", "08P01", "Invalid protocol version. Protocol version: 80877104")),
    detailed("*", row(ENVOY, Trigger::EarlyData, "FATAL", "08P01", "Received unencrypted data after SSL request.")),
    detailed("Please upgrade your client to support SNI.", row(ENVOY, Trigger::NoServerName, "FATAL", "08006", "Connection does not have SNI.")),
    detailed(PAUSED, row(ENVOY, Trigger::OtherHost, "FATAL", "28000", UNAUTHORIZED)),
    detailed(PAUSED, row(ENVOY, Trigger::Asleep, "FATAL", "28000", UNAUTHORIZED)),
    row(ENVOY, Trigger::Protocol(196_610), "FATAL", "0A000", "Unsupported frontend protocol 3.2. Server supports 3.0 to 3.0"),
    row(ENVOY, Trigger::Protocol(131_072), "FATAL", "0A000", "Unsupported frontend protocol 2.0. Server supports 3.0 to 3.0"),
    row(ENVOY, Trigger::LongStartup, "FATAL", "08006", "Invalid length of startup packet."),
    row(ENVOY, Trigger::SlowStartup, "FATAL", "08006", "Client handshake timeout."),
    row(ENVOY, Trigger::CancelOfWrongLength, "FATAL", "08P01", "Invalid cancel request message length."),
    row(NEON, Trigger::Password(Password::Text), "ERROR", "XX000", "Provided authentication token is not a valid JWT encoding"),
    row(NEON, Trigger::Password(Password::AccessToken), "ERROR", "XX000", "Provided authentication token is not a valid JWT encoding"),
    row(NEON, Trigger::Password(Password::WorkspaceToken), "ERROR", "XX000", "invalid JWT token audience"),
    row(NEON, Trigger::Password(Password::WithoutKeyId), "ERROR", "XX000", "missing key id"),
    row(NEON, Trigger::Password(Password::Forged), "ERROR", "XX000", "signature error: *"),
    row(NEON, Trigger::Password(Password::OfOtherWorkspace), "ERROR", "XX000", "jwk not found"),
    row(NEON, Trigger::Password(Password::Expired), "ERROR", "XX000", "JWT token has expired (exp=*)"),
    row(NEON, Trigger::Password(Password::FromTheFuture), "ERROR", "XX000", "JWT token is not yet ready to use (nbf=*)"),
    row(NEON, Trigger::PlainRole, "ERROR", "XX000", "password authentication failed for user '*'"),
    row(NEON, Trigger::Disabled, "ERROR", "XX000", "Control plane request failed: endpoint is disabled"),
    row(REPORTED, Trigger::Password(Password::Revoked), "FATAL", "28000", IDENTITY),
    row(REPORTED, Trigger::Password(Password::OfOtherIdentity), "FATAL", "28000", IDENTITY),
    row(REPORTED, Trigger::OtherLabel, "FATAL", "28P01", "token's identity \"*\" did not match the security label configured for role \"*\""),
    row(REPORTED, Trigger::NoLabel, "FATAL", "28P01", "no security label is configured for role \"*\""),
    row(REPORTED, Trigger::Pooler, "FATAL", "08P01", "SASL authentication failed"),
    row(DOCS, Trigger::NoExtension, "FATAL", "28P01", "password authentication failed for user \"*\""),
    row(POSTGRES, Trigger::NoRole, "FATAL", "28000", "role \"*\" does not exist"),
    row(POSTGRES, Trigger::NoDatabase, "FATAL", "3D000", "database \"databricks-postgres\" does not exist"),
    row(POSTGRES, Trigger::StartingUp, "FATAL", "57P03", "the database system is starting up"),
    row(POSTGRES, Trigger::RoleIsFull, "FATAL", "53300", "too many connections for role \"*\""),
    row(POSTGRES, Trigger::Terminated, "FATAL", "57P01", "terminating connection due to administrator command"),
];

#[tokio::test]
async fn each_error_has_the_words_of_its_source() {
    for row in ROWS {
        let what = format!("{:?}, after {}", row.trigger, row.source);
        let refusal = provoke(row.trigger).await;
        let refusal = refusal.unwrap_or_else(|| panic!("{what}: no error"));
        let found = (refusal.field('S'), refusal.field('C'));
        assert_eq!(found, (row.severity, row.code), "{what}: {refusal:?}");
        assert!(
            matches(refusal.field('M'), row.message),
            "{what}: {refusal:?}"
        );
        assert!(
            matches(refusal.field('D'), row.detail),
            "{what}: {refusal:?}"
        );
        // The proxy layer behind the edge sends no `V`.
        let is_proxy_layer = row.severity == "ERROR";
        assert_eq!(refusal.field('V').is_empty(), is_proxy_layer, "{what}");
    }
}

/// Whether `text` is `pattern`, in which `*` stands for anything.
fn matches(text: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        let Some((_, after)) = rest.split_once(part) else {
            return false;
        };
        rest = after;
    }
    true
}

#[test]
fn a_pattern_matches_whole_texts() {
    for (text, pattern, expected) in [
        ("", "", true),
        ("a", "", false),
        ("abc", "abc", true),
        ("abcd", "abc", false),
        ("a1c2e", "a*c*e", true),
        ("a1c2", "a*c*e", false),
        ("anything", "*", true),
    ] {
        assert_eq!(matches(text, pattern), expected, "{text} {pattern}");
    }
}

async fn provoke(trigger: Trigger) -> Option<Refusal> {
    let emulator = start_with(|settings| {
        settings.handshake_timeout = Duration::from_secs(1);
        settings.wake_delay = Duration::from_mins(1);
        settings.is_disabled = matches!(trigger, Trigger::Disabled);
        if matches!(trigger, Trigger::StartingUp) {
            settings.while_asleep = WhileAsleep::StartingUp;
        }
        if matches!(trigger, Trigger::NoExtension) {
            settings.databases_without_extension = vec!["databricks_postgres".to_owned()];
        }
    })
    .await;
    let app = emulator.identities().app.clone();
    let mut login = Login::of(&emulator, &app);
    match trigger {
        Trigger::PlainStartup => return plain(&emulator, &edge::startup(&emulator)).await,
        Trigger::GssRequest => return plain(&emulator, &packet(80_877_104, b"")).await,
        Trigger::CancelOfWrongLength => {
            let request = packet(80_877_102, b"123456789012");
            return plain(&emulator, &request).await;
        }
        Trigger::EarlyData => {
            let mut tcp = dial(&emulator).await;
            let request = [SSL_REQUEST, b"\x16\x03\x01"].concat();
            tcp.write_all(&request).await.unwrap();
            assert_eq!(tcp.read_u8().await.unwrap(), b'S');
            return refusal(&mut tcp).await;
        }
        Trigger::Protocol(version) => {
            return in_tls(&emulator, &packet(version, b"user\0ada\0\0")).await;
        }
        Trigger::LongStartup => {
            let name = format!("user\0ada\0application_name\0{}\0\0", "x".repeat(10_000));
            return in_tls(&emulator, &packet(PROTOCOL_3_0, name.as_bytes())).await;
        }
        Trigger::SlowStartup => return in_tls(&emulator, b"").await,
        Trigger::Terminated => return terminated(&emulator).await,
        Trigger::NoServerName => login.server_name = None,
        Trigger::OtherHost => login.server_name = Some("ep-elsewhere.localhost".to_owned()),
        Trigger::Pooler => login.server_name = Some(emulator.pooler_host()),
        Trigger::Asleep | Trigger::StartingUp => emulator.suspend().await,
        Trigger::Disabled | Trigger::NoExtension => {}
        Trigger::Password(password) => {
            let other = start().await;
            login.password = password_of(password, &emulator, &other);
            match password {
                Password::Expired => {
                    emulator.configure(|settings| settings.clock_skew_seconds = 3601);
                }
                Password::FromTheFuture => {
                    emulator.configure(|settings| settings.clock_skew_seconds = -60);
                }
                Password::Revoked => emulator.revoke_credentials(),
                _ => {}
            }
        }
        Trigger::NoRole => login = Login::of(&emulator, &emulator.identities().stranger),
        Trigger::PlainRole => {
            let stranger = &emulator.identities().stranger;
            let role = format!("create role \"{}\" login", stranger.name);
            emulator.execute(&role).await.unwrap();
            login = Login::of(&emulator, stranger);
        }
        Trigger::NoDatabase => login.database = "databricks-postgres",
        Trigger::OtherLabel => {
            let label = Some("id=1,type=USER");
            emulator.label_role(&app.name, label).await.unwrap();
        }
        Trigger::NoLabel => emulator.label_role(&app.name, None).await.unwrap(),
        Trigger::RoleIsFull => {
            let limit = format!("alter role \"{}\" connection limit 0", app.name);
            emulator.execute(&limit).await.unwrap();
        }
    }
    login.attempt(&emulator).await
}

/// In plain text.
async fn plain(emulator: &Emulator, bytes: &[u8]) -> Option<Refusal> {
    let mut tcp = dial(emulator).await;
    tcp.write_all(bytes).await.unwrap();
    refusal(&mut tcp).await
}

/// In TLS, in place of a startup message.
async fn in_tls(emulator: &Emulator, bytes: &[u8]) -> Option<Refusal> {
    let mut tls = dial_tls(emulator, Some("localhost")).await;
    tls.write_all(bytes).await.unwrap();
    refusal(&mut tls).await
}

async fn terminated(emulator: &Emulator) -> Option<Refusal> {
    let (mut tls, ..) = edge::log_in(emulator, "").await;
    emulator.terminate_sessions().await;
    refusal(&mut tls).await
}

/// One login, as far as it gets.
struct Login {
    server_name: Option<String>,
    user: String,
    database: &'static str,
    password: String,
}

impl Login {
    fn of(emulator: &Emulator, who: &Identity) -> Self {
        Self {
            server_name: Some("localhost".to_owned()),
            user: who.name.clone(),
            database: "databricks_postgres",
            password: credential_of(emulator, who),
        }
    }

    async fn attempt(&self, emulator: &Emulator) -> Option<Refusal> {
        let mut tls = dial_tls(emulator, self.server_name.as_deref()).await;
        let body = format!("user\0{}\0database\0{}\0\0", self.user, self.database);
        let startup = packet(PROTOCOL_3_0, body.as_bytes());
        tls.write_all(&startup).await.unwrap();
        let mut answer = self.password.clone().into_bytes();
        if self.server_name == Some(emulator.pooler_host()) {
            // The pooler requests SCRAM, and any answer does.
            let first = b"SCRAM-SHA-256\0\0\0\0\x08n,,n=,r=".to_vec();
            tls.write_all(&password_message(&first)).await.unwrap();
            tls.write_all(&password_message(b"c=biws,r=,p="))
                .await
                .unwrap();
            return last_error(&mut tls).await;
        }
        answer.push(0);
        // A server that has refused already may have closed.
        let _ = tls.write_all(&password_message(&answer)).await;
        last_error(&mut tls).await
    }
}

fn password_message(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [b"p", &length[..], body].concat()
}

/// The error behind the requests for authentication.
async fn last_error<S: tokio::io::AsyncRead + Unpin>(stream: &mut S) -> Option<Refusal> {
    loop {
        let (kind, body) = edge::message(stream).await.ok()?;
        match kind {
            b'R' => {}
            b'E' => return Some(Refusal::parse(&body)),
            other => panic!("{}", char::from(other)),
        }
    }
}

fn password_of(password: Password, emulator: &Emulator, other: &Emulator) -> String {
    let app = &emulator.identities().app;
    let hour = Duration::from_hours(1);
    match password {
        Password::Text => "secret".to_owned(),
        Password::AccessToken => {
            let pat = emulator.identities().user.pat.as_ref();
            pat.unwrap().expose_secret().to_owned()
        }
        Password::WorkspaceToken => emulator.workspace_token_for(app, hour).unwrap(),
        Password::WithoutKeyId => {
            let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","typ":"JWT"}"#);
            let token = credential(emulator);
            format!("{header}.{}", token.split_once('.').unwrap().1)
        }
        Password::Forged => {
            let token = credential(emulator);
            let (signed, signature) = token.rsplit_once('.').unwrap();
            let other = if signature.starts_with('A') { "B" } else { "A" };
            format!("{signed}.{other}{}", &signature[1..])
        }
        Password::OfOtherWorkspace => credential(other),
        Password::Expired | Password::FromTheFuture | Password::Revoked => credential(emulator),
        Password::OfOtherIdentity => credential_of(emulator, &emulator.identities().user),
    }
}

/// Status, `error_code` and message of the workspace API.
#[tokio::test]
async fn each_answer_of_the_workspace_has_the_words_of_its_source() {
    let emulator = start().await;
    let identities = emulator.identities();
    let hour = Duration::from_hours(1);
    let app = emulator.workspace_token_for(&identities.app, hour).unwrap();
    let unentitled = emulator
        .workspace_token_for(&identities.unentitled, hour)
        .unwrap();
    let mint = "POST /api/2.0/postgres/credentials";
    let missing = r#"{"endpoint":"projects/lakebase-local/branches/production/endpoints/other"}"#;
    let no_branch = r#"{"endpoint":"projects/lakebase-local/branches/br-1/endpoints/primary"}"#;
    for (source, head, token, body, status, code, message) in [
        (
            DOCS,
            mint,
            &app,
            "{}",
            400,
            "INVALID_PARAMETER_VALUE",
            "Field 'endpoint' is required, expected non-default value (not \"\")!",
        ),
        (
            DOCS,
            mint,
            &unentitled,
            "{}",
            403,
            "PERMISSION_DENIED",
            "API is disabled for users without workspace-access entitlement",
        ),
        (
            REPORTED,
            mint,
            &app,
            missing,
            404,
            "NOT_FOUND",
            "endpoint id not found [TraceId: *]",
        ),
        (
            REPORTED,
            mint,
            &app,
            no_branch,
            404,
            "NOT_FOUND",
            "branch id not found [TraceId: *]",
        ),
        (
            REPORTED,
            mint,
            &"nonsense".to_owned(),
            "{}",
            403,
            "403",
            "Invalid access token.",
        ),
    ] {
        let head = format!("{head}\nAuthorization: Bearer {token}");
        let answer: HttpAnswer = http(port(&emulator), &head, body).await.unwrap();
        let json = answer.json();
        let what = format!("{message}, after {source}: {json}");
        assert_eq!(
            (answer.status, json["error_code"].as_str()),
            (status, Some(code)),
            "{what}"
        );
        assert!(
            matches(json["message"].as_str().unwrap(), message),
            "{what}"
        );
        let detail = &json["details"][0]["@type"];
        assert_eq!(
            detail, "type.googleapis.com/google.rpc.RequestInfo",
            "{what}"
        );
    }
}
