//! Unix sockets, and the user of this process.
//!
//! On a system without them, types without values take their place, so that code for both kinds of sockets needs no
//! conditions. A configuration with a Unix socket is refused there.

#[cfg(unix)]
mod supported;
#[cfg(not(unix))]
mod unsupported;

#[cfg(unix)]
pub use self::supported::*;
#[cfg(not(unix))]
pub use self::unsupported::*;

/// The process at the other end of a Unix socket, as the kernel recorded it at connect(2): it cannot choose it.
#[derive(Clone, Copy, Debug)]
pub struct PeerProcess {
    /// Its user.
    pub uid: u32,
    /// Its process id, where the kernel knows it.
    pub pid: Option<i32>,
}
