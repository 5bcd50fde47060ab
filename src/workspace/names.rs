//! Names of endpoints, branches, projects, instances and hosts, checked for use in addresses.

use std::{fmt, str::FromStr};

use crate::config::without_userinfo;

/// The longest resource id.
const MAX_ID: usize = 63;
/// The longest host name (RFC 1035).
const MAX_HOST: usize = 253;
/// Ends the first label of a pooler's host.
const POOLER: &str = "-pooler";
/// Ends the hosts of Neon's own service.
const NEON: &str = ".neon.tech";
/// Ends the first label of the readable replicas' host.
const READ_ONLY: &str = "-ro";

/// A name that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` {problem}")]
pub struct NameError {
    name: String,
    problem: &'static str,
    hint: &'static str,
}

impl NameError {
    fn new(name: &str, problem: &'static str, hint: &'static str) -> Self {
        // A connection string in place of a name may hold a password.
        let name = without_userinfo(name).into_owned();
        Self {
            name,
            problem,
            hint,
        }
    }

    /// The error for a host of Neon's own service.
    pub(super) fn neon(host: &HostName) -> Self {
        Self::new(
            host.as_str(),
            "is a host of Neon, not of Databricks Lakebase",
            "a Databricks workspace mints no credential for it: name a Lakebase endpoint (`ep-...database...databricks.com`), or give the endpoint a password of its own (`credential`)",
        )
    }

    /// The error for a name of nothing that has an endpoint.
    fn reference(name: &str) -> Self {
        Self::new(
            name,
            "names no endpoint, branch, project, instance or host",
            "write `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`, `projects/PROJECT/branches/BRANCH`, \
             `projects/PROJECT`, the endpoint's host, or the name of a database instance",
        )
    }

    /// A correct form.
    pub fn hint(&self) -> &'static str {
        self.hint
    }
}

macro_rules! resource_names {
    ($($(#[$doc:meta])* $name:ident;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

resource_names! {
    /// `projects/P/branches/B/endpoints/E`: a compute of Lakebase Autoscaling.
    EndpointName;
    /// `projects/P/branches/B`.
    BranchName;
    /// `projects/P`.
    ProjectName;
    /// A database instance of Lakebase Provisioned.
    InstanceName;
}

impl EndpointName {
    /// `projects/P/branches/B`.
    pub fn branch(&self) -> &str {
        let parts = self.0.rsplit_once("/endpoints/");
        parts.map_or("", |(branch, _)| branch)
    }
}

impl BranchName {
    /// The endpoint with this id on it.
    pub(super) fn endpoint(&self, id: &str) -> EndpointName {
        EndpointName(format!("{self}/endpoints/{id}"))
    }
}

impl ProjectName {
    /// The branch with this id in it.
    pub(super) fn branch(&self, id: &str) -> BranchName {
        BranchName(format!("{self}/branches/{id}"))
    }
}

impl From<&InstanceName> for ProjectName {
    /// The project that replaced the instance.
    fn from(name: &InstanceName) -> Self {
        Self(format!("projects/{name}"))
    }
}

/// Whether this is a path of these collections, with an id after each.
fn is_path(text: &str, collections: &[&str]) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let mut pairs = parts.chunks(2).zip(collections);
    parts.len() == 2 * collections.len()
        && pairs.all(|(pair, name)| matches!(pair, [part, id] if part == name && is_id(id)))
}

impl FromStr for EndpointName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        if is_path(text, &["projects", "branches", "endpoints"]) {
            return Ok(Self(text.to_owned()));
        }
        Err(NameError::new(
            text,
            "is not of the form `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`",
            "the form is `projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT`",
        ))
    }
}

impl FromStr for BranchName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.parse()? {
            Reference::Branch(name) => Ok(name),
            _ => Err(NameError::reference(text)),
        }
    }
}

impl FromStr for InstanceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = text.trim();
        if is_id(name) {
            return Ok(Self(name.to_owned()));
        }
        Err(NameError::new(
            name,
            "is not the name of a database instance",
            "an instance is named by letters, digits and hyphens",
        ))
    }
}

/// Anything that `ENDPOINT_NAME` may hold.
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
    /// The endpoint with this host.
    Host(HostName),
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let text = text.trim();
        if is_path(text, &["projects"]) {
            return Ok(Self::Project(ProjectName(text.to_owned())));
        }
        if is_path(text, &["projects", "branches"]) {
            return Ok(Self::Branch(BranchName(text.to_owned())));
        }
        // Parsed as an endpoint, even if it is none, so that the error shows the form of one.
        if text.starts_with("projects/") && text.contains("/endpoints/") {
            return Ok(Self::Endpoint(text.parse()?));
        }
        if text.contains('/') {
            return Err(NameError::reference(text));
        }
        // An endpoint's uid, the first label of its host, leads to it as well.
        if text.contains('.') || text.starts_with("ep-") {
            return Ok(Self::Host(text.parse()?));
        }
        let instance = text.parse().map(Self::Instance);
        instance.map_err(|_| NameError::reference(text))
    }
}

/// The resource that a host name belongs to, by its first label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HostKind {
    /// An endpoint, by its uid.
    Endpoint(String),
    /// A Provisioned instance, by its uid.
    Instance(String),
    /// An alias, or another server.
    Other,
}

/// The name of a host, lower-case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName {
    text: String,
    pub(super) kind: HostKind,
    is_read_only: bool,
}

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it has the form of a Lakebase endpoint's host.
    pub fn is_lakebase(&self) -> bool {
        self.kind != HostKind::Other
    }

    /// The host without the built-in pooler, if this is the pooler's.
    pub fn direct(&self) -> Option<String> {
        let (label, zone) = self
            .text
            .split_at(self.text.find('.').unwrap_or(self.text.len()));
        Some(format!("{}{zone}", label.strip_suffix(POOLER)?))
    }

    /// Whether it belongs to Neon's own service, whose hosts have the same form.
    pub fn is_neon(&self) -> bool {
        self.text.ends_with(NEON)
    }

    /// Whether it is more than the first label of a host.
    pub(super) fn is_complete(&self) -> bool {
        self.kind == HostKind::Other || self.text.contains('.')
    }

    /// The host of the readable replicas; the same host if its form is unknown.
    #[must_use]
    pub fn read_only(&self) -> Self {
        let text = match &self.kind {
            HostKind::Endpoint(uid) if !self.is_read_only => {
                self.text.replacen(uid, &format!("{uid}{READ_ONLY}"), 1)
            }
            HostKind::Instance(uid) if !self.is_read_only => {
                self.text.replacen(uid, &format!("ro-{uid}"), 1)
            }
            _ => return self.clone(),
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
        // RFC 6066 section 3: the server name in TLS has no trailing dot.
        let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
        let is_host = (1..=MAX_HOST).contains(&name.len())
            && name
                .bytes()
                // Also IP addresses, IPv6 in brackets.
                .all(|byte| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte));
        if !is_host {
            return Err(NameError::new(
                text.trim(),
                "is not a host name",
                "a host is named as in `ep-cool-breeze-1.database.us-east-1.cloud.databricks.com`",
            ));
        }
        let label = name.split('.').next().unwrap_or_default();
        // First, since the label of a pooled replica ends in `-ro-pooler`.
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

/// The object of a credential.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Lakebase Autoscaling.
    Endpoint(EndpointName),
    /// Lakebase Provisioned.
    Instance(InstanceName),
}

impl Target {
    /// The name as text.
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
    // Wider than the documented form: the workspace decides. No character may change the path of an address.
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
    fn every_form_of_reference_is_recognized() {
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
    fn a_host_name_shows_its_resource() {
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
    fn hosts_of_neon_are_recognized() {
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
