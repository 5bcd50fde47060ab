//! A personal access token: sent as it is, never renewed. Good for the API; the endpoint itself does not accept it.

use secrecy::SecretString;

use super::{Expiry, WorkspaceToken, needed_secret};
use crate::workspace::settings::{Attribute, Settings, SettingsError};

pub(in crate::workspace) struct Pat {
    token: SecretString,
    setting: String,
}

impl Pat {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let because = "a personal access token is to be used";
        Ok(Self {
            token: needed_secret(settings, Attribute::Token, because)?,
            setting: settings.named(Attribute::Token),
        })
    }

    pub(super) fn setting(&self) -> &str {
        &self.setting
    }

    pub(super) fn token(&self) -> WorkspaceToken {
        WorkspaceToken {
            secret: self.token.clone(),
            expiry: Expiry::Unknown,
            scopes: None,
            headers: Vec::new(),
        }
    }
}
