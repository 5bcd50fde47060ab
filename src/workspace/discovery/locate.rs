//! From an endpoint's settings to its host, user and database. Settings win; look-ups fill in what they leave open.

use std::time::Duration;

use tokio::time::timeout;

use super::{AppDatabases, EndpointInfo, EndpointType, LocateError, error::known, lookup::Lookup};
use crate::{
    config::EndpointConfig,
    workspace::{
        BranchName, EndpointName, HostName, InstanceName, NameError, ProjectName, Reference,
        Target, Workspace, names::HostKind,
    },
};

/// The ids of a new project's branch and endpoint.
const DEFAULT_BRANCH: &str = "production";
const DEFAULT_ENDPOINT: &str = "primary";
/// For a whole search, which may take many calls.
const SEARCH_TIMEOUT: Duration = Duration::from_mins(2);

/// An endpoint that can be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The object of its credentials.
    pub target: Target,
    /// The host to connect to.
    pub host: String,
    /// The role to log in as.
    pub user: String,
    /// The database's name in Postgres, from the settings or the app's resource.
    pub database: Option<String>,
    /// The workspace's information, if it was looked up.
    pub info: Option<EndpointInfo>,
    /// The databases of the app, if it has several.
    pub app_databases: Option<AppDatabases>,
}

impl Workspace {
    /// Locates an endpoint with no more look-ups than the settings leave open; one of name, host and app is enough.
    /// `within` bounds each look-up with its retries; zero disables retries.
    pub async fn locate(
        &self,
        wanted: &EndpointConfig,
        within: Duration,
    ) -> Result<Located, LocateError> {
        let Names {
            mut host,
            reference,
        } = Names::parse(wanted)?;
        // `ENDPOINT_NAME` may hold a host, which is then dialed as it is.
        if let (None, Some(Reference::Host(named))) = (&host, &reference)
            && named.is_complete()
        {
            host = Some(named.clone());
        }
        if let Some(host) = host.as_ref().filter(|host| host.is_neon()) {
            return Err(NameError::neon(host).into());
        }
        let lookup = Lookup::new(self, within);
        let search = Search {
            lookup,
            wanted,
            host,
        };
        // Cancel safe: a search only reads.
        match timeout(SEARCH_TIMEOUT, search.run(reference)).await {
            Ok(located) => located,
            Err(_) => {
                let names = [&wanted.name, &wanted.host, &wanted.app];
                let what = names.into_iter().flatten().next().cloned();
                let what = what.unwrap_or_default();
                Err(LocateError::TooLong { what })
            }
        }
    }
}

/// The names in the settings of an endpoint.
struct Names {
    host: Option<HostName>,
    reference: Option<Reference>,
}

impl Names {
    fn parse(config: &EndpointConfig) -> Result<Self, NameError> {
        Ok(Self {
            host: config.host.as_deref().map(str::parse).transpose()?,
            reference: config.name.as_deref().map(str::parse).transpose()?,
        })
    }
}

/// Checks the names in the settings of an endpoint without the workspace.
pub fn check_names(config: &EndpointConfig) -> Result<(), NameError> {
    Names::parse(config).map(drop)
}

/// A target, before the settings are applied.
pub(super) struct Found {
    target: Target,
    info: Option<EndpointInfo>,
    /// Of the app's resource: a name in Postgres, or a resource name.
    pub(super) database: Option<String>,
    pub(super) app_databases: Option<AppDatabases>,
}

impl Found {
    pub(super) fn new(target: Target, info: Option<EndpointInfo>) -> Self {
        Self {
            target,
            info,
            database: None,
            app_databases: None,
        }
    }

    pub(super) fn endpoint(info: EndpointInfo) -> Option<Self> {
        let target = Target::Endpoint(info.name.parse().ok()?);
        Some(Self::new(target, Some(info)))
    }

    /// The endpoint with the default id, for an identity that may not look it up.
    pub(super) fn default_endpoint(branch: &BranchName) -> Self {
        Self::new(Target::Endpoint(branch.endpoint(DEFAULT_ENDPOINT)), None)
    }
}

/// The search for one endpoint.
pub(super) struct Search<'a> {
    pub(super) lookup: Lookup<'a>,
    wanted: &'a EndpointConfig,
    host: Option<HostName>,
}

impl Search<'_> {
    async fn run(&self, reference: Option<Reference>) -> Result<Located, LocateError> {
        let found = match (reference, &self.host, &self.wanted.app) {
            (Some(reference), ..) => self.by_reference(reference).await?,
            (None, Some(host), _) => self.by_host(host).await?,
            (None, None, Some(app)) => self.by_app(app).await?,
            (None, None, None) => {
                let known = self.lookup.near("projects").await;
                return Err(LocateError::NotNamed { known });
            }
        };
        // No connection wakes a disabled endpoint: clients would wait until their timeout.
        if found.info.as_ref().is_some_and(|info| info.disabled) {
            let known = self.lookup.siblings(&found.target).await;
            let name = found.target;
            return Err(LocateError::Disabled { name, known });
        }
        let read_only = self.wanted.read_only;
        let host = match &self.host {
            // Databricks Apps set `PGHOST` to the read-write host.
            Some(host) if read_only => Some(host.read_only().to_string()),
            Some(host) => Some(host.to_string()),
            None => found
                .info
                .as_ref()
                .and_then(|info| info.host_for(read_only)),
        };
        let host = host.ok_or_else(|| LocateError::NoHost {
            name: found.target.clone(),
            kind: if read_only { "read-only " } else { "" },
        })?;
        let database = match self.wanted.database.clone().or(found.database) {
            Some(text) => Some(self.database_name(&found.target, text).await?),
            None => None,
        };
        Ok(Located {
            host,
            user: self.user().await?,
            database,
            target: found.target,
            info: found.info,
            app_databases: found.app_databases,
        })
    }

    async fn user(&self) -> Result<String, LocateError> {
        // A service principal's id is its role, which saves the call.
        let known = self.wanted.user.as_deref();
        if let Some(user) = known.or_else(|| self.lookup.workspace.service_principal()) {
            return Ok(user.to_owned());
        }
        match self.lookup.profile().await {
            Ok(profile) => Ok(profile.user_name),
            Err(source) => Err(LocateError::Call {
                what: "the identity (set PGUSER to skip this)".to_owned(),
                source,
            }),
        }
    }

    pub(super) async fn by_reference(&self, reference: Reference) -> Result<Found, LocateError> {
        match reference {
            Reference::Endpoint(name) => self.by_endpoint(name).await,
            Reference::Branch(name) => self.by_branch(&name).await,
            Reference::Project(name) => self.by_project(&name).await,
            Reference::Instance(name) => self.by_instance(name).await,
            Reference::Host(host) => self.by_host(&host).await,
        }
    }

    async fn by_endpoint(&self, name: EndpointName) -> Result<Found, LocateError> {
        // Name and host suffice, and an app may have no right to look anything up.
        if self.host.is_some() {
            return Ok(Found::new(Target::Endpoint(name), None));
        }
        let error = match self.lookup.endpoint(&name).await {
            Ok(info) => return Ok(Found::new(Target::Endpoint(name), Some(info))),
            Err(error) => error,
        };
        if error.status == Some(404)
            && let Some(right) = self.by_uid(&name).await
        {
            return Err(LocateError::Uid {
                given: name,
                name: right,
            });
        }
        Err(self
            .lookup
            .failed(format!("endpoint `{name}`"), name.branch(), error)
            .await)
    }

    /// The endpoint whose uid, the first label of its host, stands in place of its id.
    async fn by_uid(&self, given: &EndpointName) -> Option<EndpointName> {
        let (_, id) = given.as_str().rsplit_once('/')?;
        let host: HostName = id.parse().ok()?;
        if !host.is_lakebase() {
            return None;
        }
        let endpoints = self.lookup.endpoints(given.branch()).await.ok()?;
        let info = endpoints.into_iter().find(|info| info.answers_to(&host))?;
        info.name.parse().ok()
    }

    async fn by_branch(&self, branch: &BranchName) -> Result<Found, LocateError> {
        let endpoints = match self.lookup.endpoints(branch.as_str()).await {
            Ok(endpoints) => endpoints,
            // With a host, only the name for the credential is missing, which most likely ends in the default id.
            Err(error) if error.is_forbidden() && self.host.is_some() => {
                return Ok(Found::default_endpoint(branch));
            }
            Err(error) => {
                let what = format!("branch `{branch}`");
                return Err(self.lookup.failed(what, branch.as_str(), error).await);
            }
        };
        let names = endpoints.iter().map(|info| info.name.clone());
        let known = known(&format!("endpoints of {branch}"), names);
        let of_type = |wanted| endpoints.iter().find(|info| info.endpoint_type == wanted);
        let read_write = of_type(EndpointType::ReadWrite);
        let chosen = if self.wanted.read_only {
            // Replicas of the read-write compute, else a compute of their own.
            read_write
                .filter(|info| info.read_only_host.is_some())
                .or_else(|| of_type(EndpointType::ReadOnly))
        } else {
            read_write
        };
        let found = chosen.cloned().and_then(Found::endpoint);
        found.ok_or_else(|| LocateError::NoEndpoint {
            branch: branch.to_string(),
            kind: if self.wanted.read_only {
                "read-only"
            } else {
                "read-write"
            },
            known,
        })
    }

    async fn by_project(&self, project: &ProjectName) -> Result<Found, LocateError> {
        let branch = match self.lookup.project(project).await {
            Ok(found) => match found.default_branch.parse() {
                Ok(branch) => branch,
                Err(_) => self.default_branch(project).await?,
            },
            Err(error) if error.is_forbidden() && self.host.is_some() => {
                project.branch(DEFAULT_BRANCH)
            }
            Err(error) => {
                let what = format!("project `{project}`");
                return Err(self.lookup.failed(what, "projects", error).await);
            }
        };
        self.by_branch(&branch).await
    }

    async fn default_branch(&self, project: &ProjectName) -> Result<BranchName, LocateError> {
        let branches = self.lookup.branches(project.as_str()).await;
        let branches = branches.map_err(|source| LocateError::Call {
            what: format!("the branches of `{project}`"),
            source,
        })?;
        let default = branches.iter().find(|branch| branch.status.is_default);
        let default = default.and_then(|branch| branch.name.parse().ok());
        Ok(default.unwrap_or_else(|| project.branch(DEFAULT_BRANCH)))
    }

    async fn by_instance(&self, name: InstanceName) -> Result<Found, LocateError> {
        let error = match self.lookup.instance(&name).await {
            Ok(info) => return Ok(Found::new(Target::Instance(name), Some(info))),
            Err(error) if error.is_forbidden() && self.host.is_some() => {
                return Ok(Found::new(Target::Instance(name), None));
            }
            Err(error) => error,
        };
        // Instances have become projects of the same name, and a project may be given by its id alone.
        let project = ProjectName::from(&name);
        if error.status == Some(404) && self.lookup.project(&project).await.is_ok() {
            return Box::pin(self.by_project(&project)).await;
        }
        let what = format!("database instance or project `{name}`");
        Err(self.lookup.failed(what, "instances", error).await)
    }

    /// By the app's resource, by uid, and finally by a search of the whole workspace.
    async fn by_host(&self, host: &HostName) -> Result<Found, LocateError> {
        if let Some(app) = &self.wanted.app
            && let Some(found) = self.by_host_of_app(host, app).await
        {
            return Ok(found);
        }
        if let HostKind::Instance(uid) = &host.kind {
            return self.by_instance_uid(host, uid).await;
        }
        let projects = self.lookup.projects().await;
        let projects = projects.map_err(|source| LocateError::Call {
            what: format!("which endpoint answers on `{host}`"),
            source,
        })?;
        let mut seen = Vec::new();
        for project in &projects {
            // A project that fails to be listed must not hide the next.
            let mut branches = self
                .lookup
                .branches(&project.name)
                .await
                .unwrap_or_default();
            // The default branch first: most hosts are found there, with fewer calls.
            branches.sort_by_key(|branch| branch.name != project.status.default_branch);
            for branch in &branches {
                // Only a valid name can stand in a path.
                let Ok(branch) = branch.name.parse::<BranchName>() else {
                    continue;
                };
                if self.lookup.is_spent() {
                    let what = host.to_string();
                    return Err(LocateError::TooLong { what });
                }
                let endpoints = self
                    .lookup
                    .endpoints(branch.as_str())
                    .await
                    .unwrap_or_default();
                seen.extend(endpoints.iter().map(|info| info.name.clone()));
                let mut endpoints = endpoints.into_iter();
                let info = endpoints.find(|info| info.answers_to(host));
                if let Some(found) = info.and_then(Found::endpoint) {
                    return Ok(found);
                }
            }
        }
        let instances = match host.kind {
            HostKind::Other => self.lookup.instances().await.unwrap_or_default(),
            // The form of the host excludes the other product.
            HostKind::Endpoint(_) | HostKind::Instance(_) => Vec::new(),
        };
        if let Some(info) = instances.into_iter().find(|info| info.answers_to(host))
            && let Ok(name) = info.name.parse()
        {
            return Ok(Found::new(Target::Instance(name), Some(info)));
        }
        Err(LocateError::NotFound {
            what: format!("endpoint that answers on `{host}`"),
            known: known("endpoints", seen),
            source: None,
        })
    }

    async fn by_instance_uid(&self, host: &HostName, uid: &str) -> Result<Found, LocateError> {
        let what = format!("database instance with the host `{host}`");
        let mut info = match self.lookup.instance_by_uid(uid).await {
            Ok(info) => info,
            Err(error) => return Err(self.lookup.failed(what, "instances", error).await),
        };
        if info.name.is_empty() {
            // The answer may lack the name.
            let instances = self.lookup.instances().await;
            let instances = instances.map_err(|source| LocateError::Call {
                what: "the database instances".to_owned(),
                source,
            })?;
            let listed = instances.into_iter().find(|info| info.answers_to(host));
            info.name = listed.map(|info| info.name).unwrap_or_default();
        }
        Ok(Found::new(Target::Instance(info.name.parse()?), Some(info)))
    }
}
