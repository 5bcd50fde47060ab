//! Every metric name and label value, in one place.
//!
//! To add one: `<noun>_<unit>` in base units (seconds, bytes), counters end in `_total`, the [`PREFIX`] is put in front by
//! the registry. Labels come from a closed set that is listed here, so that every child exists from the start and zero
//! can be seen; never a user, a database or a host. Then a help text in `metrics.rs` that says what is counted and when.

/// Put in front of each name by the registry; the standard `process_*` metrics stand outside it.
pub const PREFIX: &str = "lakebase_proxy";

/// Clients whose connection was accepted.
pub const CLIENTS_OPENED: &str = "client_connections_opened_total";
/// Clients whose connection has ended, however it did.
pub const CLIENTS_CLOSED: &str = "client_connections_closed_total";
/// Clients connected now.
pub const CLIENTS_ACTIVE: &str = "client_connections_active";
/// Clients that wait for their login now.
pub const CLIENTS_WAITING: &str = "client_connections_waiting";
/// How many sessions there may be at a time, over all endpoints.
pub const CLIENTS_LIMIT: &str = "client_connections_limit";
/// Clients sent away, by [`reason`].
pub const CLIENTS_REFUSED: &str = "client_connections_refused_total";
/// Logins at the endpoint, by [`outcome`] and [`class`].
pub const UPSTREAM_CONNECTS: &str = "upstream_connects_total";
/// Logged-in connections to the endpoint now.
pub const UPSTREAM_ACTIVE: &str = "upstream_connections_active";
/// Time that a login took, by [`phase`].
pub const UPSTREAM_CONNECT_SECONDS: &str = "upstream_connect_duration_seconds";
/// Logins tried again for the same client, by the [`retry`] class of the failure before.
pub const UPSTREAM_RETRIES: &str = "upstream_retries_total";
/// TLS handshakes with the endpoint, by [`handshake`].
pub const TLS_HANDSHAKES: &str = "upstream_tls_handshakes_total";
/// How long the endpoint took to answer once it had been found asleep.
pub const WAKE_SECONDS: &str = "endpoint_wake_duration_seconds";
/// How long sessions lasted, by who ended them, [`end`].
pub const SESSION_SECONDS: &str = "session_duration_seconds";
/// Time that clients waited for a server.
pub const HOLD_SECONDS: &str = "client_hold_duration_seconds";
/// Bytes passed on, by [`direction`].
pub const RELAY_BYTES: &str = "relay_bytes_total";
/// Answers of the endpoint up to a ReadyForQuery.
pub const QUERIES: &str = "queries_total";
/// Transactions that have ended.
pub const TRANSACTIONS: &str = "transactions_total";
/// Cancel requests, by [`cancel`].
pub const CANCELS: &str = "cancel_requests_total";
/// Sessions ended by a panic.
pub const SESSION_PANICS: &str = "session_panics_total";
/// Attempts to mint a credential, by [`refresh`].
pub const CREDENTIAL_REFRESHES: &str = "credential_refreshes_total";
/// Time that minting took, by [`step`].
pub const MINT_SECONDS: &str = "credential_mint_duration_seconds";
/// When the current credential expires.
pub const CREDENTIAL_EXPIRY: &str = "credential_expiry_timestamp_seconds";
/// When the current credential was minted.
pub const CREDENTIAL_MINTED: &str = "credential_minted_timestamp_seconds";
/// When the next one will be asked for.
pub const CREDENTIAL_NEXT_REFRESH: &str = "credential_next_refresh_timestamp_seconds";
/// How old the current credential is.
pub const CREDENTIAL_AGE: &str = "credential_age_seconds";
/// Attempts to reload the settings, by [`reload`].
pub const CONFIG_RELOADS: &str = "config_reloads_total";
/// Whether the last of them was taken.
pub const CONFIG_LAST_RELOAD_SUCCESSFUL: &str = "config_last_reload_successful";
/// Log lines that standard error did not take.
pub const LOG_LINES_DROPPED: &str = "log_lines_dropped_total";
/// Which build this is.
pub const BUILD_INFO: &str = "build_info";

/// Declares the closed set of one label: a constant for each value, and `ALL`.
macro_rules! label {
    ($(#[$doc:meta])* $set:ident { $($(#[$value_doc:meta])* $name:ident = $value:literal,)+ }) => {
        $(#[$doc])*
        pub mod $set {
            $($(#[$value_doc])* pub const $name: &str = $value;)+
            /// Every value of this label.
            pub const ALL: &[&str] = &[$($name),+];
        }
    };
}

label! {
    /// Why a client was refused.
    reason {
        /// The endpoint did not wake in time.
        WAKING = "waking",
        /// The server did not accept who we are.
        IDENTITY = "identity",
        /// The credential belongs to another identity than the role.
        WRONG_IDENTITY = "wrong_identity",
        /// The credential is of a kind that the server does not take.
        WRONG_KIND = "wrong_kind",
        /// Role, database, grant or address list.
        PERMISSION = "permission",
        /// The server is full.
        CAPACITY = "capacity",
        /// The other side did not speak Postgres, or is not trusted.
        PROTOCOL = "protocol",
        /// No valid database credential could be had.
        CREDENTIAL = "credential",
        /// Our own limit of connections.
        MAX_CONNECTIONS = "max_connections",
        /// We are shutting down.
        SHUTTING_DOWN = "shutting_down",
        /// The client's first message could not be used.
        BAD_STARTUP = "bad_startup",
        /// A password that is wrong, or a user who may not use the Unix socket.
        LOCAL_AUTH = "local_auth",
        /// TLS between the client and us.
        CLIENT_TLS = "client_tls",
        /// The client did not say what it wants in time.
        TIMEOUT = "timeout",
        /// Anything else.
        OTHER = "other",
    }
}

label! {
    /// How a login at the endpoint ended.
    outcome {
        /// Logged in.
        OK = "ok",
        /// Not logged in; the class says why.
        FAILED = "failed",
    }
}

label! {
    /// Failure classes of a login at the endpoint.
    class {
        /// No failure.
        NONE = "none",
        /// Asleep, starting or not reachable.
        WAKING = "waking",
        /// Login refused.
        IDENTITY = "identity",
        /// The credential belongs to another identity than the role.
        WRONG_IDENTITY = "wrong_identity",
        /// Not an OAuth token.
        WRONG_KIND = "wrong_kind",
        /// Role, database, grant or address list.
        PERMISSION = "permission",
        /// The server is full.
        CAPACITY = "capacity",
        /// Not Postgres, or not trusted.
        PROTOCOL = "protocol",
        /// Unknown to us.
        OTHER = "other",
    }
}

label! {
    /// Parts of a login at the endpoint.
    phase {
        /// Waiting for one's turn: behind the client that wakes the endpoint, or behind too many others.
        QUEUE = "queue",
        /// Waiting for a valid credential.
        CREDENTIAL = "credential",
        /// Host name to addresses.
        RESOLVE = "resolve",
        /// TCP connect.
        DIAL = "dial",
        /// `SSLRequest` and TLS handshake.
        TLS = "tls",
        /// Startup message up to `ReadyForQuery`.
        LOGIN = "login",
        /// All of one attempt: resolve, dial, TLS and login.
        TOTAL = "total",
    }
}

label! {
    /// Failure classes after which a login is tried again.
    retry {
        /// Asleep, starting or not reachable.
        WAKING = "waking",
        /// Login refused: once more, with a fresh credential.
        IDENTITY = "identity",
        /// The server is full.
        CAPACITY = "capacity",
    }
}

label! {
    /// How a TLS session came about.
    handshake {
        /// With certificates.
        FULL = "full",
        /// From a ticket of an earlier one.
        RESUMED = "resumed",
    }
}

label! {
    /// Who ended a session.
    end {
        /// The client, or its connection broke.
        CLIENT = "client",
        /// The endpoint, or its connection broke.
        SERVER = "server",
        /// We, because we are shutting down.
        SHUTDOWN = "shutdown",
    }
}

label! {
    /// Which way bytes went.
    direction {
        /// From the client to the endpoint.
        FROM_CLIENT = "from_client",
        /// From the endpoint to the client.
        FROM_SERVER = "from_server",
    }
}

label! {
    /// What became of a cancel request.
    cancel {
        /// Passed on to the endpoint.
        FORWARDED = "forwarded",
        /// The endpoint could not be reached.
        FAILED = "failed",
        /// No session has that key.
        UNKNOWN = "unknown",
    }
}

label! {
    /// What became of an attempt to mint.
    refresh {
        /// A new credential.
        SUCCESS = "success",
        /// The workspace said no.
        REFUSED = "refused",
        /// The workspace asked us to slow down.
        RATE_LIMITED = "rate_limited",
        /// No answer, or a server error.
        UNAVAILABLE = "unavailable",
        /// An answer that makes no sense.
        MALFORMED = "malformed",
    }
}

label! {
    /// What became of an attempt to reload the settings.
    reload {
        /// They are in force, but for those that need a restart.
        APPLIED = "applied",
        /// They are what they were.
        UNCHANGED = "unchanged",
        /// They cannot be used; the old ones stay.
        REFUSED = "refused",
    }
}

label! {
    /// Steps of a mint.
    step {
        /// Getting a workspace token.
        WORKSPACE_TOKEN = "workspace_token",
        /// Getting the database credential with it.
        CREDENTIAL = "credential",
    }
}
