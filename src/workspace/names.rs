//! The names of what a credential is for, checked so that they can stand in an address.

use std::{fmt, str::FromStr};

/// The longest resource id.
const MAX_ID: usize = 63;

/// What is wrong with a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not the name of an endpoint.
    #[error("`{name}` is not of the form `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`")]
    Endpoint {
        /// What was given.
        name: String,
    },
    /// Not the name of a database instance.
    #[error("`{name}` is not the name of a database instance")]
    Instance {
        /// What was given.
        name: String,
    },
}

/// `projects/P/branches/B/endpoints/E`: a compute of Lakebase Autoscaling.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointName(String);

impl EndpointName {
    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `projects/P/branches/B`.
    pub fn branch(&self) -> &str {
        self.0
            .rsplit_once("/endpoints/")
            .map_or("", |(branch, _)| branch)
    }
}

impl FromStr for EndpointName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [
                "projects",
                project,
                "branches",
                branch,
                "endpoints",
                endpoint,
            ] if [project, branch, endpoint].into_iter().all(is_id) => Ok(Self(text.to_owned())),
            _ => Err(NameError::Endpoint {
                name: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A database instance of Lakebase Provisioned.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceName(String);

impl InstanceName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InstanceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        if is_id(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Instance {
                name: text.to_owned(),
            })
        }
    }
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a credential is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Lakebase Autoscaling.
    Endpoint(EndpointName),
    /// Lakebase Provisioned.
    Instance(InstanceName),
}

impl Target {
    /// The name, of whichever kind.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Endpoint(name) => name.as_str(),
            Self::Instance(name) => name.as_str(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_named_in_full() {
        let name: EndpointName = " projects/my-app/branches/br-broad-pine/endpoints/primary\n"
            .parse()
            .unwrap();
        assert_eq!(
            name.as_str(),
            "projects/my-app/branches/br-broad-pine/endpoints/primary"
        );
        assert_eq!(name.branch(), "projects/my-app/branches/br-broad-pine");
        for text in [
            "",
            "primary",
            "ep-cool-breeze-1.database.us-east-1.cloud.databricks.com",
            "projects/p/branches/b",
            "projects/p/branches/b/endpoints/",
            "projects/p/branches/b/endpoints/e/x",
            "projects/p/branches/../endpoints/e",
            "projects/p/branches/b/endpoints/e?x=1",
            "/projects/p/branches/b/endpoints/e",
        ] {
            assert!(text.parse::<EndpointName>().is_err(), "{text}");
        }
    }

    #[test]
    fn an_instance_name_is_one_word() {
        assert_eq!(
            "my-instance".parse::<InstanceName>().unwrap().as_str(),
            "my-instance"
        );
        assert!("my instance".parse::<InstanceName>().is_err());
        assert!("a/b".parse::<InstanceName>().is_err());
    }
}
