//! The ways that the Databricks SDKs have and we do not: known by name, so that whoever has one configured is told what
//! to use instead. To support one is to give it a file of its own and take it out of here.

use crate::workspace::settings::SettingsError;

const SERVICE_PRINCIPAL: &str = "use a service principal: set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET` (oauth-m2m)";
const CLI: &str = "run `databricks auth login` and leave `DATABRICKS_AUTH_TYPE` out, or set it to `databricks-cli`";

const KINDS: &[(&str, &str)] = &[
    (
        "basic",
        "Databricks has ended passwords: use `databricks auth login`, or a service principal (oauth-m2m)",
    ),
    (
        "github-oidc-azure",
        "federate with Databricks directly (github-oidc: set `DATABRICKS_CLIENT_ID` to the service principal), or log in with azure/login and use azure-cli",
    ),
    ("google-credentials", SERVICE_PRINCIPAL),
    ("google-id", SERVICE_PRINCIPAL),
    ("external-browser", CLI),
    ("oauth-u2m", CLI),
    ("runtime", SERVICE_PRINCIPAL),
    ("runtime-oauth", SERVICE_PRINCIPAL),
];

/// The refusal of a way of this name, if it is one of those.
pub(super) fn refusal(kind: &str) -> Option<SettingsError> {
    let (kind, instead) = KINDS.iter().copied().find(|(known, _)| *known == kind)?;
    Some(SettingsError::Refused { kind, instead })
}
