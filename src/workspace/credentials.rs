//! Mints database credentials. The two products differ in path, body and the name of one field.
//!
//! <https://docs.databricks.com/aws/en/oltp/projects/external-apps-manual-api>

use std::fmt;

use jiff::Timestamp;
use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Builder;

use super::{
    CallError, Target, Workspace,
    diagnosis::{self, Purpose},
    expiry::Moment,
};
use crate::telemetry::labels;

const AUTOSCALING: &str = "/api/2.0/postgres/credentials";
const PROVISIONED: &str = "/api/2.0/database/credentials";

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
        // Before the call for the credential, so that each step is timed alone.
        let token = self.workspace.token().await?;
        let started = Instant::now();
        let answer = self
            .workspace
            .call_with::<Response>(&token, purpose, Method::POST, path, Some(&body))
            .await?;
        self.workspace
            .observe(labels::MintStep::Credential, started);
        let Response { token, expire_time } = answer.value;
        // The endpoint decides about the token's form; a password message must be able to carry it.
        if token.expose_secret().is_empty() || token.expose_secret().contains('\0') {
            let reason = "its token is empty or holds a NUL".to_owned();
            return Err(diagnosis::malformed(self.workspace.host(), reason));
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
