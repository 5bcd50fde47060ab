//! Failures of locating an endpoint, with the names that exist for the hint.

use std::fmt;

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
    Disabled { name: Target, known: Known },
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("`{branch}` has no {kind} endpoint")]
    NoEndpoint {
        branch: String,
        kind: &'static str,
        known: Known,
    },
    #[error("the workspace names no {kind}host for `{name}`")]
    NoHost {
        name: Target,
        // Empty, or `read-only `.
        kind: &'static str,
    },
    #[error("the app `{app}` has no Lakebase resource")]
    NoResource { app: String, known: Known },
    #[error("there is no {what}")]
    NotFound {
        what: String,
        known: Known,
        #[source]
        source: Option<CallError>,
    },
    #[error("nothing names the endpoint: neither ENDPOINT_NAME, PGHOST nor an app with a database")]
    NotNamed { known: Known },
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
        let hint = match self {
            Self::Call { source, .. } if source.is_forbidden() => format!(
                "without the right to look it up, {set} and PGHOST, which skip the look-up; or grant the identity access to the project"
            ),
            Self::Call { source, .. } => return source.hint.clone(),
            Self::Disabled {
                name: Target::Endpoint(name),
                known,
            } => known.after(&format!(
                "no connection can wake it; enable it: databricks postgres update-endpoint {name} spec.disabled --json '{{\"spec\":{{\"disabled\":false}}}}'"
            )),
            Self::Disabled {
                name: Target::Instance(name),
                known,
            } => known.after(&format!(
                "start it: databricks database update-database-instance {name} stopped --json '{{\"stopped\":false}}'"
            )),
            Self::Name(error) => error.hint().to_owned(),
            Self::Uid { name, .. } => format!("set ENDPOINT_NAME={name}"),
            Self::NoEndpoint { branch, known, .. } => known.after(&format!(
                "make one, or name another; `databricks postgres list-endpoints {branch}` shows them"
            )),
            Self::NoHost { kind: "", .. } => {
                "it may still be starting; or set PGHOST to its host (ep-...database...)".to_owned()
            }
            Self::NoHost { .. } => {
                "enable readable secondaries on it, or connect without --read-only".to_owned()
            }
            Self::NoResource { known, .. } => {
                known.after("add a database to the app's resources, or set ENDPOINT_NAME")
            }
            Self::NotFound { known, .. } | Self::NotNamed { known } => known.after(set),
            Self::TooLong { .. } => set.to_owned(),
        };
        Some(hint)
    }
}

/// Names of resources that exist, up to a number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The kind: `endpoints of projects/p/branches/b`.
    what: String,
    names: Vec<String>,
    /// The number of names left out.
    more: usize,
}

impl Known {
    pub(super) fn new(what: impl Into<String>, names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        names.dedup();
        let more = names.len().saturating_sub(MAX_SHOWN);
        names.truncate(MAX_SHOWN);
        Self {
            what: what.into(),
            names,
            more,
        }
    }

    /// A hint, followed by the names if there are any.
    fn after(&self, hint: &str) -> String {
        if self.names.is_empty() {
            hint.to_owned()
        } else {
            format!("{hint}; {self}")
        }
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.names.join(", "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_existing_names_is_bounded() {
        let names = (0..25).map(|number| format!("projects/p{number:02}"));
        let known = Known::new("projects", names);
        assert_eq!((known.names.len(), known.more), (MAX_SHOWN, 15));
        let text = known.to_string();
        assert!(text.starts_with("projects: projects/p00, "), "{text}");
        assert!(text.ends_with("projects/p09 and 15 more"), "{text}");
    }
}
