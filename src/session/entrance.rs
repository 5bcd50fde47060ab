//! Who is let in at all, and what must hold of a client before its session is begun.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rustix::process::geteuid;

use super::{Encryption, LocalPassword, handshake::Tls};
use crate::{
    protocol::error::{Report, sqlstate},
    status::{Encrypted, Peer},
    telemetry::labels::Reason,
    upstream::Refusal,
};

/// The rules for everybody who connects.
#[derive(Debug, Default)]
pub struct Entrance {
    /// The users who may use Unix sockets, beside our own and root; whomever the file's permissions let in when absent.
    pub allowed_uids: Option<Vec<u32>>,
    /// TLS, where it is offered.
    pub encryption: Option<Arc<Encryption>>,
    /// Whether TCP clients of other machines must use it.
    pub requires_tls: bool,
    /// What TCP clients must know, where that is more than nothing.
    pub password: Option<Arc<LocalPassword>>,
    /// What has been said once.
    pub told: Arc<Told>,
}

/// What the log says once in the life of a process.
#[derive(Debug, Default)]
pub struct Told {
    insists: AtomicBool,
    broken_off: AtomicBool,
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
            reason: Reason::LocalAuth,
        })
    }

    /// Whether a session of this peer is encrypted as it must be. What stays on this machine need not be: the app beside
    /// the proxy, the child of `exec`, the notes page.
    pub(super) fn check_encryption(&self, peer: Peer, encrypted: Encrypted) -> Result<(), Refusal> {
        let is_remote =
            matches!(peer, Peer::Tcp(address) if !address.ip().to_canonical().is_loopback());
        if !self.requires_tls || encrypted != Encrypted::No || !is_remote {
            return Ok(());
        }
        Err(Refusal {
            report: Report::new(
                sqlstate::INVALID_AUTHORIZATION,
                "lakebase-proxy takes clients of other machines with TLS only",
            )
            .with_hint("Connect with sslmode=require; --client-tls=required is set."),
            reason: Reason::ClientTls,
        })
    }

    /// What this peer is answered when it wants TLS. Unix sockets have none, as with PostgreSQL.
    pub(super) fn tls(&self, peer: Peer) -> Tls {
        match (&self.encryption, peer) {
            (Some(_), Peer::Tcp(_)) => Tls::Offered,
            _ => Tls::Refused,
        }
    }

    /// The password that this peer must know. A Unix socket's users the kernel vouches for.
    pub(super) fn password(&self, peer: Peer) -> Option<&LocalPassword> {
        match peer {
            Peer::Tcp(_) => self.password.as_deref(),
            Peer::Unix { .. } => None,
        }
    }

    /// A client left because it gets no TLS.
    pub(super) fn client_insists_on_tls(&self) {
        if !self.told.insists.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "a client insists on TLS, which is off between clients and the proxy; hint: set --client-tls=self-signed, or --client-tls-cert and --client-tls-key; or let the client use sslmode=prefer or disable"
            );
        }
    }

    /// A client left in the middle of a TLS handshake.
    pub(super) fn client_broke_off_tls(&self, error: &std::io::Error) {
        if self.told.broken_off.swap(true, Ordering::Relaxed) {
            tracing::debug!(%error, "client broke off the TLS handshake");
        } else {
            tracing::warn!(
                %error,
                "a client broke off the TLS handshake; hint: a client that verifies certificates needs the authority behind --client-tls-cert as its sslrootcert, and nobody can verify a self-signed one"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_tls_is_required_clients_of_other_machines_use_it() {
        let tcp = |ip: &str| Peer::Tcp(std::net::SocketAddr::new(ip.parse().unwrap(), 7));
        let unix = Peer::Unix { uid: 0, pid: None };
        let required = Entrance {
            requires_tls: true,
            ..Entrance::default()
        };
        for remote in [
            tcp("192.0.2.1"),
            tcp("2001:db8::1"),
            tcp("::ffff:192.0.2.1"),
        ] {
            let refusal = required
                .check_encryption(remote, Encrypted::No)
                .unwrap_err();
            assert_eq!(refusal.report.sqlstate, "28000");
            assert!(refusal.report.hint.unwrap().contains("sslmode=require"));
            assert!(required.check_encryption(remote, Encrypted::Tls13).is_ok());
            let offered = Entrance::default();
            assert!(offered.check_encryption(remote, Encrypted::No).is_ok());
        }
        for local in [tcp("127.0.0.1"), tcp("::1"), tcp("::ffff:127.0.0.1"), unix] {
            assert!(required.check_encryption(local, Encrypted::No).is_ok());
        }
    }

    #[test]
    fn a_unix_socket_is_for_those_listed_and_for_our_own_user_and_root() {
        let unix = |uid| Peer::Unix { uid, pid: None };
        let ours = geteuid().as_raw();
        let entrance = Entrance {
            allowed_uids: Some(vec![70_001]),
            ..Entrance::default()
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
