//! The error of listening sockets.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// Why sockets cannot be listened on: one line, and a hint that describes the fix.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ListenError {
    message: String,
    hint: Option<String>,
    source: Option<io::Error>,
    /// The address, if another process listens on it.
    pub(crate) taken: Option<Taken>,
}

/// An address that another process listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    #[cfg_attr(not(unix), expect(dead_code, reason = "there are none"))]
    Unix(PathBuf),
}

impl ListenError {
    pub(super) fn new(message: impl Into<String>, hint: &str) -> Self {
        Self {
            message: message.into(),
            hint: (!hint.is_empty()).then(|| hint.to_owned()),
            source: None,
            taken: None,
        }
    }

    /// A TCP address that cannot be bound; `flag` sets its port.
    pub(crate) fn tcp(address: SocketAddr, flag: &str, source: io::Error) -> Self {
        let is_taken = source.kind() == io::ErrorKind::AddrInUse;
        let hint = match source.kind() {
            io::ErrorKind::AddrInUse => format!(
                "something listens there already: stop it, or choose another port with --{flag} (0 = any free one)"
            ),
            // Only Postgres listeners use --address; the other ports have address settings of their own, or none.
            io::ErrorKind::AddrNotAvailable if flag == "port" => {
                "set --address to an address of this machine".to_owned()
            }
            // Lower ports need CAP_NET_BIND_SERVICE (capabilities(7)).
            io::ErrorKind::PermissionDenied => {
                format!("choose a port of 1024 or more with --{flag}")
            }
            _ => String::new(),
        };
        Self {
            taken: is_taken.then_some(Taken::Tcp(address)),
            ..Self::new(format!("cannot listen on {address} (--{flag})"), &hint).caused_by(source)
        }
    }

    /// A Unix socket that cannot be bound.
    pub(super) fn unix(path: &Path, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::NotFound => "make the directory first",
            io::ErrorKind::NotADirectory => {
                "--unix-socket names the directory that the socket is made in"
            }
            io::ErrorKind::PermissionDenied => {
                "the directory must be writable for the user that the proxy runs as"
            }
            _ => "",
        };
        let message = format!("cannot listen on `{}` (--unix-socket)", path.display());
        Self::new(message, hint).caused_by(source)
    }

    /// A Unix socket that another server accepts connections on.
    #[cfg(unix)]
    pub(super) fn taken_unix(path: &Path) -> Self {
        let message = format!(
            "another server listens on `{}` (--unix-socket)",
            path.display()
        );
        Self {
            taken: Some(Taken::Unix(path.to_owned())),
            ..Self::new(message, "stop it, or choose another directory or --port")
        }
    }

    #[must_use]
    pub(super) fn caused_by(self, source: io::Error) -> Self {
        Self {
            source: Some(source),
            ..self
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}
