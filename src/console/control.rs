//! The commands of the console that change something, with PgBouncer's meanings.

use std::sync::Arc;

use super::pools::PoolRow;
use crate::{
    config::PoolMode,
    protocol::error::{Report, sqlstate},
    session::EndpointContext,
    status::Snapshot,
};

/// The endpoints of the process; the composition root provides them.
pub(crate) type ListEndpoints = Arc<dyn Fn() -> Vec<Arc<EndpointContext>> + Send + Sync>;

/// What a command does with the connections of a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ends sessions; with a pool, new ones wait for RESUME.
    Kill,
    /// Grants no connection, and waits until none is in use.
    Pause,
    /// Replaces connections once no client has them.
    Reconnect,
    /// Ends a pause.
    Resume,
}

impl Action {
    pub(super) const ALL: [Self; 4] = [Self::Kill, Self::Pause, Self::Reconnect, Self::Resume];

    /// The command, which is also the tag of its CommandComplete.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Kill => "KILL",
            Self::Pause => "PAUSE",
            Self::Reconnect => "RECONNECT",
            Self::Resume => "RESUME",
        }
    }

    /// For SHOW HELP.
    pub(super) fn help(self) -> (&'static str, &'static str) {
        match self {
            Self::Kill => (
                "KILL database",
                "ends its sessions; new clients wait for RESUME",
            ),
            Self::Pause => (
                "PAUSE [database]",
                "grants no server connection any more, and returns when none is in use",
            ),
            Self::Reconnect => (
                "RECONNECT [database]",
                "closes server connections as soon as no client has them",
            ),
            Self::Resume => ("RESUME [database]", "ends PAUSE and KILL"),
        }
    }
}

/// A command for one database, or for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) action: Action,
    /// A name of SHOW DATABASES, or the server's name of it.
    pub(super) database: Option<String>,
}

/// What a command is for: a database of an endpoint, or all of them.
struct Target {
    endpoint: Arc<EndpointContext>,
    database: Option<String>,
}

impl Target {
    fn is_pooled(&self) -> bool {
        self.endpoint.pools.mode() != PoolMode::None
    }

    fn database(&self) -> Option<&str> {
        self.database.as_deref()
    }
}

impl Command {
    /// Not cancel safe: the action may have begun.
    pub(super) async fn run(
        &self,
        snapshot: &Snapshot,
        endpoints: Vec<Arc<EndpointContext>>,
    ) -> Result<(), Report> {
        let command = self.action.as_str();
        let targets = self.targets(snapshot, endpoints)?;
        tracing::info!(command, database = self.database, "command on the console");
        let pooled = || targets.iter().filter(|target| target.is_pooled());
        match self.action {
            Action::Kill => {
                for target in &targets {
                    // Before the sessions end, so that the next client does not take their place.
                    if target.is_pooled() {
                        target.endpoint.pools.pause(target.database());
                    }
                    target.endpoint.pools.kill(target.database());
                }
            }
            Action::Pause => {
                if pooled().next().is_none() {
                    return Err(Report::new(
                        sqlstate::FEATURE_NOT_SUPPORTED,
                        "PAUSE is possible for a database with pool_mode = \"session\" only",
                    ));
                }
                if self.is_paused(snapshot) {
                    return Err(Report::new(sqlstate::WRONG_STATE, "it is paused already"));
                }
                // All at once, and then the wait.
                for target in pooled() {
                    target.endpoint.pools.pause(target.database());
                }
                for target in pooled() {
                    target.endpoint.pools.paused(target.database()).await;
                }
            }
            Action::Reconnect => {
                for target in &targets {
                    target.endpoint.pools.reconnect(target.database());
                }
            }
            Action::Resume => {
                if !self.is_paused(snapshot) {
                    return Err(Report::new(sqlstate::WRONG_STATE, "it is not paused"));
                }
                for target in &targets {
                    target.endpoint.pools.resume(target.database());
                }
            }
        }
        Ok(())
    }

    /// Whether one of the databases that it is for is paused.
    fn is_paused(&self, snapshot: &Snapshot) -> bool {
        self.rows(snapshot).iter().any(PoolRow::is_paused)
    }

    fn targets(
        &self,
        snapshot: &Snapshot,
        endpoints: Vec<Arc<EndpointContext>>,
    ) -> Result<Vec<Target>, Report> {
        let Some(database) = &self.database else {
            let all = endpoints.into_iter().map(|endpoint| Target {
                endpoint,
                database: None,
            });
            return Ok(all.collect());
        };
        let of_row = |row: PoolRow<'_>| {
            let mut endpoints = endpoints.iter();
            let endpoint = endpoints.find(|endpoint| endpoint.registry == row.endpoint.sessions);
            Some(Target {
                endpoint: Arc::clone(endpoint?),
                database: Some(row.database?.to_owned()),
            })
        };
        let rows = self.rows(snapshot).into_iter();
        let targets: Vec<Target> = rows.filter_map(of_row).collect();
        if targets.is_empty() {
            return Err(Report::new(
                sqlstate::UNDEFINED_DATABASE,
                format!("no such database: {database}"),
            )
            .with_hint("SHOW DATABASES lists them."));
        }
        Ok(targets)
    }

    fn rows<'a>(&self, snapshot: &'a Snapshot) -> Vec<PoolRow<'a>> {
        let mut rows = PoolRow::all(snapshot);
        if let Some(database) = &self.database {
            let is_listed = rows.iter().any(|row| row.name == *database);
            rows.retain(|row| {
                row.name == *database || (!is_listed && row.database == Some(database))
            });
        }
        rows
    }
}
