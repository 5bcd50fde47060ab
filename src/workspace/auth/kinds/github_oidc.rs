//! The identity token of a GitHub Actions job, requested for the workspace's audience.
//!
//! <https://docs.github.com/actions/reference/security/oidc>

use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

use super::{
    AuthKind, AuthRules, Boxed,
    exchange::{Exchange, IdentitySource},
    required, required_secret,
};
use crate::{
    config::Attribute,
    workspace::{WorkspaceError, api::Api, diagnosis, settings::ResolvedSettings},
};

const PERMISSION: &str = "give the job `permissions: id-token: write`";

pub(super) const RULES: AuthRules = AuthRules {
    is_available: |settings, _| is_job(settings) && settings.client_id.is_some(),
    can_assume_group: true,
    ..AuthRules::new(|settings, _| {
        Exchange::create(AuthKind::GithubOidc, settings, GithubToken::new(settings)?)
    })
};

/// Whether this is a job that may request identity tokens.
pub(in crate::workspace::auth) fn is_job(settings: &ResolvedSettings) -> bool {
    settings.actions_id_token_request_url.is_some()
        && settings.actions_id_token_request_token.is_some()
}

struct GithubToken {
    url: Url,
    token: SecretString,
}

#[derive(Deserialize)]
struct Answer {
    value: SecretString,
}

impl GithubToken {
    fn new(settings: &ResolvedSettings) -> Result<Self, WorkspaceError> {
        let because = "github-oidc exchanges the job's identity token for a service principal's";
        required(settings, Attribute::ClientId, because)?;
        let because = format!("github-oidc runs in GitHub Actions alone; there, {PERMISSION}");
        let attribute = Attribute::ActionsIdTokenRequestUrl;
        let url = required(settings, attribute, &because)?;
        Ok(Self {
            url: Url::parse(&url).map_err(|_| settings.invalid(attribute, "is not an address"))?,
            token: required_secret(settings, Attribute::ActionsIdTokenRequestToken, &because)?,
        })
    }
}

impl IdentitySource for GithubToken {
    fn identity_token<'a>(&'a self, api: &'a Api, audience: &'a str) -> Boxed<'a, SecretString> {
        Box::pin(async move {
            let mut url = self.url.clone();
            // Appended: the address that GitHub sets has a query already.
            url.query_pairs_mut().append_pair("audience", audience);
            let call = api.get(AuthKind::GithubOidc, url).bearer(&self.token);
            let explain = |error| {
                let hint = format!("{PERMISSION}; its request token lives only as long as the job");
                diagnosis::service("GitHub's identity service", &hint, error)
            };
            Ok(api.json::<Answer>(call, explain).await?.value)
        })
    }
}
