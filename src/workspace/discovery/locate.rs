//! From whatever the settings say to everything a login needs. Settings come first; the workspace fills what they leave open.

use std::{
    fmt,
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::timeout;

use super::{
    AppDatabases, BUDGET, EndpointInfo, EndpointType, Explorer,
    bodies::{AppDatabase, AppPostgres, EndpointBody},
    explore::branch_name,
};
use crate::workspace::{
    CallError, EndpointName, InstanceName, NameError, Target, Workspace,
    names::{BranchName, HostKind, HostName, ProjectName, Reference},
};

/// The ids that a new project gives its branch and its endpoint.
const DEFAULT_BRANCH: &str = "production";
const DEFAULT_ENDPOINT: &str = "primary";
/// How many names of what does exist are shown.
const MAX_SHOWN: usize = 10;
/// A whole search, however many calls it takes.
const SEARCH_TIMEOUT: Duration = Duration::from_mins(2);

/// What is known of the endpoint from the settings; any one of name, host and app is enough.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// An endpoint, a branch, a project, an instance, or a host (`ENDPOINT_NAME`).
    pub name: Option<String>,
    /// Where it answers (`PGHOST`); goes before what the workspace says.
    pub host: Option<String>,
    /// The Databricks App that was given a database (`DATABRICKS_APP_NAME`, `PGAPPNAME`).
    pub app: Option<String>,
    /// Whether readable replicas are wanted.
    pub read_only: bool,
    /// The role to log in as (`PGUSER`).
    pub user: Option<String>,
    /// The database, by its name in Postgres or its resource id (`PGDATABASE`).
    pub database: Option<String>,
}

impl Wanted {
    /// Whether its names can be names, as far as that is known without the workspace.
    pub fn check(&self) -> Result<(), NameError> {
        if let Some(host) = &self.host {
            host.parse::<HostName>()?;
        }
        if let Some(name) = &self.name {
            name.parse::<Reference>()?;
        }
        Ok(())
    }
}

/// An endpoint that can be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// What credentials are asked for; it also says of which product.
    pub target: Target,
    /// The host to connect to.
    pub host: String,
    /// The endpoint's name, for people.
    pub label: String,
    /// The role to log in as.
    pub user: String,
    /// The database's name in Postgres, where the settings or the app's resource say one.
    pub database: Option<String>,
    /// What the workspace said of it, where it was asked.
    pub info: Option<EndpointInfo>,
    /// What was chosen from, where the app has several databases.
    pub app_databases: Option<AppDatabases>,
}

/// Names of what does exist, as many as fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// What they are: `endpoints of projects/p/branches/b`.
    pub what: String,
    /// Their names.
    pub names: Vec<String>,
    /// How many more there are.
    pub more: usize,
}

/// Why no endpoint was found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// A look-up failed.
    #[error("cannot look up {what}")]
    Call {
        /// What was looked up.
        what: String,
        /// Why it could not be.
        source: CallError,
    },
    /// The last part of the name is the endpoint's uid, and not its id.
    #[error("there is no endpoint `{given}`: the last part is the uid of `{name}`")]
    Uid {
        /// What was given.
        given: EndpointName,
        /// The endpoint's name.
        name: EndpointName,
    },
    /// The endpoint is switched off.
    #[error("the endpoint `{name}` is disabled")]
    Disabled {
        /// Which.
        name: Target,
        /// The others beside it.
        known: Known,
    },
    /// A name that cannot be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A branch without a compute of the wanted kind.
    #[error("`{branch}` has no {kind} endpoint")]
    NoEndpoint {
        /// The branch.
        branch: String,
        /// Read-write or read-only.
        kind: &'static str,
        /// What it has.
        known: Known,
    },
    /// The workspace knows the endpoint but no host.
    #[error("the workspace names no {kind}host for `{name}`")]
    NoHost {
        /// Which.
        name: Target,
        /// Empty, or `read-only `.
        kind: &'static str,
    },
    /// The app has no database.
    #[error("the app `{app}` has no Lakebase resource")]
    NoResource {
        /// Which app.
        app: String,
        /// What it has.
        known: Known,
    },
    /// It does not exist, or not for us.
    #[error("there is no {what}")]
    NotFound {
        /// What was sought.
        what: String,
        /// What there is.
        known: Known,
        /// What the workspace said.
        #[source]
        source: Option<CallError>,
    },
    /// Nothing to go by.
    #[error("nothing names the endpoint: neither ENDPOINT_NAME, PGHOST nor an app with a database")]
    NotNamed {
        /// What there is.
        known: Known,
    },
    /// The search took too long.
    #[error("the search for `{what}` in the whole workspace took too long")]
    TooLong {
        /// What was sought.
        what: String,
    },
}

impl LocateError {
    /// Whether only the right to look something up is missing.
    pub fn is_forbidden(&self) -> bool {
        matches!(self, Self::Call { source, .. } if source.is_forbidden())
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let set = "set ENDPOINT_NAME=projects/PROJECT/branches/BRANCH/endpoints/ENDPOINT";
        match self {
            Self::Call { source, .. } if source.is_forbidden() => Some(format!(
                "without the right to look it up, {set} and PGHOST, which skip the look-up; or grant the identity access to the project"
            )),
            Self::Call { source, .. } => source.hint.clone(),
            Self::Disabled { name, known } => {
                let mend = match name {
                    Target::Endpoint(name) => format!(
                        "no connection can wake it; enable it: databricks postgres update-endpoint {name} spec.disabled --json '{{\"spec\":{{\"disabled\":false}}}}'"
                    ),
                    Target::Instance(name) => format!(
                        "start it: databricks database update-database-instance {name} stopped --json '{{\"stopped\":false}}'"
                    ),
                };
                Some(with_known(&mend, known))
            }
            Self::Name(error) => Some(error.hint()),
            Self::Uid { name, .. } => Some(format!("set ENDPOINT_NAME={name}")),
            Self::NoEndpoint { branch, known, .. } => Some(with_known(
                &format!(
                    "make one, or name another; `databricks postgres list-endpoints {branch}` shows them"
                ),
                known,
            )),
            Self::NoHost { kind, .. } if !kind.is_empty() => {
                Some("enable readable secondaries on it, or connect without --read-only".to_owned())
            }
            Self::NoHost { .. } => Some(
                "it may still be in the making; or set PGHOST to its host (ep-...database...)"
                    .to_owned(),
            ),
            Self::NoResource { known, .. } => Some(with_known(
                "add a database to the app's resources, or set ENDPOINT_NAME",
                known,
            )),
            Self::NotFound { known, .. } | Self::NotNamed { known } => Some(with_known(set, known)),
            Self::TooLong { .. } => Some(set.to_owned()),
        }
    }
}

impl Known {
    fn new(what: String, names: impl IntoIterator<Item = String>) -> Self {
        let mut names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).collect();
        names.sort_unstable();
        names.dedup();
        let more = names.len().saturating_sub(MAX_SHOWN);
        names.truncate(MAX_SHOWN);
        Self { what, names, more }
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

fn with_known(mend: &str, known: &Known) -> String {
    if known.names.is_empty() {
        mend.to_owned()
    } else {
        format!("{mend}; {known}")
    }
}

/// What was found before the settings are laid over it.
struct Found {
    target: Target,
    info: Option<EndpointInfo>,
    /// As the app's resource says it: a name in Postgres, or a resource name.
    database: Option<String>,
}

impl Workspace {
    /// Finds the endpoint, asking no more than the settings leave open. Bounded in calls and in time.
    pub async fn locate(&self, wanted: &Wanted) -> Result<Located, LocateError> {
        self.locate_within(wanted, BUDGET).await
    }

    /// The same, with a time that one look-up may cost, retries included; zero: no retries.
    pub async fn locate_within(
        &self,
        wanted: &Wanted,
        patience: Duration,
    ) -> Result<Located, LocateError> {
        let explorer = Explorer::new(self, patience);
        match timeout(SEARCH_TIMEOUT, explorer.locate(wanted)).await {
            Ok(located) => located,
            Err(_) => Err(LocateError::TooLong {
                what: [&wanted.name, &wanted.host, &wanted.app]
                    .into_iter()
                    .flatten()
                    .next()
                    .cloned()
                    .unwrap_or_default(),
            }),
        }
    }
}

impl Explorer<'_> {
    async fn locate(&self, wanted: &Wanted) -> Result<Located, LocateError> {
        let mut host: Option<HostName> = wanted.host.as_deref().map(str::parse).transpose()?;
        let named: Option<Reference> = wanted.name.as_deref().map(str::parse).transpose()?;
        if let (None, Some(Reference::Host(named))) = (&host, &named)
            && named.is_complete()
        {
            host = Some(named.clone());
        }
        if let Some(host) = host.as_ref().filter(|host| host.is_neon()) {
            let name = host.to_string();
            return Err(NameError::Neon { name }.into());
        }
        let app = wanted.app.as_deref();
        let found = match (named, &host) {
            (Some(reference), _) => self.find(reference, wanted, host.is_some()).await?,
            (None, Some(host)) => self.find_host(host, app).await?,
            (None, None) => match app {
                Some(app) => self.find_app(app, wanted).await?,
                None => return Err(self.not_named().await),
            },
        };
        let Found {
            target,
            info,
            database,
        } = found;
        if info.as_ref().is_some_and(|info| info.disabled) {
            let known = self.beside(&target).await;
            return Err(LocateError::Disabled {
                name: target,
                known,
            });
        }
        let host = match (&host, &info) {
            (Some(host), _) if wanted.read_only => host.read_only().to_string(),
            (Some(host), _) => host.to_string(),
            (None, Some(info)) => {
                host_of(info, wanted.read_only).ok_or_else(|| LocateError::NoHost {
                    name: target.clone(),
                    kind: if wanted.read_only { "read-only " } else { "" },
                })?
            }
            (None, None) => {
                return Err(LocateError::NoHost {
                    name: target,
                    kind: "",
                });
            }
        };
        let database = match wanted.database.clone().or(database) {
            Some(text) => Some(self.database_name(&target, text).await?),
            None => None,
        };
        let user = match (&wanted.user, self.workspace().service_principal()) {
            (Some(user), _) => user.clone(),
            (None, Some(client_id)) => client_id.to_owned(),
            (None, None) => {
                let me = self.me().await.map_err(|source| LocateError::Call {
                    what: "who we are (set PGUSER to skip this)".to_owned(),
                    source,
                })?;
                me.user_name
            }
        };
        Ok(Located {
            label: target.to_string(),
            target,
            host,
            user,
            database,
            info,
            app_databases: self.app_databases().take(),
        })
    }

    fn app_databases(&self) -> MutexGuard<'_, Option<AppDatabases>> {
        let databases = self.app_databases.lock();
        databases.unwrap_or_else(PoisonError::into_inner)
    }

    async fn find(
        &self,
        reference: Reference,
        wanted: &Wanted,
        has_host: bool,
    ) -> Result<Found, LocateError> {
        match reference {
            Reference::Endpoint(name) => self.find_endpoint(name, has_host).await,
            Reference::Branch(name) => self.find_branch(&name, wanted, has_host).await,
            Reference::Project(name) => self.find_project(&name, wanted, has_host).await,
            Reference::Instance(name) => self.find_instance(name, wanted, has_host).await,
            Reference::Host(host) => self.find_host(&host, wanted.app.as_deref()).await,
        }
    }

    async fn find_endpoint(
        &self,
        name: EndpointName,
        has_host: bool,
    ) -> Result<Found, LocateError> {
        let info = if has_host {
            None
        } else {
            match self.endpoint(&name).await {
                Ok(info) => Some(info),
                Err(error) if error.status == Some(404) => {
                    if let Some(right) = self.by_uid(&name).await {
                        return Err(LocateError::Uid {
                            given: name,
                            name: right,
                        });
                    }
                    return Err(LocateError::NotFound {
                        what: format!("endpoint `{name}`"),
                        known: self.near(name.branch()).await,
                        source: Some(error),
                    });
                }
                Err(source) => {
                    return Err(LocateError::Call {
                        what: format!("the endpoint `{name}`"),
                        source,
                    });
                }
            }
        };
        Ok(Found {
            target: Target::Endpoint(name),
            info,
            database: None,
        })
    }

    /// The name of the endpoint whose uid, the first label of its host, stands where its id should.
    async fn by_uid(&self, given: &EndpointName) -> Option<EndpointName> {
        let (_, id) = given.as_str().rsplit_once('/')?;
        let host: HostName = id.parse().ok()?;
        let HostKind::Endpoint(_) = &host.kind else {
            return None;
        };
        let endpoints = self.endpoints(given.branch()).await.ok()?;
        match matching(endpoints, &host)?.target {
            Target::Endpoint(name) => Some(name),
            Target::Instance(_) => None,
        }
    }

    async fn find_branch(
        &self,
        branch: &BranchName,
        wanted: &Wanted,
        has_host: bool,
    ) -> Result<Found, LocateError> {
        let endpoints = match self.endpoints(branch.as_str()).await {
            Ok(endpoints) => endpoints,
            Err(error) if error.is_forbidden() && has_host => {
                // The host is known, and this is what a branch's compute is called unless somebody chose otherwise.
                return Ok(Found {
                    target: Target::Endpoint(branch.endpoint(DEFAULT_ENDPOINT)),
                    info: None,
                    database: None,
                });
            }
            Err(error) if error.status == Some(404) => {
                return Err(LocateError::NotFound {
                    what: format!("branch `{}`", branch.as_str()),
                    known: self.near(branch.as_str()).await,
                    source: Some(error),
                });
            }
            Err(source) => {
                return Err(LocateError::Call {
                    what: format!("the endpoints of `{}`", branch.as_str()),
                    source,
                });
            }
        };
        let known = Known::new(
            format!("endpoints of {}", branch.as_str()),
            endpoints.iter().map(|endpoint| endpoint.name.clone()),
        );
        let infos: Vec<_> = endpoints.into_iter().filter_map(info_of).collect();
        let of_type = |wanted: EndpointType| {
            infos
                .iter()
                .find(|(_, info)| info.endpoint_type == wanted)
                .cloned()
        };
        let writes = of_type(EndpointType::ReadWrite);
        let chosen = if wanted.read_only {
            // Replicas that belong to the read-write compute, or else a compute of their own.
            writes
                .filter(|(_, info)| info.read_only_host.is_some())
                .or_else(|| of_type(EndpointType::ReadOnly))
        } else {
            writes
        };
        let Some((name, info)) = chosen else {
            return Err(LocateError::NoEndpoint {
                branch: branch.as_str().to_owned(),
                kind: if wanted.read_only {
                    "read-only"
                } else {
                    "read-write"
                },
                known,
            });
        };
        Ok(Found {
            target: Target::Endpoint(name),
            info: Some(info),
            database: None,
        })
    }

    async fn find_project(
        &self,
        project: &ProjectName,
        wanted: &Wanted,
        has_host: bool,
    ) -> Result<Found, LocateError> {
        let branch = match self.project(project).await {
            Ok(body) => match body.status.default_branch.parse() {
                Ok(branch) => branch,
                Err(_) => self.default_branch(project).await?,
            },
            Err(error) if error.is_forbidden() && has_host => project.branch(DEFAULT_BRANCH),
            Err(error) if error.status == Some(404) => {
                return Err(LocateError::NotFound {
                    what: format!("project `{}`", project.as_str()),
                    known: self.near("projects").await,
                    source: Some(error),
                });
            }
            Err(source) => {
                return Err(LocateError::Call {
                    what: format!("the project `{}`", project.as_str()),
                    source,
                });
            }
        };
        self.find_branch(&branch, wanted, has_host).await
    }

    async fn default_branch(&self, project: &ProjectName) -> Result<BranchName, LocateError> {
        let branches =
            self.branches(project.as_str())
                .await
                .map_err(|source| LocateError::Call {
                    what: format!("the branches of `{}`", project.as_str()),
                    source,
                })?;
        let default = branches.iter().find(|branch| branch.status.is_default);
        Ok(default
            .and_then(branch_name)
            .unwrap_or_else(|| project.branch(DEFAULT_BRANCH)))
    }

    async fn find_instance(
        &self,
        name: InstanceName,
        wanted: &Wanted,
        has_host: bool,
    ) -> Result<Found, LocateError> {
        let info = match self.instance(&name).await {
            Ok(info) => Some(info),
            Err(error) if error.is_forbidden() && has_host => None,
            Err(error) if error.status == Some(404) => {
                // Instances have been turned into projects of the same name, and people write a project's id alone.
                let project = ProjectName::from(&name);
                if self.project(&project).await.is_ok() {
                    return self.find_project(&project, wanted, has_host).await;
                }
                let instances = self.instances().await.unwrap_or_default();
                let projects = self.projects().await.unwrap_or_default();
                let names = instances
                    .into_iter()
                    .map(|instance| instance.name)
                    .chain(projects.into_iter().map(|project| project.name));
                return Err(LocateError::NotFound {
                    what: format!("database instance or project `{name}`"),
                    known: Known::new("instances and projects".to_owned(), names),
                    source: Some(error),
                });
            }
            Err(source) => {
                return Err(LocateError::Call {
                    what: format!("the database instance `{name}`"),
                    source,
                });
            }
        };
        Ok(Found {
            target: Target::Instance(name),
            info,
            database: None,
        })
    }

    async fn find_app(&self, app: &str, wanted: &Wanted) -> Result<Found, LocateError> {
        match self.app_resource(app).await? {
            AppResourceKind::Postgres(resource) => {
                let branch: BranchName = resource.branch.parse()?;
                let found = self.find_branch(&branch, wanted, false).await?;
                let database = Some(resource.database).filter(|name| !name.is_empty());
                Ok(Found { database, ..found })
            }
            AppResourceKind::Database(resource) => {
                let name: InstanceName = resource.instance_name.parse()?;
                let found = self.find_instance(name, wanted, false).await?;
                let database = Some(resource.database_name).filter(|name| !name.is_empty());
                Ok(Found { database, ..found })
            }
        }
    }

    /// The first database among an app's resources: the one whose variables the platform sets.
    async fn app_resource(&self, app: &str) -> Result<AppResourceKind, LocateError> {
        let is_name = !app.is_empty()
            && app
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        if !is_name {
            return Err(LocateError::NotFound {
                what: format!("app `{app}`"),
                known: Known::default(),
                source: None,
            });
        }
        let body = self.app(app).await.map_err(|source| {
            if source.status == Some(404) {
                LocateError::NotFound {
                    what: format!("app `{app}`"),
                    known: Known::default(),
                    source: Some(source),
                }
            } else {
                LocateError::Call {
                    what: format!("the resources of the app `{app}`"),
                    source,
                }
            }
        })?;
        let mut databases = body.resources.iter().filter_map(|resource| {
            let postgres = resource.postgres.clone().map(AppResourceKind::Postgres);
            let kind =
                postgres.or_else(|| resource.database.clone().map(AppResourceKind::Database))?;
            Some((resource.name.clone(), kind))
        });
        let first = databases.next();
        let others: Vec<String> = databases.map(|(key, _)| key).collect();
        if let Some((taken, _)) = &first
            && !others.is_empty()
        {
            *self.app_databases() = Some(AppDatabases {
                app: app.to_owned(),
                taken: taken.clone(),
                others,
            });
        }
        let resource = first.map(|(_, kind)| kind);
        resource.ok_or_else(|| LocateError::NoResource {
            app: app.to_owned(),
            known: Known::new(
                "its resources".to_owned(),
                body.resources.into_iter().map(|resource| resource.name),
            ),
        })
    }

    /// Whose host this is: by the app's resource, by uid, and in the end by looking everywhere.
    async fn find_host(&self, host: &HostName, app: Option<&str>) -> Result<Found, LocateError> {
        if let Some(app) = app
            && let Some(found) = self.find_host_of_app(host, app).await
        {
            return Ok(found);
        }
        // The host is not that of the app's first database.
        self.app_databases().take();
        if let HostKind::Instance(uid) = &host.kind {
            return self.find_instance_host(host, uid).await;
        }
        let projects = match self.projects().await {
            Ok(projects) => projects,
            Err(source) => {
                return Err(LocateError::Call {
                    what: format!("which endpoint answers on `{host}`"),
                    source,
                });
            }
        };
        let mut seen = Vec::new();
        for project in &projects {
            // What we may not see cannot be ours; other trouble with one project should not hide the next.
            let mut branches = self.branches(&project.name).await.unwrap_or_default();
            branches.sort_by_key(|branch| branch.name != project.status.default_branch);
            for branch in branches.iter().filter_map(branch_name) {
                if self.is_spent() {
                    return Err(LocateError::TooLong {
                        what: host.to_string(),
                    });
                }
                let endpoints = self.endpoints(branch.as_str()).await.unwrap_or_default();
                seen.extend(endpoints.iter().map(|endpoint| endpoint.name.clone()));
                if let Some(found) = matching(endpoints, host) {
                    return Ok(found);
                }
            }
        }
        if host.kind == HostKind::Other
            && let Ok(instances) = self.instances().await
            && let Some(instance) = instances
                .into_iter()
                .find(|instance| instance.answers_to(None, host.as_str()))
            && let Ok(name) = instance.name.parse::<InstanceName>()
        {
            let info = Some(instance.into_info(name.as_str()));
            return Ok(Found {
                target: Target::Instance(name),
                info,
                database: None,
            });
        }
        Err(LocateError::NotFound {
            what: format!("endpoint that answers on `{host}`"),
            known: Known::new("endpoints".to_owned(), seen),
            source: None,
        })
    }

    /// The app's database, if this is its host; an app may see its own resources and little else.
    async fn find_host_of_app(&self, host: &HostName, app: &str) -> Option<Found> {
        match self.app_resource(app).await.ok()? {
            AppResourceKind::Postgres(resource) => {
                let branch: BranchName = resource.branch.parse().ok()?;
                let found = match self.endpoints(branch.as_str()).await {
                    Ok(endpoints) => matching(endpoints, host)?,
                    // This is what a branch's compute is called unless somebody chose otherwise.
                    Err(error) if error.is_forbidden() => Found {
                        target: Target::Endpoint(branch.endpoint(DEFAULT_ENDPOINT)),
                        info: None,
                        database: None,
                    },
                    Err(_) => return None,
                };
                let database = Some(resource.database).filter(|name| !name.is_empty());
                Some(Found { database, ..found })
            }
            AppResourceKind::Database(resource) => {
                let name: InstanceName = resource.instance_name.parse().ok()?;
                let info = match self.instance(&name).await {
                    Ok(info) => Some(info).filter(|info| {
                        [&info.host, &info.read_only_host]
                            .into_iter()
                            .flatten()
                            .any(|known| known.eq_ignore_ascii_case(host.as_str()))
                    }),
                    Err(_) => None,
                };
                let is_its_host = info.is_some() || matches!(host.kind, HostKind::Instance(_));
                is_its_host.then(|| Found {
                    target: Target::Instance(name),
                    info,
                    database: Some(resource.database_name).filter(|name| !name.is_empty()),
                })
            }
        }
    }

    async fn find_instance_host(&self, host: &HostName, uid: &str) -> Result<Found, LocateError> {
        let what = || format!("database instance with the host `{host}`");
        let mut body = match self.instance_by_uid(uid).await {
            Ok(body) => body,
            Err(error) if error.status == Some(404) => {
                let instances = self.instances().await.unwrap_or_default();
                return Err(LocateError::NotFound {
                    what: what(),
                    known: Known::new(
                        "instances".to_owned(),
                        instances.into_iter().map(|instance| instance.name),
                    ),
                    source: Some(error),
                });
            }
            Err(source) => {
                return Err(LocateError::Call {
                    what: format!("the {}", what()),
                    source,
                });
            }
        };
        if body.name.is_empty() {
            // The answer may come without the very name we are after.
            let instances = self.instances().await.map_err(|source| LocateError::Call {
                what: "the database instances".to_owned(),
                source,
            })?;
            let listed = instances
                .into_iter()
                .find(|instance| instance.answers_to(Some(uid), host.as_str()));
            body.name = listed.map(|instance| instance.name).unwrap_or_default();
        }
        let name: InstanceName = body.name.parse()?;
        let info = Some(body.into_info(name.as_str()));
        Ok(Found {
            target: Target::Instance(name),
            info,
            database: None,
        })
    }

    /// The name in Postgres of what may be a resource's name or id.
    async fn database_name(&self, target: &Target, text: String) -> Result<String, LocateError> {
        let Target::Endpoint(endpoint) = target else {
            return Ok(text);
        };
        let (branch, id, is_resource) = match text.rsplit_once("/databases/") {
            Some((branch, id)) => (branch, id, true),
            None => (endpoint.branch(), &*text, false),
        };
        // Ids hold hyphens and no underscores; a name without either may be both, and is the same then.
        if !is_resource && !id.contains('-') {
            return Ok(text);
        }
        if is_resource && branch.parse::<BranchName>().is_err() {
            return Err(LocateError::NotFound {
                what: format!("database `{text}`"),
                known: Known::default(),
                source: None,
            });
        }
        let databases = match self.databases(branch).await {
            Ok(databases) => databases,
            // A name with hyphens may be what it is called in Postgres, too; the server will say.
            Err(_) if !is_resource => return Ok(text),
            // The documented correspondence for the ids that people choose.
            Err(_) => return Ok(id.replace('-', "_")),
        };
        let postgres_names = || {
            databases
                .iter()
                .map(|database| database.status.postgres_database.as_str())
        };
        if !is_resource && postgres_names().any(|name| name == text) {
            return Ok(text);
        }
        let suffix = format!("/databases/{id}");
        let mapped = databases
            .iter()
            .find(|database| database.name.ends_with(&suffix))
            .map(|database| database.status.postgres_database.clone())
            .filter(|name| !name.is_empty());
        match mapped {
            Some(name) => Ok(name),
            None if !is_resource => Ok(text),
            None => Err(LocateError::NotFound {
                what: format!("database `{text}`"),
                known: Known::new("databases".to_owned(), postgres_names().map(str::to_owned)),
                source: None,
            }),
        }
    }

    /// What does exist around a name that does not: on its branch, else in its project, else at all.
    async fn near(&self, name: &str) -> Known {
        let mut parts = name.split('/');
        let (project, branch) = (parts.nth(1), parts.nth(1));
        if let (Some(project), Some(branch)) = (project, branch) {
            let branch = format!("projects/{project}/branches/{branch}");
            if let Ok(endpoints) = self.endpoints(&branch).await {
                let names = endpoints.into_iter().map(|endpoint| endpoint.name);
                return Known::new(format!("endpoints of {branch}"), names);
            }
        }
        if let Some(project) = project {
            let project = format!("projects/{project}");
            if let Ok(branches) = self.branches(&project).await {
                let names = branches.into_iter().map(|branch| branch.name);
                return Known::new(format!("branches of {project}"), names);
            }
        }
        let projects = self.projects().await.unwrap_or_default();
        let names = projects.into_iter().map(|project| project.name);
        Known::new("projects".to_owned(), names)
    }

    /// The other endpoints of the same branch that are not disabled.
    async fn beside(&self, target: &Target) -> Known {
        let Target::Endpoint(name) = target else {
            return Known::default();
        };
        let endpoints = self.endpoints(name.branch()).await.unwrap_or_default();
        let others = endpoints
            .into_iter()
            .filter_map(info_of)
            .filter(|(other, info)| other != name && !info.disabled)
            .map(|(other, _)| other.to_string());
        Known::new(format!("others of {}", name.branch()), others)
    }

    async fn not_named(&self) -> LocateError {
        let projects = self.projects().await.unwrap_or_default();
        let names = projects.into_iter().map(|project| project.name);
        LocateError::NotNamed {
            known: Known::new("projects".to_owned(), names),
        }
    }
}

enum AppResourceKind {
    Postgres(AppPostgres),
    Database(AppDatabase),
}

/// A compute of its own for reads may have only a read-only host, or only a host.
fn host_of(info: &EndpointInfo, read_only: bool) -> Option<String> {
    let is_replica = info.endpoint_type == EndpointType::ReadOnly;
    let (host, replica) = (info.host.clone(), info.read_only_host.clone());
    match (read_only, is_replica) {
        (false, false) => host,
        (false, true) => host.or(replica),
        (true, false) => replica,
        (true, true) => replica.or(host),
    }
}

fn info_of(body: EndpointBody) -> Option<(EndpointName, EndpointInfo)> {
    let name: EndpointName = body.name.parse().ok()?;
    let info = body.into_info(name.as_str());
    Some((name, info))
}

fn matching(endpoints: Vec<EndpointBody>, host: &HostName) -> Option<Found> {
    let uid = match &host.kind {
        HostKind::Endpoint(uid) => Some(uid.as_str()),
        HostKind::Instance(_) | HostKind::Other => None,
    };
    let (name, info) = endpoints
        .into_iter()
        .find(|endpoint| endpoint.answers_to(uid, host.as_str()))
        .and_then(info_of)?;
    Some(Found {
        target: Target::Endpoint(name),
        info: Some(info),
        database: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_what_exists_is_bounded() {
        let names = (0..25).map(|number| format!("projects/p{number:02}"));
        let known = Known::new("projects".to_owned(), names);
        assert_eq!((known.names.len(), known.more), (MAX_SHOWN, 15));
        let text = known.to_string();
        assert!(text.starts_with("projects: projects/p00, "), "{text}");
        assert!(text.ends_with("projects/p09 and 15 more"), "{text}");
    }
}
