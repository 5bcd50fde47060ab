//! Sockets inherited from a service manager (`LISTEN_FDS`, sd_listen_fds(3)); they replace those in the settings.

use std::{io, net::SocketAddr};

use listenfd::ListenFd;
use socket2::SockRef;

use super::{BoundSocket, ListenError, tcp::ListeningTcp};
use crate::net::unix::BoundUnix;

/// Inherited sockets that belong to no endpoint yet.
#[derive(Debug, Default)]
pub struct Inherited(Vec<Passed>);

#[derive(Debug)]
struct Passed {
    name: Option<String>,
    socket: BoundSocket,
}

impl Inherited {
    /// Takes the sockets and removes the variables that announce them, so that child processes inherit neither. `names` is
    /// `LISTEN_FDNAMES`. To be called once, before there are threads.
    pub fn take(names: Option<&str>) -> Result<Self, ListenError> {
        let mut passed = ListenFd::from_env();
        let mut names = names.unwrap_or_default().split(':');
        let mut sockets = Vec::new();
        for index in 0..passed.len() {
            let name = names.next().filter(|name| !name.is_empty());
            let unusable = |source| {
                let number = index + 1;
                ListenError::new(
                    format!("the service manager passed descriptor number {number}, which is not a listening TCP or Unix socket"),
                    "the socket unit needs ListenStream= and Accept=no",
                )
                .caused_by(source)
            };
            // A descriptor that is no TCP socket is left in its place, for the second attempt.
            let socket = match passed.take_tcp_listener(index) {
                Ok(socket) => {
                    socket.map(|socket| BoundSocket::Tcp(ListeningTcp::inherited(socket)))
                }
                Err(_) => take_unix(&mut passed, index)
                    .map_err(unusable)?
                    .map(BoundSocket::Unix),
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

    /// Assigns the sockets: all to a single endpoint; else to each endpoint those with its name, and of the rest one, in
    /// order, to each endpoint that has none yet.
    pub(crate) fn claim(
        self,
        endpoints: &[&str],
        allow_remote: bool,
    ) -> Result<Vec<Vec<BoundSocket>>, ListenError> {
        let mut shares: Vec<Vec<BoundSocket>> = Vec::new();
        shares.resize_with(endpoints.len(), Vec::new);
        let mut rest = Vec::new();
        for passed in self.0 {
            // As for the addresses in the settings: every client that reaches it acts as the service principal.
            if let (false, Some(address)) = (allow_remote, passed.socket.remote()) {
                return Err(ListenError::new(
                    format!(
                        "the service manager passed a socket on {address}, which can be reached from other machines"
                    ),
                    "every client that reaches it is the service principal; if that is intended, add --allow-remote",
                ));
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
                let name = name.unwrap_or_default();
                return Err(ListenError::new(
                    format!(
                        "the service manager passed a socket {name}that belongs to no endpoint"
                    ),
                    "FileDescriptorName= of a socket unit is an endpoint's name; without one each takes the next endpoint",
                ));
            };
            share.push(passed.socket);
        }
        Ok(shares)
    }
}

#[cfg(unix)]
fn take_unix(passed: &mut ListenFd, index: usize) -> io::Result<Option<BoundUnix>> {
    passed.take_unix_listener(index)
}

#[cfg(not(unix))]
fn take_unix(_: &mut ListenFd, _: usize) -> io::Result<Option<BoundUnix>> {
    Err(io::ErrorKind::Unsupported.into())
}

impl BoundSocket {
    fn check(&self) -> io::Result<()> {
        let socket = match self {
            Self::Tcp(tcp) => SockRef::from(&tcp.socket),
            Self::Unix(socket) => SockRef::from(socket),
        };
        socket.set_nonblocking(true)?;
        // With Accept=yes systemd passes connections (systemd.socket(5)); only Linux has an option that shows this.
        #[cfg(target_os = "linux")]
        if !socket.is_listener()? {
            return Err(io::Error::other("a connection, not a listener"));
        }
        Ok(())
    }

    /// Its address, if other machines may reach it.
    fn remote(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(tcp) => tcp
                .socket
                .local_addr()
                .ok()
                .filter(|address| !address.ip().to_canonical().is_loopback()),
            Self::Unix(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn passed(name: Option<&str>, address: &str) -> Passed {
        Passed {
            name: name.map(str::to_owned),
            socket: BoundSocket::Tcp(ListeningTcp::inherited(TcpListener::bind(address).unwrap())),
        }
    }

    fn counts(names: &[Option<&str>], endpoints: &[&str]) -> Option<Vec<usize>> {
        let sockets = names.iter().map(|name| passed(*name, "127.0.0.1:0"));
        let shares = Inherited(sockets.collect()).claim(endpoints, false).ok()?;
        Some(shares.iter().map(Vec::len).collect())
    }

    #[test]
    fn sockets_are_assigned_by_name_and_then_by_order() {
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
    fn a_socket_for_other_machines_needs_allow_remote() {
        let one = || Inherited(vec![passed(None, "0.0.0.0:0")]);
        let refused = one().claim(&["a"], false).unwrap_err();
        assert!(refused.hint().unwrap().contains("--allow-remote"));
        assert!(one().claim(&["a"], true).is_ok());
    }
}
