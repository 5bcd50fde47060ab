//! Ports for what binds a number that a test knows beforehand.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr, TcpStream},
};

use socket2::{Domain, Socket, Type};

use super::eventually;

/// A port of this machine that only the owner's own listeners take, as long as it lives.
///
/// A port that is chosen, released and bound later may meanwhile become another test's. This one stays bound without listening:
/// Linux gives it to no `bind` of port 0 and no outgoing connection, refuses connections to it, and lets a socket listen on it
/// if both have `SO_REUSEADDR`, as the sockets of the proxy, tokio and the standard library do.
pub(crate) struct ReservedPort {
    socket: Socket,
}

impl ReservedPort {
    pub(crate) fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        // On all addresses, for listeners on any of them.
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        socket.bind(&any.into()).unwrap();
        Self { socket }
    }

    pub(crate) fn number(&self) -> u16 {
        let address = self.socket.local_addr().unwrap();
        address.as_socket().unwrap().port()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.number()))
    }

    /// Waits until its listener has ended everywhere: a process that another test starts has all sockets until its `exec`.
    pub(crate) async fn until_refused(&self) {
        eventually("connections are refused", async || {
            let error = TcpStream::connect(self.address()).err()?;
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            Some(())
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn a_reserved_port_serves_its_owner_again_and_again() {
        let port = ReservedPort::new();
        for _ in 0..3 {
            port.until_refused().await;
            let listener = TcpListener::bind(port.address()).unwrap();
            let second = TcpListener::bind(port.address()).unwrap_err();
            assert_eq!(second.kind(), ErrorKind::AddrInUse);
            let _client = TcpStream::connect(port.address()).unwrap();
            let _accepted = listener.accept().unwrap();
        }
        drop(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.number())).unwrap());
    }

    /// Of 28,000 ports, 200 are reserved: a thousand choices would hit some of them.
    #[test]
    fn the_system_gives_a_reserved_port_to_no_one_else() {
        let reserved: Vec<_> = (0..200).map(|_| ReservedPort::new()).collect();
        let numbers: HashSet<u16> = reserved.iter().map(ReservedPort::number).collect();
        assert_eq!(numbers.len(), reserved.len());
        for _ in 0..1000 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let outgoing = TcpStream::connect(address).unwrap().local_addr().unwrap();
            for chosen in [address, outgoing] {
                assert!(!numbers.contains(&chosen.port()), "{chosen}");
            }
        }
    }
}
