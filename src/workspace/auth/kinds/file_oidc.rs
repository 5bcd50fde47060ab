//! An identity token in a file, read for every exchange because Kubernetes replaces it there.

use std::{io, path::PathBuf};

use secrecy::SecretString;

use super::{
    AuthKind, AuthRules, Boxed,
    exchange::{Exchange, IdentitySource},
    required,
};
use crate::{
    config::{Attribute, AuthFamily},
    net::file,
    workspace::{CallError, api::Api},
};

/// Far above any real token.
const MAX_TOKEN: u64 = 64 * 1024;

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::FileOidc),
    can_assume_group: true,
    ..AuthRules::new(|settings, _| {
        let because = "file-oidc reads a file";
        let token = FileToken {
            path: required(settings, Attribute::OidcTokenFilepath, because)?.into(),
            setting: settings.named(Attribute::OidcTokenFilepath),
        };
        Exchange::create(AuthKind::FileOidc, settings, token)
    })
};

struct FileToken {
    path: PathBuf,
    setting: String,
}

impl FileToken {
    async fn read(&self) -> io::Result<String> {
        let bytes = file::read_off_runtime(self.path.clone(), MAX_TOKEN).await?;
        Ok(file::text(&bytes)?.trim().to_owned())
    }
}

impl IdentitySource for FileToken {
    fn identity_token<'a>(&'a self, _: &'a Api, _: &'a str) -> Boxed<'a, SecretString> {
        Box::pin(async move {
            let path = self.path.display();
            match self.read().await {
                Ok(token) if !token.is_empty() => Ok(token.into()),
                // Unavailable, not refused: it may be replaced at this moment.
                Ok(_) => Err(CallError::unavailable(format!(
                    "the file of the identity token, `{path}`, is empty"
                ))
                .with_hint(format!("check {} and what writes that file", self.setting))),
                Err(error) => Err(CallError::unavailable(format!(
                    "cannot read the identity token in `{path}`"
                ))
                .with_detail(error.to_string())
                .with_hint(format!(
                    "check {}: in Kubernetes, a projected service account token must be mounted there",
                    self.setting
                ))),
            }
        })
    }
}
