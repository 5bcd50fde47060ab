//! HTTPS to the workspace and to token services: bounded calls without redirects, and their answers.
//!
//! Secrets in headers, forms and answers are wiped after use. It holds the rules that apply to
//! every call, and no particular call.

use std::{error::Error, sync::OnceLock, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::SignedDuration;
use reqwest::{
    Client, ClientBuilder, Method, NoProxy, Proxy, RequestBuilder, StatusCode,
    header::{
        ACCEPT, AUTHORIZATION, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, LOCATION,
        RETRY_AFTER, USER_AGENT,
    },
    redirect::Policy,
};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;
use tracing::debug;
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

use super::{
    CallError, WorkspaceError,
    auth::AuthKind,
    error_body::{self, ErrorBody},
    host::Host,
    times,
};
use crate::{
    clock::Clock,
    config::Variables,
    net::tls::ALPN_HTTP_1_1,
    telemetry::{KnownSecrets, chain},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One whole call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// One call to a service of this machine (as the Databricks SDKs).
const LOCAL_TIMEOUT: Duration = Duration::from_secs(10);
/// One request for an optional document.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Shorter than any refresh interval, so that no refresh uses a connection that a firewall has dropped.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer that is read.
const MAX_BODY: usize = 1024 * 1024;
const WORKSPACE_ID: HeaderName = HeaderName::from_static("x-databricks-workspace-id");
const ORG_ID: HeaderName = HeaderName::from_static("x-databricks-org-id");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// HTTP clients for one workspace and its token services.
#[derive(Debug)]
pub(super) struct Api {
    /// To the workspace, and to token endpoints elsewhere.
    http: Client,
    /// To services of this machine: also plain HTTP, never through a proxy (as the Databricks SDKs).
    local: Client,
    pub(super) host: Host,
    workspace_id: OnceLock<HeaderValue>,
    pub(super) clock: Clock,
    /// Secrets that no error may repeat.
    secrets: Vec<SecretString>,
}

/// The HTTP proxy: `HTTPS_PROXY` or `ALL_PROXY`, but not for what `NO_PROXY` lists; each in lower case too.
fn proxy(variables: &Variables) -> Result<Option<Proxy>, WorkspaceError> {
    let either = |name: &'static str| {
        let value = variables.get(name);
        let value = value.or_else(|| variables.get(&name.to_ascii_lowercase()));
        value.map(|value| (name, value))
    };
    let Some((name, address)) = either("HTTPS_PROXY").or_else(|| either("ALL_PROXY")) else {
        return Ok(None);
    };
    // As curl reads these variables: without a scheme it is http.
    let address = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let wrong = |problem: &str| WorkspaceError::new(format!("`{name}` {problem}"));
    let url = Url::parse(&address).map_err(|_| wrong("is not the address of a proxy"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("names a proxy that speaks neither http nor https"));
    }
    let except = either("NO_PROXY").and_then(|(_, list)| NoProxy::from_string(list));
    // For all schemes: the client that uses it sends https only.
    let proxy = Proxy::all(url).map_err(|_| wrong("is not the address of a proxy"))?;
    Ok(Some(proxy.no_proxy(except)))
}

/// A request and the client that sends it: calls to this machine must not use the https-only client and its proxy.
pub(super) struct Call {
    request: RequestBuilder,
    /// The path of a local service may be its only protection; it is not logged.
    is_path_secret: bool,
    /// Secrets of this call that no error may repeat.
    secrets: Vec<SecretString>,
}

impl Call {
    fn new(client: &Client, kind: AuthKind, method: Method, url: Url) -> Self {
        let agent = user_agent(kind.label());
        Self {
            request: client.request(method, url).header(USER_AGENT, agent),
            is_path_secret: false,
            secrets: Vec::new(),
        }
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        // Sensitive headers hold tokens, such as Azure's management token.
        if let (true, Ok(text)) = (value.is_sensitive(), value.to_str()) {
            self.secrets.push(text.into());
        }
        self.request = self.request.header(name, value);
        self
    }

    pub(super) fn bearer(mut self, token: &SecretString) -> Self {
        self.secrets.push(token.clone());
        self.authorization("Bearer ", token.expose_secret())
    }

    pub(super) fn basic(mut self, user: &str, password: &SecretString) -> Self {
        let pair = Zeroizing::new(format!("{user}:{}", password.expose_secret()));
        let encoded = SecretString::from(STANDARD.encode(pair.as_bytes()));
        // An error may repeat the encoded form, too.
        self.secrets.extend([password.clone(), encoded.clone()]);
        self.authorization("Basic ", encoded.expose_secret())
    }

    fn authorization(mut self, scheme: &str, secret: &str) -> Self {
        // Shared with the header instead of copied, so that the text is wiped once the request has been sent.
        let text = Zeroizing::new([scheme, secret].concat());
        // Settings and tokens have been checked for characters that a header cannot carry.
        if let Ok(mut value) = HeaderValue::from_maybe_shared(Bytes::from_owner(text)) {
            value.set_sensitive(true);
            self.request = self.request.header(AUTHORIZATION, value);
        }
        self
    }

    /// A form of open fields and one that is a secret, if it has one.
    pub(super) fn form(
        mut self,
        fields: &[(&str, &str)],
        secret: Option<(&str, &SecretString)>,
    ) -> Self {
        self.secrets.extend(secret.map(|(_, value)| value.clone()));
        let secret = secret.map(|(name, value)| (name, value.expose_secret()));
        let fields = || fields.iter().copied().chain(secret);
        // Enough for the longest encoding: a buffer that grows leaves copies of secrets behind.
        let lengths = fields().map(|(name, value)| name.len() + 3 * value.len() + 2);
        let mut body = Zeroizing::new(String::with_capacity(lengths.sum()));
        form_urlencoded::Serializer::new(&mut *body).extend_pairs(fields());
        self.body("application/x-www-form-urlencoded", Bytes::from_owner(body))
    }

    fn body(mut self, content_type: &'static str, body: Bytes) -> Self {
        self.request = self.request.header(CONTENT_TYPE, content_type).body(body);
        self
    }
}

/// An answer with a 2xx status.
pub(super) struct Reply {
    body: Zeroizing<Vec<u8>>,
    /// How far the other side's clock is ahead.
    pub(super) skew: Option<SignedDuration>,
    /// The workspace that answered.
    pub(super) workspace_id: Option<String>,
}

/// Why a call has no usable answer.
#[derive(Debug)]
pub(super) enum ApiError {
    /// No answer, or a part of one.
    Network { source: reqwest::Error },
    /// An answer of another form than documented.
    Malformed { reason: String },
    /// Not followed, since a redirect may carry secrets away.
    Redirect {
        /// Without secrets.
        location: String,
        target: Option<Url>,
    },
    /// A status of 400 or more.
    Status {
        status: StatusCode,
        body: ErrorBody,
        retry_after: Option<Duration>,
    },
}

impl Api {
    pub(super) fn new(
        host: Host,
        workspace_id: Option<&str>,
        mut tls: rustls::ClientConfig,
        variables: &Variables,
        clock: Clock,
        secrets: Vec<SecretString>,
    ) -> Result<Self, WorkspaceError> {
        let workspace_id = match workspace_id {
            None => OnceLock::new(),
            Some(id) => HeaderValue::from_str(id)
                .map_err(|_| WorkspaceError::unsendable("`DATABRICKS_WORKSPACE_ID`"))?
                .into(),
        };
        // reqwest is built without HTTP/2.
        tls.alpn_protocols = vec![ALPN_HTTP_1_1.to_vec()];
        let mut http = bounded(tls.clone())
            // Plain http for a workspace on this machine, such as the emulator's.
            .https_only(!host.is_loopback())
            .timeout(CALL_TIMEOUT);
        if let Some(proxy) = proxy(variables)?.filter(|_| !host.is_loopback()) {
            http = http.proxy(proxy);
        }
        // Without https_only: Azure's instance metadata and local services are plain http.
        let local = bounded(tls).timeout(LOCAL_TIMEOUT);
        Ok(Self {
            http: http.build().map_err(no_client)?,
            local: local.build().map_err(no_client)?,
            host,
            workspace_id,
            clock,
            secrets,
        })
    }

    /// Notes the workspace's id, unless the settings have one.
    pub(super) fn learn_workspace_id(&self, id: &str) {
        if let Ok(value) = HeaderValue::from_str(id) {
            // `Err`: the settings have one, or an earlier answer did.
            let _ = self.workspace_id.set(value);
        }
    }

    /// A call to the workspace itself: GET, or POST if there is a body.
    pub(super) fn call(&self, kind: AuthKind, path: &str, body: Option<&Value>) -> Call {
        let url = self.host.join(path);
        let mut call = match body {
            None => self.get(kind, url),
            Some(body) => self
                .post(kind, url)
                .body("application/json", body.to_string().into()),
        };
        // Hosts that serve several workspaces (unified hosts) need it.
        if let Some(id) = self.workspace_id.get() {
            call = call.header(WORKSPACE_ID, id.clone());
        }
        call
    }

    /// A call to a token service: https, or http if it and the workspace are on this machine.
    pub(super) fn get(&self, kind: AuthKind, url: Url) -> Call {
        Call::new(&self.http, kind, Method::GET, url)
    }

    /// The same with POST.
    pub(super) fn post(&self, kind: AuthKind, url: Url) -> Call {
        Call::new(&self.http, kind, Method::POST, url)
    }

    /// A request for an optional document.
    pub(super) fn probe(&self, kind: AuthKind, url: Url) -> Call {
        let mut call = self.get(kind, url);
        call.request = call.request.timeout(PROBE_TIMEOUT);
        call
    }

    /// A call to a service of this machine.
    pub(super) fn local(&self, kind: AuthKind, url: Url) -> Call {
        Call {
            is_path_secret: true,
            ..Call::new(&self.local, kind, Method::GET, url)
        }
    }

    /// Sends a call and parses its JSON. Cancel safe.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        call: Call,
        explain: impl FnOnce(ApiError) -> CallError,
    ) -> Result<T, CallError> {
        let reply = self.send(call).await;
        reply.and_then(|reply| reply.json()).map_err(explain)
    }

    /// Sends a call and reads the whole answer. Bounded in time and size. Cancel safe: closes the connection.
    pub(super) async fn send(&self, call: Call) -> Result<Reply, ApiError> {
        let (client, request) = call.request.build_split();
        let request = request?;
        let (method, url) = (request.method().clone(), request.url().clone());
        let path = if call.is_path_secret {
            "..."
        } else {
            url.path()
        };
        let started = Instant::now();
        let mut response = client.execute(request).await?;
        let (status, received_at) = (response.status(), self.clock.now());
        debug!(%method, path, status = status.as_u16(), elapsed = ?started.elapsed(), "workspace answered");

        // A copy, since reading the body borrows the response.
        let headers = response.headers().clone();
        let length = response
            .content_length()
            .and_then(|length| usize::try_from(length).ok())
            .unwrap_or_default();
        // The whole length, if it is known: a buffer that grows leaves copies of the token behind.
        let mut body = Zeroizing::new(Vec::with_capacity(length.min(MAX_BODY)));
        while let Some(chunk) = response.chunk().await? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(ApiError::Malformed {
                    reason: format!("the answer is larger than {MAX_BODY} bytes"),
                });
            }
            body.extend_from_slice(&chunk);
        }

        // Built for errors only: a success shows no foreign text.
        let known = || KnownSecrets::new(self.secrets.iter().chain(&call.secrets));
        let date = text(&headers, &DATE).and_then(times::http_date);
        // A redirect to a login page would otherwise look like a success (Private Link denies access in this form).
        if status.is_redirection() {
            let location = text(&headers, &LOCATION);
            return Err(ApiError::Redirect {
                target: location.and_then(|location| url.join(location).ok()),
                location: location
                    .map(|location| redacted(&url, &known().redact(location)))
                    .unwrap_or_default(),
            });
        }
        if !status.is_success() {
            let request_id = text(&headers, &REQUEST_ID);
            let parsed = error_body::parse(status, &body, request_id, &known());
            let retry_after = text(&headers, &RETRY_AFTER)
                // A date is by the other side's clock, which the answer's own `Date` shows.
                .and_then(|value| times::retry_after(value, date.unwrap_or(received_at)))
                .or(parsed
                    .retry_delay
                    .map(|delay| delay.min(times::MAX_RETRY_AFTER)));
            return Err(ApiError::Status {
                status,
                body: parsed,
                retry_after,
            });
        }
        Ok(Reply {
            body,
            skew: date.and_then(|date| times::skew(date, received_at)),
            workspace_id: text(&headers, &ORG_ID)
                .map(error_body::clean)
                .filter(|id| !id.is_empty()),
        })
    }
}

/// An address without its query, which may hold secrets, except an error code.
fn redacted(base: &Url, location: &str) -> String {
    let Ok(url) = base.join(location) else {
        return "an invalid address".to_owned();
    };
    let error = url
        .query_pairs()
        .find(|(key, _)| key == "error")
        .map(|(_, value)| error_body::clean(&value));
    let address = format!("{}{}", url.origin().ascii_serialization(), url.path());
    let address = error_body::clean(&address);
    error.map_or(address.clone(), |error| format!("{address}?error={error}"))
}

impl Reply {
    /// Parses the body.
    pub(super) fn json<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_json::from_slice(&self.body).map_err(|error| {
            // serde_json may quote an unexpected string, which may be a token: only place and kind are reported.
            let reason = if self.body.trim_ascii_start().starts_with(b"<") {
                "the answer is a web page, not JSON".to_owned()
            } else {
                format!(
                    "the answer is not the expected JSON ({:?} error at line {})",
                    error.classify(),
                    error.line()
                )
            };
            ApiError::Malformed { reason }
        })
    }
}

impl ApiError {
    /// The message in an error answer, else empty.
    pub(super) fn message(&self) -> &str {
        match self {
            Self::Status { body, .. } => &body.message,
            Self::Network { .. } | Self::Malformed { .. } | Self::Redirect { .. } => "",
        }
    }

    /// The causes of a network failure, innermost last, without the address.
    pub(super) fn causes(error: &reqwest::Error) -> String {
        let cause = error.source().unwrap_or(error);
        error_body::clean(&chain(cause).to_string())
    }
}

impl From<reqwest::Error> for ApiError {
    fn from(error: reqwest::Error) -> Self {
        // The address of a local metadata service is a secret.
        let source = error.without_url();
        Self::Network { source }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn no_client(error: reqwest::Error) -> WorkspaceError {
    WorkspaceError::new("cannot set up HTTPS towards the workspace").with_source(error)
}

/// The common settings of the clients.
fn bounded(tls: rustls::ClientConfig) -> ClientBuilder {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    Client::builder()
        .tls_backend_preconfigured(tls)
        .default_headers(headers)
        .redirect(Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_max_idle_per_host(1)
        .referer(false)
        // Proxies come from `proxy`, which reads the variables of `config` and not of the process.
        .no_proxy()
}

/// `lakebase-proxy/0.1.0 rust/1.95 os/linux auth/oauth-m2m`: the form of the Databricks SDKs (`useragent.py`).
fn user_agent(auth_type: &str) -> String {
    format!(
        "lakebase-proxy/{} rust/{} os/{} auth/{auth_type}",
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_RUST_VERSION"),
        std::env::consts::OS
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_agent_has_the_form_of_the_databricks_sdks() {
        let agent = user_agent("oauth-m2m");
        assert!(
            agent.starts_with(concat!(
                "lakebase-proxy/",
                env!("CARGO_PKG_VERSION"),
                " rust/1."
            )),
            "{agent}"
        );
        assert!(
            agent.ends_with(&format!("os/{} auth/oauth-m2m", std::env::consts::OS)),
            "{agent}"
        );
    }
}
