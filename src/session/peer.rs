//! Who is at the other end of a client's connection, as far as the kernel says.

use std::{fmt, net::SocketAddr};

/// Who connected; known from accept on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// From this address.
    Tcp(SocketAddr),
    /// A process of this machine, through a Unix socket.
    Unix {
        /// The user it ran as when it connected.
        uid: u32,
        /// Its process id, where the kernel tells.
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
