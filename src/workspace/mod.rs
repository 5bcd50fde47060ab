//! Calls to the Databricks workspace over HTTPS: authentication, database credentials, and discovery of endpoints.
//!
//! It knows the REST API and the kinds of authentication. It knows nothing of Postgres, nor of when a credential is due.

mod api;
mod auth;
pub(crate) mod command;
mod databrickscfg;
mod diagnosis;
mod discovery;
mod error;
mod error_body;

#[cfg(fuzzing)]
pub mod fuzzing;
mod host;
mod inspect;
mod names;
mod settings;
#[cfg(test)]
mod tests;
pub(crate) mod times;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::warn;
use uuid::Builder;

pub use auth::AuthKind;
pub use discovery::{
    AppDatabases, EndpointInfo, EndpointState, EndpointType, LocateError, Located, Profile, Role,
    check_names,
};
pub use error::{CallError, CallErrorKind, WorkspaceError};
pub use host::Host;
pub use inspect::TokenFacts;
pub use names::{
    BranchName, EndpointName, HostName, InstanceName, NameError, ProjectName, Reference, Target,
};
pub use settings::ResolvedSettings;
pub(crate) use settings::secret_variables;

use api::{Api, ApiError, Reply};
pub(crate) use auth::claim;
use auth::{CachedToken, TokenCache};
use diagnosis::{Purpose, diagnose};
use times::Moment;

use crate::{
    clock::Clock,
    config::{Roots, WorkspaceSettings},
    net::tls::{self, TlsError},
    telemetry::{Metrics, labels::MintStep},
};

const AUTOSCALING: &str = "/api/2.0/postgres/credentials";
const PROVISIONED: &str = "/api/2.0/database/credentials";

/// The longest mint whose steps all succeed, each within its own timeout: a token and the call, and both again if the
/// workspace refuses a token from a cache.
pub(crate) const MINT_TIMEOUT: Duration =
    Duration::from_secs(2 * (auth::TOKEN_TIMEOUT.as_secs() + api::CALL_TIMEOUT.as_secs()));

/// A smaller difference between the clocks is not logged.
const NOTABLE_SKEW: SignedDuration = SignedDuration::from_mins(1);

/// A workspace with its authentication; cheap to clone.
#[derive(Clone)]
pub struct Workspace(Arc<Inner>);

struct Inner {
    api: Api,
    tokens: TokenCache,
    metrics: Arc<Metrics>,
    has_noted_skew: AtomicBool,
}

/// The answer to a call, and how far the workspace's clock is ahead.
struct Answer<T> {
    value: T,
    skew: Option<SignedDuration>,
    workspace_id: Option<String>,
}

impl Workspace {
    /// Verification by the system's roots; PGSSLROOTCERT is for the endpoint. A workspace on this machine that is called by plain
    /// HTTP, the emulator's, needs no roots, so that the demo runs where none are installed.
    pub(crate) fn tls(settings: &WorkspaceSettings) -> Result<Arc<rustls::ClientConfig>, TlsError> {
        let is_plain = |host: &String| host.starts_with("http://");
        match tls::client_config(&Roots::System, tls::ALPN_HTTP_1_1) {
            Err(_) if settings.host.as_ref().is_some_and(is_plain) => {
                tls::client_config_without_roots(tls::ALPN_HTTP_1_1)
            }
            verified => verified,
        }
    }

    /// Checks the settings; sends nothing. `tls` holds the trusted roots and the crypto provider; its ALPN is set here.
    pub fn new(
        settings: WorkspaceSettings,
        tls: &rustls::ClientConfig,
        clock: Clock,
        metrics: Arc<Metrics>,
    ) -> Result<Self, WorkspaceError> {
        let settings = ResolvedSettings::new(settings)?;
        let (host, id_in_host) = settings.address()?;
        let sources = auth::choose(&settings, &host)?;
        let workspace_id = settings.workspace_id.clone().or(id_in_host);
        let api = Api::new(
            host,
            workspace_id.as_deref(),
            tls.clone(),
            &settings.variables,
            clock.clone(),
            settings.secrets(),
        )?;
        let tokens = TokenCache::new(sources, clock);
        Ok(Self(Arc::new(Inner {
            api,
            tokens,
            metrics,
            has_noted_skew: AtomicBool::new(false),
        })))
    }

    /// The address.
    pub fn host(&self) -> &Host {
        &self.0.api.host
    }

    /// The kind of authentication that worked, or the one that is tried first.
    pub fn auth_kind(&self) -> AuthKind {
        self.0.tokens.source().kind
    }

    /// The service principal's application id, which is also its Postgres role, if it is known without a call.
    pub fn service_principal(&self) -> Option<&str> {
        self.0.tokens.service_principal()
    }

    /// Gets a workspace token, which shows that authentication works.
    pub async fn authenticate(&self) -> Result<(), CallError> {
        self.token().await.map(drop)
    }

    /// A call with a workspace token, repeated once with a new token if the workspace refuses the first. GET, or POST if
    /// there is a body.
    async fn call<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Answer<T>, CallError> {
        let token = self.token().await?;
        let started = Instant::now();
        let mut outcome = self.send(&token, path, body).await;
        // The token may have been revoked or replaced since it was cached; a new one decides.
        if let Err(ApiError::Status { status, .. }) = &outcome
            // Also for a POST: a call refused with 401 has no effect. Not for 403: a new token has the same rights.
            && status.as_u16() == 401
            && let Some(another) = self.0.tokens.another(&self.0.api, &token).await
        {
            outcome = self.send(&another?, path, body).await;
        }
        let answer = outcome.and_then(|reply| {
            Ok(Answer {
                value: reply.json()?,
                skew: reply.skew,
                workspace_id: reply.workspace_id.clone(),
            })
        });
        let answer = answer.map_err(|error| self.diagnosed(purpose, error))?;
        if let Purpose::Credential(_) = purpose {
            self.observe(MintStep::Credential, started);
        }
        Ok(answer)
    }

    async fn token(&self) -> Result<CachedToken, CallError> {
        let started = Instant::now();
        let token = self.0.tokens.token(&self.0.api).await?;
        // Only a request is a step of a mint; a token from the cache takes no time.
        if token.is_new {
            self.observe(MintStep::WorkspaceToken, started);
        }
        Ok(token)
    }

    async fn send(
        &self,
        token: &CachedToken,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Reply, ApiError> {
        let mut call = self.0.api.call(self.auth_kind(), path, body);
        call = call.bearer(&token.token.secret);
        for (name, value) in &token.token.headers {
            call = call.header(name.clone(), value.clone());
        }
        self.0.api.send(call).await
    }

    fn diagnosed(&self, purpose: Purpose<'_>, error: ApiError) -> CallError {
        diagnose(purpose, self.0.tokens.source(), self.host(), error)
    }

    /// Logs once that the clocks differ, which explains times of expiry in the log.
    fn note_skew(&self, skew: Option<SignedDuration>) {
        if let Some(skew) = skew.filter(|skew| skew.abs() >= NOTABLE_SKEW)
            && !self.0.has_noted_skew.swap(true, Ordering::Relaxed)
        {
            warn!(
                seconds_behind = skew.as_secs(),
                "this machine's clock differs from the workspace's"
            );
        }
    }

    fn observe(&self, step: MintStep, started: Instant) {
        self.0.metrics.process.mint_seconds[step].observe(started.elapsed().as_secs_f64());
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace")
            .field("host", &self.host().to_string())
            .field("auth", &self.auth_kind())
            .finish_non_exhaustive()
    }
}

/// A new database credential.
pub struct Minted {
    /// The token.
    pub secret: SecretString,
    /// Expiry by the local wall clock (the source corrects for skew); `None`: never.
    pub expires_at: Option<Timestamp>,
}

impl fmt::Debug for Minted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Minted")
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Mints credentials for one target.
#[derive(Clone, Debug)]
pub struct CredentialMinter {
    workspace: Workspace,
    target: Target,
}

/// The field is `expire_time` in Autoscaling, `expiration_time` in Provisioned.
#[derive(Deserialize)]
struct Response {
    token: SecretString,
    #[serde(alias = "expiration_time")]
    expire_time: Moment,
}

impl CredentialMinter {
    /// A minter; sends nothing.
    pub fn new(workspace: Workspace, target: Target) -> Self {
        Self { workspace, target }
    }

    fn request(&self) -> (&'static str, Value) {
        match &self.target {
            // Without `ttl`, which older servers lack: the default of an hour is the longest.
            Target::Endpoint(name) => (AUTOSCALING, json!({ "endpoint": name.as_str() })),
            Target::Instance(name) => {
                // Optional; the SDKs send one with each request.
                let request_id = Builder::from_random_bytes(rand::random())
                    .into_uuid()
                    .to_string();
                let body = json!({ "instance_names": [name.as_str()], "request_id": request_id });
                (PROVISIONED, body)
            }
        }
    }

    /// Requests a new credential. Cancel safe.
    pub async fn request_credential(&self) -> Result<Minted, CallError> {
        let purpose = Purpose::Credential(self.target.as_str());
        let (path, body) = self.request();
        let answer: Answer<Response> = self.workspace.call(purpose, path, Some(&body)).await?;
        let Response { token, expire_time } = answer.value;
        // The endpoint decides about the token's form; a password message must be able to carry it.
        if token.expose_secret().is_empty() || token.expose_secret().contains('\0') {
            let reason = "its token is empty or holds a NUL".to_owned();
            return Err(self
                .workspace
                .diagnosed(purpose, ApiError::Malformed { reason }));
        }
        let Moment(expires_at) = expire_time;
        // The expiry is by the workspace's clock, and compared with ours.
        let expires_at = match answer.skew {
            Some(skew) => expires_at.checked_sub(skew).unwrap_or(expires_at),
            None => expires_at,
        };
        self.workspace.note_skew(answer.skew);
        Ok(Minted {
            secret: token,
            expires_at: Some(expires_at),
        })
    }
}
