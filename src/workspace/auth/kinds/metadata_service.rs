//! A local service that hands out workspace tokens, as editors' extensions run for their child processes.
//!
//! Loopback only: its address is a secret, which a request elsewhere would give away.

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::{
    AuthKind, AuthRules, Boxed, Freshness, Renewal, Source, TokenSource, WorkspaceToken, oauth,
    required,
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{
        WorkspaceError,
        api::{Api, ApiError},
        diagnosis,
        host::{Host, is_loopback},
        settings::ResolvedSettings,
    },
};

const VERSION: HeaderName = HeaderName::from_static("x-databricks-metadata-version");
const HOST: HeaderName = HeaderName::from_static("x-databricks-host");

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::MetadataService),
    ..AuthRules::new(|settings, host| {
        let hint = "restart the tool that set `DATABRICKS_METADATA_SERVICE_URL`";
        let tokens = MetadataService::new(settings, host)?;
        Ok(Source::new(AuthKind::MetadataService, hint, tokens))
    })
};

struct MetadataService {
    url: Url,
    host: HeaderValue,
}

impl MetadataService {
    fn new(settings: &ResolvedSettings, host: &Host) -> Result<Self, WorkspaceError> {
        let attribute = Attribute::MetadataServiceUrl;
        let text = required(
            settings,
            attribute,
            "metadata-service requests tokens there",
        )?;
        let wrong = |problem| settings.invalid(attribute, problem);
        let url = Url::parse(&text).map_err(|_| wrong("is not an address"))?;
        if !url.host_str().is_some_and(is_loopback) || !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("must be an address of this machine (localhost)"));
        }
        let host = HeaderValue::from_str(&host.to_string())
            .map_err(|_| WorkspaceError::unsendable(&settings.named(Attribute::Host)))?;
        Ok(Self { url, host })
    }
}

impl TokenSource for MetadataService {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        let call = api
            .local(AuthKind::MetadataService, self.url.clone())
            // The version of the protocol, as in the SDKs (`auth_metadata_service.go`).
            .header(VERSION, HeaderValue::from_static("1"))
            // The service has a session for each workspace, and chooses by this.
            .header(HOST, self.host.clone());
        let explain = |error: ApiError| {
            let hint = match &error {
                ApiError::Status { status, .. } if status.as_u16() == 404 => {
                    format!(
                        "it has no session for {}: check `DATABRICKS_HOST`, or start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again",
                        &api.host
                    )
                }
                _ => "start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again, or unset it"
                    .to_owned(),
            };
            diagnosis::service("the local metadata service", &hint, error)
        };
        Box::pin(oauth::request_token(api, call, explain))
    }

    fn renewal(&self) -> Renewal {
        Renewal::Cached
    }
}
