//! The look-ups themselves: bounded in number, in pages and in patience.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};
use tracing::debug;

use super::{
    AppDatabases, EndpointInfo, Identity,
    bodies::{
        AppBody, BranchBody, DatabaseBody, EndpointBody, InstanceBody, MeBody, MeValue,
        ProjectBody, RoleBody,
    },
};
use crate::workspace::{
    Answer, CallError, EndpointName, InstanceName, MintErrorKind, Profile, Role, Target, Workspace,
    diagnosis::Purpose,
    names::{BranchName, ProjectName},
};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(8);
/// Pages of a list that are read; a page holds 100.
const MAX_PAGES: usize = 10;
/// What the API calls a role that logs in with an OAuth credential.
const OAUTH_METHOD: &str = "LAKEBASE_OAUTH_V1";
/// Calls that one search through the whole workspace may make.
const MAX_CALLS: usize = 200;

/// Asks the workspace, counting what it costs.
pub(in crate::workspace) struct Explorer<'a> {
    workspace: &'a Workspace,
    patience: Duration,
    calls: AtomicUsize,
    /// What was chosen from, where an app has several databases.
    pub(super) app_databases: Mutex<Option<AppDatabases>>,
}

impl<'a> Explorer<'a> {
    /// `patience` is what one question may cost in all, retries included; zero: no retries.
    pub(in crate::workspace) fn new(workspace: &'a Workspace, patience: Duration) -> Self {
        Self {
            workspace,
            patience,
            calls: AtomicUsize::new(0),
            app_databases: Mutex::default(),
        }
    }

    pub(super) fn workspace(&self) -> &Workspace {
        self.workspace
    }

    /// Whether a search must end without having seen everything.
    pub(super) fn is_spent(&self) -> bool {
        self.calls.load(Ordering::Relaxed) >= MAX_CALLS
    }

    pub(super) async fn endpoint(&self, name: &EndpointName) -> Result<EndpointInfo, CallError> {
        let purpose = Purpose::Lookup(name.as_str());
        let answer = self
            .get::<EndpointBody>(purpose, &format!("/api/2.0/postgres/{name}"))
            .await;
        let error = match answer {
            Ok(answer) => return Ok(answer.value.into_info(name.as_str())),
            Err(error) => error,
        };
        if error.status != Some(404) {
            return Err(error);
        }
        // An endpoint that was deleted and made again under its old name is listed, but not found by it.
        let listed = match self.endpoints(name.branch()).await {
            Ok(listed) => listed,
            Err(error) if error.status == Some(404) => Vec::new(),
            Err(error) => return Err(error),
        };
        listed
            .into_iter()
            .find(|endpoint| endpoint.name == name.as_str())
            .map(|endpoint| endpoint.into_info(name.as_str()))
            .ok_or(error)
    }

    pub(super) async fn instance(&self, name: &InstanceName) -> Result<EndpointInfo, CallError> {
        let purpose = Purpose::Lookup(name.as_str());
        let answer = self
            .get::<InstanceBody>(purpose, &format!("/api/2.0/database/instances/{name}"))
            .await?;
        Ok(answer.value.into_info(name.as_str()))
    }

    pub(super) async fn instance_by_uid(&self, uid: &str) -> Result<InstanceBody, CallError> {
        let path = format!("/api/2.0/database/instances:findByUid?uid={}", encoded(uid));
        Ok(self.get(Purpose::Lookup(uid), &path).await?.value)
    }

    pub(super) async fn instances(&self) -> Result<Vec<InstanceBody>, CallError> {
        let purpose = Purpose::Lookup("database instances");
        self.list(purpose, "/api/2.0/database/instances", "database_instances")
            .await
    }

    pub(super) async fn project(&self, name: &ProjectName) -> Result<ProjectBody, CallError> {
        let path = format!("/api/2.0/postgres/{}", name.as_str());
        Ok(self.get(Purpose::Lookup(name.as_str()), &path).await?.value)
    }

    pub(super) async fn projects(&self) -> Result<Vec<ProjectBody>, CallError> {
        let purpose = Purpose::Lookup("projects");
        self.list(purpose, "/api/2.0/postgres/projects", "projects")
            .await
    }

    pub(super) async fn branches(&self, project: &str) -> Result<Vec<BranchBody>, CallError> {
        let path = format!("/api/2.0/postgres/{project}/branches");
        self.list(Purpose::Lookup(project), &path, "branches").await
    }

    pub(super) async fn endpoints(&self, branch: &str) -> Result<Vec<EndpointBody>, CallError> {
        let path = format!("/api/2.0/postgres/{branch}/endpoints");
        self.list(Purpose::Lookup(branch), &path, "endpoints").await
    }

    pub(super) async fn databases(&self, branch: &str) -> Result<Vec<DatabaseBody>, CallError> {
        let path = format!("/api/2.0/postgres/{branch}/databases");
        self.list(Purpose::Lookup(branch), &path, "databases").await
    }

    pub(super) async fn roles(&self, branch: &str) -> Result<Vec<RoleBody>, CallError> {
        let path = format!("/api/2.0/postgres/{branch}/roles");
        self.list(Purpose::Lookup(branch), &path, "roles").await
    }

    pub(super) async fn app(&self, name: &str) -> Result<AppBody, CallError> {
        let path = format!("/api/2.0/apps/{name}");
        Ok(self.get(Purpose::Lookup(name), &path).await?.value)
    }

    /// An endpoint or an instance, as the target has it.
    pub(in crate::workspace) async fn describe(
        &self,
        target: &Target,
    ) -> Result<EndpointInfo, CallError> {
        match target {
            Target::Endpoint(name) => self.endpoint(name).await,
            Target::Instance(name) => self.instance(name).await,
        }
    }

    /// Who we are, at length.
    pub(in crate::workspace) async fn profile(&self) -> Result<Profile, CallError> {
        let Answer {
            value,
            workspace_id,
            ..
        } = self.me_in_full().await?;
        let texts = |values: Vec<MeValue>| {
            let text = |value: MeValue| match value.display.as_str() {
                "" => value.value,
                _ => value.display,
            };
            values.into_iter().map(text).collect()
        };
        Ok(Profile {
            user_name: value.user_name,
            id: value.id,
            groups: texts(value.groups),
            entitlements: texts(value.entitlements),
            workspace_id,
        })
    }

    /// The Postgres roles of a branch.
    pub(in crate::workspace) async fn role_names(
        &self,
        branch: &str,
    ) -> Result<Vec<Role>, CallError> {
        let roles = self.roles(branch).await?.into_iter().map(|role| Role {
            is_oauth: role.status.auth_method == OAUTH_METHOD,
            name: role.status.postgres_role,
        });
        Ok(roles.collect())
    }

    /// The databases of a branch, by their names in Postgres.
    pub(in crate::workspace) async fn database_names(
        &self,
        branch: &str,
    ) -> Result<Vec<String>, CallError> {
        let databases = self.databases(branch).await?.into_iter();
        Ok(databases
            .map(|database| database.status.postgres_database)
            .collect())
    }

    pub(super) async fn me(&self) -> Result<Identity, CallError> {
        let answer = self.me_in_full().await?;
        Ok(Identity {
            user_name: answer.value.user_name,
            workspace_id: answer.workspace_id,
        })
    }

    async fn me_in_full(&self) -> Result<Answer<MeBody>, CallError> {
        self.get(Purpose::Identity, "/api/2.0/preview/scim/v2/Me")
            .await
    }

    /// Every element of a list, up to a number of pages.
    async fn list<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
        key: &str,
    ) -> Result<Vec<T>, CallError> {
        let mut found = Vec::new();
        let mut page_token = String::new();
        for _ in 0..MAX_PAGES {
            let mut page_path = format!("{path}?page_size=100");
            if !page_token.is_empty() {
                page_path = format!("{page_path}&page_token={}", encoded(&page_token));
            }
            let mut page = self
                .get::<Map<String, Value>>(purpose, &page_path)
                .await?
                .value;
            let elements = match page.remove(key) {
                Some(Value::Array(elements)) => elements,
                _ => Vec::new(),
            };
            // One that we do not understand hides no other.
            found.extend(
                elements
                    .into_iter()
                    .filter_map(|element| serde_json::from_value(element).ok()),
            );
            match page.remove("next_page_token") {
                Some(Value::String(next)) if !next.is_empty() && next != page_token => {
                    page_token = next;
                }
                _ => break,
            }
        }
        Ok(found)
    }

    /// A GET that waits out what time heals, as far as patience lasts.
    async fn get<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
    ) -> Result<Answer<T>, CallError> {
        let deadline = Instant::now() + self.patience;
        let mut wait = FIRST_WAIT;
        let mut is_reported = false;
        loop {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let error = match self.workspace.call(purpose, Method::GET, path, None).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = error
                .retry_after
                .unwrap_or_default()
                .max(wait.mul_f64(rand::random_range(0.5..=1.5)));
            let is_worth_it = matches!(
                error.kind,
                MintErrorKind::RateLimited | MintErrorKind::Unavailable
            );
            if !is_worth_it || Instant::now() + pause >= deadline {
                return Err(error);
            }
            if !is_reported {
                // The caller logs what comes of it.
                debug!(error = %error, detail = error.detail.as_deref(), "retrying");
                is_reported = true;
            }
            sleep(pause).await;
            wait = (wait * 2).min(LAST_WAIT);
        }
    }
}

/// As part of a query.
fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

/// A branch's name, where the API gave one that can stand in a path.
pub(super) fn branch_name(body: &BranchBody) -> Option<BranchName> {
    body.name.parse().ok()
}
