//! A Databricks App of the emulated workspace: its resources, and the environment that its process gets.

use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Emulator,
    shared::{Names, Shared},
};

/// A resource that an app was given; `key` is what `valueFrom` names.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum AppResource {
    /// A database of a Lakebase project.
    Postgres {
        /// The resource's key.
        key: String,
        /// The branch's resource name.
        branch: String,
        /// The database's resource name, or a Postgres name, which stands for that database of the branch.
        database: String,
    },
    /// A database of a Provisioned instance.
    Database {
        /// The resource's key.
        key: String,
        /// The instance's name.
        instance_name: String,
        /// The database's name in Postgres.
        database_name: String,
    },
    /// Something else than a database.
    Secret {
        /// The resource's key.
        key: String,
    },
}

impl AppResource {
    /// A database of the emulated endpoint.
    pub fn postgres(key: &str, database: &str) -> Self {
        Self::Postgres {
            key: key.to_owned(),
            branch: branch().to_owned(),
            database: database.to_owned(),
        }
    }

    fn key(&self) -> &str {
        match self {
            Self::Postgres { key, .. } | Self::Database { key, .. } | Self::Secret { key } => key,
        }
    }

    /// As the apps API shows it.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Postgres {
                key,
                branch,
                database,
            } => json!({
                "name": key,
                "postgres": {
                    "branch": branch,
                    "database": database_name(branch, database),
                    "permission": "CAN_CONNECT_AND_CREATE",
                },
            }),
            Self::Database {
                key,
                instance_name,
                database_name,
            } => json!({
                "name": key,
                "database": {
                    "instance_name": instance_name,
                    "database_name": database_name,
                    "permission": "CAN_CONNECT_AND_CREATE",
                },
            }),
            Self::Secret { key } => json!({
                "name": key,
                "secret": { "scope": "apps", "key": key, "permission": "READ" },
            }),
        }
    }

    /// What `valueFrom` puts into a variable.
    fn value(&self, shared: &Shared) -> String {
        match self {
            Self::Postgres { branch, .. } => format!("{branch}/endpoints/primary"),
            Self::Database { .. } => shared.names.host.clone(),
            Self::Secret { key } => format!("the-value-of-{key}"),
        }
    }

    /// Host and database of a database resource.
    fn target(&self, shared: &Shared) -> Option<Target<'_>> {
        match self {
            Self::Postgres {
                branch, database, ..
            } => Some(Target {
                host: shared.host_of(&format!("{branch}/endpoints/primary")),
                database: database.rsplit('/').next().unwrap_or(database),
            }),
            Self::Database { database_name, .. } => Some(Target {
                host: shared.names.host.clone(),
                database: database_name,
            }),
            Self::Secret { .. } => None,
        }
    }
}

struct Target<'a> {
    host: String,
    database: &'a str,
}

/// The branch of the emulated endpoint.
pub(crate) fn branch() -> &'static str {
    Names::ENDPOINT.rsplitn(3, '/').last().unwrap_or_default()
}

/// Resource ids take no underscores.
fn database_name(branch: &str, database: &str) -> String {
    if database.contains('/') {
        database.to_owned()
    } else {
        format!("{branch}/databases/{}", database.replace('_', "-"))
    }
}

impl Shared {
    /// The app's resources: those of the settings, or one for the emulated endpoint.
    pub(crate) fn app_resources(&self) -> Vec<AppResource> {
        let resources = self.settings.borrow().app_resources.clone();
        if resources.is_empty() {
            vec![AppResource::postgres("postgres", &self.names.database)]
        } else {
            resources
        }
    }
}

impl Emulator {
    /// The app's name.
    pub fn app_name(&self) -> &'static str {
        Names::APP
    }

    /// The environment in which Databricks Apps starts the app's process.
    ///
    /// The first database resource fills `PG*`; `value_from` are the `valueFrom` entries of its `app.yaml`, as pairs of
    /// variable and key of a resource. No other variable names an endpoint, and there is no password. Holds a secret.
    pub fn app_environment(&self, value_from: &[(&str, &str)]) -> Vec<(String, String)> {
        let shared = &self.shared;
        let app = &shared.identities.app;
        let secret = app.client_secret.as_ref().map(ExposeSecret::expose_secret);
        let resources = shared.app_resources();
        let mut variables = vec![
            ("DATABRICKS_APP_NAME", Names::APP.to_owned()),
            ("DATABRICKS_WORKSPACE_ID", shared.names.workspace_id.clone()),
            ("DATABRICKS_HOST", shared.workspace_url.clone()),
            ("DATABRICKS_CLIENT_ID", app.name.clone()),
            (
                "DATABRICKS_CLIENT_SECRET",
                secret.unwrap_or_default().to_owned(),
            ),
        ];
        let mut targets = resources.iter().filter_map(|one| one.target(shared));
        if let Some(Target { host, database }) = targets.next() {
            variables.extend([
                ("PGAPPNAME", Names::APP.to_owned()),
                ("PGDATABASE", database.to_owned()),
                ("PGHOST", host),
                ("PGPORT", self.pg_port.to_string()),
                ("PGSSLMODE", "require".to_owned()),
                ("PGUSER", app.name.clone()),
                // Ours alone: Lakebase's certificates are publicly trusted.
                ("PGSSLROOTCERT", self.authority.display().to_string()),
            ]);
        }
        let named = value_from.iter().filter_map(|(variable, key)| {
            let resource = resources.iter().find(|resource| resource.key() == *key)?;
            Some(((*variable).to_owned(), resource.value(shared)))
        });
        let variables = variables
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value));
        variables.chain(named).collect()
    }
}
