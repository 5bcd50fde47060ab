//! The identity token of a GitHub Actions job, asked for with the audience that the workspace expects.

use reqwest::Method;
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

use super::{AuthKind, needed, needed_secret};
use crate::workspace::{
    api::Api,
    diagnosis::{self, CallError},
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::GithubOidc;
const PERMISSION: &str = "give the job `permissions: id-token: write`";

pub(super) struct GithubToken {
    url: Url,
    token: SecretString,
}

#[derive(Deserialize)]
struct Answer {
    value: SecretString,
}

impl GithubToken {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        needed(
            settings,
            Attribute::ClientId,
            "github-oidc exchanges the job's identity token for a service principal's",
        )?;
        let because = format!("github-oidc runs in GitHub Actions alone; there, {PERMISSION}");
        let url = needed(
            settings,
            Attribute::ActionsIdTokenRequestUrl,
            because.as_str(),
        )?;
        let wrong = || SettingsError::InvalidValue {
            name: settings.named(Attribute::ActionsIdTokenRequestUrl),
            problem: "is not an address",
        };
        Ok(Self {
            url: Url::parse(&url).map_err(|_| wrong())?,
            token: needed_secret(settings, Attribute::ActionsIdTokenRequestToken, because)?,
        })
    }

    pub(super) async fn ask(&self, api: &Api, audience: &str) -> Result<SecretString, CallError> {
        let mut url = self.url.clone();
        url.query_pairs_mut().append_pair("audience", audience);
        let request = api.elsewhere(KIND, Method::GET, url).bearer(&self.token);
        let told = |error| {
            let hint = format!("{PERMISSION}; its request token lives only as long as the job");
            diagnosis::service("GitHub's identity service", |_| Some(hint), error)
        };
        let reply = api.send(request).await.map_err(told)?;
        let told = |error| diagnosis::service("GitHub's identity service", |_| None, error);
        Ok(reply.json::<Answer>().map_err(told)?.value)
    }
}
