//! Errors of settings.

use std::{net::IpAddr, path::PathBuf};

/// An error of the settings. Its text is one line; [`hint`](Self::hint) describes the fix.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is invalid.
    #[error("in the configuration file `{}`, line {line}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The cause.
        message: String,
    },
    /// A credential names a variable that is not set.
    #[error("the endpoint `{endpoint}` takes its password from {variable}, which is not set")]
    NoPassword {
        /// The endpoint.
        endpoint: String,
        /// The variable.
        variable: String,
    },
    /// A credential without a user.
    #[error("the endpoint `{endpoint}` has a credential but no user")]
    NoUser {
        /// The endpoint.
        endpoint: String,
    },
    /// A credential without a host.
    #[error("the endpoint `{endpoint}` has a credential but no host")]
    NoHost {
        /// The endpoint.
        endpoint: String,
    },
    /// An empty command.
    #[error("the endpoint `{endpoint}` has an empty credential command")]
    NoCommand {
        /// The endpoint.
        endpoint: String,
    },
    /// No endpoint is named.
    #[error("no endpoint is named: neither ENDPOINT_NAME nor LAKEBASE_ENDPOINT is set")]
    NoEndpoint,
    /// Two variables name different endpoints.
    #[error("ENDPOINT_NAME is `{endpoint_name}` but LAKEBASE_ENDPOINT is `{lakebase_endpoint}`")]
    TwoEndpoints {
        /// `ENDPOINT_NAME`.
        endpoint_name: String,
        /// `LAKEBASE_ENDPOINT`.
        lakebase_endpoint: String,
    },
    /// A variable is not valid UTF-8.
    #[error("{variable} is not valid UTF-8")]
    NotText {
        /// The variable.
        variable: String,
    },
    /// The value of a variable is invalid.
    #[error("{variable} is `{value}`, which is not {expected}")]
    Variable {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The host belongs to Neon.
    #[error("PGHOST `{host}` is a host of Neon, not of Databricks Lakebase")]
    Neon {
        /// The host.
        host: String,
    },
    /// TLS is off for another machine.
    #[error("PGSSLMODE is `disable`, but `{host}` is not this machine")]
    PlainRemote {
        /// The host.
        host: String,
    },
    /// A listener that other machines can reach, without --allow-remote.
    #[error("--address {address} can be reached from other machines")]
    Remote {
        /// The address.
        address: IpAddr,
    },
    /// Settings of TLS for clients that are incomplete or contradict each other.
    #[error("{0}")]
    ClientTls(&'static str),
    /// No password, although clients need one.
    #[error("--local-auth requires a password, but none is set")]
    NoLocalPassword,
    /// The password cannot be read.
    #[error("cannot read the password from `{}` (--local-password-file)", path.display())]
    LocalPasswordFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Two listeners with the same address.
    #[error("{one} and {other} would both listen on {place}")]
    Conflict {
        /// One listener.
        one: String,
        /// The other.
        other: String,
        /// The address.
        place: String,
    },
    /// No listener.
    #[error("--port is `none`, and there is no Unix socket")]
    NoListener,
}

impl ConfigError {
    /// What the user can do.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::InvalidData => {
                "it must be a text file in UTF-8, of 1 MiB at most; config/lakebase-proxy.toml shows every setting"
            }
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::Unsupported => {
                "reloading needs a regular file, not a pipe or a device"
            }
            Self::File { .. } => {
                "check the path, or omit --config-file: every setting has a flag and a variable"
            }
            Self::Parse { .. } => "config/lakebase-proxy.toml shows every setting",
            Self::NoPassword { .. } => "set it in the environment of the proxy",
            Self::NoUser { .. } => "add `user` to its table: the role that the password belongs to",
            Self::NoHost { .. } => "add `host` to its table",
            Self::NoCommand { .. } => {
                "write it as `credential = { command = [\"program\", \"argument\"] }`"
            }
            Self::NoEndpoint => {
                "set ENDPOINT_NAME=projects/<project>/branches/<branch>/endpoints/<endpoint>; `databricks postgres list-endpoints projects/<project>/branches/<branch>` shows it. To try without an account: lakebase-proxy demo"
            }
            Self::TwoEndpoints { .. } => "unset one of them",
            Self::NotText { .. } => "set it in UTF-8, or unset it",
            Self::Variable { .. } => return None,
            Self::Neon { .. } => {
                "a Databricks workspace mints no credential for it: set PGHOST to the Lakebase endpoint's host, or configure a password for the endpoint (`credential`)"
            }
            Self::PlainRemote { .. } => {
                "unset PGSSLMODE, or set it to `require`: certificates are always verified"
            }
            Self::Remote { .. } => {
                "every client that reaches it acts as the service principal; if that is intended, add --allow-remote"
            }
            Self::ClientTls(_) => {
                "set both --client-tls-cert and --client-tls-key, or --client-tls=self-signed"
            }
            Self::NoLocalPassword => "set --local-password-file or LAKEBASE_PROXY_LOCAL_PASSWORD",
            Self::LocalPasswordFile { .. } => "it must be a text file that the proxy can read",
            Self::Conflict { .. } => "set a different port for each (0 = any free one)",
            Self::NoListener => "set --port, or a directory for a Unix socket with --unix-socket",
        })
    }
}
