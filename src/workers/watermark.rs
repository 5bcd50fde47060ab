//! How much of what has arrived makes a socket readable (`SO_RCVLOWAT`, socket(7)).

use mio::net::TcpStream;

/// Lets the thread be woken for so many bytes, where that changes. A failure costs processor time and nothing else.
#[inline]
pub(super) fn wake_for(socket: &TcpStream, bytes: Option<usize>) {
    #[cfg(target_os = "linux")]
    if let Some(bytes) = bytes {
        let _ = nix::sys::socket::setsockopt(socket, linux::ReceiveLowWatermark, &bytes);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, bytes);
}

#[cfg(target_os = "linux")]
mod linux {
    use nix::{libc, setsockopt_impl, sys::socket::sockopt::SetUsize};

    #[derive(Clone, Copy, Debug)]
    pub(super) struct ReceiveLowWatermark;

    setsockopt_impl!(
        ReceiveLowWatermark,
        libc::SOL_SOCKET,
        libc::SO_RCVLOWAT,
        usize,
        SetUsize
    );
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{io::Write, net, time::Duration};

    use mio::{Events, Interest, Poll, Token};

    use super::*;

    #[test]
    fn less_than_that_wakes_nobody() {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut theirs = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut ours = TcpStream::from_std(ours);
        wake_for(&ours, Some(1000));
        theirs.write_all(&[7; 999]).unwrap();
        while ours.peek(&mut [0; 1000]).ok() != Some(999) {
            std::thread::yield_now();
        }

        let mut poll = Poll::new().unwrap();
        let registry = poll.registry();
        registry
            .register(&mut ours, Token(0), Interest::READABLE)
            .unwrap();
        let mut events = Events::with_capacity(1);
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        assert!(events.is_empty());

        wake_for(&ours, Some(1));
        poll.poll(&mut events, Some(Duration::from_secs(30)))
            .unwrap();
        assert!(events.iter().any(mio::event::Event::is_readable));
    }
}
