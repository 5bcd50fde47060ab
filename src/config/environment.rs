//! The variables that the tutorial, libpq, the Databricks SDKs and Databricks Apps have already given names to.

use std::{collections::HashMap, fmt};

use secrecy::SecretString;

use crate::workspace;

/// What the environment says, read once. An empty or blank variable counts as unset.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `ENDPOINT_NAME`.
    pub endpoint_name: Option<String>,
    /// `LAKEBASE_ENDPOINT`, the same thing by another name.
    pub lakebase_endpoint: Option<String>,
    /// `PGHOST`.
    pub host: Option<String>,
    /// `PGPORT`.
    pub port: Option<String>,
    /// `PGDATABASE`.
    pub database: Option<String>,
    /// `PGUSER`.
    pub user: Option<String>,
    /// `PGSSLMODE`.
    pub sslmode: Option<String>,
    /// `PGSSLROOTCERT`.
    pub sslrootcert: Option<String>,
    /// `DATABRICKS_APP_NAME`, or `PGAPPNAME`, which an app with a database is given as well.
    pub app_name: Option<String>,
    /// `DATABRICKS_APP_PORT`.
    pub app_port: Option<String>,
    /// `DATABRICKS_HOST` and what authenticates us there.
    pub workspace: workspace::Settings,
    /// All of it, for settings that name a variable.
    variables: Variables,
}

/// Every variable, unprintable, as any may be a secret.
#[derive(Clone, Default)]
struct Variables(HashMap<String, String>);

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variables").finish_non_exhaustive()
    }
}

impl Environment {
    /// Of this process.
    pub fn of_process() -> Self {
        Self::from_variables(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    /// Of these variables.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let variables: HashMap<_, _> = variables.into_iter().collect();
        let get = |name: &str| {
            variables
                .get(name)
                .map(|value| value.trim())
                .filter(|value| !value.is_empty())
                .map(str::to_owned)
        };
        Self {
            endpoint_name: get("ENDPOINT_NAME"),
            lakebase_endpoint: get("LAKEBASE_ENDPOINT"),
            host: get("PGHOST"),
            port: get("PGPORT"),
            database: get("PGDATABASE"),
            user: get("PGUSER"),
            sslmode: get("PGSSLMODE"),
            sslrootcert: get("PGSSLROOTCERT"),
            app_name: get("DATABRICKS_APP_NAME").or_else(|| get("PGAPPNAME")),
            app_port: get("DATABRICKS_APP_PORT"),
            workspace: workspace::Settings::from_variables(
                variables
                    .iter()
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect(),
            ),
            variables: Variables(variables),
        }
    }

    /// The value of the variable that a setting names; kept as it is, since a password may begin with a blank.
    pub fn secret(&self, name: &str) -> Option<SecretString> {
        let value = self.variables.0.get(name)?;
        (!value.is_empty()).then(|| SecretString::from(value.as_str()))
    }
}
