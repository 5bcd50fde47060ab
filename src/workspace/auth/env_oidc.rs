//! An identity token in a variable, `DATABRICKS_OIDC_TOKEN` unless `DATABRICKS_OIDC_TOKEN_ENV` names another.

use secrecy::SecretString;

use super::AuthKind;
use crate::workspace::settings::{Attribute, Settings, SettingsError};

const DEFAULT_VARIABLE: &str = "DATABRICKS_OIDC_TOKEN";

pub(super) struct EnvToken(SecretString);

impl EnvToken {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let variable = settings.oidc_token_env.as_deref();
        let name = variable.unwrap_or(DEFAULT_VARIABLE);
        if let Some(token) = settings.variables.get(name) {
            return Ok(Self(token.into()));
        }
        Err(match variable {
            // The name is the user's own.
            Some(name) => SettingsError::InvalidValue {
                name: format!(
                    "`{name}` is not set, but {}",
                    settings.named(Attribute::OidcTokenEnv)
                ),
                problem: "names it as the variable of the identity token",
            },
            None => SettingsError::Incomplete {
                missing: DEFAULT_VARIABLE,
                because: format!(
                    "{} needs an identity token there",
                    AuthKind::EnvOidc.label()
                ),
            },
        })
    }

    pub(super) fn get(&self) -> SecretString {
        self.0.clone()
    }
}
