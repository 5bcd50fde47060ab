//! HTTPS to the workspace and to token services: bounded calls without redirects, and their answers.
//!
//! Secrets in headers, forms and answers are wiped after use. It holds the rules that apply to
//! every call, and no particular call.

use std::{error::Error, sync::OnceLock, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp, fmt::rfc2822};
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
};
use crate::{clock::Clock, config::Variables, net::tls::ALPN_HTTP_1_1, telemetry::KnownSecrets};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One whole call.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// One call to a service of this machine (as the Databricks SDKs).
const LOCAL_TIMEOUT: Duration = Duration::from_secs(10);
/// One request for an optional document.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest `Retry-After` that is obeyed; the header allows any number, also one too large to add to the time.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(24);
/// Shorter than any refresh interval, so that no refresh uses a connection that a firewall has dropped.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer that is read.
const MAX_BODY: usize = 1024 * 1024;
/// `Date` has whole seconds and a delay; a smaller difference is not skew.
const SKEW_NOISE: SignedDuration = SignedDuration::from_secs(2);

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
    host: Host,
    workspace_id: OnceLock<HeaderValue>,
    clock: Clock,
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

    /// Keeps the path out of the log.
    pub(super) fn with_secret_path(mut self) -> Self {
        self.is_path_secret = true;
        self
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
        self.secrets.push(password.clone());
        let pair = Zeroizing::new(format!("{user}:{}", password.expose_secret()));
        let encoded = SecretString::from(STANDARD.encode(pair.as_bytes()));
        let call = self.authorization("Basic ", encoded.expose_secret());
        // An error may repeat the encoded form, too.
        call.with_secret(encoded)
    }

    fn with_secret(mut self, secret: SecretString) -> Self {
        self.secrets.push(secret);
        self
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

    pub(super) fn json(self, body: &Value) -> Self {
        self.body("application/json", body.to_string().into())
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

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Notes the workspace's id, unless the settings have one.
    pub(super) fn learn_workspace_id(&self, id: &str) {
        if let Ok(value) = HeaderValue::from_str(id) {
            // `Err`: the settings have one, or an earlier answer did.
            let _ = self.workspace_id.set(value);
        }
    }

    /// A call to the workspace itself.
    pub(super) fn request(&self, kind: AuthKind, method: Method, path: &str) -> Call {
        let call = Call::new(&self.http, kind, method, self.host.join(path));
        // Hosts that serve several workspaces (unified hosts) need it.
        match self.workspace_id.get() {
            Some(id) => call.header(WORKSPACE_ID, id.clone()),
            None => call,
        }
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
        Call::new(&self.local, kind, Method::GET, url)
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
        let request = request.map_err(network)?;
        let (method, url) = (request.method().clone(), request.url().clone());
        let path = if call.is_path_secret {
            "..."
        } else {
            url.path()
        };
        let started = Instant::now();
        let mut response = client.execute(request).await.map_err(network)?;
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
        while let Some(chunk) = response.chunk().await.map_err(network)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(ApiError::Malformed {
                    reason: format!("the answer is larger than {MAX_BODY} bytes"),
                });
            }
            body.extend_from_slice(&chunk);
        }

        // Built for errors only: a success shows no foreign text.
        let known = || KnownSecrets::new(self.secrets.iter().chain(&call.secrets));
        let date = text(&headers, &DATE).and_then(http_date);
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
            let known = known();
            let mut parsed = error_body::parse(status, &body, &known);
            parsed.request_id = parsed
                .request_id
                .or_else(|| text(&headers, &REQUEST_ID).map(|id| known.redact(id)))
                .map(|id| error_body::clean(&id))
                .filter(|id| !id.is_empty());
            let retry_after = text(&headers, &RETRY_AFTER)
                // A date is by the other side's clock, which the answer's own `Date` shows.
                .and_then(|value| retry_after(value, date.unwrap_or(received_at)))
                .or(parsed.retry_delay.map(|delay| delay.min(MAX_RETRY_AFTER)));
            return Err(ApiError::Status {
                status,
                body: parsed,
                retry_after,
            });
        }
        Ok(Reply {
            body,
            skew: date.and_then(|date| skew(date, received_at)),
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
        // Many errors repeat the text of their source.
        let mut parts: Vec<String> = Vec::new();
        let mut next = error.source();
        while let Some(cause) = next {
            let text = error_body::clean(&cause.to_string());
            if parts.last().is_none_or(|last| !last.contains(&text)) {
                parts.push(text);
            }
            next = cause.source();
        }
        if parts.is_empty() {
            error_body::clean(&error.to_string())
        } else {
            parts.join(": ")
        }
    }
}

fn network(error: reqwest::Error) -> ApiError {
    ApiError::Network {
        // The address of a local metadata service is a secret.
        source: error.without_url(),
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

/// RFC 9110's preferred form, which is also an RFC 2822 date.
pub(super) fn http_date(text: &str) -> Option<Timestamp> {
    rfc2822::parse(text).ok().map(|date| date.timestamp())
}

/// Seconds or a date (RFC 9110 section 10.2.3).
pub(super) fn retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    // Databricks sends seconds (`errors/customizer.py` of the SDK for Python).
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    }
    let wait = http_date(text)?.duration_since(now);
    Some(
        Duration::try_from(wait)
            .unwrap_or_default()
            .min(MAX_RETRY_AFTER),
    )
}

pub(super) fn skew(date: Timestamp, received_at: Timestamp) -> Option<SignedDuration> {
    // The time lies somewhere in that second.
    let skew = date
        .duration_since(received_at)
        .saturating_add(SignedDuration::from_millis(500));
    (skew.abs() > SKEW_NOISE).then_some(skew)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

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

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(retry_after(" 7 ", now), Some(Duration::from_secs(7)));
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:50:07 GMT", now),
            Some(Duration::from_secs(30))
        );
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now),
            Some(Duration::ZERO)
        );
        assert_eq!(retry_after("soon", now), None);
        assert_eq!(retry_after("-1", now), None);
    }

    /// Added to the time, the longest wait that a header can name ended the caller in a panic.
    #[test]
    fn the_longest_wait_can_be_added_to_the_time() {
        let now = Timestamp::UNIX_EPOCH;
        for text in ["18446744073709551615", "Wed, 29 Dec 9999 23:59:59 GMT"] {
            let wait = retry_after(text, now).unwrap();
            assert!(Instant::now().checked_add(wait).is_some(), "{text}");
            assert_eq!(wait, MAX_RETRY_AFTER);
        }
    }

    #[test]
    fn a_difference_below_the_resolution_of_date_is_not_skew() {
        assert_eq!(skew(at(100), at(101)), None);
        assert_eq!(skew(at(102), at(101)), None);
        assert_eq!(
            skew(at(400), at(100)),
            Some(SignedDuration::from_millis(300_500))
        );
        assert_eq!(
            skew(at(100), at(400)),
            Some(SignedDuration::from_millis(-299_500))
        );
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(text: String, second in any::<i64>()) {
            let now = Timestamp::from_second(second % 200_000_000_000).unwrap();
            prop_assert!(retry_after(&text, now).is_none_or(|wait| wait <= MAX_RETRY_AFTER));
            if let Some(date) = http_date(&text) {
                let _ = skew(date, now);
            }
        }

        #[test]
        fn seconds_are_read_back(seconds in 0_u64..86_400) {
            let read = retry_after(&seconds.to_string(), Timestamp::UNIX_EPOCH);
            prop_assert_eq!(read, Some(Duration::from_secs(seconds)));
        }
    }
}
