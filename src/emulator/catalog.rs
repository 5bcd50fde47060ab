//! The resources of the workspace: projects, their branches, and what belongs to a branch.
//!
//! It holds documents as the API shows them, without what a compute or a setting changes. One branch of the first project has
//! data and an endpoint that answers, and so have the branches that the API makes; the others are there so that lists have
//! more than one entry and pages more than one page.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use secrecy::SecretString;
use serde_json::{Value, json};

use super::{
    app,
    identity::Identities,
    postgres::{Database, LocalPostgres},
    shared::Names,
};

/// The most resources, and the most operations that are kept.
const MAX_ENTRIES: usize = 1000;

/// The creation time of what is there from the start.
pub(crate) const CREATED: &str = "2026-01-01T00:00:00Z";

/// A branch's id and those of its endpoints.
type Branch = (&'static str, &'static [&'static str]);

/// Every project, branch and endpoint at the start.
const TREE: [(&str, &[Branch]); 2] = [
    (
        "lakebase-local",
        &[
            ("production", &["primary", "replica"]),
            ("development", &["primary", "recreated"]),
            ("archive", &["primary"]),
        ],
    ),
    ("another-project", &[("production", &["primary"])]),
];

/// Switched off for good; the real one is by [`crate::emulator::Settings::is_disabled`].
const DISABLED: &str = "projects/lakebase-local/branches/archive/endpoints/primary";

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Project,
    Branch,
    Endpoint,
    Role,
    Database,
}

impl Kind {
    /// Its name in messages and fields.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Project => "project",
            Self::Branch => "branch",
            Self::Endpoint => "endpoint",
            Self::Role => "role",
            Self::Database => "database",
        }
    }

    /// Its collection in resource names.
    pub(crate) fn collection(self) -> &'static str {
        match self {
            Self::Project => "projects",
            Self::Branch => "branches",
            Self::Endpoint => "endpoints",
            Self::Role => "roles",
            Self::Database => "databases",
        }
    }

    /// The type of its operations' metadata.
    fn metadata(self) -> &'static str {
        match self {
            Self::Project => "ProjectOperationMetadata",
            Self::Branch => "BranchOperationMetadata",
            Self::Endpoint => "EndpointOperationMetadata",
            Self::Role => "RoleOperationMetadata",
            Self::Database => "DatabaseOperationMetadata",
        }
    }

    /// The type of what `collections` lead to.
    pub(crate) fn of(collections: &[&str]) -> Option<Self> {
        match collections {
            ["projects"] => Some(Self::Project),
            ["projects", "branches"] => Some(Self::Branch),
            ["projects", "branches", "endpoints"] => Some(Self::Endpoint),
            ["projects", "branches", "roles"] => Some(Self::Role),
            ["projects", "branches", "databases"] => Some(Self::Database),
            _ => None,
        }
    }
}

/// One resource.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(crate) name: String,
    pub(crate) document: Value,
    /// A role's, if it has one.
    pub(crate) password: Option<SecretString>,
    /// Made with its parent, and deleted with it only.
    pub(crate) is_implicit: bool,
}

impl Resource {
    /// A resource with the fields that all have.
    pub(crate) fn new(
        kind: Kind,
        name: &str,
        uid: Option<String>,
        time: &str,
        status: Value,
    ) -> Self {
        let (collection, id) = name.rsplit_once('/').unwrap_or_default();
        let parent = collection.rsplit_once('/').map(|(parent, _)| parent);
        let key = format!("{}_id", kind.word());
        let mut document = json!({
            "name": name,
            &key: id,
            "create_time": time,
            "update_time": time,
        });
        document["status"] = status;
        document["status"][&key] = id.into();
        if let Some(parent) = parent {
            document["parent"] = parent.into();
        }
        if let Some(uid) = uid {
            document["uid"] = uid.into();
        }
        Self {
            name: name.to_owned(),
            document,
            password: None,
            is_implicit: false,
        }
    }
}

/// The data of a branch.
#[derive(Clone)]
pub(crate) struct BranchPostgres {
    /// `None` for a server that is not ours.
    pub(crate) server: Option<Arc<LocalPostgres>>,
    pub(crate) database: Database,
}

/// Why an operation failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

/// A long-running operation.
struct Operation {
    name: String,
    kind: Kind,
    /// `None` while it runs.
    outcome: Option<Result<Value, Failure>>,
}

/// All resources and operations.
pub(crate) struct Catalog {
    state: Mutex<State>,
    /// Held while a new resource is looked for and added: no two have the same name.
    pub(crate) additions: Mutex<()>,
    /// Operations work one after another: a branch is not deleted while it is copied.
    pub(crate) work: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    resources: Vec<Resource>,
    postgres: HashMap<String, BranchPostgres>,
    operations: VecDeque<Operation>,
    serial: u64,
}

impl Catalog {
    /// What is there at the start; `main` are the data of the emulated endpoint's branch.
    pub(crate) fn new(names: &Names, identities: &Identities, main: BranchPostgres) -> Self {
        let mut state = State::default();
        for (project, branches) in TREE {
            let path = format!("projects/{project}");
            let uid = format!("{project}-{}", names.suffix);
            let mut resource = project_of(&path, uid, CREATED, &identities.user.name);
            resource.is_implicit = true;
            state.resources.push(resource);
            for (branch, endpoints) in branches {
                let path = format!("{path}/branches/{branch}");
                let is_default = *branch == "production";
                let uid = format!("br-{branch}-{}", names.suffix);
                let mut resource = branch_of(&path, uid, CREATED, is_default);
                resource.is_implicit = is_default;
                if !is_default {
                    resource.document["status"]["source_branch"] =
                        format!("projects/{project}/branches/production").into();
                }
                state.resources.push(resource);
                for endpoint in *endpoints {
                    let path = format!("{path}/endpoints/{endpoint}");
                    let is_main = path == Names::ENDPOINT;
                    let uid = if is_main {
                        names.endpoint_uid()
                    } else {
                        format!("ep-{project}-{branch}-{endpoint}-{}", names.suffix)
                    };
                    let mut resource = endpoint_of(&path, &uid, CREATED, *endpoint == "replica");
                    resource.is_implicit = *endpoint == "primary";
                    let status = &mut resource.document["status"];
                    status["current_state"] = "IDLE".into();
                    status["last_active_time"] = CREATED.into();
                    status["disabled"] = (path == DISABLED).into();
                    if is_main {
                        status["hosts"]["host"] = names.host.clone().into();
                    }
                    state.resources.push(resource);
                }
                state
                    .resources
                    .extend(contents(&path, CREATED, names, identities));
            }
        }
        state.postgres.insert(app::branch().to_owned(), main);
        Self {
            state: Mutex::new(state),
            additions: Mutex::default(),
            work: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<Resource> {
        let state = self.lock();
        let mut resources = state.resources.iter();
        resources.find(|resource| resource.name == name).cloned()
    }

    pub(crate) fn uid_of(&self, name: &str) -> Option<String> {
        let uid = self.get(name)?.document["uid"].as_str()?.to_owned();
        Some(uid)
    }

    /// The resources of one collection, in the order of their creation.
    pub(crate) fn list(&self, collection: &str) -> Vec<Resource> {
        let state = self.lock();
        let is_in = |resource: &&Resource| {
            let parts = resource.name.rsplit_once('/');
            parts.is_some_and(|(parent, _)| parent == collection)
        };
        state.resources.iter().filter(is_in).cloned().collect()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.lock().resources.len() >= MAX_ENTRIES
    }

    pub(crate) fn add(&self, resources: impl IntoIterator<Item = Resource>) {
        self.lock().resources.extend(resources);
    }

    /// Changes a resource's status, if it is still there.
    pub(crate) fn change(&self, name: &str, time: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.lock();
        let found = state.resources.iter_mut().find(|it| it.name == name);
        if let Some(resource) = found {
            change(&mut resource.document["status"]);
            resource.document["update_time"] = time.into();
        }
    }

    /// Removes a resource and what belongs to it; returns the data of its branches.
    pub(crate) fn remove(&self, name: &str) -> Vec<BranchPostgres> {
        let mut state = self.lock();
        state.resources.retain(|it| !is_within(&it.name, name));
        let gone = state
            .postgres
            .extract_if(|branch, _| is_within(branch, name));
        gone.map(|(_, postgres)| postgres).collect()
    }

    /// The data of a branch; `None` for one that is only listed, or not ready yet.
    pub(crate) fn postgres(&self, branch: &str) -> Option<BranchPostgres> {
        self.lock().postgres.get(branch).cloned()
    }

    pub(crate) fn set_postgres(&self, branch: &str, postgres: BranchPostgres) {
        self.lock().postgres.insert(branch.to_owned(), postgres);
    }

    /// Takes all data out, to be dropped where that may block.
    pub(crate) fn take_postgres(&self) -> HashMap<String, BranchPostgres> {
        std::mem::take(&mut self.lock().postgres)
    }

    /// Begins an operation on a resource; returns its name.
    pub(crate) fn begin(&self, kind: Kind, resource: &str) -> String {
        let mut state = self.lock();
        state.serial += 1;
        let name = format!("{resource}/operations/{:08x}", state.serial);
        if state.operations.len() == MAX_ENTRIES {
            state.operations.pop_front();
        }
        state.operations.push_back(Operation {
            name: name.clone(),
            kind,
            outcome: None,
        });
        name
    }

    pub(crate) fn finish(&self, operation: &str, outcome: Result<Value, Failure>) {
        let mut state = self.lock();
        let found = state.operations.iter_mut().find(|it| it.name == operation);
        if let Some(operation) = found {
            operation.outcome = Some(outcome);
        }
    }

    /// An operation as the API shows it.
    pub(crate) fn operation(&self, name: &str) -> Option<Value> {
        let state = self.lock();
        let operation = state.operations.iter().find(|it| it.name == name)?;
        let metadata = format!(
            "type.googleapis.com/databricks.postgres.v1.{}",
            operation.kind.metadata()
        );
        let mut shown = json!({
            "name": operation.name,
            "done": operation.outcome.is_some(),
            "metadata": { "@type": metadata },
        });
        match &operation.outcome {
            None => {}
            Some(Ok(response)) => shown["response"] = response.clone(),
            Some(Err(Failure { code, message })) => {
                shown["error"] = json!({ "error_code": code, "message": message });
            }
        }
        Some(shown)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `name` is `parent` or below it.
pub(crate) fn is_within(name: &str, parent: &str) -> bool {
    let rest = name.strip_prefix(parent);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

pub(crate) fn project_of(name: &str, uid: String, time: &str, owner: &str) -> Resource {
    let id = name.rsplit('/').next().unwrap_or_default();
    let status = json!({
        "display_name": id,
        "owner": owner,
        "pg_version": 17,
        "default_branch": format!("{name}/branches/production"),
        "history_retention_duration": "604800s",
        "default_endpoint_settings": {
            "autoscaling_limit_min_cu": 0.5,
            "autoscaling_limit_max_cu": 4.0,
            "pg_settings": {},
        },
    });
    Resource::new(Kind::Project, name, Some(uid), time, status)
}

pub(crate) fn branch_of(name: &str, uid: String, time: &str, is_default: bool) -> Resource {
    let status = json!({
        "current_state": "READY",
        "default": is_default,
        "is_protected": false,
        "logical_size_bytes": 31_457_280,
        "state_change_time": time,
    });
    Resource::new(Kind::Branch, name, Some(uid), time, status)
}

pub(crate) fn endpoint_of(name: &str, uid: &str, time: &str, is_read_only: bool) -> Resource {
    let host = |suffix: &str| format!("{uid}{suffix}.localhost");
    let (endpoint_type, hosts) = if is_read_only {
        let hosts = json!({
            "host": host(""),
            "read_only_host": host(""),
            "read_only_pooled_host": host("-pooler"),
        });
        ("ENDPOINT_TYPE_READ_ONLY", hosts)
    } else {
        let hosts = json!({
            "host": host(""),
            "read_only_host": host("-ro"),
            "read_write_pooled_host": host("-pooler"),
            "read_only_pooled_host": host("-ro-pooler"),
        });
        ("ENDPOINT_TYPE_READ_WRITE", hosts)
    };
    let status = json!({
        "endpoint_type": endpoint_type,
        "current_state": "INIT",
        "disabled": false,
        "autoscaling_limit_min_cu": 0.5,
        "autoscaling_limit_max_cu": 4.0,
        "hosts": hosts,
        "group": { "min": 1, "max": 1, "enable_readable_secondaries": false },
        "settings": { "pg_settings": {} },
    });
    Resource::new(Kind::Endpoint, name, Some(uid.to_owned()), time, status)
}

/// The roles and the database of a new branch without a source.
pub(crate) fn contents(
    branch: &str,
    time: &str,
    names: &Names,
    identities: &Identities,
) -> Vec<Resource> {
    let role = |id: &str, identity: &super::Identity| {
        let is_owner = id == "owner";
        let memberships: &[&str] = if is_owner {
            &["DATABRICKS_SUPERUSER"]
        } else {
            &[]
        };
        let status = json!({
            "postgres_role": identity.name,
            "auth_method": "LAKEBASE_OAUTH_V1",
            "identity_type": identity.kind.as_str(),
            "membership_roles": memberships,
            "attributes": { "bypassrls": false, "createdb": is_owner, "createrole": is_owner },
        });
        Resource::new(
            Kind::Role,
            &format!("{branch}/roles/{id}"),
            None,
            time,
            status,
        )
    };
    // Resource ids take no underscores.
    let id = names.database.replace('_', "-");
    let status = json!({
        "postgres_database": names.database,
        "role": format!("{branch}/roles/owner"),
    });
    let name = format!("{branch}/databases/{id}");
    vec![
        role("app", &identities.app),
        role("owner", &identities.user),
        Resource::new(Kind::Database, &name, None, time, status),
    ]
}
