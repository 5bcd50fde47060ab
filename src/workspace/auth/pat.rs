//! A personal access token: sent as it is, never renewed. Good for the API; the endpoint itself does not accept it.

use secrecy::SecretString;

use super::WorkspaceToken;

pub(in crate::workspace) struct Pat {
    token: SecretString,
}

impl Pat {
    pub(super) fn new(token: SecretString) -> Self {
        Self { token }
    }

    pub(super) fn token(&self) -> WorkspaceToken {
        WorkspaceToken {
            secret: self.token.clone(),
            lifetime: None,
        }
    }
}
