//! The identity token of a job in Azure Pipelines. Azure DevOps fixes its audience: `api://AzureADTokenExchange`.
//!
//! <https://learn.microsoft.com/rest/api/azure/devops/distributedtask/oidctoken/create>

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

use super::{
    AuthKind, AuthRules, Boxed,
    exchange::{Exchange, IdentitySource},
    required,
};
use crate::{
    config::Attribute,
    workspace::{WorkspaceError, api::Api, diagnosis, settings::ResolvedSettings},
};

/// Set in all pipelines.
const COLLECTION: &str = "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI";
/// Set only for steps that map it.
const ACCESS_TOKEN: &str = "SYSTEM_ACCESSTOKEN";
const VERSION: &str = "7.2-preview.1";
const MAPPING: &str = "give the step `env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)`";

pub(super) const RULES: AuthRules = AuthRules {
    is_available: |settings, _| {
        settings.variables.get(COLLECTION).is_some() && settings.client_id.is_some()
    },
    can_assume_group: true,
    secret_variables: &[ACCESS_TOKEN],
    ..AuthRules::new(|settings, _| {
        let token = AzureDevOpsToken::new(settings)?;
        Exchange::create(AuthKind::AzureDevOpsOidc, settings, token)
    })
};

struct AzureDevOpsToken {
    url: Url,
    token: SecretString,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "oidcToken")]
    token: SecretString,
}

impl AzureDevOpsToken {
    fn new(settings: &ResolvedSettings) -> Result<Self, WorkspaceError> {
        let because =
            "azure-devops-oidc exchanges the job's identity token for a service principal's";
        required(settings, Attribute::ClientId, because)?;
        let variable = |missing: &'static str| {
            let value = settings.variables.get(missing);
            value.ok_or_else(|| {
                let because = match missing {
                    ACCESS_TOKEN => {
                        &format!("azure-devops-oidc shows it to Azure DevOps: {MAPPING}")
                    }
                    _ => "azure-devops-oidc runs in Azure Pipelines alone, which set it",
                };
                WorkspaceError::incomplete(missing, because)
            })
        };
        let token = variable(ACCESS_TOKEN)?;
        if token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(WorkspaceError::unsendable(&format!("`{ACCESS_TOKEN}`")));
        }
        let invalid = || WorkspaceError::new(format!("`{COLLECTION}` is not an address"));
        let mut url = Url::parse(variable(COLLECTION)?).map_err(|_| invalid())?;
        url.path_segments_mut()
            .map_err(|()| invalid())?
            .pop_if_empty()
            .push(variable("SYSTEM_TEAMPROJECTID")?)
            .extend(["_apis", "distributedtask", "hubs"])
            .push(variable("SYSTEM_HOSTTYPE")?)
            .push("plans")
            .push(variable("SYSTEM_PLANID")?)
            .push("jobs")
            .push(variable("SYSTEM_JOBID")?)
            .push("oidctoken");
        url.set_query(Some(&format!("api-version={VERSION}")));
        Ok(Self {
            url,
            token: token.into(),
        })
    }
}

impl IdentitySource for AzureDevOpsToken {
    fn identity_token<'a>(&'a self, api: &'a Api, _: &'a str) -> Boxed<'a, SecretString> {
        Box::pin(async move {
            let call = api
                .post(AuthKind::AzureDevOpsOidc, self.url.clone())
                .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
                // RFC 9110 section 8.6 wants the length; hyper sends none for a POST without a body.
                .header(CONTENT_LENGTH, HeaderValue::from_static("0"))
                .bearer(&self.token);
            let explain = |error| {
                let hint = format!("{MAPPING}; the access token lives only as long as the job");
                diagnosis::service("Azure DevOps", &hint, error)
            };
            Ok(api.json::<Answer>(call, explain).await?.token)
        })
    }
}
