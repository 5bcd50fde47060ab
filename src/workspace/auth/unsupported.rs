//! Kinds of authentication that the Databricks SDKs have and this program lacks, each with an alternative for the hint.

use crate::{
    config::AuthFamily,
    workspace::{WorkspaceError, settings::ResolvedSettings},
};

const SERVICE_PRINCIPAL: &str = "use a service principal: set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET` (oauth-m2m)";
const CLI: &str = "run `databricks auth login` and leave `DATABRICKS_AUTH_TYPE` out, or set it to `databricks-cli`";

const BASIC: &str = "basic";
const GITHUB_AZURE: &str = "github-oidc-azure";
const GOOGLE_CREDENTIALS: &str = "google-credentials";
const GOOGLE_ID: &str = "google-id";

const KINDS: &[(&str, &str)] = &[
    (
        BASIC,
        "Databricks has ended passwords: use `databricks auth login`, or a service principal (oauth-m2m)",
    ),
    (
        GITHUB_AZURE,
        "federate with Databricks directly (github-oidc: set `DATABRICKS_CLIENT_ID` to the service principal), or log in with azure/login and use azure-cli",
    ),
    (GOOGLE_CREDENTIALS, SERVICE_PRINCIPAL),
    (GOOGLE_ID, SERVICE_PRINCIPAL),
    ("external-browser", CLI),
    ("oauth-u2m", CLI),
    ("runtime", SERVICE_PRINCIPAL),
    ("runtime-oauth", SERVICE_PRINCIPAL),
];

/// The refusal of the kind with this name.
pub(super) fn by_label(label: &str) -> Option<WorkspaceError> {
    let (kind, instead) = KINDS.iter().copied().find(|(known, _)| *known == label)?;
    let message = format!("signing in with {kind} is not supported");
    Some(WorkspaceError::new(message).with_hint(instead))
}

/// The refusal of the kind that these settings of a family select.
pub(super) fn by_family(family: AuthFamily, settings: &ResolvedSettings) -> Option<WorkspaceError> {
    match family {
        AuthFamily::Google if settings.google_credentials.is_none() => by_label(GOOGLE_ID),
        family => by_label(labels(family).first()?),
    }
}

/// The names of a family's kinds.
pub(super) fn labels(family: AuthFamily) -> &'static [&'static str] {
    match family {
        AuthFamily::Basic => &[BASIC],
        AuthFamily::Google => &[GOOGLE_CREDENTIALS],
        _ => &[],
    }
}

/// The refusal of a GitHub Actions job that is set up to log in to Azure.
pub(super) fn github_azure(settings: &ResolvedSettings) -> Option<WorkspaceError> {
    let is_azure_job =
        super::kinds::github_oidc::is_job(settings) && settings.azure_client_id.is_some();
    is_azure_job.then(|| by_label(GITHUB_AZURE))?
}
