//! Mints database credentials. The two products differ in path, body and the name of one field.
//!
//! <https://docs.databricks.com/aws/en/oltp/projects/external-apps-manual-api>

use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{CallError, MintError, Minted, Target, Workspace, diagnosis::Purpose, expiry::Moment};
use crate::telemetry::labels;

const AUTOSCALING: &str = "/api/2.0/postgres/credentials";
const PROVISIONED: &str = "/api/2.0/database/credentials";

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
            Target::Endpoint(name) => (AUTOSCALING, json!({ "endpoint": name.as_str() })),
            Target::Instance(name) => {
                let body = json!({ "instance_names": [name.as_str()], "request_id": request_id() });
                (PROVISIONED, body)
            }
        }
    }

    /// Requests a new credential.
    pub async fn mint(&self) -> Result<Minted, MintError> {
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
            return Err(CallError::malformed_by(
                self.workspace.host(),
                "its token is empty or holds a NUL",
            )
            .into());
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

/// A random UUID (RFC 9562, version 4).
fn request_id() -> String {
    let bits: u128 = rand::random();
    let bits = (bits & !(0xf << 76) & !(0b11 << 62)) | (4 << 76) | (0b10 << 62);
    let hex = format!("{bits:032x}");
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_a_random_uuid() {
        let id = request_id();
        assert_eq!(id.len(), 36);
        assert_eq!(&id[14..15], "4");
        assert!("89ab".contains(&id[19..20]), "{id}");
        assert_ne!(id, request_id());
    }
}
