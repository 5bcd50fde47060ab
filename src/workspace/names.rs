//! The names of what a credential is for, checked so that they can stand in an address.

use std::{fmt, str::FromStr};

use crate::config::without_userinfo;

/// The longest resource id.
const MAX_ID: usize = 63;
/// The longest host name (RFC 1035).
const MAX_HOST: usize = 253;
/// Ends the first label of a pooler's host, of either kind.
const POOLER: &str = "-pooler";
/// Ends the hosts of Neon's own service.
const NEON: &str = ".neon.tech";
/// Ends the first label of the readable replicas' host.
const READ_ONLY: &str = "-ro";

/// What is wrong with a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not the name of an endpoint.
    #[error("`{name}` is not of the form `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`")]
    Endpoint {
        /// What was given.
        name: String,
    },
    /// Not a host name.
    #[error("`{name}` is not a host name")]
    Host {
        /// What was given.
        name: String,
    },
    /// Not the name of a database instance.
    #[error("`{name}` is not the name of a database instance")]
    Instance {
        /// What was given.
        name: String,
    },
    /// A host of Neon's own service.
    #[error("`{name}` is a host of Neon, not of Databricks Lakebase")]
    Neon {
        /// What was given.
        name: String,
    },
    /// Nothing that leads to an endpoint.
    #[error("`{name}` names no endpoint, branch, project, instance or host")]
    Reference {
        /// What was given.
        name: String,
    },
}

impl NameError {
    /// What to write instead.
    pub fn hint(&self) -> String {
        match self {
            Self::Endpoint { .. } => {
                "the form is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`".to_owned()
            }
            Self::Host { .. } => "a host is named as in `ep-cool-breeze-1.database.us-east-1.cloud.databricks.com`".to_owned(),
            Self::Instance { .. } => {
                "an instance is named by letters, digits and hyphens".to_owned()
            }
            Self::Neon { .. } => "a Databricks workspace mints no credential for it: name a Lakebase endpoint (`ep-...database...databricks.com`), or give the endpoint a password of its own (`credential`)".to_owned(),
            Self::Reference { .. } => {
                "write `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`, `projects/PROJECT/branches/BRANCH`, \
                 `projects/PROJECT`, the endpoint's host, or the name of a database instance"
                    .to_owned()
            }
        }
    }
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

/// `projects/P/branches/B`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BranchName(String);

impl BranchName {
    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The endpoint of this id on it.
    pub(super) fn endpoint(&self, id: &str) -> EndpointName {
        EndpointName(format!("{}/endpoints/{id}", self.0))
    }
}

impl FromStr for BranchName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse()? {
            Reference::Branch(name) => Ok(name),
            _ => Err(NameError::Reference {
                name: text.to_owned(),
            }),
        }
    }
}

/// `projects/P`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProjectName(String);

impl ProjectName {
    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The branch of this id in it.
    pub(super) fn branch(&self, id: &str) -> BranchName {
        BranchName(format!("{}/branches/{id}", self.0))
    }
}

impl From<&InstanceName> for ProjectName {
    /// The project that an instance of this name has become.
    fn from(name: &InstanceName) -> Self {
        Self(format!("projects/{}", name.0))
    }
}

/// Whatever may stand where an endpoint is to be named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// The endpoint itself.
    Endpoint(EndpointName),
    /// The read-write endpoint of a branch.
    Branch(BranchName),
    /// That of a project's default branch.
    Project(ProjectName),
    /// A Provisioned instance.
    Instance(InstanceName),
    /// Whatever answers on this host.
    Host(HostName),
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        let unknown = || NameError::Reference {
            name: without_userinfo(text).into_owned(),
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            ["projects", project] if is_id(project) => {
                Ok(Self::Project(ProjectName(text.to_owned())))
            }
            ["projects", project, "branches", branch] if is_id(project) && is_id(branch) => {
                Ok(Self::Branch(BranchName(text.to_owned())))
            }
            ["projects", _, "branches", _, "endpoints", _] => Ok(Self::Endpoint(text.parse()?)),
            [word] => {
                // An endpoint's uid is the first label of its host and leads to it just as well.
                let is_host = word.contains('.') || word.starts_with("ep-");
                if is_host {
                    return Ok(Self::Host(word.parse()?));
                }
                word.parse().map(Self::Instance).map_err(|_| unknown())
            }
            _ => Err(unknown()),
        }
    }
}

/// What the first label of a host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HostKind {
    /// An endpoint, by its uid.
    Endpoint(String),
    /// A Provisioned instance, by its uid.
    Instance(String),
    /// Nothing: an alias, or another server.
    Other,
}

/// The name of a host that an endpoint may answer on, lower-case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName {
    text: String,
    pub(super) kind: HostKind,
    is_read_only: bool,
}

impl HostName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether its shape is that of a Lakebase endpoint's host.
    pub fn is_lakebase(&self) -> bool {
        self.kind != HostKind::Other
    }

    /// The host beside it that leads past the built-in pooler, where this is the pooler's.
    pub fn direct(&self) -> Option<String> {
        let (label, zone) = match self.text.split_once('.') {
            Some((label, zone)) => (label, Some(zone)),
            None => (&*self.text, None),
        };
        let label = label.strip_suffix(POOLER)?;
        Some(zone.map_or_else(|| label.to_owned(), |zone| format!("{label}.{zone}")))
    }

    /// Whether it is one of Neon's own service, which shares its shape with Lakebase's.
    pub fn is_neon(&self) -> bool {
        self.text.ends_with(NEON)
    }

    /// Whether it is an address or a whole name, not the first label alone.
    pub(super) fn is_complete(&self) -> bool {
        self.kind == HostKind::Other || self.text.contains('.')
    }

    /// The host of the readable replicas, where the shape of the name tells.
    #[must_use]
    pub fn read_only(&self) -> Self {
        let text = match &self.kind {
            _ if self.is_read_only => return self.clone(),
            HostKind::Endpoint(uid) => self.text.replacen(uid, &format!("{uid}{READ_ONLY}"), 1),
            HostKind::Instance(uid) => self.text.replacen(uid, &format!("ro-{uid}"), 1),
            HostKind::Other => return self.clone(),
        };
        Self {
            text,
            is_read_only: true,
            ..self.clone()
        }
    }
}

impl FromStr for HostName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
        let is_host = (1..=MAX_HOST).contains(&name.len())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
        if !is_host {
            return Err(NameError::Host {
                name: without_userinfo(text.trim()).into_owned(),
            });
        }
        let label = name.split('.').next().unwrap_or_default();
        let label = label.strip_suffix(POOLER).unwrap_or(label);
        let (kind, is_read_only) = if label.starts_with("ep-") {
            let uid = label.strip_suffix(READ_ONLY);
            let kind = HostKind::Endpoint(uid.unwrap_or(label).to_owned());
            (kind, uid.is_some())
        } else if let Some(uid) = label.strip_prefix("instance-") {
            let replica = uid.strip_prefix("ro-");
            let kind = HostKind::Instance(replica.unwrap_or(uid).to_owned());
            (kind, replica.is_some())
        } else {
            (HostKind::Other, false)
        };
        Ok(Self {
            kind,
            text: name,
            is_read_only,
        })
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
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
    use proptest::prelude::*;

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
    fn whatever_leads_to_an_endpoint_is_told_apart() {
        let read = |text: &str| text.parse::<Reference>();
        assert!(matches!(
            read("projects/p/branches/b/endpoints/e"),
            Ok(Reference::Endpoint(_))
        ));
        assert!(
            matches!(read(" projects/p/branches/br-b "), Ok(Reference::Branch(name)) if name.as_str() == "projects/p/branches/br-b")
        );
        assert!(
            matches!(read("projects/p"), Ok(Reference::Project(name)) if name.as_str() == "projects/p")
        );
        assert!(matches!(read("my-instance"), Ok(Reference::Instance(_))));
        for host in [
            "ep-a-1.database.cloud.databricks.com",
            "ep-a-1",
            "db.example.com",
        ] {
            assert!(matches!(read(host), Ok(Reference::Host(_))), "{host}");
        }
        for text in [
            "",
            "projects/",
            "projects/p/branches/",
            "projects/p/branches/b/databases/d",
            "projects/p/branches/b/endpoints/",
            "/projects/p",
            "two words",
            "a/b",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_host_says_what_it_belongs_to() {
        let host = |text: &str| text.parse::<HostName>().unwrap();
        let uid = HostKind::Endpoint("ep-a-1".to_owned());
        assert_eq!(host("EP-a-1.database.cloud.databricks.com.").kind, uid);
        assert_eq!(host("ep-a-1-ro.database.cloud.databricks.com").kind, uid);
        let uid = HostKind::Instance("0f7d-1".to_owned());
        assert_eq!(
            host("instance-0f7d-1.database.azuredatabricks.net").kind,
            uid
        );
        assert_eq!(
            host("instance-ro-0f7d-1.database.azuredatabricks.net").kind,
            uid
        );
        assert_eq!(host("localhost").kind, HostKind::Other);
        assert!("ep a".parse::<HostName>().is_err());
    }

    #[test]
    fn the_replicas_host_follows_from_the_endpoints() {
        for (given, expected) in [
            ("ep-a-1.database.x", "ep-a-1-ro.database.x"),
            ("ep-a-1-ro.database.x", "ep-a-1-ro.database.x"),
            ("instance-7.database.x", "instance-ro-7.database.x"),
            ("localhost", "localhost"),
        ] {
            let host: HostName = given.parse().unwrap();
            assert_eq!(host.read_only().as_str(), expected);
        }
    }

    #[test]
    fn a_poolers_host_is_its_endpoints_and_knows_the_direct_one() {
        for (given, direct, read_only) in [
            (
                "ep-a-1-pooler.database.x",
                "ep-a-1.database.x",
                "ep-a-1-ro-pooler.database.x",
            ),
            (
                "EP-A-1-ro-pooler.database.x",
                "ep-a-1-ro.database.x",
                "ep-a-1-ro-pooler.database.x",
            ),
        ] {
            let host: HostName = given.parse().unwrap();
            assert_eq!(host.direct().as_deref(), Some(direct));
            assert_eq!(host.kind, HostKind::Endpoint("ep-a-1".to_owned()));
            assert_eq!(host.read_only().as_str(), read_only);
        }
        let direct: HostName = "ep-a-1.database.x".parse().unwrap();
        assert_eq!(direct.direct(), None);
    }

    #[test]
    fn neons_hosts_are_told_apart() {
        let is_neon = |name: &str| name.parse::<HostName>().unwrap().is_neon();
        assert!(is_neon("ep-cool-breeze-1.us-east-2.aws.neon.tech"));
        assert!(is_neon("EP-cool-1-pooler.eu-central-1.aws.NEON.tech."));
        assert!(!is_neon("ep-a-1.database.cloud.databricks.com"));
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

    proptest! {
        /// What is accepted is shown as it is accepted again; what is refused has a hint.
        #[test]
        fn names_are_read_back(text in "(projects|branches|endpoints|ep-[a-z0-9]{1,4}|[a-zA-Z0-9.:@/_ -]{0,9}|/){0,9}") {
            if let Ok(name) = text.parse::<EndpointName>() {
                prop_assert_eq!(name.as_str().parse::<EndpointName>().unwrap(), name.clone());
                prop_assert!(name.branch().parse::<BranchName>().is_ok());
            }
            if let Ok(name) = text.parse::<HostName>() {
                prop_assert_eq!(name.as_str().parse::<HostName>().unwrap(), name);
            }
            if let Err(error) = text.parse::<Reference>() {
                prop_assert!(!error.hint().is_empty());
            }
        }

        #[test]
        fn no_text_makes_them_panic(text: String) {
            let _ = text.parse::<Reference>();
            let _ = text.parse::<HostName>();
            let _ = text.parse::<InstanceName>();
        }

        #[test]
        fn every_well_formed_endpoint_is_one(project in "[a-z][a-z0-9-]{0,20}[a-z0-9]", branch in "[a-z][a-z0-9]{0,9}", id in "[a-z][a-z0-9]{0,9}") {
            let text = format!("projects/{project}/branches/{branch}/endpoints/{id}");
            let is_endpoint = matches!(text.parse(), Ok(Reference::Endpoint(name)) if name.as_str() == text);
            prop_assert!(is_endpoint, "{}", text);
        }
    }
}
