//! On a system where the emulator starts no Postgres of its own.

use std::path::{Path, PathBuf};

use crate::emulator::EmulatorError;

/// How to run the local Postgres.
#[derive(Clone, Debug)]
pub struct LocalPostgresOptions {
    /// Ignored.
    pub bin_dir: Option<PathBuf>,
    /// Ignored.
    pub download: bool,
    /// Ignored.
    pub fsync: bool,
    /// Ignored.
    pub max_connections: u16,
}

impl Default for LocalPostgresOptions {
    fn default() -> Self {
        Self {
            bin_dir: None,
            download: true,
            fsync: false,
            max_connections: 1000,
        }
    }
}

/// A running local Postgres, of which there is none.
#[derive(Debug)]
pub enum LocalPostgres {}

#[expect(clippy::unused_async, reason = "the real ones are")]
impl LocalPostgres {
    /// Fails.
    pub async fn start(_: LocalPostgresOptions) -> Result<Self, EmulatorError> {
        Err(EmulatorError::NoLocalPostgres)
    }

    /// As on Unix.
    pub async fn restart(&self) -> Result<(), EmulatorError> {
        match *self {}
    }

    /// As on Unix.
    pub fn bin_dir(&self) -> &Path {
        match *self {}
    }

    /// As on Unix.
    pub fn directory(&self) -> &Path {
        match *self {}
    }

    pub(crate) fn config(&self, _: &str) -> tokio_postgres::Config {
        match *self {}
    }

    pub(crate) fn socket(&self) -> PathBuf {
        match *self {}
    }
}
