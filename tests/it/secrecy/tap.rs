//! Between the proxy and the emulated workspace: records every secret, and can answer as no API should, by repeating them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use super::search::Secrets;
use crate::harness::http::forward;

/// One call and the emulator's true answer to it.
pub(super) struct Call {
    pub(super) path: String,
    /// The `Authorization` header's value.
    pub(super) authorization: String,
    pub(super) request: String,
    pub(super) reply: Value,
}

impl Call {
    /// The requested token, if one was issued.
    pub(super) fn token(&self) -> &str {
        ["access_token", "token"]
            .iter()
            .find_map(|name| self.reply.get(name)?.as_str())
            .unwrap_or_default()
    }

    pub(super) fn is_mint(&self) -> bool {
        self.path.ends_with("/credentials")
    }

    pub(super) fn is_sign_in(&self) -> bool {
        self.path == "/oidc/v1/token"
    }

    pub(super) fn is_look_up(&self) -> bool {
        self.path.contains("/endpoints/") || self.path.ends_with("/Me")
    }
}

/// An answer instead of the truth: status, extra header, body.
pub(super) type Untruth = (u16, Option<(&'static str, String)>, String);

/// What to answer instead of the truth, if anything.
pub(super) type Twist = fn(&Call) -> Option<Untruth>;

pub(super) struct Tap {
    pub(super) address: SocketAddr,
    record: Arc<Record>,
    tasks: TaskTracker,
}

struct Record {
    address: String,
    emulator: String,
    twist: Twist,
    authorizations: Mutex<Vec<String>>,
    tokens: Mutex<Vec<String>>,
}

impl Tap {
    pub(super) async fn open(emulator: &str, twist: Twist) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let record = Arc::new(Record {
            address: address.to_string(),
            emulator: emulator.strip_prefix("http://").unwrap().to_owned(),
            twist,
            authorizations: Mutex::default(),
            tokens: Mutex::default(),
        });
        let tap = Self {
            address,
            record: Arc::clone(&record),
            tasks: TaskTracker::new(),
        };
        let app = Router::new().fallback(answer).with_state(record);
        tap.tasks
            .spawn(async move { axum::serve(listener, app).await });
        tap
    }

    /// The token issued last.
    pub(super) fn latest(&self) -> String {
        self.record
            .tokens
            .lock()
            .unwrap()
            .last()
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn tokens(&self) -> usize {
        self.record.tokens.lock().unwrap().len()
    }

    /// Adds all recorded secrets.
    pub(super) fn add_to(&self, secrets: &mut Secrets) {
        for authorization in &*self.record.authorizations.lock().unwrap() {
            if let Some(basic) = authorization.strip_prefix("Basic ") {
                let pair = String::from_utf8(STANDARD.decode(basic).unwrap()).unwrap();
                let (id, secret) = pair.split_once(':').unwrap();
                secrets.add("the client secret", secret);
                // The id is no secret, and base64 of three bytes does not depend on what follows.
                secrets.add("id and secret in base64", &basic[id.len() / 3 * 4..]);
            } else {
                let token = authorization.strip_prefix("Bearer ").unwrap();
                if token.contains('.') {
                    secrets.add_token("a workspace token", token);
                } else {
                    secrets.add("the personal access token", token);
                }
            }
        }
        for token in &*self.record.tokens.lock().unwrap() {
            secrets.add_token("a token issued", token);
        }
    }
}

async fn answer(State(record): State<Arc<Record>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let mut message = format!("{} {} HTTP/1.1\r\n", parts.method, parts.uri);
    for (name, value) in &parts.headers {
        if name != "connection" {
            message.extend([name.as_str(), ": ", value.to_str().unwrap(), "\r\n"]);
        }
    }
    message += "connection: close\r\n\r\n";
    let (status, headers, reply) = forward(&record.emulator, &message, &body).await;
    // The discovery document names addresses: they are to lead here.
    let reply = match String::from_utf8(reply) {
        Ok(text) => text.replace(&record.emulator, &record.address).into_bytes(),
        Err(binary) => binary.into_bytes(),
    };
    let authorization = parts.headers.get("authorization");
    let authorization = authorization
        .map_or("", |value| value.to_str().unwrap())
        .to_owned();
    if !authorization.is_empty() {
        let mut all = record.authorizations.lock().unwrap();
        if !all.contains(&authorization) {
            all.push(authorization.clone());
        }
    }
    let call = Call {
        path: parts.uri.path().to_owned(),
        authorization,
        request: message + &String::from_utf8_lossy(&body),
        reply: serde_json::from_slice(&reply).unwrap_or_default(),
    };
    if !call.token().is_empty() {
        record.tokens.lock().unwrap().push(call.token().to_owned());
    }
    let mut answer = Response::builder();
    match (record.twist)(&call) {
        Some((status, header, body)) => {
            if let Some((name, value)) = header {
                answer = answer.header(name, value);
            }
            answer.status(status).body(Body::from(body)).unwrap()
        }
        None => {
            *answer.headers_mut().unwrap() = headers;
            answer.status(status).body(Body::from(reply)).unwrap()
        }
    }
}
