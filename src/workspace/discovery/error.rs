//! Failures of locating an endpoint, with the names that exist for the hint.

use super::lookup::Lookup;
use crate::workspace::{CallError, EndpointName, NameError, Target};

/// The most names in a hint.
const MAX_SHOWN: usize = 10;

/// Why no endpoint was found.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages describe variants and fields")]
pub enum LocateError {
    #[error("cannot look up {what}")]
    Call { what: String, source: CallError },
    #[error("there is no endpoint `{given}`: the last part is the uid of `{name}`")]
    Uid {
        given: EndpointName,
        name: EndpointName,
    },
    #[error("the endpoint `{name}` is disabled")]
    Disabled { name: Target, known: String },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("`{branch}` has no {kind} endpoint")]
    NoEndpoint {
        branch: String,
        kind: &'static str,
        known: String,
    },
    #[error("the workspace names no {kind}host for `{name}`")]
    NoHost {
        name: Target,
        // Empty, or `read-only `.
        kind: &'static str,
    },
    #[error("the app `{app}` has no Lakebase resource")]
    NoResource { app: String, known: String },
    #[error("there is no {what}")]
    NotFound {
        what: String,
        known: String,
        #[source]
        source: Option<CallError>,
    },
    #[error("nothing names the endpoint: neither ENDPOINT_NAME, PGHOST nor an app with a database")]
    NotNamed { known: String },
    #[error("the search for `{what}` in the whole workspace took too long")]
    TooLong { what: String },
}

impl LocateError {
    /// Whether only the right to a look-up is missing.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.is_forbidden())
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let set = "set ENDPOINT_NAME=projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT";
        let (hint, known) = match self {
            Self::Call { source, .. } if source.is_forbidden() => (
                format!(
                    "without the right to look it up, {set} and PGHOST, which skip the look-up; or grant the identity access to the project"
                ),
                "",
            ),
            Self::Call { source, .. } => return source.hint.clone(),
            Self::Disabled { name, known } => {
                let hint = match name {
                    Target::Endpoint(name) => format!(
                        "no connection can wake it; enable it: databricks postgres update-endpoint {name} spec.disabled --json '{{\"spec\":{{\"disabled\":false}}}}'"
                    ),
                    Target::Instance(name) => format!(
                        "start it: databricks database update-database-instance {name} stopped --json '{{\"stopped\":false}}'"
                    ),
                };
                (hint, &**known)
            }
            Self::Name(error) => (error.hint().to_owned(), ""),
            Self::Uid { name, .. } => (format!("set ENDPOINT_NAME={name}"), ""),
            Self::NoEndpoint { branch, known, .. } => (
                format!(
                    "make one, or name another; `databricks postgres list-endpoints {branch}` shows them"
                ),
                &**known,
            ),
            Self::NoHost { kind: "", .. } => (
                "it may still be starting; or set PGHOST to its host (ep-...database...)"
                    .to_owned(),
                "",
            ),
            Self::NoHost { .. } => (
                "enable readable secondaries on it, or connect without --read-only".to_owned(),
                "",
            ),
            Self::NoResource { known, .. } => (
                "add a database to the app's resources, or set ENDPOINT_NAME".to_owned(),
                &**known,
            ),
            Self::NotFound { known, .. } | Self::NotNamed { known } => (set.to_owned(), &**known),
            Self::TooLong { .. } => (set.to_owned(), ""),
        };
        Some(match known {
            "" => hint,
            known => format!("{hint}; {known}"),
        })
    }
}

impl Lookup<'_> {
    /// The error of a failed look-up: if nothing was found, with what exists near a name.
    pub(super) async fn failed(&self, what: String, near: &str, error: CallError) -> LocateError {
        if error.status == Some(404) {
            LocateError::NotFound {
                what,
                known: self.near(near).await,
                source: Some(error),
            }
        } else {
            LocateError::Call {
                what: format!("the {what}"),
                source: error,
            }
        }
    }

    /// The resources that exist near a name: on its branch, else in its project, else at all.
    pub(super) async fn near(&self, name: &str) -> String {
        if name.is_empty() {
            return String::new();
        }
        let mut parts = name.split('/');
        let (kind, project, branch) = (parts.next(), parts.next(), parts.nth(1));
        if let (Some(project), Some(branch)) = (project, branch) {
            let branch = format!("projects/{project}/branches/{branch}");
            if let Ok(endpoints) = self.endpoints(&branch).await {
                let names = endpoints.into_iter().map(|info| info.name);
                return known(&format!("endpoints of {branch}"), names);
            }
        }
        if let Some(project) = project {
            let project = format!("projects/{project}");
            if let Ok(branches) = self.branches(&project).await {
                let names = branches.into_iter().map(|branch| branch.name);
                return known(&format!("branches of {project}"), names);
            }
        }
        let projects = self.projects().await.unwrap_or_default();
        let projects = projects.into_iter().map(|project| project.name);
        if kind != Some("instances") {
            return known("projects", projects);
        }
        let instances = self.instances().await.unwrap_or_default();
        let instances = instances.into_iter().map(|info| info.name);
        known("instances and projects", instances.chain(projects))
    }

    /// The other endpoints of the branch that are not disabled.
    pub(super) async fn siblings(&self, target: &Target) -> String {
        let Target::Endpoint(name) = target else {
            return String::new();
        };
        let endpoints = self.endpoints(name.branch()).await.unwrap_or_default();
        let others = endpoints
            .into_iter()
            .filter(|info| info.name != name.as_str() && !info.disabled)
            .map(|info| info.name);
        known(&format!("others of {}", name.branch()), others)
    }
}

/// The names of resources that exist, up to a number: `endpoints of projects/p/branches/b: …`. Empty if there are none.
pub(super) fn known(what: &str, names: impl IntoIterator<Item = String>) -> String {
    let mut names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    names.dedup();
    let more = names.len().saturating_sub(MAX_SHOWN);
    names.truncate(MAX_SHOWN);
    match (names.join(", "), more) {
        (names, _) if names.is_empty() => names,
        (names, 0) => format!("{what}: {names}"),
        (names, more) => format!("{what}: {names} and {more} more"),
    }
}
