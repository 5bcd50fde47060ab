//! The types of std, tokio and rustix.

use std::{io, path::PathBuf};

pub use std::os::unix::net::UnixListener as BoundUnix;
pub use tokio::net::{UnixListener, UnixStream};

use super::PeerProcess;

/// The user of this process.
pub(crate) fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The other end of a connection (`SO_PEERCRED`, unix(7)).
pub(crate) fn peer(socket: &UnixStream) -> io::Result<PeerProcess> {
    let credentials = socket.peer_cred()?;
    Ok(PeerProcess {
        uid: credentials.uid(),
        pid: credentials.pid(),
    })
}

/// The path of a listener; none for one in Linux's abstract namespace.
pub(crate) fn path(socket: &BoundUnix) -> io::Result<Option<PathBuf>> {
    let address = socket.local_addr()?;
    Ok(address.as_pathname().map(PathBuf::from))
}
