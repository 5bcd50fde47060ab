//! An identity token in a file, read again at every exchange: whoever projects it there (Kubernetes) replaces it.

use std::{io, path::PathBuf};

use secrecy::SecretString;

use super::{AuthKind, needed};
use crate::{
    files,
    workspace::{
        diagnosis::CallError,
        settings::{Attribute, Settings, SettingsError},
    },
};

/// Far above any real token.
const MAX_TOKEN: u64 = 64 * 1024;

pub(super) struct FileToken {
    path: PathBuf,
    setting: String,
}

impl FileToken {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let because = format!("{} reads a file", AuthKind::FileOidc.label());
        Ok(Self {
            path: needed(settings, Attribute::OidcTokenFilepath, because)?.into(),
            setting: settings.named(Attribute::OidcTokenFilepath),
        })
    }

    pub(super) async fn read(&self) -> Result<SecretString, CallError> {
        let path = self.path.display();
        let read = files::read_off_runtime(self.path.clone(), MAX_TOKEN).await;
        let read = match &read {
            Ok(bytes) => files::text(bytes),
            Err(error) => return Err(self.unreadable(error)),
        };
        match read {
            Ok(text) if !text.trim().is_empty() => Ok(text.trim().into()),
            // It may be replaced at this very moment.
            Ok(_) => Err(CallError::unavailable(
                format!("the file of the identity token, `{path}`, is empty"),
                None,
                format!("check {} and who writes that file", self.setting),
            )),
            Err(error) => Err(self.unreadable(&error)),
        }
    }

    fn unreadable(&self, error: &io::Error) -> CallError {
        let path = self.path.display();
        CallError::unavailable(
            format!("cannot read the identity token in `{path}`"),
            Some(error.to_string()),
            format!(
                "check {}: in Kubernetes, a projected service account token must be mounted there",
                self.setting
            ),
        )
    }
}
