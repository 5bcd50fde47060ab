//! A local service that hands out workspace tokens, as editors' extensions run for their child processes.
//!
//! Loopback only: its address is a secret, which a request elsewhere would give away.

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::{AuthKind, Boxed, Freshness, Kind, TokenSource, WorkspaceToken, required, token};
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

pub(super) const KIND: Kind = Kind {
    family: Some(AuthFamily::MetadataService),
    ..Kind::new(|settings, host| Ok(Box::new(MetadataService::new(settings, host)?)))
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
        let invalid = |attribute, problem| WorkspaceError::InvalidValue {
            name: settings.named(attribute),
            problem,
        };
        let url = Url::parse(&text).map_err(|_| invalid(attribute, "is not an address"))?;
        if !url.host_str().is_some_and(is_loopback) || !matches!(url.scheme(), "http" | "https") {
            return Err(invalid(
                attribute,
                "must be an address of this machine (localhost)",
            ));
        }
        let host = HeaderValue::from_str(&host.to_string())
            .map_err(|_| invalid(Attribute::Host, "holds characters that cannot be sent"))?;
        Ok(Self { url, host })
    }
}

impl TokenSource for MetadataService {
    fn kind(&self) -> AuthKind {
        AuthKind::MetadataService
    }

    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        let call = api
            .local(self.kind(), self.url.clone())
            .with_secret_path()
            .header(VERSION, HeaderValue::from_static("1"))
            .header(HOST, self.host.clone());
        let explain = |error: ApiError| {
            let hint = match &error {
                ApiError::Status { status, .. } if status.as_u16() == 404 => {
                    format!(
                        "it has no session for {}: check `DATABRICKS_HOST`, or start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again",
                        api.host()
                    )
                }
                _ => "start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again, or unset it"
                    .to_owned(),
            };
            diagnosis::service("the local metadata service", Some(hint), error)
        };
        Box::pin(token::request(api, call, explain))
    }

    fn hint(&self) -> String {
        "restart the tool that set `DATABRICKS_METADATA_SERVICE_URL`".to_owned()
    }

    fn has_cache(&self) -> bool {
        true
    }
}
