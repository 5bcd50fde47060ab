//! Who is let in at all: what must hold of a client before its session is begun.

use rustix::process::geteuid;

use super::Peer;
use crate::{
    protocol::error::{Report, sqlstate},
    telemetry::names::reason,
    upstream::Refusal,
};

/// The rules for everybody who connects.
#[derive(Debug, Default)]
pub struct Entrance {
    /// The users who may use Unix sockets, beside our own and root; whomever the file's permissions let in when absent.
    pub allowed_uids: Option<Vec<u32>>,
}

impl Entrance {
    /// Whether this peer may ask for anything.
    pub(super) fn admit(&self, peer: Peer) -> Result<(), Refusal> {
        let (Some(allowed), Peer::Unix { uid, .. }) = (&self.allowed_uids, peer) else {
            return Ok(());
        };
        if uid == 0 || uid == geteuid().as_raw() || allowed.contains(&uid) {
            return Ok(());
        }
        Err(Refusal {
            report: Report::new(
                sqlstate::INVALID_AUTHORIZATION,
                format!("the user with uid {uid} may not use this Unix socket"),
            )
            .with_hint("Add the uid to --unix-socket-allowed-uids."),
            reason: reason::LOCAL_AUTH,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unix_socket_is_for_those_listed_and_for_our_own_user_and_root() {
        let unix = |uid| Peer::Unix { uid, pid: None };
        let ours = geteuid().as_raw();
        let entrance = Entrance {
            allowed_uids: Some(vec![70_001]),
        };
        for uid in [0, ours, 70_001] {
            assert!(entrance.admit(unix(uid)).is_ok(), "{uid}");
        }
        let refusal = entrance.admit(unix(70_002)).unwrap_err();
        assert_eq!(refusal.report.sqlstate, "28000");
        assert!(refusal.report.message.contains("70002"));
        let tcp = Peer::Tcp(([127, 0, 0, 1], 1).into());
        assert!(entrance.admit(tcp).is_ok(), "has no uid");
        assert!(Entrance::default().admit(unix(70_002)).is_ok());
    }
}
