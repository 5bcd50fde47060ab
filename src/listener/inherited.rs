//! Sockets that a service manager has opened for us (`LISTEN_FDS`); they take the place of those in the settings.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::unix::net::UnixListener,
};

use listenfd::ListenFd;
use socket2::SockRef;

/// The sockets that were passed and not claimed yet.
#[derive(Debug, Default)]
pub struct Inherited(Vec<Passed>);

#[derive(Debug)]
struct Passed {
    name: Option<String>,
    socket: InheritedSocket,
}

/// A listening socket that somebody else made.
#[derive(Debug)]
pub enum InheritedSocket {
    /// TCP.
    Tcp(TcpListener),
    /// Unix.
    Unix(UnixListener),
}

/// What is wrong with what was passed.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// Not something that clients connect to.
    #[error(
        "the service manager passed descriptor number {number}, which is not a listening TCP or Unix socket"
    )]
    Unusable {
        /// Counted from 1.
        number: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// More sockets than endpoints.
    #[error("the service manager passed a socket {name}that belongs to no endpoint")]
    Unclaimed {
        /// Its name, quoted, and a blank; or nothing.
        name: String,
    },
    /// Open to other machines, without having been told to.
    #[error(
        "the service manager passed a socket on {address}, which can be reached from other machines"
    )]
    Remote {
        /// The address.
        address: SocketAddr,
    },
}

impl InheritedError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unusable { .. } => "the socket unit needs ListenStream= and Accept=no",
            Self::Unclaimed { .. } => {
                "FileDescriptorName= of a socket unit is an endpoint's name; without one each takes the next endpoint"
            }
            Self::Remote { .. } => {
                "whoever reaches it is the service principal; if that is meant, add --allow-remote"
            }
        }
    }
}

impl Inherited {
    /// Takes what the environment says was passed, and the variables that say so with it: our children get neither.
    /// `names` is `LISTEN_FDNAMES`. Call it once, before there are threads.
    pub fn take(names: Option<&str>) -> Result<Self, InheritedError> {
        let mut passed = ListenFd::from_env();
        let mut names = names.unwrap_or_default().split(':');
        let mut sockets = Vec::new();
        for index in 0..passed.len() {
            let name = names.next().filter(|name| !name.is_empty());
            let unusable = |source| InheritedError::Unusable {
                number: index + 1,
                source,
            };
            let socket = match passed.take_tcp_listener(index) {
                Ok(socket) => socket.map(InheritedSocket::Tcp),
                Err(_) => passed
                    .take_unix_listener(index)
                    .map_err(unusable)?
                    .map(InheritedSocket::Unix),
            };
            let Some(socket) = socket else { continue };
            socket.check().map_err(unusable)?;
            sockets.push(Passed {
                name: name.map(str::to_owned),
                socket,
            });
        }
        Ok(Self(sockets))
    }

    /// Shares the sockets out: to a single endpoint all; else to each those that bear its name, and of the rest, in
    /// their order, one to each endpoint that has none yet.
    pub(crate) fn claim(
        self,
        endpoints: &[&str],
        allow_remote: bool,
    ) -> Result<Vec<Vec<InheritedSocket>>, InheritedError> {
        let mut shares: Vec<Vec<InheritedSocket>> = Vec::new();
        shares.resize_with(endpoints.len(), Vec::new);
        let mut rest = Vec::new();
        for passed in self.0 {
            if let (false, Some(address)) = (allow_remote, passed.socket.remote()) {
                return Err(InheritedError::Remote { address });
            }
            let named = endpoints
                .iter()
                .position(|endpoint| passed.name.as_deref() == Some(endpoint));
            let named = if endpoints.len() == 1 { Some(0) } else { named };
            match named.and_then(|index| shares.get_mut(index)) {
                Some(share) => share.push(passed.socket),
                None => rest.push(passed),
            }
        }
        let mut empty = shares.iter_mut().filter(|share| share.is_empty());
        for passed in rest {
            let Some(share) = empty.next() else {
                let name = passed.name.map(|name| format!("`{name}` "));
                return Err(InheritedError::Unclaimed {
                    name: name.unwrap_or_default(),
                });
            };
            share.push(passed.socket);
        }
        Ok(shares)
    }
}

impl InheritedSocket {
    fn check(&self) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(socket) => SockRef::from(socket),
            Self::Unix(socket) => SockRef::from(socket),
        };
        socket.set_nonblocking(true)?;
        #[cfg(target_os = "linux")]
        if !socket.is_listener()? {
            return Err(io::Error::other("a connection, not a listener"));
        }
        Ok(())
    }

    /// Its address, where other machines may reach it.
    fn remote(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(socket) => socket
                .local_addr()
                .ok()
                .filter(|address| !address.ip().to_canonical().is_loopback()),
            Self::Unix(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(name: Option<&str>, address: &str) -> Passed {
        Passed {
            name: name.map(str::to_owned),
            socket: InheritedSocket::Tcp(TcpListener::bind(address).unwrap()),
        }
    }

    fn counts(names: &[Option<&str>], endpoints: &[&str]) -> Option<Vec<usize>> {
        let sockets = names.iter().map(|name| passed(*name, "127.0.0.1:0"));
        let shares = Inherited(sockets.collect()).claim(endpoints, false).ok()?;
        Some(shares.iter().map(Vec::len).collect())
    }

    #[test]
    fn sockets_are_shared_out_by_name_and_then_by_order() {
        assert_eq!(counts(&[], &["a"]), Some(vec![0]));
        assert_eq!(
            counts(&[None, Some("x")], &["a"]),
            Some(vec![2]),
            "one endpoint takes all"
        );
        assert_eq!(counts(&[None, None], &["a", "b"]), Some(vec![1, 1]));
        assert_eq!(
            counts(&[Some("b"), Some("b"), None], &["a", "b"]),
            Some(vec![1, 2])
        );
        assert_eq!(counts(&[Some("b")], &["a", "b"]), Some(vec![0, 1]));
        assert_eq!(counts(&[None, None, Some("c")], &["a", "b"]), None);
    }

    #[test]
    fn a_socket_for_other_machines_needs_to_be_meant() {
        let one = || Inherited(vec![passed(None, "0.0.0.0:0")]);
        assert!(matches!(
            one().claim(&["a"], false),
            Err(InheritedError::Remote { .. })
        ));
        assert!(one().claim(&["a"], true).is_ok());
    }
}
