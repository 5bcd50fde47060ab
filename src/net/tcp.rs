//! TCP: listening, happy eyeballs, keepalive, low latency.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

use crate::config::Keepalive;

/// The kernel caps it; a burst of clients must not find the queue full.
pub(crate) const BACKLOG: i32 = 4096;
/// The head start of each address over the next (RFC 8305's connection attempt delay).
const HAPPY_EYEBALLS_DELAY: Duration = Duration::from_millis(250);

/// Connects to one address.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // Before the connect: a paced socket stays paced.
    unpace(&SockRef::from(&socket), address);
    socket.connect(address).await
}

/// The first connection to succeed, and its address; each address gets a head start over the next.
pub(crate) async fn connect_any(addresses: Vec<SocketAddr>) -> io::Result<(TcpStream, SocketAddr)> {
    let mut attempts = JoinSet::new();
    let mut last_error = io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        "the host name has no address",
    );
    let mut addresses = interleave(addresses).into_iter();
    let mut more = true;
    loop {
        if more {
            match addresses.next() {
                Some(address) => {
                    // Returned beside the socket, which no longer knows its peer once it has been reset.
                    attempts.spawn(async move { Ok((connect(address).await?, address)) });
                }
                None => more = false,
            }
        }
        // `join_next` is cancel safe: attempts that exceed their head start go on in the set.
        let finished = if more {
            match timeout(HAPPY_EYEBALLS_DELAY, attempts.join_next()).await {
                Ok(finished) => finished,
                Err(_head_start_over) => continue,
            }
        } else {
            attempts.join_next().await
        };
        match finished {
            // Dropping the set ends the other attempts.
            Some(Ok(Ok(connected))) => return Ok(connected),
            // RFC 8305, 5: after a failure the next attempt starts at once.
            Some(Ok(Err(error))) => last_error = error,
            Some(Err(lost)) => last_error = io::Error::other(lost),
            // Only without more addresses: otherwise the set holds the attempt that has just begun.
            None => return Err(last_error),
        }
    }
}

/// Listens on `address`; `[::]` takes the port of 0.0.0.0 as well if `is_dual_stack`.
pub(crate) fn listen(address: SocketAddr, is_dual_stack: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // A restart succeeds while connections of the last run are in TIME_WAIT, as with PostgreSQL. On Windows that needs no
    // option, and this one would let two programs listen on the same port.
    if cfg!(unix) {
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        // Explicit, since the default is a setting of the system (net.ipv6.bindv6only).
        socket.set_only_v6(!is_dual_stack)?;
    }
    // As every runtime requires it.
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it from this one.
    unpace(&SockRef::from(&socket), address);
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether a connection to `address` reaches a socket that listens on `listener`.
pub(crate) fn leads_to(address: SocketAddr, listener: SocketAddr) -> bool {
    let ip = match address.ip().to_canonical() {
        // The kernel connects to this machine.
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let includes = |listener: IpAddr| {
        listener == ip
            // A listener on 127.0.0.1 is accompanied by one on ::1.
            || (listener == Ipv4Addr::LOCALHOST && ip == Ipv6Addr::LOCALHOST)
            || (listener.is_unspecified()
                && listener.is_ipv4() == ip.is_ipv4()
                && (ip.is_loopback() || is_own(address).unwrap_or(false)))
    };
    address.port() == listener.port() && includes(listener.ip().to_canonical())
}

/// Whether an interface of this machine has the address: the source of a connection to it is then the address itself.
fn is_own(address: SocketAddr) -> io::Result<bool> {
    let any: IpAddr = if address.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    // Sends nothing: for UDP it only chooses the route.
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip() == address.ip())
}

/// Whether a peer at `address` is on this machine.
pub(crate) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Disables pacing for a loopback socket: between processes of one machine nothing is lost or queued, and a pacing congestion
/// control's timer for every burst costs two thirds more system time (BBR on Linux 6.18: 800 and 480 µs/MB).
///
/// Reno is in every kernel and needs no privilege. It must be set before the socket is connected or listens: a paced socket
/// stays paced. If it fails, nothing but that time is lost.
pub(crate) fn unpace(socket: &SockRef<'_>, address: SocketAddr) {
    #[cfg(target_os = "linux")]
    if is_loopback(address.ip()) {
        let _ = socket.set_tcp_congestion(b"reno");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, address);
}

/// Alternates the address families, starting with the one that the resolver prefers (RFC 8305).
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let Some(first) = addresses.first().copied() else {
        return addresses;
    };
    let (mut preferred, mut other): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv4() == first.is_ipv4());
    let mut ordered = Vec::with_capacity(preferred.len() + other.len());
    preferred.reverse();
    other.reverse();
    loop {
        let before = ordered.len();
        ordered.extend(preferred.pop());
        ordered.extend(other.pop());
        if ordered.len() == before {
            return ordered;
        }
    }
}

/// Sets nodelay and keepalive. Errors are ignored: the connection works without.
pub(crate) fn tune(socket: &TcpStream, keepalive: &Keepalive) {
    // As libpq and PostgreSQL do: Nagle's algorithm would hold back the end of a message until an acknowledgement.
    let _ = socket.set_nodelay(true);
    let socket = SockRef::from(socket);
    if !keepalive.idle.is_zero() {
        let probes = TcpKeepalive::new()
            .with_time(keepalive.idle)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.count);
        let _ = socket.set_tcp_keepalive(&probes);
    }
    // Zero by default: Linux also ends a peer that is alive and does not read, such as a COPY that waits for a lock.
    #[cfg(target_os = "linux")]
    if !keepalive.user_timeout.is_zero() {
        let _ = socket.set_tcp_user_timeout(Some(keepalive.user_timeout));
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_leads_to_listeners_of_this_machine_only() {
        let leads = |address: &str, listener: &str| {
            leads_to(
                SocketAddr::new(address.parse().unwrap(), 7),
                SocketAddr::new(listener.parse().unwrap(), 7),
            )
        };
        for (address, listener, expected) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("::1", "127.0.0.1", true),
            ("0.0.0.0", "127.0.0.1", true),
            ("::ffff:127.0.0.1", "127.0.0.1", true),
            ("127.0.0.2", "0.0.0.0", true),
            ("::1", "::", true),
            ("127.0.0.2", "127.0.0.1", false),
            ("127.0.0.1", "::1", false),
            ("127.0.0.1", "::", false),
            ("192.0.2.1", "0.0.0.0", false),
            ("192.0.2.1", "127.0.0.1", false),
        ] {
            assert_eq!(leads(address, listener), expected, "{address} {listener}");
        }
        let one = "127.0.0.1:1".parse().unwrap();
        assert!(!leads_to(one, "127.0.0.1:2".parse().unwrap()));
        // The address of an interface, where this machine has a route to others.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        if socket.connect("192.0.2.1:9").is_ok() {
            let own = socket.local_addr().unwrap().ip().to_string();
            assert!(leads(&own, "0.0.0.0"), "{own}");
            assert!(!leads(&own, "127.0.0.1"), "{own}");
        }
    }

    #[tokio::test]
    async fn all_of_ipv6_takes_ipv4_only_if_dual_stack() {
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let Ok(dual_stack) = listen(any, true) else {
            return; // no IPv6
        };
        for (listener, takes_ipv4) in [(dual_stack, true), (listen(any, false).unwrap(), false)] {
            let port = listener.local_addr().unwrap().port();
            let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            assert_eq!(listen(ipv4, false).is_err(), takes_ipv4);
        }
    }

    #[test]
    fn families_alternate() {
        let parse = |list: &[&str]| {
            list.iter()
                .map(|a| a.parse().unwrap())
                .collect::<Vec<SocketAddr>>()
        };
        let given = parse(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1"]);
        assert_eq!(
            interleave(given),
            parse(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"])
        );
    }

    /// A server that waits for a lock in the middle of a COPY reads nothing, and is alive: Linux would end such a
    /// connection when the user timeout is over.
    #[tokio::test]
    async fn a_peer_is_given_up_when_it_is_dead_and_not_when_it_does_not_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        tune(&socket, &Keepalive::default());
        assert!(socket.nodelay().unwrap());
        assert!(SockRef::from(&socket).keepalive().unwrap());
        #[cfg(target_os = "linux")]
        assert_eq!(SockRef::from(&socket).tcp_user_timeout().unwrap(), None);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn only_what_stays_on_this_machine_is_not_paced() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = connect(listener.local_addr().unwrap()).await.unwrap();
        let congestion_control = |socket: SockRef<'_>| socket.tcp_congestion().unwrap();
        assert!(congestion_control(SockRef::from(&local)).starts_with(b"reno"));

        let (socket, other) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
        unpace(&SockRef::from(&socket), "192.0.2.1:5432".parse().unwrap());
        assert_eq!(
            congestion_control(SockRef::from(&socket)),
            congestion_control(SockRef::from(&other)),
            "left to the system"
        );
    }

    #[tokio::test]
    async fn every_address_is_tried() {
        // Bound, so that no one else takes the port, and not listening.
        let closed = TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let dead = closed.local_addr().unwrap();
        let alive = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stream, address) = connect_any(vec![dead, alive.local_addr().unwrap()])
            .await
            .unwrap();
        assert_eq!(address, alive.local_addr().unwrap());
        assert_eq!(stream.peer_addr().unwrap(), address);
        assert_eq!(
            connect_any(vec![dead, dead]).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
        assert!(connect_any(Vec::new()).await.is_err());
    }
}
