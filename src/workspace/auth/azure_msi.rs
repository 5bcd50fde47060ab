//! The managed identity of an Azure machine, from its instance metadata service.

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::{
    AuthKind, TokenResponse, WorkspaceToken,
    azure::{self, Cloud},
};
use crate::workspace::{
    api::{Api, ApiError},
    diagnosis::{self, CallError},
    host::Host,
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::AzureMsi;
/// Link-local: the machine's own host answers, so plain http is all there is.
const INSTANCE_METADATA: &str = "http://169.254.169.254";
/// Keeps out requests that a web page or a redirect makes.
const METADATA: HeaderName = HeaderName::from_static("metadata");
const VERSION: &str = "2018-02-01";

pub(in crate::workspace) struct AzureMsi {
    url: Url,
    /// Of a user-assigned identity.
    client_id: Option<String>,
    cloud: Cloud,
    resource_id: Option<HeaderValue>,
}

impl AzureMsi {
    pub(super) fn new(settings: &Settings, host: &Host) -> Result<Self, SettingsError> {
        let base = settings.services.instance_metadata.as_deref();
        let url = format!(
            "{}/metadata/identity/oauth2/token",
            base.unwrap_or(INSTANCE_METADATA)
        );
        let wrong = || SettingsError::InvalidValue {
            name: settings.named(Attribute::AzureUseMsi),
            problem: "leads to no address",
        };
        Ok(Self {
            url: Url::parse(&url).map_err(|_| wrong())?,
            client_id: settings.azure_client_id.clone(),
            cloud: azure::cloud(settings, host)?,
            resource_id: azure::resource_id(settings)?,
        })
    }

    pub(super) fn client_id(&self) -> Option<&str> {
        self.client_id.as_deref()
    }

    pub(super) async fn token(&self, api: &Api) -> Result<WorkspaceToken, CallError> {
        let mut token = self.ask(api, azure::DATABRICKS).await?;
        let management = self.ask(api, self.cloud.management).await?;
        azure::add_headers(
            &mut token,
            Some(&management.secret),
            self.resource_id.as_ref(),
        );
        Ok(token)
    }

    async fn ask(&self, api: &Api, resource: &str) -> Result<WorkspaceToken, CallError> {
        let mut url = self.url.clone();
        url.query_pairs_mut()
            .append_pair("api-version", VERSION)
            .append_pair("resource", resource);
        if let Some(id) = &self.client_id {
            url.query_pairs_mut().append_pair("client_id", id);
        }
        let request = api
            .local(KIND, url)
            .header(METADATA, HeaderValue::from_static("true"));
        let told = |error: ApiError| {
            let hint = match (&error, &self.client_id) {
                (ApiError::Network { .. }, _) => "azure-msi works on machines in Azure alone: is this one?".to_owned(),
                (_, Some(id)) => format!("assign the managed identity `{id}` (`ARM_CLIENT_ID`) to this machine"),
                (_, None) => "assign a managed identity to this machine; if it has several, choose with `ARM_CLIENT_ID`".to_owned(),
            };
            diagnosis::service("Azure's instance metadata service", |_| Some(hint), error)
        };
        let reply = api.send(request).await.map_err(told)?;
        // It gives both a lifetime and an end, and what it caches is not new: the end counts.
        let mut response: TokenResponse = reply.json().map_err(told)?;
        if response.expires_on.is_some() {
            response.expires_in = None;
        }
        response.into_token()
    }
}
