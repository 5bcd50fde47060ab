//! Whatever makes an endpoint's credentials.

use std::future::pending;

use crate::{
    config::CredentialSource,
    credential::{CredentialCommand, Mint, MintError, Minted, Password, PasswordFile},
    workspace::{CredentialMinter, Workspace},
};

/// Who is asked for an endpoint's credential.
#[derive(Clone)]
pub(super) enum Access {
    /// Nobody but what the settings name.
    Own(Own),
    /// The workspace, which can also tell what the settings leave open.
    Workspace(Workspace),
}

/// A credential that no workspace mints.
#[derive(Clone)]
pub(super) enum Own {
    Command(CredentialCommand),
    Password(Password),
    PasswordFile(PasswordFile),
}

impl Access {
    /// Access by what the settings say; `workspace` is called only where they say so.
    pub(super) fn new<E>(
        source: &CredentialSource,
        workspace: impl FnOnce() -> Result<Workspace, E>,
    ) -> Result<Self, E> {
        Ok(match source {
            CredentialSource::Command(command) => {
                Self::Own(Own::Command(CredentialCommand(command.clone())))
            }
            CredentialSource::Password(password) => {
                Self::Own(Own::Password(Password(password.clone())))
            }
            CredentialSource::PasswordFile(path) => {
                Self::Own(Own::PasswordFile(PasswordFile::new(path.clone())))
            }
            CredentialSource::Workspace => Self::Workspace(workspace()?),
        })
    }
}

/// What the refresher of an endpoint is given.
pub(super) enum Source {
    Own(Own),
    Workspace(CredentialMinter),
}

impl Mint for Source {
    async fn mint(&self) -> Result<Minted, MintError> {
        match self {
            Self::Own(Own::Command(command)) => command.mint().await,
            Self::Own(Own::Password(password)) => password.mint().await,
            Self::Own(Own::PasswordFile(file)) => file.mint().await,
            Self::Workspace(minter) => minter.mint().await,
        }
    }

    async fn changed(&self) {
        match self {
            Self::Own(Own::PasswordFile(file)) => file.changed().await,
            Self::Own(Own::Command(_) | Own::Password(_)) | Self::Workspace(_) => pending().await,
        }
    }
}
