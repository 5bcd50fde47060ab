//! Access checks: which peers may connect, whether they must use TLS, and the password that they must know.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::BytesMut;

use super::{
    ListenerCertificate, LocalPassword, Session,
    client::Client,
    close::{Closing, shutting_down},
    handshake::{Handshake, HandshakeError, Tls},
    local_password::PasswordFailure,
};
use crate::{
    net::{socket::Transport, unix::effective_uid},
    protocol::{
        backend::negotiation,
        error::{Report, sqlstate},
        startup::StartupMessage,
    },
    status::{Encrypted, Peer},
    telemetry::labels::Reason,
    upstream::Refusal,
};

/// The access policy of all listeners.
#[derive(Debug, Default)]
pub struct AccessPolicy {
    /// The users that may use Unix sockets, besides our own and root; `None` leaves that to the file's permissions.
    pub(crate) allowed_uids: Option<Vec<u32>>,
    /// The certificate shown to clients, where TLS is offered.
    pub(crate) certificate: Option<Arc<ListenerCertificate>>,
    /// Whether TCP clients of other machines must use TLS.
    pub(crate) requires_tls: bool,
    /// The password of TCP clients.
    pub(crate) password: Option<Arc<LocalPassword>>,
    /// Which warnings have been logged.
    pub(crate) logged: Arc<LoggedOnce>,
}

/// Warnings that are logged once per process.
#[derive(Debug, Default)]
pub(crate) struct LoggedOnce {
    tls_required_by_client: AtomicBool,
    tls_handshake_failure: AtomicBool,
}

/// A client that requests a session.
pub(super) struct SessionRequest<'a> {
    pub(super) handshake: Handshake<'a>,
    pub(super) startup: StartupMessage,
}

/// A client that has passed the access checks. `connect.rs` admits and connects it; `console.rs` takes those of the console.
pub(super) struct Access<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) startup: StartupMessage,
    pub(super) encryption: Encrypted,
    /// A NegotiateProtocolVersion that is still to be sent, or nothing.
    pub(super) negotiation: BytesMut,
}

impl<'a> SessionRequest<'a> {
    /// Checks the client and its password; the handshake, and with it its permit, ends here.
    pub(super) async fn check<S: Transport>(
        self,
        client: &mut Client<S>,
    ) -> Result<Access<'a>, Closing> {
        let Self { handshake, startup } = self;
        let session = handshake.session;
        let access = &session.config.access;
        access.check_uid(session.peer)?;
        let encryption = client.encryption();
        access.check_encryption(session.peer, encryption)?;
        // Last, as it takes round trips: a client that is refused anyway is refused before it sends a password.
        let Some(password) = access.password(session.peer) else {
            return Ok(Access {
                session,
                // Sent with the welcome: until then an error may take its place.
                negotiation: negotiation(&startup),
                startup,
                encryption,
            });
        };
        let verifying = async { Ok(password.verify(client, &startup).await) };
        let verified = handshake.in_time(verifying).await;
        let failure = match verified {
            Ok(Ok(())) => {
                return Ok(Access {
                    session,
                    startup,
                    encryption,
                    negotiation: BytesMut::new(), // sent before the password was requested
                });
            }
            Ok(Err(failure)) => failure,
            // This client has sent its startup message and awaits an answer; before that it may be no Postgres client.
            Err(HandshakeError::ShuttingDown) => return Err(shutting_down().into()),
            Err(error) => return Err(handshake.failed(&error)),
        };
        // A delayed refusal holds no permit: it must not get in the way of other clients.
        drop(handshake);
        Err(match failure {
            PasswordFailure::Refused(refusal) => refusal.into(),
            PasswordFailure::Wrong(wrong) => wrong.delayed().await.into(),
            PasswordFailure::Gone => {
                // No warning: psql leaves like this before it prompts its user.
                tracing::info!(
                    session = session.id,
                    peer = %session.peer,
                    "client left without giving the proxy's password; hint: a client that does not return needs the password of --local-password-file"
                );
                Closing::Silent
            }
        })
    }
}

impl AccessPolicy {
    pub(super) fn check_uid(&self, peer: Peer) -> Result<(), Refusal> {
        let (Some(allowed), Peer::Unix { uid, .. }) = (&self.allowed_uids, peer) else {
            return Ok(());
        };
        // Root can become any user, and our own user can read the proxy's memory.
        if uid == 0 || uid == effective_uid() || allowed.contains(&uid) {
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

    /// Clients on this machine need no TLS: the application beside the proxy, the child of `exec`, the notes page.
    fn check_encryption(&self, peer: Peer, encrypted: Encrypted) -> Result<(), Refusal> {
        let is_remote =
            // Canonical, as an inherited dual-stack socket reports IPv4 clients as ::ffff:a.b.c.d.
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

    /// The answer to a request for TLS. Unix sockets have none, as with PostgreSQL.
    pub(super) fn tls(&self, peer: Peer) -> Tls {
        match (&self.certificate, peer) {
            (Some(_), Peer::Tcp(_)) => Tls::Offered,
            _ => Tls::Refused,
        }
    }

    /// The password of this peer; the kernel vouches for the users of a Unix socket.
    fn password(&self, peer: Peer) -> Option<&LocalPassword> {
        match peer {
            Peer::Tcp(_) => self.password.as_deref(),
            Peer::Unix { .. } => None,
        }
    }

    /// Logs that a client left because TLS is off.
    pub(super) fn log_tls_required_by_client(&self) {
        if !self
            .logged
            .tls_required_by_client
            .swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                "a client insists on TLS, which is off between clients and the proxy; hint: set --client-tls=self-signed, or --client-tls-cert and --client-tls-key; or let the client use sslmode=prefer or disable"
            );
        }
    }

    /// Logs that a client left in the middle of a TLS handshake.
    pub(super) fn log_tls_handshake_failure(&self, error: &io::Error) {
        if self
            .logged
            .tls_handshake_failure
            .swap(true, Ordering::Relaxed)
        {
            tracing::debug!(%error, "client broke off the TLS handshake");
        } else {
            tracing::warn!(
                %error,
                "a client broke off the TLS handshake; hint: a client that verifies certificates needs the authority behind --client-tls-cert as its sslrootcert, and no client can verify a self-signed one"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_tls_applies_to_clients_of_other_machines() {
        let tcp = |ip: &str| Peer::Tcp(std::net::SocketAddr::new(ip.parse().unwrap(), 7));
        let unix = Peer::Unix { uid: 0, pid: None };
        let required = AccessPolicy {
            requires_tls: true,
            ..AccessPolicy::default()
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
            let offered = AccessPolicy::default();
            assert!(offered.check_encryption(remote, Encrypted::No).is_ok());
        }
        for local in [tcp("127.0.0.1"), tcp("::1"), tcp("::ffff:127.0.0.1"), unix] {
            assert!(required.check_encryption(local, Encrypted::No).is_ok());
        }
    }

    #[test]
    fn a_unix_socket_accepts_listed_users_our_own_user_and_root() {
        let unix = |uid| Peer::Unix { uid, pid: None };
        let ours = effective_uid();
        let access = AccessPolicy {
            allowed_uids: Some(vec![70_001]),
            ..AccessPolicy::default()
        };
        for uid in [0, ours, 70_001] {
            assert!(access.check_uid(unix(uid)).is_ok(), "{uid}");
        }
        let refusal = access.check_uid(unix(70_002)).unwrap_err();
        assert_eq!(refusal.report.sqlstate, "28000");
        assert!(refusal.report.message.contains("70002"));
        let tcp = Peer::Tcp(([127, 0, 0, 1], 1).into());
        assert!(access.check_uid(tcp).is_ok(), "has no uid");
        assert!(AccessPolicy::default().check_uid(unix(70_002)).is_ok());
    }
}
