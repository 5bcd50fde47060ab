//! The token that Databricks Model Serving puts into a file beside a model, and replaces there.
//!
//! Undocumented; as in `credentials_provider.py` of the SDK for Python.

use std::{io, path::PathBuf, time::Duration};

use secrecy::SecretString;
use serde::Deserialize;
use tokio::time::sleep;

use super::{
    AuthKind, AuthRules, Boxed, Expiry, Freshness, Renewal, Source, TokenSource, WorkspaceToken,
};
use crate::{
    config::Variables,
    net::file,
    workspace::{CallError, WorkspaceError, api::Api},
};

/// The first that is set decides (as in the Databricks SDK for Python).
const IS_SERVING: [&str; 2] = [
    "IS_IN_DB_MODEL_SERVING_ENV",
    "IS_IN_DATABRICKS_MODEL_SERVING_ENV",
];
/// The workspace's address, if no setting has it.
const HOSTS: [&str; 2] = [
    "DATABRICKS_MODEL_SERVING_HOST_URL",
    "DB_MODEL_SERVING_HOST_URL",
];
/// Set on serverless compute.
const DIRECTORY: &str = "SERVING_CREDENTIALS_DIR";
const CLASSIC_DIRECTORY: &str = "/var/credentials-secret";
const FILE: &str = "model-dependencies-oauth-token";
/// The file is read again after this (as the SDK does): it names no expiry.
const LIFETIME: Duration = Duration::from_mins(5);
/// Pause before the second attempt, for a file that is being replaced.
const RETRY: Duration = Duration::from_millis(500);
/// Far above any real token.
const MAX_FILE: u64 = 64 * 1024;

pub(super) const RULES: AuthRules = AuthRules {
    is_available: |settings, _| is_serving(&settings.variables),
    ..AuthRules::new(|settings, _| {
        let hint = "check that the model was logged with the resources that it uses, and that `DATABRICKS_HOST`, if set, is their workspace";
        let tokens = ModelServing::new(&settings.variables)?;
        Ok(Source::new(AuthKind::ModelServing, hint, tokens))
    })
};

struct ModelServing {
    path: PathBuf,
}

#[derive(Deserialize)]
struct Content {
    #[serde(rename = "OAUTH_TOKEN")]
    tokens: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "oauthTokenValue")]
    value: SecretString,
}

/// Whether this process runs in Databricks Model Serving.
fn is_serving(variables: &Variables) -> bool {
    let first = IS_SERVING.iter().find_map(|name| variables.get(name));
    first == Some("true")
}

/// The variable that holds the workspace's address, and the address.
pub(in crate::workspace) fn host(variables: &Variables) -> Option<(&'static str, &str)> {
    let mut names = HOSTS.iter().filter(|_| is_serving(variables));
    names.find_map(|name| Some((*name, variables.get(name)?)))
}

impl ModelServing {
    fn new(variables: &Variables) -> Result<Self, WorkspaceError> {
        if !is_serving(variables) {
            let because = "model-serving works in Databricks Model Serving alone, which sets it";
            return Err(WorkspaceError::incomplete(IS_SERVING[1], because));
        }
        let directory = variables.get(DIRECTORY).unwrap_or(CLASSIC_DIRECTORY);
        let path = PathBuf::from(directory).join(FILE);
        if !path.is_file() {
            let path = path.display();
            return Err(WorkspaceError::absent(format!(
                "model-serving needs the token in `{path}`, which does not exist"
            ))
            .with_hint("log the model with the resources that it uses, so that Model Serving gives it a token, or set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`"));
        }
        Ok(Self { path })
    }

    async fn token(&self) -> Result<WorkspaceToken, CallError> {
        let content = match self.read().await {
            Ok(content) => content,
            Err(_) => {
                sleep(RETRY).await;
                self.read().await.map_err(|error| self.unreadable(&error))?
            }
        };
        // The first, as in the SDK.
        let token = content.tokens.into_iter().next();
        let token = token.ok_or_else(|| self.unreadable(&io::ErrorKind::InvalidData.into()))?;
        WorkspaceToken::new(token.value, Expiry::In(LIFETIME))
    }

    async fn read(&self) -> io::Result<Content> {
        let text = file::read_off_runtime(self.path.clone(), MAX_FILE).await?;
        // The parser's message could quote the token.
        serde_json::from_slice(&text).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn unreadable(&self, error: &io::Error) -> CallError {
        let path = self.path.display();
        CallError::unavailable(format!(
            "cannot read the token of model-serving in `{path}`"
        ))
        .with_detail(error.to_string())
        .with_hint("check that Model Serving still keeps the file; the proxy reads it again")
    }
}

impl TokenSource for ModelServing {
    fn token<'a>(&'a self, _: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(self.token())
    }

    fn renewal(&self) -> Renewal {
        Renewal::Cached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(variables: &[(&str, &str)]) -> Result<PathBuf, String> {
        let variables = variables.iter();
        let variables = variables.map(|&(name, value)| (name.to_owned(), value.to_owned()));
        match ModelServing::new(&variables.collect()) {
            Ok(source) => Ok(source.path),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn the_directory_is_the_one_that_is_named_or_the_classic_one() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().to_str().unwrap();
        let missing = path(&[(IS_SERVING[0], "true")]).unwrap_err();
        assert!(
            missing.contains("/var/credentials-secret/model-dependencies-oauth-token"),
            "{missing}"
        );
        let named = [(IS_SERVING[1], "true"), (DIRECTORY, directory)];
        assert!(path(&named).unwrap_err().contains(directory));
        std::fs::write(scratch.path().join(FILE), "").unwrap();
        assert_eq!(path(&named).unwrap(), scratch.path().join(FILE));
        // The first variable decides, and anything but `true` is no.
        let both = [(IS_SERVING[0], "false"), named[0], named[1]];
        assert!(path(&both).unwrap_err().contains("is not set"));
        assert!(path(&[(IS_SERVING[1], "1"), named[1]]).is_err());
    }
}
