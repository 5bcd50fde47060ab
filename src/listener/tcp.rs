//! The TCP sockets of one endpoint, which share a port.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener},
};

use socket2::SockRef;

use super::ListenError;
use crate::net::tcp::listen;

/// Attempts to find a port that is free on several addresses.
const FREE_PORT_ATTEMPTS: usize = 16;

/// A socket that listens until this is dropped.
#[derive(Debug)]
pub(crate) struct ListeningTcp {
    pub(super) socket: TcpListener,
    /// The service manager has it, too, and goes on listening.
    is_inherited: bool,
}

impl ListeningTcp {
    fn ours(socket: TcpListener) -> Self {
        Self {
            socket,
            is_inherited: false,
        }
    }

    pub(super) fn inherited(socket: TcpListener) -> Self {
        Self {
            socket,
            is_inherited: true,
        }
    }
}

impl Drop for ListeningTcp {
    fn drop(&mut self) {
        if !self.is_inherited {
            // A child process between fork and exec has a copy of the socket. If that listened on, a reload would find the
            // port taken. BSD refuses to shut a listening socket down.
            let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        }
    }
}

/// Binds all of `addresses`; returns the sockets and their addresses, in that order. 127.0.0.1 is accompanied by ::1 where
/// that exists, behind the others and not among the addresses, since `localhost` may mean either.
pub(super) fn bind_all(
    addresses: &[SocketAddr],
) -> Result<(Vec<ListeningTcp>, Vec<SocketAddr>), ListenError> {
    let any_port = addresses.iter().all(|address| address.port() == 0);
    // The port that the system chooses for the first address may be taken on another: then all are chosen again.
    let mut attempts = if any_port && addresses.len() > 1 {
        FREE_PORT_ATTEMPTS
    } else {
        1
    };
    loop {
        attempts -= 1;
        match bind_each(addresses, any_port) {
            Err(error) if attempts > 0 && error.taken.is_some() => {}
            outcome => return outcome,
        }
    }
}

fn bind_each(
    addresses: &[SocketAddr],
    any_port: bool,
) -> Result<(Vec<ListeningTcp>, Vec<SocketAddr>), ListenError> {
    let mut sockets = Vec::with_capacity(addresses.len() + 1);
    let mut bound: Vec<SocketAddr> = Vec::with_capacity(addresses.len());
    for &(mut address) in addresses {
        if let (true, Some(first)) = (any_port, bound.first()) {
            // One port for all addresses, as a client has one PGPORT.
            address.set_port(first.port());
        }
        let failed = |source| ListenError::tcp(address, "port", source);
        // As PostgreSQL does: `[::]` would otherwise take the port from 0.0.0.0.
        let socket = listen(address, false).map_err(failed)?;
        bound.push(socket.local_addr().map_err(failed)?);
        sockets.push(ListeningTcp::ours(socket));
    }
    let mut companions: Vec<SocketAddr> = bound
        .iter()
        .filter(|address| address.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST))
        .map(|address| SocketAddr::from((Ipv6Addr::LOCALHOST, address.port())))
        .filter(|companion| !bound.contains(companion))
        .collect();
    companions.dedup();
    for companion in companions {
        match listen(companion, false) {
            Ok(socket) => sockets.push(ListeningTcp::ours(socket)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => tracing::warn!(
                address = %companion,
                "another program listens on this address: clients that connect to `localhost` may reach it instead of the proxy; hint: end it, choose another --port, or let clients connect to 127.0.0.1"
            ),
            // Without IPv6, `localhost` is IPv4.
            Err(error) => tracing::debug!(address = %companion, %error, "not listening"),
        }
    }
    Ok((sockets, bound))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;
    use crate::listener::Taken;

    fn loopback(port: u16) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, port))
    }

    fn has_ipv6() -> bool {
        std::net::UdpSocket::bind("[::1]:0").is_ok()
    }

    #[tokio::test]
    async fn localhost_is_served_on_both_families() {
        let (_sockets, bound) = bind_all(&[loopback(0)]).unwrap();
        let port = bound[0].port();
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_ok());
        if has_ipv6() {
            assert!(TcpStream::connect(("::1", port)).await.is_ok());
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn local_clients_are_not_paced() {
        let (sockets, bound) = bind_all(&[loopback(0)]).unwrap();
        let _client = TcpStream::connect(bound[0]).await.unwrap();
        let (accepted, _) = sockets[0].socket.accept().unwrap();
        let name = SockRef::from(&accepted).tcp_congestion().unwrap();
        assert!(name.starts_with(b"reno"));
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error() {
        let (_sockets, bound) = bind_all(&[loopback(0)]).unwrap();
        let error = bind_all(&bound).unwrap_err();
        assert_eq!(error.taken, Some(Taken::Tcp(bound[0])));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_port_is_free_although_a_child_process_has_a_copy_of_the_socket() {
        let (sockets, bound) = bind_all(&[loopback(0)]).unwrap();
        let copy = SockRef::from(&sockets[0].socket).try_clone().unwrap();
        drop(sockets);
        let (_sockets, again) = bind_all(&bound).unwrap();
        assert_eq!(again, bound);
        drop(copy);
    }

    #[tokio::test]
    async fn several_addresses_share_one_port() {
        let second = SocketAddr::from(([127, 0, 0, 2], 0));
        let mut wanted = vec![loopback(0), second];
        if has_ipv6() {
            wanted.push(SocketAddr::from((Ipv6Addr::LOCALHOST, 0)));
        }
        let (sockets, bound) = bind_all(&wanted).unwrap();
        assert_eq!(sockets.len(), wanted.len(), "::1 once");
        for (wanted, bound) in wanted.iter().zip(&bound) {
            assert_eq!(
                (wanted.ip(), bound.port()),
                (bound.ip(), sockets[0].socket.local_addr().unwrap().port())
            );
            assert!(TcpStream::connect(bound).await.is_ok());
        }
    }
}
