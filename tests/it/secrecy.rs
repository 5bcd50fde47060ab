//! No secret is disclosed: logs at TRACE, errors, metrics, health, the notes page, what the kernel shows.
//!
//! The secrets searched for are those really used, recorded by a tap between the proxy and the workspace. The workspace and
//! the endpoint repeat them to the proxy in every way we could think of.

mod search;
mod tap;

use std::{fs, net::SocketAddr, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::join_all;
use lakebase_proxy::emulator::{Action, Emulator, EmulatorOptions, ServerError, Site};
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use self::{
    search::Secrets,
    tap::{Call, Tap, Twist, Untruth},
};
use crate::{harness::binary::PROGRAM, process::Process, web};

const FLAGS: [&str; 4] = [
    "--port=0",
    "--http-port=0",
    "--capacity-timeout=1s",
    "--log-filter=trace",
];
const NOTES: [&str; 2] = ["--notes=true", "--notes-port=0"];
/// For a client that cannot be served: it gets its error at once.
const HURRY: &str = "--connect-timeout=1s";

fn flags(more: &[&'static str]) -> Vec<&'static str> {
    FLAGS.iter().chain(more).copied().collect()
}
/// Stands in for what an app keeps in its statements, which are confidential, too.
const STATEMENT: &str = "statement-5f0c1a77e9b34d";
const PARAMETER: &str = "parameter-e1d20b9946ac88";
/// What a client may send as a password, requested or not.
const CLIENT_PASSWORD: &str = "hunter2-is-what-the-client-sent";

fn truth(_: &Call) -> Option<Untruth> {
    None
}

/// What the proxy's world is made of; `changes` replace or, when empty, remove variables.
fn variables(emulator: &Emulator, tap: &Tap, changes: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = emulator
        .environment()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let host = format!("http://{}", tap.address);
    for &(name, value) in [("DATABRICKS_HOST", host.as_str())].iter().chain(changes) {
        variables.retain(|(known, _)| known != name);
        if !value.is_empty() {
            variables.push((name.to_owned(), value.to_owned()));
        }
    }
    variables
}

/// All public answers of a running proxy, and what the kernel shows of it.
async fn gather(proxy: &Process) -> String {
    let mut all = String::new();
    let http = proxy.address("serving health and metrics").await;
    for path in [
        "/",
        "/metrics",
        "/startup",
        "/readiness",
        "/liveness",
        "/nothing",
    ] {
        all += &web::get(http, path).await.body;
    }
    if proxy.reply().contains("serving the notes page") {
        let notes = proxy.address("serving the notes page").await;
        for path in ["/", "/healthz", "/nothing"] {
            all += &web::get(notes, path).await.body;
        }
    }
    for name in ["cmdline", "comm"] {
        all += &fs::read_to_string(format!("/proc/{}/{name}", proxy.id())).unwrap();
    }
    for thread in fs::read_dir(format!("/proc/{}/task", proxy.id())).unwrap() {
        // Threads come and go.
        all += &fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default();
    }
    all
}

/// Connects, sends `more` behind the StartupMessage, and returns all that comes back until the proxy closes.
async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = timeout(Duration::from_mins(1), stream.read_to_end(&mut answer)).await;
    // A refusal may end in a reset; what came before it counts.
    let _ = read.expect("the proxy answers");
    String::from_utf8_lossy(&answer).into_owned()
}

fn startup() -> Vec<u8> {
    let body = b"user\0app\0\0";
    let length = u32::try_from(body.len() + 8).unwrap();
    [
        &length.to_be_bytes()[..],
        &0x0003_0000_u32.to_be_bytes(),
        body,
    ]
    .concat()
}

fn message(tag: u8, body: &str) -> Vec<u8> {
    let length = u32::try_from(body.len() + 5).unwrap();
    [&[tag][..], &length.to_be_bytes(), body.as_bytes(), b"\0"].concat()
}

/// A client that runs one statement and leaves; it sends an unrequested password.
fn whole_visit() -> Vec<u8> {
    let statement = format!("SELECT 'answer', '{STATEMENT}'");
    [
        startup(),
        message(b'p', CLIENT_PASSWORD),
        message(b'Q', &statement),
        b"X\0\0\0\x04".to_vec(),
    ]
    .concat()
}

fn complaint(secrets: &Secrets, what: &str, text: &str) -> Option<String> {
    let found = secrets.find(text)?;
    Some(format!("{what} shows {found}\n"))
}

fn assert_none(secrets: &Secrets, what: &str, text: &str) {
    if let Some(complaint) = complaint(secrets, what, text) {
        panic!("{complaint}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_s_whole_life_at_trace_shows_no_secret() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    for format in ["--structured-logs=false", "--structured-logs=true"] {
        let tap = Tap::open(emulator.workspace_url(), truth).await;
        // A credential that was just minted is replaced after 5 s at the earliest.
        let flags = flags(&[format, "--connect-timeout=30s", NOTES[0], NOTES[1]]);
        let proxy = Process::spawn(PROGRAM, variables(&emulator, &tap, &[]), &flags);
        let postgres = proxy.address("listening for Postgres clients").await;

        let mut seen = raw(postgres, &whole_visit()).await;
        assert!(seen.contains("answer"), "{seen}");
        seen = seen.replace(STATEMENT, "");
        with_parameter(postgres).await;
        // A token that is refused, and the one that replaces it.
        let before = tap.tokens();
        emulator.revoke_credentials();
        emulator.revoke_workspace_tokens();
        let renewed = raw(postgres, &whole_visit()).await;
        assert!(
            renewed.contains("answer") && tap.tokens() >= before + 2,
            "{renewed}"
        );
        // Strangers of all kinds.
        for bytes in [
            &b"GET / HTTP/1.1\r\nAuthorization: Bearer hunter2-is-what-the-client-sent\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\0\0\0\x0c\0\x03\0\0user",
        ] {
            seen += &raw(postgres, bytes).await;
        }
        seen += &gather(&proxy).await;
        let (status, log) = proxy.end().await;
        assert_eq!(status.code(), Some(143));

        // It did log, dependencies too: else there would be nothing to look through.
        for part in ["session begins", "rustls", "database credential refreshed"] {
            assert!(log.contains(part), "no {part:?} in the log:\n{log}");
        }
        let mut secrets = Secrets::default();
        tap.add_to(&mut secrets);
        assert!(
            secrets.count >= 10,
            "only {} secrets were seen",
            secrets.count
        );
        secrets.add("a client's password", CLIENT_PASSWORD);
        secrets.add("a client's statement", STATEMENT);
        secrets.add("a client's parameter", PARAMETER);
        assert_none(&secrets, "the requests", &seen);
        assert_none(&secrets, "the log", &log);
    }
    emulator.stop().await;
}

/// The extended protocol, with a parameter.
async fn with_parameter(postgres: SocketAddr) {
    let config = format!(
        "host=127.0.0.1 port={} user=x sslmode=disable",
        postgres.port()
    );
    let (client, connection) = tokio_postgres::connect(&config, tokio_postgres::NoTls)
        .await
        .unwrap();
    let tasks = tokio_util::task::TaskTracker::new();
    tasks.spawn(connection);
    let row = client
        .query_one("SELECT $1::text", &[&PARAMETER])
        .await
        .unwrap();
    assert_eq!(row.get::<_, &str>(0), PARAMETER);
    drop(client);
    tasks.close();
    tasks.wait().await;
}

fn hex(text: &str) -> String {
    let digits: Vec<String> = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    digits.concat()
}

/// A workspace that repeats what it was sent, or what it was about to give, in the wrong place.
const TWISTS: &[(&str, Twist)] = &[
    ("403 repeats the header", |call| {
        let message = format!("bad header Authorization: {}", call.authorization);
        call.is_mint().then(|| {
            (
                403,
                None,
                json!({"error_code": "PERMISSION_DENIED", "message": message}).to_string(),
            )
        })
    }),
    ("401 repeats the header in plain text", |call| {
        call.is_mint().then(|| {
            (
                401,
                None,
                format!("UNAUTHENTICATED: {}", call.authorization),
            )
        })
    }),
    ("400 is a page with the request", |call| {
        call.is_mint().then(|| {
            (
                400,
                None,
                format!("<html><pre>{}</pre></html>", call.request),
            )
        })
    }),
    ("500 quotes the request and the token", |call| {
        let message = format!("{:?} gave {:?}", call.request, call.token());
        call.is_mint()
            .then(|| (500, None, json!({"message": message}).to_string()))
    }),
    ("the code and the ids are tokens", |call| {
        let body = json!({
            "error_code": call.token(), "message": "no",
            "details": [{"@type": "type.googleapis.com/google.rpc.RequestInfo", "request_id": call.token()}],
        });
        call.is_mint().then(|| {
            (
                403,
                Some(("x-request-id", call.token().to_owned())),
                body.to_string(),
            )
        })
    }),
    ("429 with a token for a time", |call| {
        call.is_mint().then(|| {
            (
                429,
                Some(("retry-after", call.token().to_owned())),
                String::new(),
            )
        })
    }),
    ("a redirect that carries the token", |call| {
        let location = format!(
            "https://elsewhere.example/{}/login.html?error={}",
            call.token(),
            call.token()
        );
        call.is_mint()
            .then(|| (302, Some(("location", location)), String::new()))
    }),
    ("the answer breaks off", |call| {
        call.is_mint()
            .then(|| (200, None, format!("{{\"token\": \"{}", call.token())))
    }),
    ("the token is where the time should be", |call| {
        call.is_mint().then(|| {
            (
                200,
                None,
                json!({"token": call.token(), "expire_time": call.token()}).to_string(),
            )
        })
    }),
    ("the token is of another type", |call| {
        call.is_mint().then(|| {
            (
                200,
                None,
                json!({"token": [call.token()], "expire_time": 1}).to_string(),
            )
        })
    }),
    ("the token is a name", |call| {
        call.is_mint()
            .then(|| (200, None, json!({call.token(): "token"}).to_string()))
    }),
    ("the token has parts too many", |call| {
        let token = format!("{}.{}", call.token(), call.token());
        call.is_mint().then(|| {
            (
                200,
                None,
                json!({"token": token, "expire_time": "2099-01-01T00:00:00Z"}).to_string(),
            )
        })
    }),
    ("the token holds a line break", |call| {
        let token = format!("{}\n", call.token());
        call.is_mint().then(|| {
            (
                200,
                None,
                json!({"token": token, "expire_time": "2099-01-01T00:00:00Z"}).to_string(),
            )
        })
    }),
    ("sign-in repeats the header", |call| {
        let body = json!({"error": "invalid_client", "error_description": format!("no client {}", call.authorization)});
        call.is_sign_in().then(|| (401, None, body.to_string()))
    }),
    ("sign-in repeats the request in plain text", |call| {
        call.is_sign_in().then(|| (400, None, call.request.clone()))
    }),
    ("sign-in quotes pair and token in JSON", |call| {
        let body = json!({"errorCode": "E", "errorSummary": json!({"h": call.authorization, "t": call.token()}).to_string()});
        call.is_sign_in().then(|| (403, None, body.to_string()))
    }),
    ("the workspace token cannot be a header", |call| {
        let body = json!({"access_token": format!("{}\u{7}x", call.token()), "expires_in": 3600});
        call.is_sign_in().then(|| (200, None, body.to_string()))
    }),
    ("sign-in breaks off", |call| {
        call.is_sign_in().then(|| {
            (
                200,
                None,
                format!("{{\"access_token\": \"{}\"", call.token()),
            )
        })
    }),
    ("403 repeats the header in hexadecimal", |call| {
        let body = json!({"error_code": "PERMISSION_DENIED", "message": hex(&call.authorization)});
        call.is_mint().then(|| (403, None, body.to_string()))
    }),
    ("403 repeats the header in base64", |call| {
        let body = json!({"message": STANDARD.encode(&call.authorization)});
        call.is_mint().then(|| (403, None, body.to_string()))
    }),
    (
        "400 repeats the header byte by byte, percent-encoded",
        |call| {
            let bytes = call.authorization.bytes();
            let text: Vec<String> = bytes.map(|byte| format!("%{byte:02X}")).collect();
            call.is_mint().then(|| (400, None, text.concat()))
        },
    ),
    (
        "the code and the ids are the token in hexadecimal",
        |call| {
            let token = hex(&call.authorization).to_uppercase();
            let body = json!({
                "error_code": token, "message": "no",
                "details": [{"@type": "type.googleapis.com/google.rpc.RequestInfo", "request_id": token}],
            });
            call.is_mint()
                .then(|| (403, Some(("x-request-id", token)), body.to_string()))
        },
    ),
    ("a redirect that carries the token in hexadecimal", |call| {
        let location = format!(
            "https://elsewhere.example/{0}?error={0}",
            hex(&call.authorization)
        );
        call.is_mint()
            .then(|| (302, Some(("location", location)), String::new()))
    }),
    ("sign-in repeats the request in hexadecimal", |call| {
        call.is_sign_in().then(|| {
            (
                401,
                None,
                json!({"error": "invalid_client", "error_description": hex(&call.authorization)})
                    .to_string(),
            )
        })
    }),
    ("sign-in repeats the secret itself in hexadecimal", |call| {
        let pair = call
            .authorization
            .strip_prefix("Basic ")
            .unwrap_or_default();
        let pair = STANDARD.decode(pair).unwrap_or_default();
        let pair = String::from_utf8_lossy(&pair).into_owned();
        call.is_sign_in().then(|| (401, None, hex(&pair)))
    }),
    ("a look-up repeats the header", |call| {
        let message = format!("{} may not look, {}", call.authorization, call.request);
        call.is_look_up().then(|| {
            (
                403,
                None,
                json!({"error_code": "PERMISSION_DENIED", "message": message}).to_string(),
            )
        })
    }),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_workspace_that_repeats_secrets_is_not_repeated() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let pat = emulator.identities().user.pat.clone().unwrap();
    // The first is for service principals, the second for people, with less configured, so that more is looked up.
    let principal: &[(&str, &str)] = &[];
    let person = [
        ("DATABRICKS_TOKEN", pat.expose_secret()),
        ("DATABRICKS_CLIENT_ID", ""),
        ("DATABRICKS_CLIENT_SECRET", ""),
        ("PGUSER", ""),
    ];
    let mut cases = Vec::new();
    for &(name, twist) in TWISTS {
        cases.push((format!("{name} (service principal)"), twist, principal));
        if !name.contains("sign-in") && !name.contains("workspace token") {
            cases.push((format!("{name} (person)"), twist, &person));
        }
    }
    // In small groups: each is a process of its own.
    let mut complaints = Vec::new();
    for group in cases.chunks(6) {
        let group = group
            .iter()
            .map(|(name, twist, changes)| repeats(&emulator, name, *twist, changes));
        complaints.extend(join_all(group).await);
    }
    assert!(complaints.concat().is_empty(), "{}", complaints.concat());
    emulator.stop().await;
}

/// What is to be complained of.
async fn repeats(
    emulator: &Emulator,
    name: &str,
    twist: Twist,
    changes: &[(&str, &str)],
) -> String {
    let tap = Tap::open(emulator.workspace_url(), twist).await;
    let proxy = Process::spawn(
        PROGRAM,
        variables(emulator, &tap, changes),
        &flags(&[HURRY]),
    );
    let (seen, log) = if name.contains("look-up") && !changes.is_empty() {
        // Who we are must be known before anything can be served.
        let (status, log) = proxy.ended().await;
        assert_eq!(status.code(), Some(1), "{name}: {log}");
        (String::new(), log)
    } else {
        let postgres = proxy.address("listening for Postgres clients").await;
        let mut seen = raw(postgres, &whole_visit()).await;
        seen += &gather(&proxy).await;
        (seen, proxy.end().await.1)
    };
    let mut secrets = Secrets::default();
    tap.add_to(&mut secrets);
    assert!(
        secrets.count >= 1,
        "{name}: only {} secrets were seen",
        secrets.count
    );
    secrets.add("a client's password", CLIENT_PASSWORD);
    if !name.contains("look-up") {
        // A token of any shape is passed on, and it is the endpoint that refuses it.
        let harms = ["cannot mint a database credential", "client refused"];
        assert!(
            harms.iter().any(|harm| log.contains(harm)),
            "{name} did no harm:\n{log}"
        );
    }
    [(&seen, "the requests"), (&log, "the log")]
        .iter()
        .filter_map(|(text, what)| complaint(&secrets, &format!("{name}: {what}"), text))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_repeats_the_credential_is_not_repeated() {
    let emulator = Emulator::start(EmulatorOptions::default()).await.unwrap();
    let tap = Tap::open(emulator.workspace_url(), truth).await;
    let proxy = Process::spawn(
        PROGRAM,
        variables(&emulator, &tap, &[]),
        &flags(&[HURRY, NOTES[0], NOTES[1]]),
    );
    let postgres = proxy.address("listening for Postgres clients").await;
    assert!(raw(postgres, &whole_visit()).await.contains("answer"));
    let credential = tap.latest();
    // Each class that the failure table knows, and bytes that are no Postgres.
    let errors = [
        ServerError::fatal(
            "28P01",
            format!("password authentication failed with '{credential}'"),
        ),
        ServerError::fatal("28000", "no").detail(format!("password={credential};")),
        ServerError::proxy(format!("token \"{credential}\" has expired")),
        ServerError::proxy(format!("{credential} is not a valid JWT encoding")),
        ServerError::fatal("3D000", format!("database \"{credential}\" does not exist")),
        ServerError::fatal("53300", format!("too many connections for {credential}")),
        ServerError::fatal(
            "57P03",
            format!("the database system is starting up for {credential}"),
        ),
        ServerError {
            hint: Some(format!("try not {credential}")),
            ..ServerError::fatal("XX001", "odd").detail(credential.clone())
        },
    ];
    let answers = errors.into_iter().map(Action::Error).chain([
        Action::Answer(format!("HTTP/1.1 400 {credential}\r\n")),
        Action::Answer(credential.clone()),
    ]);
    let mut seen = String::new();
    for action in answers {
        emulator.faults().always(Site::Password, action.clone());
        let reported = raw(postgres, &whole_visit()).await;
        assert!(
            reported.starts_with('E'),
            "{action:?} did no harm: {reported}"
        );
        seen += &reported;
        emulator.faults().clear();
    }
    // The notes page and readiness, while there is a failure to show.
    emulator
        .faults()
        .always(Site::Password, Action::Answer(credential));
    seen += &gather(&proxy).await;
    let (_, log) = proxy.end().await;
    let mut secrets = Secrets::default();
    tap.add_to(&mut secrets);
    assert_none(&secrets, "the requests", &seen);
    assert_none(&secrets, "the log", &log);
    emulator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_cannot_work_is_refused_without_its_secrets() {
    // Looks like nothing in particular: only knowing where it stands keeps it out.
    const SECRET: &str = "correct-horse-battery-staple";
    let base = [
        ("DATABRICKS_HOST", "https://127.0.0.1:1"),
        ("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e"),
        ("PGHOST", "localhost"),
        ("PGPORT", "1"),
        ("PGUSER", "me"),
        ("PGPASSWORD", SECRET),
    ];
    let with_user = format!("https://me:{SECRET}@workspace.example");
    let broken = format!("{SECRET}\n{SECRET}");
    let url = format!("postgres://me:{SECRET}@localhost/db");
    for (name, value) in [
        ("DATABRICKS_HOST", with_user.as_str()),
        ("DATABRICKS_TOKEN", &broken),
        ("DATABRICKS_CLIENT_SECRET", SECRET),
        ("DATABRICKS_AUTH_TYPE", "oauth-m2m"),
        ("PGHOST", &url),
        ("PGPORT", url.as_str()),
        ("ENDPOINT_NAME", &url),
        ("PGSSLMODE", &url),
    ] {
        let mut variables: Vec<(&str, &str)> = base
            .iter()
            .copied()
            .filter(|(known, _)| *known != name)
            .collect();
        variables.push((name, value));
        if name != "DATABRICKS_TOKEN" {
            variables.push(("DATABRICKS_TOKEN", SECRET));
        }
        let proxy = Process::spawn(PROGRAM, variables, &flags(&[HURRY]));
        let (status, reply) = proxy.ended().await;
        assert_eq!(status.code(), Some(1), "{name}: {reply}");
        let mut secrets = Secrets::default();
        secrets.add("the secret", SECRET);
        assert_none(&secrets, &format!("the refusal of {name}"), &reply);
    }
}
