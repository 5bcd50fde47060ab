//! On a system where the emulator starts no Postgres of its own.

use std::path::{Path, PathBuf};

use super::LocalPostgresOptions;
use crate::emulator::EmulatorError;

/// A running local Postgres, of which there is none.
#[derive(Debug)]
pub enum LocalPostgres {}

#[expect(clippy::unused_async, reason = "the real ones are")]
impl LocalPostgres {
    /// Fails.
    pub async fn start(_: LocalPostgresOptions) -> Result<Self, EmulatorError> {
        Err(EmulatorError::NoLocalPostgres)
    }

    pub(crate) fn options(&self) -> LocalPostgresOptions {
        match *self {}
    }

    pub(crate) async fn branch(&self) -> Result<Self, EmulatorError> {
        match *self {}
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
