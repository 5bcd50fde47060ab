//! The client's end of a connection.

use std::{fmt, net::SocketAddr};

/// The client as the kernel identifies it at accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client with this address.
    Tcp(SocketAddr),
    /// A process of this machine, through a Unix socket.
    Unix {
        /// Its user when it connected.
        uid: u32,
        /// Its process id, where the kernel knows it.
        pid: Option<i32>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix {
                uid,
                pid: Some(pid),
            } => write!(f, "unix:uid={uid},pid={pid}"),
            Self::Unix { uid, pid: None } => write!(f, "unix:uid={uid}"),
        }
    }
}

/// The encryption of a client's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encrypted {
    /// None.
    #[default]
    No,
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl Encrypted {
    /// The encryption of an accepted connection.
    pub fn by(connection: &rustls::ServerConnection) -> Self {
        match connection.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_3) => Self::Tls13,
            // rustls speaks no version below 1.2.
            _ => Self::Tls12,
        }
    }

    /// The name that PgBouncer shows; empty without encryption.
    pub fn label(self) -> &'static str {
        match self {
            Self::No => "",
            Self::Tls12 => "TLSv1.2",
            Self::Tls13 => "TLSv1.3",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_reads_as_one_word() {
        let tcp = Peer::Tcp(SocketAddr::from(([127, 0, 0, 1], 4711)));
        assert_eq!(tcp.to_string(), "127.0.0.1:4711");
        let unix = |pid| Peer::Unix { uid: 1000, pid };
        assert_eq!(unix(Some(7)).to_string(), "unix:uid=1000,pid=7");
        assert_eq!(unix(None).to_string(), "unix:uid=1000");
    }
}
