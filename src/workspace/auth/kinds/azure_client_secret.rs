//! An application of Microsoft Entra ID, by its client secret.
//!
//! <https://docs.databricks.com/azure/dev-tools/auth/azure-sp>

use secrecy::SecretString;
use tokio::sync::OnceCell;
use url::Url;

use super::{
    AuthKind, AuthRules, Boxed, Freshness, Source, TokenSource, WorkspaceToken,
    azure::{self, Rights},
    oauth, required, required_secret,
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

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::Azure),
    is_selected: |settings| settings.azure_client_secret.is_some(),
    ..AuthRules::new(|settings, host| {
        let tokens = AzureClientSecret::new(settings, host)?;
        // The workspace keeps the ids of Entra ID's applications.
        let id = tokens.client_id.clone();
        let source = Source::new(AuthKind::AzureClientSecret, azure::ADD_IDENTITY, tokens);
        Ok(source.of_service_principal(Some(id)))
    })
};

struct AzureClientSecret {
    client_id: String,
    client_secret: SecretString,
    tenant: OnceCell<String>,
    entra_id: String,
    rights: Rights,
    /// The settings to check when Entra ID refuses them.
    settings: String,
}

impl AzureClientSecret {
    fn new(settings: &ResolvedSettings, host: &Host) -> Result<Self, WorkspaceError> {
        let because = "azure-client-secret needs the id and the secret of an application";
        let cloud = azure::cloud(settings, host)?;
        let tenant = settings.azure_tenant_id.clone();
        if tenant
            .as_deref()
            .is_some_and(|tenant| !azure::is_tenant(tenant))
        {
            let problem = "is not a tenant's id or domain";
            return Err(settings.invalid(Attribute::AzureTenantId, problem));
        }
        let used = [
            Attribute::AzureClientId,
            Attribute::AzureClientSecret,
            Attribute::AzureTenantId,
        ];
        let entra_id = settings.services.entra_id.clone();
        Ok(Self {
            client_id: required(settings, Attribute::AzureClientId, because)?,
            client_secret: required_secret(settings, Attribute::AzureClientSecret, because)?,
            tenant: OnceCell::new_with(tenant),
            entra_id: entra_id.unwrap_or_else(|| cloud.entra_id.to_owned()),
            rights: Rights::new(settings, cloud)?,
            settings: used.map(|attribute| settings.named(attribute)).join(", "),
        })
    }

    async fn request(
        &self,
        api: &Api,
        url: &Url,
        resource: &str,
    ) -> Result<WorkspaceToken, CallError> {
        let form = [
            ("grant_type", "client_credentials"),
            ("client_id", self.client_id.as_str()),
            // The first version of Entra ID's endpoint, as in the SDKs: `resource` in place of `scope`.
            ("resource", resource),
        ];
        let call = api
            .post(AuthKind::AzureClientSecret, url.clone())
            .form(&form, Some(("client_secret", &self.client_secret)));
        let explain = |error: ApiError| {
            let hint = azure::hint(error.message(), &self.settings);
            diagnosis::service("Microsoft Entra ID", &hint, error)
        };
        oauth::request_token(api, call, explain).await
    }
}

impl TokenSource for AzureClientSecret {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(async move {
            let tenant = self
                .tenant
                .get_or_try_init(|| azure::tenant(api, AuthKind::AzureClientSecret));
            let url = format!("{}{}/oauth2/token", self.entra_id, tenant.await?);
            let url = Url::parse(&url).map_err(|_| {
                CallError::refused("the address of Entra ID is malformed")
                    .with_hint("check `ARM_TENANT_ID`")
            })?;
            let mut token = self.request(api, &url, azure::DATABRICKS).await?;
            let management = self.request(api, &url, self.rights.management).await?;
            self.rights.add_to(&mut token, Some(&management));
            Ok(token)
        })
    }
}
