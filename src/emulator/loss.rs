//! Loss of the network path: a connection whose packets vanish, in both directions.
//!
//! A peer that merely stops reading still acknowledges: its kernel answers probes, so a client's keepalive and
//! `TCP_USER_TIMEOUT` see a healthy peer. On Linux a socket filter that accepts nothing discards every packet before TCP
//! sees it. Elsewhere, and where the kernel permits filters to root only, the connection is only left unread.

use std::time::Duration;

use socket2::Socket;

/// Discards what arrives at `socket` from now on. Its close becomes a reset: a FIN would never be acknowledged.
pub(crate) fn begin(socket: &Socket) {
    let _ = socket.set_linger(Some(Duration::ZERO));
    #[cfg(target_os = "linux")]
    {
        /// Classic BPF: return a constant, the number of bytes to keep.
        const RETURN: u16 = 0x06;
        let nothing = socket2::SockFilter::new(RETURN, 0, 0, 0);
        if let Err(error) = socket.attach_filter(&[nothing]) {
            tracing::warn!(
                %error,
                "packets cannot be lost, the connection is only left unread; hint: run the emulator as root"
            );
        }
    }
}

/// Lets packets pass again; what was lost meanwhile is retransmitted.
pub(crate) fn end(socket: &Socket) {
    let _ = socket.set_linger(None);
    #[cfg(target_os = "linux")]
    let _ = socket.detach_filter();
}
