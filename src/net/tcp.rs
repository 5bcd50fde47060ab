//! TCP: happy eyeballs, keepalive, low latency.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
    time::timeout,
};

use crate::config::Keepalive;

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
        let dead = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
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
