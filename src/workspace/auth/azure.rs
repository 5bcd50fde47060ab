//! Common to the kinds that use Microsoft Entra ID: clouds, the tenant, and headers beside the token.

use reqwest::header::{HeaderName, HeaderValue};
use secrecy::ExposeSecret;
use tracing::debug;

use super::{AuthKind, token::WorkspaceToken};
use crate::{
    config::Attribute,
    workspace::{
        CallError, WorkspaceError,
        api::{Api, ApiError},
        diagnosis,
        host::Host,
        settings::ResolvedSettings,
    },
};

/// The resource id of Azure Databricks in Entra ID, in every cloud.
pub(super) const DATABRICKS: &str = "2ff814a6-3304-4ab8-85cb-cd0e6f879c1d";

const ZONES: [&str; 3] = [
    ".azuredatabricks.net",
    ".databricks.azure.us",
    ".databricks.azure.cn",
];
const MANAGEMENT_TOKEN: HeaderName =
    HeaderName::from_static("x-databricks-azure-sp-management-token");
const RESOURCE_ID: HeaderName = HeaderName::from_static("x-databricks-azure-workspace-resource-id");

/// One of Azure's clouds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cloud {
    /// The address of Entra ID.
    pub(super) entra_id: &'static str,
    /// The resource of its management API.
    management: &'static str,
}

const PUBLIC: Cloud = Cloud {
    entra_id: "https://login.microsoftonline.com/",
    management: "https://management.core.windows.net/",
};
const US_GOVERNMENT: Cloud = Cloud {
    entra_id: "https://login.microsoftonline.us/",
    management: "https://management.core.usgovcloudapi.net/",
};
const CHINA: Cloud = Cloud {
    entra_id: "https://login.chinacloudapi.cn/",
    management: "https://management.core.chinacloudapi.cn/",
};

/// Whether the workspace is in Azure.
pub(super) fn is_azure(settings: &ResolvedSettings, host: &Host) -> bool {
    let cloud = settings.cloud.as_deref().unwrap_or_default();
    settings.azure_workspace_resource_id.is_some()
        || cloud.eq_ignore_ascii_case("azure")
        || ZONES.iter().any(|zone| host.name().ends_with(zone))
}

/// The cloud, from the workspace's address, else from `ARM_ENVIRONMENT`.
pub(super) fn cloud(settings: &ResolvedSettings, host: &Host) -> Result<Cloud, WorkspaceError> {
    if host.name().ends_with(".databricks.azure.us") {
        return Ok(US_GOVERNMENT);
    }
    if host.name().ends_with(".databricks.azure.cn") {
        return Ok(CHINA);
    }
    let name = settings.azure_environment.as_deref().unwrap_or("public");
    match name.to_ascii_lowercase().as_str() {
        "public" | "azurepubliccloud" => Ok(PUBLIC),
        "usgovernment" | "azureusgovernmentcloud" => Ok(US_GOVERNMENT),
        "china" | "azurechinacloud" => Ok(CHINA),
        _ => Err(settings.invalid(
            Attribute::AzureEnvironment,
            "is none of Azure's clouds (public, usgovernment, china)",
        )),
    }
}

/// What a workspace needs beside a token to accept an identity that it does not list yet.
pub(super) struct Rights {
    /// The resource whose token proves them.
    pub(super) management: &'static str,
    resource_id: Option<HeaderValue>,
}

impl Rights {
    pub(super) fn new(settings: &ResolvedSettings, cloud: Cloud) -> Result<Self, WorkspaceError> {
        let id = settings.azure_workspace_resource_id.as_deref();
        let id = id.map(HeaderValue::from_str).transpose();
        Ok(Self {
            management: cloud.management,
            resource_id: id.map_err(|_| {
                let name = settings.named(Attribute::AzureWorkspaceResourceId);
                WorkspaceError::unsendable(&name)
            })?,
        })
    }

    /// Adds them to a token. `management`: the token for that resource, if the identity gets one.
    pub(super) fn add_to(&self, token: &mut WorkspaceToken, management: Option<&WorkspaceToken>) {
        let value =
            management.and_then(|token| HeaderValue::from_str(token.secret.expose_secret()).ok());
        if let Some(mut value) = value {
            // Masked in errors, see `Call::header`.
            value.set_sensitive(true);
            token.headers.push((MANAGEMENT_TOKEN, value));
        }
        if let Some(id) = &self.resource_id {
            token.headers.push((RESOURCE_ID, id.clone()));
        }
    }
}

/// The tenant of the workspace's users, from the redirect to their login page (as in the SDKs).
pub(super) async fn tenant(api: &Api, kind: AuthKind) -> Result<String, CallError> {
    let page = api.host.join("/aad/auth");
    let target = match api.send(api.probe(kind, page)).await {
        Err(ApiError::Redirect { target, .. }) => target,
        Err(ApiError::Network { source }) => {
            return Err(diagnosis::network(&api.host, source));
        }
        // Only the redirect names the tenant.
        Ok(_) | Err(_) => None,
    };
    let tenant = target.as_ref().and_then(|url| url.path_segments()?.next());
    match tenant.filter(|tenant| is_tenant(tenant)) {
        Some(tenant) => {
            debug!(tenant, "found the tenant of the workspace");
            Ok(tenant.to_owned())
        }
        None => Err(CallError::refused(format!(
            "the workspace {} does not name its tenant",
            &api.host
        ))
        .with_hint(
            "set `ARM_TENANT_ID`, and check that `DATABRICKS_HOST` is a workspace in Azure",
        )),
    }
}

/// An id or a domain, which can become part of an address.
pub(super) fn is_tenant(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

/// The hint of kinds with an identity of their own.
pub(super) const ADD_IDENTITY: &str = "check that the identity is a service principal of this workspace; one that is not yet needs `DATABRICKS_AZURE_RESOURCE_ID` and the Contributor role on it";

/// The hint for an error of Entra ID, by its number
/// (<https://learn.microsoft.com/entra/identity-platform/reference-error-codes>).
pub(super) fn hint(message: &str, settings: &str) -> String {
    for (code, hint) in [
        (
            "AADSTS7000215",
            "the client secret is wrong: use its value, not its id",
        ),
        (
            "AADSTS7000222",
            "the client secret has expired: make a new one in Entra ID",
        ),
        (
            "AADSTS700016",
            "the application is not in this tenant: check `ARM_CLIENT_ID` and `ARM_TENANT_ID`",
        ),
        (
            "AADSTS90002",
            "there is no such tenant: check `ARM_TENANT_ID`",
        ),
        (
            "AADSTS500011",
            "Azure Databricks is not known in this tenant: check `ARM_TENANT_ID`",
        ),
    ] {
        if message.contains(code) {
            return hint.to_owned();
        }
    }
    format!("check {settings}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WorkspaceSettings;

    fn settings(environment: Option<&str>) -> ResolvedSettings {
        // A host, so that no file is read.
        ResolvedSettings::new(WorkspaceSettings {
            host: Some("adb-1.2.azuredatabricks.net".to_owned()),
            azure_environment: environment.map(str::to_owned),
            ..WorkspaceSettings::default()
        })
        .unwrap()
    }

    #[test]
    fn the_cloud_follows_from_the_address_or_its_name() {
        let host = |name: &str| Host::parse(name).unwrap().0;
        let public = host("adb-1.2.azuredatabricks.net");
        assert_eq!(cloud(&settings(None), &public).unwrap(), PUBLIC);
        assert_eq!(
            cloud(
                &settings(Some("PUBLIC")),
                &host("adb-1.2.databricks.azure.us")
            )
            .unwrap(),
            US_GOVERNMENT
        );
        assert_eq!(
            cloud(&settings(None), &host("adb-1.2.databricks.azure.cn")).unwrap(),
            CHINA
        );
        assert_eq!(cloud(&settings(Some("China")), &public).unwrap(), CHINA);
        assert!(cloud(&settings(Some("german")), &public).is_err());
        assert!(is_azure(&settings(None), &public));
        assert!(!is_azure(
            &settings(None),
            &host("dbc-1.cloud.databricks.com")
        ));
    }
}
