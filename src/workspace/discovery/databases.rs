//! Databases: those of a Databricks App, and the name in Postgres of one that is given by its resource name or id.

use std::fmt;

use super::{
    LocateError,
    error::known,
    locate::{Found, Search},
};
use crate::workspace::{BranchName, HostName, Reference, Target, names::HostKind};

/// The databases of an app, if it has several and nothing names the endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppDatabases {
    /// The app.
    pub app: String,
    /// The key of the first resource, which is served.
    pub taken: String,
    /// The keys of the others.
    pub others: Vec<String>,
}

impl AppDatabases {
    /// How to serve all of them.
    pub const HINT: &str = "serve each with an --endpoint (or [[endpoint]]) of its own, named by the variable that app.yaml sets with `valueFrom: <key>`";
}

impl fmt::Display for AppDatabases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { app, taken, others } = self;
        let others = others.join("`, `");
        write!(
            f,
            "the app `{app}` has several databases: the resource `{taken}` is served, and `{others}` not"
        )
    }
}

/// The first database of an app: the one that the platform sets variables for.
struct FirstDatabase {
    /// A branch or an instance.
    place: Reference,
    /// A name in Postgres, or a resource name.
    database: Option<String>,
    /// Set if there are several.
    all: Option<AppDatabases>,
}

impl FirstDatabase {
    fn found(self, mut found: Found) -> Found {
        found.database = self.database;
        found.app_databases = self.all;
        found
    }
}

impl Search<'_> {
    pub(super) async fn by_app(&self, app: &str) -> Result<Found, LocateError> {
        let first = self.first_database(app).await?;
        let found = self.by_reference(first.place.clone()).await?;
        Ok(first.found(found))
    }

    /// The app's database if this is its host; an app may have access to nothing else.
    pub(super) async fn by_host_of_app(&self, host: &HostName, app: &str) -> Option<Found> {
        let first = self.first_database(app).await.ok()?;
        let found = match first.place.clone() {
            Reference::Branch(branch) => match self.lookup.endpoints(branch.as_str()).await {
                Ok(endpoints) => {
                    let mut endpoints = endpoints.into_iter();
                    Found::endpoint(endpoints.find(|info| info.answers_to(host))?)?
                }
                // An app may connect without the right to list endpoints.
                Err(error) if error.is_forbidden() => Found::default_endpoint(&branch),
                Err(_) => return None,
            },
            Reference::Instance(name) => {
                let is_instance = matches!(host.kind, HostKind::Instance(_));
                let info = match self.lookup.instance(&name).await {
                    Ok(info) if info.answers_to(host) => Some(info),
                    Err(error) if error.is_forbidden() && is_instance => None,
                    Ok(_) | Err(_) => return None,
                };
                Found::new(Target::Instance(name), info)
            }
            _ => return None,
        };
        Some(first.found(found))
    }

    /// The first database of an app: the one that the platform sets variables for.
    async fn first_database(&self, app: &str) -> Result<FirstDatabase, LocateError> {
        let what = format!("app `{app}`");
        // The name becomes part of an address.
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if app.is_empty() || !app.bytes().all(is_name) {
            return Err(LocateError::NotFound {
                what,
                known: String::new(),
                source: None,
            });
        }
        let resources = match self.lookup.app(app).await {
            Ok(body) => body.resources,
            Err(error) => return Err(self.lookup.failed(what, "", error).await),
        };
        let mut databases = resources.iter().filter_map(|resource| {
            let (place, database) = match (&resource.postgres, &resource.database) {
                (Some(it), _) => (it.branch.parse().map(Reference::Branch), &it.database),
                (None, Some(it)) => {
                    let instance = it.instance_name.parse();
                    (instance.map(Reference::Instance), &it.database_name)
                }
                (None, None) => return None,
            };
            Some((&resource.name, place, database))
        });
        let Some((taken, place, database)) = databases.next() else {
            let names = resources.iter().map(|resource| resource.name.clone());
            let known = known("its resources", names);
            let app = app.to_owned();
            return Err(LocateError::NoResource { app, known });
        };
        let others: Vec<String> = databases.map(|(name, ..)| name.clone()).collect();
        Ok(FirstDatabase {
            place: place?,
            database: Some(database.clone()).filter(|name| !name.is_empty()),
            all: (!others.is_empty()).then(|| AppDatabases {
                app: app.to_owned(),
                taken: taken.clone(),
                others,
            }),
        })
    }

    /// The name in Postgres of a database that may be given by its resource name or id.
    pub(super) async fn database_name(
        &self,
        target: &Target,
        text: String,
    ) -> Result<String, LocateError> {
        let Target::Endpoint(endpoint) = target else {
            return Ok(text);
        };
        let (branch, id, is_resource) = match text.rsplit_once("/databases/") {
            Some((branch, id)) => (branch, id, true),
            None => (endpoint.branch(), &*text, false),
        };
        // Ids have hyphens and no underscores. Without either, id and name are the same.
        if !is_resource && !id.contains('-') {
            return Ok(text);
        }
        let not_found = |known| LocateError::NotFound {
            what: format!("database `{text}`"),
            known,
            source: None,
        };
        if is_resource && branch.parse::<BranchName>().is_err() {
            return Err(not_found(String::new()));
        }
        let databases = match self.lookup.databases(branch).await {
            Ok(databases) => databases,
            // It may be a name with hyphens; the server decides.
            Err(_) if !is_resource => return Ok(text),
            // The documented relation of ids and names.
            Err(_) => return Ok(id.replace('-', "_")),
        };
        let names = databases
            .iter()
            .map(|database| &database.status.postgres_database);
        if !is_resource && names.clone().any(|name| *name == text) {
            return Ok(text);
        }
        let suffix = format!("/databases/{id}");
        let mapped = databases
            .iter()
            .find(|database| database.name.ends_with(&suffix));
        match mapped.map(|database| database.status.postgres_database.clone()) {
            Some(name) if !name.is_empty() => Ok(name),
            _ if !is_resource => Ok(text),
            _ => Err(not_found(known("databases", names.cloned()))),
        }
    }
}
