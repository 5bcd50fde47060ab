//! An identity token in a variable, `DATABRICKS_OIDC_TOKEN` unless `DATABRICKS_OIDC_TOKEN_ENV` names another.

use secrecy::SecretString;

use super::{
    AuthKind, AuthRules, Boxed,
    exchange::{Exchange, IdentitySource},
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{WorkspaceError, api::Api, settings::ResolvedSettings},
};

const DEFAULT_VARIABLE: &str = "DATABRICKS_OIDC_TOKEN";

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::EnvOidc),
    is_available: |settings, _| EnvToken::new(settings).is_ok(),
    can_assume_group: true,
    secret_variables: &[DEFAULT_VARIABLE],
    ..AuthRules::new(|settings, _| {
        Exchange::create(AuthKind::EnvOidc, settings, EnvToken::new(settings)?)
    })
};

struct EnvToken(SecretString);

impl EnvToken {
    fn new(settings: &ResolvedSettings) -> Result<Self, WorkspaceError> {
        let variable = settings.oidc_token_env.as_deref();
        let name = variable.unwrap_or(DEFAULT_VARIABLE);
        if let Some(token) = settings.variables.get(name) {
            return Ok(Self(token.into()));
        }
        Err(match variable {
            // The name is the user's own.
            Some(name) => WorkspaceError::new(format!(
                "`{name}` is not set, but {} names it as the variable of the identity token",
                settings.named(Attribute::OidcTokenEnv)
            )),
            None => WorkspaceError::incomplete(
                DEFAULT_VARIABLE,
                "env-oidc needs an identity token there",
            ),
        })
    }
}

impl IdentitySource for EnvToken {
    fn identity_token<'a>(&'a self, _: &'a Api, _: &'a str) -> Boxed<'a, SecretString> {
        Box::pin(async { Ok(self.0.clone()) })
    }
}
