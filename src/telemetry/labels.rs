//! The label values of metrics: one enum for each label.
//!
//! A closed set, so that every child exists from the start and zero is visible; never a user, a database or a host. Code
//! that makes the same distinction uses the enum itself.

use enum_map::{Enum, EnumArray};
use prometheus::{Histogram, IntCounter, IntGauge};

/// A label with a closed set of values.
pub(super) trait Label:
    EnumArray<IntCounter> + EnumArray<IntGauge> + EnumArray<Histogram> + Copy
{
    /// The label's name.
    const NAME: &str;

    /// The value's text.
    fn text(self) -> &'static str;
}

/// Declares one label: its name, its values and their text.
macro_rules! label {
    ($(#[$doc:meta])* $label:ident($name:literal) { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Enum, PartialEq, Eq, Hash)]
        pub enum $label {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $label {
            /// The value's text.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl Label for $label {
            const NAME: &str = $name;

            fn text(self) -> &'static str {
                self.as_str()
            }
        }
    };
}

label! {
    /// Why a client was refused.
    Reason("reason") {
        /// The endpoint did not wake in time.
        Waking = "waking",
        /// The server refused the credential or its user.
        Identity = "identity",
        /// The credential belongs to another identity than the role.
        WrongIdentity = "wrong_identity",
        /// The server does not take this kind of credential.
        WrongKind = "wrong_kind",
        /// Role, database, grant or address list.
        Permission = "permission",
        /// The server has no connection left.
        Capacity = "capacity",
        /// The server does not speak Postgres, or is not trusted.
        Protocol = "protocol",
        /// No valid database credential in time.
        Credential = "credential",
        /// The proxy's own connection limit.
        MaxConnections = "max_connections",
        /// No server connection of the pool became free in time.
        PoolTimeout = "pool_timeout",
        /// The proxy is draining.
        ShuttingDown = "shutting_down",
        /// The client's first message is invalid.
        BadStartup = "bad_startup",
        /// A wrong local password, or a user who may not use the Unix socket.
        LocalAuth = "local_auth",
        /// TLS between the client and the proxy.
        ClientTls = "client_tls",
        /// The handshake did not finish in time.
        Timeout = "timeout",
        /// Anything else.
        Other = "other",
    }
}

label! {
    /// What a failed login at the endpoint means; decides retry, health and hint.
    FailureClass("class") {
        /// Asleep, starting or unreachable: wait and retry.
        Waking = "waking",
        /// The credential was refused: one forced refresh, one retry.
        Identity = "identity",
        /// The credential belongs to another identity than the role: one forced refresh at most.
        WrongIdentity = "wrong_identity",
        /// The password sent is not an OAuth token.
        WrongKind = "wrong_kind",
        /// Role, database, grant or address list.
        Permission = "permission",
        /// The server has no connection left: a bounded wait.
        Capacity = "capacity",
        /// Not Postgres, or not trusted.
        Protocol = "protocol",
        /// An unknown error: passed on unchanged.
        Other = "other",
    }
}

impl From<FailureClass> for Reason {
    fn from(class: FailureClass) -> Self {
        match class {
            FailureClass::Waking => Self::Waking,
            FailureClass::Identity => Self::Identity,
            FailureClass::WrongIdentity => Self::WrongIdentity,
            FailureClass::WrongKind => Self::WrongKind,
            FailureClass::Permission => Self::Permission,
            FailureClass::Capacity => Self::Capacity,
            FailureClass::Protocol => Self::Protocol,
            FailureClass::Other => Self::Other,
        }
    }
}

label! {
    /// A part of a login at the endpoint.
    LoginPhase("phase") {
        /// Waiting for a login slot, or for the client that leads the attempts at a waking endpoint.
        Queue = "queue",
        /// Waiting for a valid credential.
        Credential = "credential",
        /// Host name to addresses.
        Resolve = "resolve",
        /// TCP connect.
        Dial = "dial",
        /// `SSLRequest` and TLS handshake.
        Tls = "tls",
        /// StartupMessage to ReadyForQuery.
        Login = "login",
        /// One whole attempt: resolve, dial, TLS and login.
        Total = "total",
    }
}

label! {
    /// The kind of a TLS handshake.
    TlsHandshake("kind") {
        /// With certificates.
        Full = "full",
        /// From a ticket of an earlier one.
        Resumed = "resumed",
    }
}

label! {
    /// The side that ended a session.
    SessionEnd("end") {
        /// The client, or its connection broke.
        Client = "client",
        /// The endpoint, or its connection broke.
        Server = "server",
        /// The proxy, because it is draining.
        Shutdown = "shutdown",
    }
}

label! {
    /// The direction of relayed bytes.
    Direction("direction") {
        /// From the client to the endpoint.
        FromClient = "from_client",
        /// From the endpoint to the client.
        FromServer = "from_server",
    }
}

label! {
    /// The outcome of a cancel request.
    CancelOutcome("outcome") {
        /// Sent on to the endpoint.
        Forwarded = "forwarded",
        /// Nothing to cancel: the session has no server connection, or waits for one and was ended in its wait.
        AtRest = "at_rest",
        /// The endpoint could not be reached.
        Failed = "failed",
        /// No session has that key.
        Unknown = "unknown",
    }
}

label! {
    /// The outcome of an attempt to mint a credential.
    RefreshOutcome("outcome") {
        /// A new credential.
        Success = "success",
        /// The workspace refused.
        Refused = "refused",
        /// The workspace requests fewer calls.
        RateLimited = "rate_limited",
        /// No answer, or a server error.
        Unavailable = "unavailable",
        /// An unreadable answer.
        Malformed = "malformed",
    }
}

label! {
    /// The outcome of a reload of the settings.
    ReloadOutcome("outcome") {
        /// In force, except for those that need a restart.
        Applied = "applied",
        /// No difference.
        Unchanged = "unchanged",
        /// Invalid; the old ones stay.
        Refused = "refused",
    }
}

label! {
    /// The state of a pooled server connection.
    PoolServer("state") {
        /// Being opened.
        Opening = "opening",
        /// A client's.
        Leased = "leased",
        /// Being reset after its client has left.
        Resetting = "resetting",
        /// Ready for the next client.
        Idle = "idle",
        /// Being closed.
        Closing = "closing",
    }
}

label! {
    /// How a client got its server connection from a pool.
    PoolLease("how") {
        /// One that no client had.
        Idle = "idle",
        /// One that another client returned meanwhile.
        Returned = "returned",
        /// A new one.
        Opened = "opened",
    }
}

label! {
    /// Why a pooled server connection was closed.
    PoolClose("reason") {
        /// Its client left in the middle of a request.
        Abandoned = "abandoned",
        /// A cancel request was forwarded to it, which may arrive late.
        Cancelled = "cancelled",
        /// Its client used what no reset undoes, such as temporary tables.
        Unresettable = "unresettable",
        /// The reset failed.
        ResetFailed = "reset_failed",
        /// The server closed it, or reported an error on it without a request.
        Server = "server",
        /// No client for the idle timeout.
        IdleTimeout = "idle_timeout",
        /// It reached its lifetime.
        Lifetime = "lifetime",
        /// The pool is larger than it may be, or another client needs different startup parameters.
        Surplus = "surplus",
        /// The settings have changed, or RECONNECT.
        Retired = "retired",
        /// The proxy is shutting down.
        Shutdown = "shutdown",
        /// A client took it for good (`pool_mode = "none"`).
        Taken = "taken",
        /// The session ended otherwise.
        Session = "session",
    }
}

label! {
    /// The result of resetting a server connection.
    PoolReset("result") {
        /// It is like a new one.
        Done = "ok",
        /// It is closed, for the reason that its close counts under.
        Failed = "failed",
    }
}

label! {
    /// Why a client must keep its server connection.
    PinReason("reason") {
        /// It holds an advisory lock of the session.
        AdvisoryLock = "advisory_lock",
        /// It has a cursor that outlives its transaction.
        Cursor = "cursor",
        /// Texts in its encoding cannot be read.
        Encoding = "encoding",
        /// It has prepared a statement that is too long to be repeated elsewhere.
        LargeStatement = "large_statement",
        /// It listens.
        Listen = "listen",
        /// It has loaded a module.
        Load = "load",
        /// It is another replication origin.
        ReplicationOrigin = "replication_origin",
        /// It has another role.
        Role = "role",
        /// It reads the value of a sequence that the session remembers.
        Sequence = "sequence",
        /// It has changed a setting by `set_config`.
        SetConfig = "set_config",
        /// It has seeded `random()`.
        Setseed = "setseed",
        /// Its settings are not known any more.
        Settings = "settings",
        /// It has exported a snapshot.
        Snapshot = "snapshot",
        /// It has prepared a statement by SQL.
        SqlPrepare = "sql_prepare",
        /// It has temporary objects.
        Temp = "temp",
        /// Its state cannot be known: dynamic SQL, or a procedural language with a state of its own.
        UnknownState = "unknown_state",
        /// A text was not split as the server has split it.
        Unparsed = "unparsed",
    }
}

impl PinReason {
    /// What the client uses, as an error calls it.
    pub const fn feature(self) -> &'static str {
        match self {
            Self::AdvisoryLock => "advisory locks of the session",
            Self::Cursor => "cursors WITH HOLD",
            Self::Encoding => "a client encoding whose texts cannot be read",
            Self::LargeStatement => "named prepared statements of more than 64 KiB",
            Self::Listen => "LISTEN",
            Self::Load => "LOAD",
            Self::ReplicationOrigin => "replication origins",
            Self::Role => "SET SESSION AUTHORIZATION",
            Self::Sequence => {
                "values of sequences that the session remembers (nextval, setval, currval, lastval)"
            }
            Self::SetConfig => "set_config for the session",
            Self::Setseed => "setseed",
            Self::Settings => "settings changed by something else than SET",
            Self::Snapshot => "exported snapshots",
            Self::SqlPrepare => "SQL PREPARE",
            Self::Temp => "temporary objects",
            Self::UnknownState => {
                "dynamic SQL in DO, dblink, languages with a state of their own, the function-call protocol"
            }
            Self::Unparsed => "standard_conforming_strings = off",
        }
    }

    /// What helps against it.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::AdvisoryLock => {
                "Use pg_advisory_xact_lock, or connect this client through an endpoint without pooling."
            }
            Self::Cursor => {
                "Close cursors WITH HOLD, or declare them without HOLD in a transaction."
            }
            Self::Encoding => "Let the client use client_encoding UTF8.",
            Self::LargeStatement => {
                "Do not prepare statements longer than 64 KiB: pass lists as an array parameter."
            }
            Self::Listen => "Connect clients that LISTEN through an endpoint without pooling.",
            Self::Load => "Connect clients that LOAD through an endpoint without pooling.",
            Self::ReplicationOrigin => "Connect replication through an endpoint without pooling.",
            Self::Role => "Use SET ROLE instead of SET SESSION AUTHORIZATION.",
            Self::Sequence => "Use INSERT ... RETURNING instead of currval and lastval.",
            Self::SetConfig => "Use SET, or set_config(..., true) within a transaction.",
            Self::Setseed => "Pass the seed within the same transaction, or do without setseed.",
            Self::Settings => "Change settings by SET, one statement each, and not in functions.",
            Self::Snapshot => "End the transaction that exported the snapshot.",
            Self::SqlPrepare => "Prepare statements by the driver, not by SQL PREPARE.",
            Self::Temp => "Drop temporary tables, or create them with ON COMMIT DROP.",
            Self::UnknownState => {
                "Avoid DO with EXECUTE, dblink and languages with a state of their own, or connect without pooling."
            }
            Self::Unparsed => "Set standard_conforming_strings to on.",
        }
    }
}

label! {
    /// What a query has shown of a client that may have something in its session.
    PoolVerification("result") {
        /// It has nothing.
        Clean = "clean",
        /// It was not answered.
        Failed = "failed",
        /// It has something.
        InUse = "in_use",
    }
}

label! {
    /// A step of minting a credential.
    MintStep("step") {
        /// Getting a workspace token.
        WorkspaceToken = "workspace_token",
        /// Getting the database credential with it.
        Credential = "credential",
    }
}
