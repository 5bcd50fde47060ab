//! Roles and databases that the API makes, changes and removes.

use std::fmt::Write;

use secrecy::{ExposeSecret, SecretString};

use super::{
    Database, escape_literal,
    schema::{self, identifier, query_error},
};
use crate::emulator::EmulatorError;

/// A role to be made.
pub(crate) struct NewRole {
    pub(crate) name: String,
    /// `None`: a plain Postgres role.
    pub(crate) identity_type: Option<String>,
    pub(crate) password: Option<SecretString>,
    pub(crate) can_login: bool,
    pub(crate) attributes: Attributes,
}

/// What a role may do.
#[derive(Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "Postgres' own attributes")]
pub(crate) struct Attributes {
    pub(crate) bypassrls: bool,
    pub(crate) createdb: bool,
    pub(crate) createrole: bool,
    /// A member of `databricks_superuser`.
    pub(crate) is_superuser: bool,
}

impl Attributes {
    fn statements(self, role: &str) -> String {
        let word = |is_on: bool, word: &str| format!("{}{word}", if is_on { "" } else { "no" });
        let membership = if self.is_superuser {
            format!("grant databricks_superuser to {role};")
        } else {
            format!("revoke databricks_superuser from {role};")
        };
        format!(
            "alter role {role} {} {} {};{membership}",
            word(self.bypassrls, "bypassrls"),
            word(self.createdb, "createdb"),
            word(self.createrole, "createrole"),
        )
    }
}

impl Database {
    pub(crate) async fn create_role(&self, new: &NewRole) -> Result<(), EmulatorError> {
        let role = identifier(&new.name);
        let mut script = match (&new.identity_type, &new.password) {
            (Some(identity), _) => format!(
                "select public.databricks_create_role({}, {});",
                escape_literal(&new.name),
                escape_literal(identity)
            ),
            (None, Some(password)) => format!(
                "create role {role} password {} in role databricks_native;",
                escape_literal(password.expose_secret())
            ),
            (None, None) => format!("create role {role};"),
        };
        let login = if new.can_login { "login" } else { "nologin" };
        let _ = write!(script, "alter role {role} {login};");
        script.push_str(&new.attributes.statements(&role));
        self.run_in(&self.0.database, &script).await
    }

    pub(crate) async fn alter_role(
        &self,
        name: &str,
        attributes: Attributes,
    ) -> Result<(), EmulatorError> {
        self.execute(&attributes.statements(&identifier(name)))
            .await
    }

    /// Drops a role, whose objects go to `heir`; without one, a role with objects is kept.
    pub(crate) async fn drop_role(
        &self,
        name: &str,
        heir: Option<&str>,
    ) -> Result<(), EmulatorError> {
        let role = identifier(name);
        if let Some(heir) = heir.map(identifier) {
            let control = self.control().await?;
            let query = "select datname from pg_database where datallowconn";
            let rows = control.connected.client.query(query, &[]).await;
            let script = format!("reassign owned by {role} to {heir}; drop owned by {role};");
            for row in rows.map_err(query_error)? {
                let database: String = row.try_get(0).map_err(query_error)?;
                self.run_in(&database, &script).await?;
            }
        }
        self.execute(&format!("drop role {role}")).await
    }

    pub(crate) async fn create_database(
        &self,
        name: &str,
        owner: &str,
    ) -> Result<(), EmulatorError> {
        let (name, owner) = (identifier(name), identifier(owner));
        self.execute(&format!("create database {name} owner {owner}"))
            .await
    }

    pub(crate) async fn set_owner(&self, name: &str, owner: &str) -> Result<(), EmulatorError> {
        let (name, owner) = (identifier(name), identifier(owner));
        self.execute(&format!("alter database {name} owner to {owner}"))
            .await
    }

    pub(crate) async fn rename_database(&self, old: &str, new: &str) -> Result<(), EmulatorError> {
        let (old, new) = (identifier(old), identifier(new));
        self.execute(&format!("alter database {old} rename to {new}"))
            .await
    }

    /// Drops a database, and ends the sessions in it.
    pub(crate) async fn drop_database(&self, name: &str) -> Result<(), EmulatorError> {
        self.execute(&format!("drop database {} with (force)", identifier(name)))
            .await
    }

    async fn run_in(&self, database: &str, script: &str) -> Result<(), EmulatorError> {
        let mut config = self.0.maintenance.clone();
        config.dbname(database);
        schema::run(&config, script).await
    }
}
