//! The workspace's signing key: makes JWTs (RFC 7519, ES256) and checks them again.
//!
//! Two audiences, so that a workspace token is no database credential and the other way round.

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair,
        UnparsedPublicKey,
    },
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    EmulatorError,
    identity::{hex, random},
};

/// How far ahead of our clock a token's `nbf` may lie; the value Neon's proxy allows.
const CLOCK_LEEWAY_SECONDS: i64 = 30;

/// What a token may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// The workspace's REST API.
    Workspace,
    /// The password of a Postgres login.
    Database,
    /// An exchange for a workspace token.
    Identity,
    /// Azure's resource management.
    Management,
}

impl Audience {
    fn as_str(self) -> &'static str {
        match self {
            Self::Workspace => "workspace",
            Self::Database => "lakebase",
            Self::Identity => "federation",
            Self::Management => "management",
        }
    }
}

/// The claims we read back.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Claims {
    pub(crate) iss: String,
    pub(crate) sub: String,
    pub(crate) aud: String,
    pub(crate) iat: i64,
    pub(crate) nbf: i64,
    pub(crate) exp: i64,
    /// Counts tokens of this key, so that all up to one can be revoked.
    pub(crate) serial: u64,
    pub(crate) jti: String,
}

/// Why a token is refused; the texts are those of Neon's proxy, as its users see them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("JWT token has expired (exp={0})")]
    Expired(i64),
    #[error("invalid JWT token audience")]
    InvalidAudience,
    #[error("missing key id")]
    MissingKeyId,
    #[error("Provided authentication token is not a valid JWT encoding")]
    NotJwt,
    #[error("JWT token is not yet ready to use (nbf={0})")]
    NotYet(i64),
    #[error("signature error: signature verification failed")]
    Signature,
    #[error("jwk not found")]
    UnknownKey,
}

/// Holds the private key of one emulated workspace.
pub(crate) struct Signer {
    key: EcdsaKeyPair,
    key_id: String,
    issuer: String,
}

impl Signer {
    pub(crate) fn generate(issuer: String) -> Result<Self, EmulatorError> {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .map_err(|_| EmulatorError::Randomness)?;
        Ok(Self {
            key,
            key_id: hex(&random::<8>()?),
            issuer,
        })
    }

    /// A signed token for `subject`; valid from `now` for `seconds`.
    pub(crate) fn issue(
        &self,
        subject: &str,
        audience: Audience,
        now: Timestamp,
        seconds: i64,
        serial: u64,
    ) -> Result<(String, Claims), EmulatorError> {
        let issued = now.as_second();
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: subject.to_owned(),
            aud: audience.as_str().to_owned(),
            iat: issued,
            nbf: issued,
            exp: issued.saturating_add(seconds),
            serial,
            jti: hex(&random::<16>()?),
        };
        let header = json!({ "alg": "ES256", "typ": "JWT", "kid": self.key_id });
        let body = serde_json::to_vec(&claims).map_err(|source| EmulatorError::Json { source })?;
        let signed = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(body)
        );
        let signature = self
            .key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .map_err(|_| EmulatorError::Randomness)?;
        Ok((
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())),
            claims,
        ))
    }

    /// Checks structure, key, signature, audience and times, in this order.
    pub(crate) fn verify(
        &self,
        token: &str,
        audience: Audience,
        now: Timestamp,
    ) -> Result<Claims, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::NotJwt)?;
        let (header, payload) = signed.split_once('.').ok_or(TokenError::NotJwt)?;
        let header: Value = decode(header)?;
        let payload: Value = decode(payload)?;
        let signature = URL_SAFE_NO_PAD
            .decode(signature)
            .map_err(|_| TokenError::NotJwt)?;
        match header.get("kid").and_then(Value::as_str) {
            None => return Err(TokenError::MissingKeyId),
            Some(key_id) if key_id != self.key_id => return Err(TokenError::UnknownKey),
            Some(_) => {}
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.key.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .map_err(|_| TokenError::Signature)?;
        let claims: Claims = serde_json::from_value(payload).map_err(|_| TokenError::NotJwt)?;
        if claims.aud != audience.as_str() {
            return Err(TokenError::InvalidAudience);
        }
        if now.as_second() >= claims.exp {
            return Err(TokenError::Expired(claims.exp));
        }
        if now.as_second().saturating_add(CLOCK_LEEWAY_SECONDS) < claims.nbf {
            return Err(TokenError::NotYet(claims.nbf));
        }
        Ok(claims)
    }

    /// The public key as a JSON Web Key Set (RFC 7517).
    pub(crate) fn jwks(&self) -> Value {
        // An uncompressed point: 0x04, x, y.
        let point = self.key.public_key().as_ref();
        let (x, y) = point.get(1..).unwrap_or_default().split_at(point.len() / 2);
        json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.key_id,
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }] })
    }
}

fn decode(part: &str) -> Result<Value, TokenError> {
    let bytes = URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| TokenError::NotJwt)?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| TokenError::NotJwt)?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(TokenError::NotJwt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer() -> Signer {
        Signer::generate("http://127.0.0.1:1/oidc".to_owned()).unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_token_is_good_until_its_last_second() {
        let signer = signer();
        let (token, _) = signer
            .issue("ada", Audience::Database, at(1000), 60, 1)
            .unwrap();
        assert_eq!(
            signer
                .verify(&token, Audience::Database, at(1059))
                .unwrap()
                .sub,
            "ada"
        );
        assert_eq!(
            signer
                .verify(&token, Audience::Database, at(1060))
                .unwrap_err(),
            TokenError::Expired(1060)
        );
    }

    #[test]
    fn a_token_from_the_future_is_refused_beyond_the_leeway() {
        let signer = signer();
        let (token, _) = signer
            .issue("ada", Audience::Database, at(1000), 60, 1)
            .unwrap();
        assert!(signer.verify(&token, Audience::Database, at(970)).is_ok());
        assert_eq!(
            signer
                .verify(&token, Audience::Database, at(969))
                .unwrap_err(),
            TokenError::NotYet(1000)
        );
    }

    #[test]
    fn a_workspace_token_is_no_database_credential() {
        let signer = signer();
        let (token, _) = signer
            .issue("ada", Audience::Workspace, at(1000), 60, 1)
            .unwrap();
        assert_eq!(
            signer
                .verify(&token, Audience::Database, at(1001))
                .unwrap_err(),
            TokenError::InvalidAudience
        );
    }

    #[test]
    fn a_changed_claim_breaks_the_signature() {
        let signer = signer();
        let (token, mut claims) = signer
            .issue("ada", Audience::Database, at(1000), 60, 1)
            .unwrap();
        let parts: Vec<&str> = token.split('.').collect();
        claims.sub = "eve".to_owned();
        let forged = format!(
            "{}.{}.{}",
            parts[0],
            URL_SAFE_NO_PAD.encode(json!(claims).to_string()),
            parts[2]
        );
        assert_eq!(
            signer
                .verify(&forged, Audience::Database, at(1001))
                .unwrap_err(),
            TokenError::Signature
        );
    }

    #[test]
    fn another_workspaces_token_names_an_unknown_key() {
        let (token, _) = signer()
            .issue("ada", Audience::Database, at(1000), 60, 1)
            .unwrap();
        assert_eq!(
            signer()
                .verify(&token, Audience::Database, at(1001))
                .unwrap_err(),
            TokenError::UnknownKey
        );
    }

    #[test]
    fn what_is_not_a_jwt_is_called_so() {
        for password in [
            "",
            "secret",
            "dapi0123",
            "a.b.c",
            "e30.e30",
            "bnVsbA.e30.AA",
        ] {
            assert_eq!(
                signer()
                    .verify(password, Audience::Database, at(0))
                    .unwrap_err(),
                TokenError::NotJwt,
                "{password}"
            );
        }
    }

    #[test]
    fn the_key_set_holds_both_coordinates() {
        let set = signer().jwks();
        for coordinate in ["x", "y"] {
            let text = set["keys"][0][coordinate].as_str().unwrap();
            assert_eq!(URL_SAFE_NO_PAD.decode(text).unwrap().len(), 32);
        }
    }
}
