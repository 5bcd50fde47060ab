//! What can be wrong with settings.

use std::{net::IpAddr, path::PathBuf};

/// What is wrong with the settings. Display is one line, [`hint`](Self::hint) says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file `{}`", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("in the configuration file `{}`, line {line}: {message}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where, counted from 1.
        line: usize,
        /// Why.
        message: String,
    },
    /// A credential names a variable that is not set.
    #[error("the endpoint `{endpoint}` takes its password from {variable}, which is not set")]
    NoPassword {
        /// Which endpoint.
        endpoint: String,
        /// Which variable.
        variable: String,
    },
    /// A credential without an identity.
    #[error("the endpoint `{endpoint}` has a credential of its own, but no user")]
    NoUser {
        /// Which endpoint.
        endpoint: String,
    },
    /// A credential without a host, so that there is nobody to present it to.
    #[error("the endpoint `{endpoint}` has a credential of its own, but no host")]
    NoHost {
        /// Which endpoint.
        endpoint: String,
    },
    /// An empty command.
    #[error("the endpoint `{endpoint}` takes its credential from a command that is empty")]
    NoCommand {
        /// Which endpoint.
        endpoint: String,
    },
    /// No endpoint is named.
    #[error("no endpoint is named: neither ENDPOINT_NAME nor LAKEBASE_ENDPOINT is set")]
    NoEndpoint,
    /// Both variables name one, and not the same.
    #[error("ENDPOINT_NAME is `{endpoint_name}` but LAKEBASE_ENDPOINT is `{lakebase_endpoint}`")]
    TwoEndpoints {
        /// `ENDPOINT_NAME`.
        endpoint_name: String,
        /// `LAKEBASE_ENDPOINT`.
        lakebase_endpoint: String,
    },
    /// A variable holds bytes that are no text.
    #[error("{variable} is not valid UTF-8")]
    NotText {
        /// Which.
        variable: String,
    },
    /// A variable holds something it cannot.
    #[error("{variable} is `{value}`, which is not {expected}")]
    Variable {
        /// Which.
        variable: &'static str,
        /// What it holds.
        value: String,
        /// What it should.
        expected: &'static str,
    },
    /// The host is one of Neon's own service.
    #[error("PGHOST `{host}` is a host of Neon, not of Databricks Lakebase")]
    Neon {
        /// The host.
        host: String,
    },
    /// TLS off towards another machine.
    #[error("PGSSLMODE is `disable`, but `{host}` is not this machine")]
    PlainRemote {
        /// The host.
        host: String,
    },
    /// Listening where others could connect, without having been told to.
    #[error("--address {address} can be reached from other machines")]
    Remote {
        /// The address.
        address: IpAddr,
    },
    /// TLS for clients that is set only by half, or twice.
    #[error("{0}")]
    ClientTls(&'static str),
    /// No password, where clients must know one.
    #[error("clients must know a password (--local-auth), but there is none")]
    NoLocalPassword,
    /// The password cannot be read.
    #[error("cannot read the password from `{}` (--local-password-file)", path.display())]
    LocalPasswordFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Two sockets for one place.
    #[error("{one} and {other} would both listen on {place}")]
    Clash {
        /// Whose the one is.
        one: String,
        /// Whose the other is.
        other: String,
        /// Where.
        place: String,
    },
    /// Nothing to do.
    #[error("--port is `none`, and there is no other way in")]
    NoListener,
}

impl ConfigError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::InvalidData => {
                "it must be a text file in UTF-8, of 1 MiB at most; config/lakebase-proxy.toml shows every setting"
            }
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::Unsupported => {
                "name a file, not a pipe or a device, where the settings are to be reloaded"
            }
            Self::File { .. } => {
                "check the path, or leave --config-file out: every setting has a flag and a variable"
            }
            Self::Parse { .. } => "config/lakebase-proxy.toml shows every setting",
            Self::NoPassword { .. } => "set it where the proxy is started",
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
                "a Databricks workspace mints no credential for it: set PGHOST to the Lakebase endpoint's host, or give the endpoint a password of its own (`credential`)"
            }
            Self::PlainRemote { .. } => {
                "leave PGSSLMODE out, or set it to `require`: certificates are always verified"
            }
            Self::Remote { .. } => {
                "whoever reaches it is the service principal; if that is meant, add --allow-remote"
            }
            Self::ClientTls(_) => {
                "give both --client-tls-cert and --client-tls-key, or --client-tls=self-signed"
            }
            Self::NoLocalPassword => {
                "put it into the file that --local-password-file names, or into LAKEBASE_PROXY_LOCAL_PASSWORD"
            }
            Self::LocalPasswordFile { .. } => {
                "it must be a text file that the proxy's user may read"
            }
            Self::Clash { .. } => "give each a port of its own (0 = any free one)",
            Self::NoListener => {
                "give it a port, or a directory for a Unix socket with --unix-socket"
            }
        })
    }
}
