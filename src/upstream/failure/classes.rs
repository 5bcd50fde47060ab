//! What follows from each class of failure.

use crate::{protocol::error::sqlstate, telemetry::labels::FailureClass as Class};

/// The catch-all SQLSTATE of the endpoint's edge.
pub(super) const INTERNAL_ERROR: &str = "XX000";

/// What a client's connect does after a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::upstream) enum Reaction {
    /// Refuses the client.
    Refuse,
    /// Tries once more with a new credential, then refuses.
    Renew,
    /// Waits up to `capacity_timeout`.
    WaitForCapacity,
    /// Waits up to `connect_timeout` while the endpoint wakes.
    WaitForWake,
}

/// A row of the table below.
pub(in crate::upstream) struct Consequence {
    pub(in crate::upstream) reaction: Reaction,
    /// In place of an empty or catch-all SQLSTATE.
    pub(super) sqlstate: &'static str,
    pub(super) hint: Option<&'static str>,
}

pub(in crate::upstream) fn consequence(class: Class) -> Consequence {
    let (reaction, sqlstate, hint) = match class {
        // Other clients close connections within seconds: a short wait often succeeds.
        Class::Capacity => (
            Reaction::WaitForCapacity,
            sqlstate::TOO_MANY_CONNECTIONS,
            Some(
                "The endpoint has no connection left: use fewer or smaller pools, or raise the compute's size.",
            ),
        ),
        // Expired, revoked, or not known at the endpoint yet: another credential may be accepted.
        Class::Identity => (
            Reaction::Renew,
            sqlstate::INVALID_AUTHORIZATION,
            Some(
                "Check that PGUSER is the identity the credential belongs to, and that the role was made with databricks_create_role on this branch.",
            ),
        ),
        Class::Other => (Reaction::Refuse, INTERNAL_ERROR, None),
        // Only a person can change the cause.
        Class::Permission => (
            Reaction::Refuse,
            sqlstate::INVALID_AUTHORIZATION,
            Some("Grant the role what it lacks, or correct the setting."),
        ),
        Class::Protocol => (
            Reaction::Refuse,
            sqlstate::PROTOCOL_VIOLATION,
            Some(
                "Check PGHOST and PGPORT, and PGSSLROOTCERT if something on the way terminates TLS.",
            ),
        ),
        Class::Waking => (
            Reaction::WaitForWake,
            sqlstate::CANNOT_CONNECT_NOW,
            Some(
                "The endpoint did not answer in time. Retry; if it lasts, check that the compute is not disabled and that the network reaches it.",
            ),
        ),
        // Once until a login is accepted, see `CredentialCell::note_mismatch`.
        Class::WrongIdentity => (
            Reaction::Renew,
            sqlstate::INVALID_AUTHORIZATION,
            Some(
                "The login is as `{user}` (PGUSER), and the credential belongs to `{identity}`. If these are two, unset PGUSER; if they are one, bind the role to it, as its owner: SECURITY LABEL FOR databricks_auth ON ROLE {role} IS 'id=<numeric id of the identity in the workspace>,type={kind}';",
            ),
        ),
        // The next credential is of the same kind.
        Class::WrongKind => (
            Reaction::Refuse,
            sqlstate::INVALID_AUTHORIZATION,
            Some(
                "The endpoint takes OAuth credentials only. A personal access token or a native password cannot log in here.",
            ),
        ),
    };
    Consequence {
        reaction,
        sqlstate,
        hint,
    }
}
