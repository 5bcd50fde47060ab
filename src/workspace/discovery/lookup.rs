//! Calls of the workspace API: bounded in number, in pages and in time.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};
use tracing::debug;
use url::form_urlencoded;

use super::{
    EndpointInfo, Profile, Role,
    bodies::{
        App, Branch, Database, Endpoint, Instance, Me, MeValue, PostgresRole, Project, Resource,
    },
};
use crate::{
    net::backoff::Backoff,
    workspace::{
        Answer, CallError, CallErrorKind, EndpointName, InstanceName, ProjectName, Workspace,
        diagnosis::Purpose,
    },
};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(8);
/// The most pages of a list that are read; a page holds 100.
// A workspace has at most 1,000 projects, and a project 500 branches.
const MAX_PAGES: usize = 10;
/// The most calls of one search through the whole workspace.
const MAX_CALLS: usize = 200;
/// The API's name for logins with an OAuth credential.
const OAUTH_METHOD: &str = "LAKEBASE_OAUTH_V1";

pub(in crate::workspace) struct Lookup<'a> {
    pub(super) workspace: &'a Workspace,
    timeout: Duration,
    calls: AtomicUsize,
}

impl<'a> Lookup<'a> {
    /// `timeout` bounds each look-up with its retries; zero disables retries.
    pub(in crate::workspace) fn new(workspace: &'a Workspace, timeout: Duration) -> Self {
        Self {
            workspace,
            timeout,
            calls: AtomicUsize::new(0),
        }
    }

    /// Whether a search has used up its calls.
    pub(super) fn is_spent(&self) -> bool {
        self.calls.load(Ordering::Relaxed) >= MAX_CALLS
    }

    pub(super) async fn endpoint(&self, name: &EndpointName) -> Result<EndpointInfo, CallError> {
        let error = match self.resource::<Endpoint>(name.as_str()).await {
            Ok(found) => {
                return Ok(EndpointInfo {
                    name: name.to_string(),
                    ..found.into_info()
                });
            }
            Err(error) if error.status == Some(404) => error,
            Err(error) => return Err(error),
        };
        // An endpoint that was deleted and made again under its old name is listed, but not found by it.
        let listed = match self.endpoints(name.branch()).await {
            Ok(listed) => listed,
            Err(error) if error.status == Some(404) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut listed = listed.into_iter();
        listed.find(|info| info.name == name.as_str()).ok_or(error)
    }

    pub(super) async fn instance(&self, name: &InstanceName) -> Result<EndpointInfo, CallError> {
        let path = format!("/api/2.0/database/instances/{name}");
        let found: Answer<Instance> = self.get(Purpose::Lookup(name.as_str()), &path).await?;
        Ok(EndpointInfo {
            // The answer may lack it, as `psql_provisioned.go` of the CLI notes.
            name: name.to_string(),
            ..found.value.into_info()
        })
    }

    pub(super) async fn instance_by_uid(&self, uid: &str) -> Result<EndpointInfo, CallError> {
        let path = format!("/api/2.0/database/instances:findByUid?uid={}", encoded(uid));
        let found: Answer<Instance> = self.get(Purpose::Lookup(uid), &path).await?;
        Ok(found.value.into_info())
    }

    pub(super) async fn instances(&self) -> Result<Vec<EndpointInfo>, CallError> {
        let purpose = Purpose::Lookup("database instances");
        let path = "/api/2.0/database/instances";
        let found: Vec<Instance> = self.list(purpose, path, "database_instances").await?;
        Ok(found.into_iter().map(Instance::into_info).collect())
    }

    pub(super) async fn project(&self, name: &ProjectName) -> Result<Project, CallError> {
        Ok(self.resource(name.as_str()).await?.status)
    }

    pub(super) async fn projects(&self) -> Result<Vec<Resource<Project>>, CallError> {
        let purpose = Purpose::Lookup("projects");
        self.list(purpose, "/api/2.0/postgres/projects", "projects")
            .await
    }

    pub(super) async fn branches(&self, project: &str) -> Result<Vec<Resource<Branch>>, CallError> {
        self.children(project, "branches").await
    }

    pub(super) async fn endpoints(&self, branch: &str) -> Result<Vec<EndpointInfo>, CallError> {
        let found: Vec<Resource<Endpoint>> = self.children(branch, "endpoints").await?;
        Ok(found.into_iter().map(Resource::into_info).collect())
    }

    pub(super) async fn databases(
        &self,
        branch: &str,
    ) -> Result<Vec<Resource<Database>>, CallError> {
        self.children(branch, "databases").await
    }

    pub(super) async fn roles(&self, branch: &str) -> Result<Vec<Role>, CallError> {
        let found: Vec<Resource<PostgresRole>> = self.children(branch, "roles").await?;
        let roles = found.into_iter().map(|role| Role {
            is_oauth: role.status.auth_method == OAUTH_METHOD,
            name: role.status.postgres_role,
        });
        Ok(roles.collect())
    }

    pub(super) async fn app(&self, name: &str) -> Result<App, CallError> {
        let path = format!("/api/2.0/apps/{name}");
        Ok(self.get(Purpose::Lookup(name), &path).await?.value)
    }

    /// Our identity.
    pub(in crate::workspace) async fn profile(&self) -> Result<Profile, CallError> {
        let path = "/api/2.0/preview/scim/v2/Me";
        let Answer {
            value: me,
            workspace_id,
            ..
        } = self.get::<Me>(Purpose::Identity, path).await?;
        let texts = |values: Vec<MeValue>| values.into_iter().map(MeValue::into_text).collect();
        Ok(Profile {
            user_name: me.user_name,
            id: me.id,
            groups: texts(me.groups),
            entitlements: texts(me.entitlements),
            workspace_id,
        })
    }

    async fn resource<S: Default + DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Resource<S>, CallError> {
        let path = format!("/api/2.0/postgres/{name}");
        Ok(self.get(Purpose::Lookup(name), &path).await?.value)
    }

    async fn children<T: DeserializeOwned>(
        &self,
        of: &str,
        kind: &str,
    ) -> Result<Vec<T>, CallError> {
        let path = format!("/api/2.0/postgres/{of}/{kind}");
        self.list(Purpose::Lookup(of), &path, kind).await
    }

    /// The elements of a list, up to a number of pages.
    async fn list<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
        key: &str,
    ) -> Result<Vec<T>, CallError> {
        let mut found = Vec::new();
        // The API's maximum.
        let mut page_path = format!("{path}?page_size=100");
        for _ in 0..MAX_PAGES {
            let mut page: Map<String, Value> = self.get(purpose, &page_path).await?.value;
            if let Some(Value::Array(elements)) = page.remove(key) {
                // An element of an unknown form does not hide the others.
                let elements = elements.into_iter();
                found.extend(elements.filter_map(|element| serde_json::from_value(element).ok()));
            }
            let next = match page.get("next_page_token") {
                Some(Value::String(token)) if !token.is_empty() => {
                    format!("{path}?page_size=100&page_token={}", encoded(token))
                }
                _ => break,
            };
            // A server that repeats its token would never end.
            if next == page_path {
                break;
            }
            page_path = next;
        }
        Ok(found)
    }

    /// A GET with retries of temporary failures.
    async fn get<T: DeserializeOwned>(
        &self,
        purpose: Purpose<'_>,
        path: &str,
    ) -> Result<Answer<T>, CallError> {
        let deadline = Instant::now() + self.timeout;
        let mut backoff = Backoff::new(FIRST_WAIT, LAST_WAIT);
        loop {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let error = match self.workspace.call(purpose, path, None).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let pause = error.retry_after.unwrap_or_default().max(backoff.next());
            // Not for malformed answers: something else answers in the workspace's place, such as an HTTP proxy.
            let is_temporary = matches!(
                error.kind,
                CallErrorKind::RateLimited | CallErrorKind::Unavailable
            );
            // Reported now, since no attempt fits into the time after the pause.
            if !is_temporary || Instant::now() + pause >= deadline {
                return Err(error);
            }
            debug!(%error, detail = error.detail.as_deref(), ?pause, "retrying a look-up");
            sleep(pause).await;
        }
    }
}

/// As part of a query.
fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}
