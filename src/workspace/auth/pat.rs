//! A personal access token: sent as it is, never renewed. The API accepts it; the endpoint itself does not.

use secrecy::SecretString;

use super::{
    AuthKind, Boxed, Expiry, Freshness, Kind, TokenSource, WorkspaceToken, required_secret,
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::api::Api,
};

pub(super) const KIND: Kind = Kind {
    family: Some(AuthFamily::Pat),
    ..Kind::new(|settings, _| {
        let because = "a personal access token is to be used";
        Ok(Box::new(Pat {
            token: required_secret(settings, Attribute::Token, because)?,
            setting: settings.named(Attribute::Token),
        }))
    })
};

struct Pat {
    token: SecretString,
    setting: String,
}

impl TokenSource for Pat {
    fn kind(&self) -> AuthKind {
        AuthKind::Pat
    }

    fn token<'a>(&'a self, _: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        let token = WorkspaceToken {
            secret: self.token.clone(),
            expiry: Expiry::Unknown,
            scopes: None,
            headers: Vec::new(),
        };
        Box::pin(async { Ok(token) })
    }

    fn hint(&self) -> String {
        format!(
            "check {}: it may have expired, been revoked, or belong to another workspace",
            self.setting
        )
    }

    fn is_renewable(&self) -> bool {
        false
    }
}
