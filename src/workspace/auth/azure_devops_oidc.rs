//! The identity token of a job in Azure Pipelines. Its audience is fixed by Azure DevOps: `api://AzureADTokenExchange`.

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;

use super::{AuthKind, needed, oidc::POST};
use crate::workspace::{
    api::Api,
    diagnosis::{self, CallError},
    settings::{Attribute, Settings, SettingsError},
};

const KIND: AuthKind = AuthKind::AzureDevOpsOidc;
const WHO: &str = "Azure DevOps";
/// Pipelines set this one; its absence means that this is none.
const COLLECTION: &str = "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI";
/// Set for steps alone that map it.
const ACCESS_TOKEN: &str = "SYSTEM_ACCESSTOKEN";
const VERSION: &str = "7.2-preview.1";
const MAPPING: &str = "give the step `env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)`";

pub(super) struct AzureDevOpsToken {
    url: Url,
    token: SecretString,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "oidcToken")]
    token: SecretString,
}

/// Whether this is a job of Azure Pipelines.
pub(super) fn is_pipeline(settings: &Settings) -> bool {
    settings.variables.get(COLLECTION).is_some()
}

impl AzureDevOpsToken {
    pub(super) fn new(settings: &Settings) -> Result<Self, SettingsError> {
        needed(
            settings,
            Attribute::ClientId,
            "azure-devops-oidc exchanges the job's identity token for a service principal's",
        )?;
        let variable = |missing: &'static str| {
            let value = settings.variables.get(missing);
            value.ok_or_else(|| SettingsError::Incomplete {
                missing,
                because: "azure-devops-oidc runs in Azure Pipelines alone, which set it".to_owned(),
            })
        };
        let token = settings.variables.get(ACCESS_TOKEN);
        let token = token.ok_or_else(|| SettingsError::Incomplete {
            missing: ACCESS_TOKEN,
            because: format!("azure-devops-oidc shows it to Azure DevOps: {MAPPING}"),
        })?;
        let wrong = |name: &str, problem| SettingsError::InvalidValue {
            name: format!("`{name}`"),
            problem,
        };
        if token.chars().any(|c| !c.is_ascii_graphic()) {
            return Err(wrong(ACCESS_TOKEN, "holds characters that cannot be sent"));
        }
        let mut url = Url::parse(variable(COLLECTION)?)
            .map_err(|_| wrong(COLLECTION, "is not an address"))?;
        url.path_segments_mut()
            .map_err(|()| wrong(COLLECTION, "is not an address"))?
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

    pub(super) async fn ask(&self, api: &Api) -> Result<SecretString, CallError> {
        let call = api
            .elsewhere(KIND, POST, self.url.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(CONTENT_LENGTH, HeaderValue::from_static("0"))
            .bearer(&self.token);
        let refused = |error| {
            let hint = format!("{MAPPING}; the access token lives only as long as the job");
            diagnosis::service(WHO, |_| Some(hint), error)
        };
        let reply = api.send(call).await.map_err(refused)?;
        let malformed = |error| diagnosis::service(WHO, |_| None, error);
        Ok(reply.json::<Answer>().map_err(malformed)?.token)
    }
}
