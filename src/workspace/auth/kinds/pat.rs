//! A personal access token: sent as it is, never renewed. The API accepts it; the endpoint itself does not.

use secrecy::SecretString;

use super::{
    AuthKind, AuthRules, Boxed, Expiry, Freshness, Renewal, Source, TokenSource, WorkspaceToken,
    required_secret,
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::api::Api,
};

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::Pat),
    ..AuthRules::new(|settings, _| {
        let because = "a personal access token is to be used";
        let token = required_secret(settings, Attribute::Token, because)?;
        let hint = format!(
            "check {}: it may have expired, been revoked, or belong to another workspace",
            settings.named(Attribute::Token)
        );
        Ok(Source::new(AuthKind::Pat, hint, Pat(token)))
    })
};

struct Pat(SecretString);

impl TokenSource for Pat {
    fn token<'a>(&'a self, _: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(async { WorkspaceToken::new(self.0.clone(), Expiry::Unknown) })
    }

    fn renewal(&self) -> Renewal {
        Renewal::Same
    }
}
