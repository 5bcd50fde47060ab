//! An application of Microsoft Entra ID, by its client secret.

use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::OnceCell;
use url::Url;

use super::{
    AuthKind, TokenResponse, WorkspaceToken,
    azure::{self, Cloud},
    needed, needed_secret,
    oidc::POST,
};
use crate::workspace::{
    api::Api,
    diagnosis::{self, CallError},
    host::Host,
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::AzureClientSecret;

pub(in crate::workspace) struct AzureClientSecret {
    client_id: String,
    client_secret: SecretString,
    tenant: OnceCell<String>,
    cloud: Cloud,
    entra_id: String,
    resource_id: Option<HeaderValue>,
    mend: String,
}

impl AzureClientSecret {
    pub(super) fn new(settings: &Settings, host: &Host) -> Result<Self, SettingsError> {
        let because = "azure-client-secret needs the id and the secret of an application";
        let cloud = azure::cloud(settings, host)?;
        let tenant = settings.azure_tenant_id.clone();
        if tenant
            .as_deref()
            .is_some_and(|tenant| !azure::is_tenant(tenant))
        {
            return Err(SettingsError::InvalidValue {
                name: settings.named(Attribute::AzureTenantId),
                problem: "is not a tenant's id or domain",
            });
        }
        let mend = [
            Attribute::AzureClientId,
            Attribute::AzureClientSecret,
            Attribute::AzureTenantId,
        ]
        .map(|attribute| settings.named(attribute))
        .join(", ");
        Ok(Self {
            client_id: needed(settings, Attribute::AzureClientId, because)?,
            client_secret: needed_secret(settings, Attribute::AzureClientSecret, because)?,
            tenant: OnceCell::new_with(tenant),
            entra_id: settings
                .services
                .entra_id
                .clone()
                .unwrap_or_else(|| cloud.entra_id.to_owned()),
            cloud,
            resource_id: azure::resource_id(settings)?,
            mend,
        })
    }

    pub(super) fn client_id(&self) -> &str {
        &self.client_id
    }

    pub(super) async fn token(&self, api: &Api) -> Result<WorkspaceToken, CallError> {
        let tenant = self
            .tenant
            .get_or_try_init(|| azure::tenant(api, KIND))
            .await?;
        let url = format!("{}{tenant}/oauth2/token", self.entra_id);
        let url = Url::parse(&url).map_err(|_| {
            CallError::refused(
                "the address of Entra ID is malformed",
                None,
                "check `ARM_TENANT_ID`",
            )
        })?;
        let mut token = self.ask(api, &url, azure::DATABRICKS).await?;
        let management = self.ask(api, &url, self.cloud.management).await?;
        azure::add_headers(
            &mut token,
            Some(&management.secret),
            self.resource_id.as_ref(),
        );
        Ok(token)
    }

    async fn ask(&self, api: &Api, url: &Url, resource: &str) -> Result<WorkspaceToken, CallError> {
        let request = api.elsewhere(KIND, POST, url.clone()).form(&[
            ("grant_type", "client_credentials"),
            ("client_id", self.client_id.as_str()),
            ("client_secret", self.client_secret.expose_secret()),
            ("resource", resource),
        ]);
        let told = |error| {
            diagnosis::service(
                "Microsoft Entra ID",
                |body| Some(azure::mend(body, &self.mend)),
                error,
            )
        };
        let reply = api.send(request).await.map_err(told)?;
        reply.json::<TokenResponse>().map_err(told)?.into_token()
    }
}
