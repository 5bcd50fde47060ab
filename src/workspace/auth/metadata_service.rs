//! A service on this machine that hands out workspace tokens, as editors' extensions run for their child processes.
//!
//! Loopback only: its address is a secret, and whoever sends it elsewhere gives it away.

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::{AuthKind, TokenResponse, WorkspaceToken, needed};
use crate::workspace::{
    api::{Api, ApiError},
    diagnosis::{self, CallError},
    host::{Host, is_loopback},
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::MetadataService;
const VERSION: HeaderName = HeaderName::from_static("x-databricks-metadata-version");
const HOST: HeaderName = HeaderName::from_static("x-databricks-host");
const WHO: &str = "the local metadata service";

pub(in crate::workspace) struct MetadataService {
    url: Url,
    host: String,
    host_header: HeaderValue,
}

impl MetadataService {
    pub(super) fn new(settings: &Settings, host: &Host) -> Result<Self, SettingsError> {
        let because = "metadata-service asks there";
        let text = needed(settings, Attribute::MetadataServiceUrl, because)?;
        let wrong = |problem| SettingsError::InvalidValue {
            name: settings.named(Attribute::MetadataServiceUrl),
            problem,
        };
        let url = Url::parse(&text).map_err(|_| wrong("is not an address"))?;
        if !url.host_str().is_some_and(is_loopback) || !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("must be an address of this machine (localhost)"));
        }
        let host = host.to_string();
        let host_header =
            HeaderValue::from_str(&host).map_err(|_| SettingsError::InvalidValue {
                name: settings.named(Attribute::Host),
                problem: "holds characters that cannot be sent",
            })?;
        Ok(Self {
            url,
            host,
            host_header,
        })
    }

    pub(super) async fn token(&self, api: &Api) -> Result<WorkspaceToken, CallError> {
        let request = api
            .local(KIND, self.url.clone())
            .with_secret_path()
            .header(VERSION, HeaderValue::from_static("1"))
            .header(HOST, self.host_header.clone());
        let told = |error: ApiError| {
            let hint = match &error {
                ApiError::Status { status, .. } if status.as_u16() == 404 => {
                    format!(
                        "it knows no session for {}: check `DATABRICKS_HOST`, or start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again",
                        self.host
                    )
                }
                _ => "start the tool that set `DATABRICKS_METADATA_SERVICE_URL` again, or unset it"
                    .to_owned(),
            };
            diagnosis::service(WHO, |_| Some(hint), error)
        };
        let reply = api.send(request).await.map_err(told)?;
        reply.json::<TokenResponse>().map_err(told)?.into_token()
    }
}
