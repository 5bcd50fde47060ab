//! The managed identity of an Azure machine, from its instance metadata service.
//!
//! <https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token>

use reqwest::header::{HeaderName, HeaderValue};
use url::Url;

use super::{
    AuthKind, AuthRules, Boxed, Freshness, Renewal, Source, TokenSource, WorkspaceToken,
    azure::{self, Rights},
    oauth::TokenResponse,
};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{
        CallError, WorkspaceError,
        api::{Api, ApiError},
        diagnosis,
        host::Host,
        settings::ResolvedSettings,
    },
};

/// Link-local: the machine's own host answers, in plain http only.
const INSTANCE_METADATA: &str = "http://169.254.169.254";
/// Required by the service, so that no web page and no redirect can make the request.
const METADATA: HeaderName = HeaderName::from_static("metadata");
const VERSION: &str = "2018-02-01";

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::Azure),
    is_selected: is_enabled,
    ..AuthRules::new(|settings, host| {
        let tokens = AzureMsi::new(settings, host)?;
        let source = Source::new(AuthKind::AzureMsi, azure::ADD_IDENTITY, tokens);
        Ok(source.of_service_principal(settings.azure_client_id.clone()))
    })
};

/// Whether `ARM_USE_MSI` is on.
pub(in crate::workspace::auth) fn is_enabled(settings: &ResolvedSettings) -> bool {
    let value = settings.azure_use_msi.as_deref().unwrap_or_default();
    let value = value.to_ascii_lowercase();
    matches!(value.as_str(), "true" | "1" | "t" | "yes" | "on")
}

struct AzureMsi {
    url: Url,
    /// Of a user-assigned identity.
    client_id: Option<String>,
    rights: Rights,
}

impl AzureMsi {
    fn new(settings: &ResolvedSettings, host: &Host) -> Result<Self, WorkspaceError> {
        let base = settings.services.instance_metadata.as_deref();
        let base = base.unwrap_or(INSTANCE_METADATA);
        let url = Url::parse(&format!("{base}/metadata/identity/oauth2/token"));
        Ok(Self {
            url: url
                .map_err(|_| settings.invalid(Attribute::AzureUseMsi, "leads to no address"))?,
            client_id: settings.azure_client_id.clone(),
            rights: Rights::new(settings, azure::cloud(settings, host)?)?,
        })
    }

    async fn request(&self, api: &Api, resource: &str) -> Result<WorkspaceToken, CallError> {
        let mut url = self.url.clone();
        url.query_pairs_mut()
            .append_pair("api-version", VERSION)
            .append_pair("resource", resource);
        if let Some(id) = &self.client_id {
            url.query_pairs_mut().append_pair("client_id", id);
        }
        let call = api
            .local(AuthKind::AzureMsi, url)
            .header(METADATA, HeaderValue::from_static("true"));
        let explain = |error: ApiError| {
            let hint = match (&error, &self.client_id) {
                (ApiError::Network { .. }, _) => "azure-msi works on machines in Azure alone: is this one?".to_owned(),
                (_, Some(id)) => format!("assign the managed identity `{id}` (`ARM_CLIENT_ID`) to this machine"),
                (_, None) => "assign a managed identity to this machine; if it has several, choose with `ARM_CLIENT_ID`".to_owned(),
            };
            diagnosis::service("Azure's instance metadata service", &hint, error)
        };
        let mut response: TokenResponse = api.json(call, explain).await?;
        // The service caches tokens, but sends their whole lifetime: the time of expiry counts.
        if response.expires_on.is_some() {
            response.expires_in = None;
        }
        response.into_token()
    }
}

impl TokenSource for AzureMsi {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(async move {
            let mut token = self.request(api, azure::DATABRICKS).await?;
            let management = self.request(api, self.rights.management).await?;
            self.rights.add_to(&mut token, Some(&management));
            Ok(token)
        })
    }

    fn renewal(&self) -> Renewal {
        Renewal::Cached
    }
}
