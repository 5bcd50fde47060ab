//! The login of the Azure CLI, through `az account get-access-token`.

use std::{path::PathBuf, time::Duration};

use jiff::tz::TimeZone;
use secrecy::SecretString;
use serde::Deserialize;
use tokio::sync::OnceCell;
use tracing::debug;

use super::{
    AuthKind, AuthRules, Boxed, Expiry, Freshness, Renewal, Source, TOKEN_TIMEOUT, TokenSource,
    WorkspaceToken,
    azure::{self, Rights},
};
use crate::{
    config::AuthFamily,
    workspace::{
        CallError, CallErrorKind, WorkspaceError,
        api::{Api, PROBE_TIMEOUT},
        command::{self, Failure},
        host::Host,
        settings::ResolvedSettings,
        times::{self, Number},
    },
};

/// It starts slowly, and may renew its own token over the network.
const TIMEOUT: Duration = Duration::from_secs(30);
// The login, the workspace's tenant, a token with it and without, and the management token with the subscription and without.
const _: () = assert!(5 * TIMEOUT.as_secs() + PROBE_TIMEOUT.as_secs() <= TOKEN_TIMEOUT.as_secs());

pub(super) const RULES: AuthRules = AuthRules {
    family: Some(AuthFamily::Azure),
    // No setting is its own: it is tried where the settings of Azure select no other kind.
    is_selected: |_| false,
    is_available: |settings, host| azure::is_azure(settings, host),
    ..AuthRules::new(|settings, host| {
        let hint = "check with `az account show` that the right account is logged in, and that it is a user of this workspace";
        Ok(Source::new(
            AuthKind::AzureCli,
            hint,
            AzureCli::new(settings, host)?,
        ))
    })
};

/// Failures of the CLI, which has no codes of its own: those of Entra ID (AADSTS…) stand in its messages.
const FAILURES: [Failure; 5] = [
    (
        &["AADSTS50173", "AADSTS700082", "AADSTS70043", "expired"],
        CallErrorKind::Refused,
        "the Azure CLI's login has expired",
        "run `az login`",
    ),
    (
        &["az login", "No subscription found"],
        CallErrorKind::Refused,
        "the Azure CLI is not logged in",
        "run `az login`",
    ),
    (
        &["AADSTS50076", "AADSTS50079", "interaction"],
        CallErrorKind::Refused,
        "the Azure CLI's login needs another factor",
        "run `az login --scope 2ff814a6-3304-4ab8-85cb-cd0e6f879c1d/.default`",
    ),
    (
        &[
            "Failed to resolve",
            "Connection",
            "Max retries exceeded",
            "timed out",
        ],
        CallErrorKind::Unavailable,
        "the Azure CLI does not reach Microsoft Entra ID",
        "check that this machine reaches login.microsoftonline.com, and the proxy variables (`HTTPS_PROXY`, `NO_PROXY`)",
    ),
    (
        &[""],
        CallErrorKind::Refused,
        "the Azure CLI returned no token",
        "run `az account get-access-token --resource 2ff814a6-3304-4ab8-85cb-cd0e6f879c1d` by hand",
    ),
];

struct AzureCli {
    program: PathBuf,
    tenant: Option<String>,
    subscription: Option<String>,
    rights: Rights,
    login: OnceCell<Login>,
}

/// The kind of identity that is logged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Login {
    /// A managed identity, which takes no `--tenant`.
    ManagedIdentity,
    Person,
    ServicePrincipal,
}

#[derive(Deserialize)]
struct Account {
    #[serde(default)]
    user: AccountUser,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AccountUser {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "accessToken")]
    access_token: SecretString,
    /// In local time, without an offset.
    #[serde(rename = "expiresOn", default)]
    local: Option<String>,
    /// Seconds since 1970, since version 2.54.
    #[serde(default)]
    expires_on: Option<Number>,
}

impl AzureCli {
    fn new(settings: &ResolvedSettings, host: &Host) -> Result<Self, WorkspaceError> {
        let mut programs = command::find("az", &settings.variables).into_iter();
        let program = programs.next().ok_or_else(|| {
            WorkspaceError::absent("azure-cli needs the command `az`, which is not installed")
                .with_hint("install the Azure CLI (https://learn.microsoft.com/cli/azure) and run `az login`")
        })?;
        let id = settings.azure_workspace_resource_id.as_deref();
        // /subscriptions/SUBSCRIPTION/resourceGroups/...
        let subscription = id.and_then(|id| id.split('/').nth(2)).map(str::to_owned);
        Ok(Self {
            program,
            tenant: settings.azure_tenant_id.clone(),
            subscription: subscription.filter(|text| !text.is_empty()),
            rights: Rights::new(settings, azure::cloud(settings, host)?)?,
            login: OnceCell::new(),
        })
    }

    async fn token(&self, api: &Api) -> Result<WorkspaceToken, CallError> {
        // Kept, since the CLI starts slowly.
        let login = *self.login.get_or_try_init(|| self.login()).await?;
        // A person with several tenants needs a token of the workspace's.
        let tenant = match (&self.tenant, login) {
            (_, Login::ManagedIdentity) => None,
            (Some(tenant), _) => Some(tenant.clone()),
            // Not an error: without a tenant, `az` uses that of the login.
            (None, _) => azure::tenant(api, AuthKind::AzureCli).await.ok(),
        };
        let mut token = match self.request(azure::DATABRICKS, tenant.as_deref()).await {
            // A login with a federated token has a fixed tenant and accepts no other.
            Err(_) if login == Login::ServicePrincipal && tenant.is_some() => {
                self.request(azure::DATABRICKS, None).await?
            }
            token => token?,
        };
        // People are users of the workspace already.
        // Without the management token, a service principal that the workspace lists is still accepted.
        let management = match login {
            Login::Person => None,
            _ => {
                let management = self.request(self.rights.management, tenant.as_deref());
                management.await.ok()
            }
        };
        self.rights.add_to(&mut token, management.as_ref());
        Ok(token)
    }

    async fn login(&self) -> Result<Login, CallError> {
        let stdout = self.run(&["account", "show", "--output", "json"]).await?;
        let account: Account = serde_json::from_slice(&stdout)
            .map_err(|_| CallError::malformed("`az account show` did not print an account"))?;
        let AccountUser { name, kind } = account.user;
        Ok(match (kind.as_str(), name.as_str()) {
            ("servicePrincipal", "systemAssignedIdentity" | "userAssignedIdentity") => {
                Login::ManagedIdentity
            }
            ("servicePrincipal", _) => Login::ServicePrincipal,
            _ => Login::Person,
        })
    }

    async fn request(
        &self,
        resource: &str,
        tenant: Option<&str>,
    ) -> Result<WorkspaceToken, CallError> {
        let mut arguments = vec![
            "account",
            "get-access-token",
            "--resource",
            resource,
            "--output",
            "json",
        ];
        if let Some(tenant) = tenant {
            arguments.extend(["--tenant", tenant]);
        }
        // `az` takes one of tenant and subscription, not both.
        let stdout = match (&self.subscription, tenant) {
            // An identity may use a workspace without seeing its subscription.
            (Some(subscription), None) => {
                let mut with_subscription = arguments.clone();
                with_subscription.extend(["--subscription", subscription]);
                match self.run(&with_subscription).await {
                    Ok(stdout) => stdout,
                    Err(error) => {
                        debug!(%error, "no token with the subscription; retrying without");
                        self.run(&arguments).await?
                    }
                }
            }
            _ => self.run(&arguments).await?,
        };
        let malformed =
            || CallError::malformed("`az account get-access-token` did not print a token");
        let answer: Answer = serde_json::from_slice(&stdout).map_err(|_| malformed())?;
        // The time without an offset is ambiguous in the hour when clocks are set back.
        let epoch = answer.expires_on.as_ref().and_then(Number::timestamp);
        let at = epoch.or_else(|| times::from_text(answer.local.as_deref()?, &TimeZone::system()));
        WorkspaceToken::new(answer.access_token, Expiry::At(at.ok_or_else(malformed)?))
    }

    async fn run(&self, arguments: &[&str]) -> Result<zeroize::Zeroizing<Vec<u8>>, CallError> {
        let output = command::run(&self.program, arguments, TIMEOUT).await;
        let output = output.map_err(|error| {
            let hint = "run `az account get-access-token` by hand";
            error.call_error("the Azure CLI returned no token", hint)
        })?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(command::explain(&FAILURES, &output.stderr))
        }
    }
}

impl TokenSource for AzureCli {
    fn token<'a>(&'a self, api: &'a Api, _: Freshness) -> Boxed<'a, WorkspaceToken> {
        Box::pin(self.token(api))
    }

    fn renewal(&self) -> Renewal {
        Renewal::Cached
    }
}

#[cfg(test)]
mod tests {
    use jiff::tz::Offset;

    use super::*;

    #[test]
    fn the_expiry_is_in_local_time() {
        let zone = TimeZone::fixed(Offset::constant(2));
        assert_eq!(
            times::from_text("2026-08-28 15:04:05.000000", &zone),
            Some("2026-08-28T13:04:05Z".parse().unwrap())
        );
        assert_eq!(times::from_text("soon", &zone), None);
    }
}
