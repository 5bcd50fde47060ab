//! The files of a running server, copied as a base backup: see "Making a Base Backup Using the Low-Level API" in Postgres'
//! documentation. The copy recovers from its label and the log when it starts.

use std::{
    fs::{self, DirBuilder},
    io,
    ops::RangeInclusive,
    os::unix::fs::DirBuilderExt,
    path::Path,
};

use tokio_postgres::Config;

use super::schema::{Connected, query_error};
use crate::emulator::EmulatorError;

/// A copy has these directories empty.
const EMPTY: &[&str] = &[
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];
/// Timeline, and position in the log, in hexadecimal.
const SEGMENT_NAME_LENGTH: usize = 24;

/// A copy does not have these files.
const LEFT_OUT: &[&str] = &["backup_label", "postmaster.opts", "postmaster.pid"];

/// The slot keeps the log that the copy needs, and ends with its session.
const START: &str = "select pg_create_physical_replication_slot('branch_' || pg_backend_pid(), true, true), \
     pg_walfile_name(pg_backup_start('branch', fast => true))";
const FINISH: &str =
    "select pg_walfile_name(lsn), labelfile from pg_backup_stop(wait_for_archive => false)";

/// A backup under way: files may be copied.
pub(super) struct Backup {
    session: Connected,
    first: String,
}

impl Backup {
    pub(super) async fn start(config: &Config) -> Result<Self, EmulatorError> {
        let session = Connected::open(config).await?;
        let row = session.client.query_one(START, &[]).await;
        let first = row.and_then(|row| row.try_get(1)).map_err(query_error)?;
        Ok(Self { session, first })
    }

    pub(super) async fn finish(self) -> Result<Log, EmulatorError> {
        let row = self.session.client.query_one(FINISH, &[]).await;
        let row = row.map_err(query_error)?;
        let last = row.try_get(0).map_err(query_error)?;
        Ok(Log {
            segments: self.first..=last,
            label: row.try_get(1).map_err(query_error)?,
            _session: self.session,
        })
    }
}

/// What makes a copy of the files consistent.
pub(super) struct Log {
    segments: RangeInclusive<String>,
    label: String,
    /// Keeps the segments.
    _session: Connected,
}

impl Log {
    /// Completes a copy of the files.
    pub(super) fn add(&self, source: &Path, target: &Path) -> io::Result<()> {
        fs::write(target.join("backup_label"), &self.label)?;
        for entry in fs::read_dir(source.join("pg_wal"))? {
            let entry = entry?;
            // Names of one timeline are in the order of the log.
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.len() == SEGMENT_NAME_LENGTH && self.segments.contains(&name) {
                fs::copy(entry.path(), target.join("pg_wal").join(entry.file_name()))?;
            }
        }
        Ok(())
    }
}

/// Copies the files of a server that may be running.
pub(super) fn files(source: &Path, target: &Path) -> io::Result<()> {
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        let is_one_of = |names: &[&str]| names.iter().any(|other| name == **other);
        let is_temporary = name.to_string_lossy().starts_with("pgsql_tmp");
        if is_one_of(LEFT_OUT) || is_temporary {
            continue;
        }
        if entry.file_type()?.is_dir() {
            DirBuilder::new().mode(0o700).create(target.join(&name))?;
            if !is_one_of(EMPTY) {
                files(&path, &target.join(&name))?;
            }
            continue;
        }
        match fs::copy(&path, target.join(&name)) {
            // Dropped meanwhile, which the log repeats.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            copied => drop(copied?),
        }
    }
    Ok(())
}
