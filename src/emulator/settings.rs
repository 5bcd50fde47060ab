//! What can be changed while the emulator runs.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::AppResource;

/// The emulated workspace's and endpoint's settings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
#[expect(
    clippy::struct_excessive_bools,
    reason = "switches that have nothing to do with each other"
)]
pub struct Settings {
    /// How long a database credential lives when the request names no lifetime.
    #[serde(with = "seconds")]
    pub token_ttl: Duration,
    /// How long a workspace token lives.
    #[serde(with = "seconds")]
    pub workspace_token_ttl: Duration,
    /// Suspend after this long without logins, queries and open transactions; zero: never.
    #[serde(with = "seconds")]
    pub suspend_after: Duration,
    /// How long waking takes, counted from the connection that causes it.
    #[serde(with = "seconds")]
    pub wake_delay: Duration,
    /// What a connection meets while the compute sleeps or wakes.
    pub while_asleep: WhileAsleep,
    /// What running sessions meet when the compute goes to sleep.
    pub on_suspend: OnSuspend,
    /// Whether the endpoint is disabled: then no connection wakes it.
    pub is_disabled: bool,
    /// Whether roles with a Postgres password may log in with it (`enable_pg_native_login`, off on new projects).
    pub native_login: bool,
    /// Whether the built-in pooler (`-pooler` hosts) accepts OAuth credentials.
    pub pooler_oauth: bool,
    /// Databases without the extension `databricks_auth`, as a plain `CREATE DATABASE` leaves them: OAuth logins fail there.
    pub databases_without_extension: Vec<String>,
    /// Whether the edge listens; `false` makes dials fail with "connection refused".
    pub is_listening: bool,
    /// How far the workspace's clock is ahead of ours (or behind, if negative), in seconds.
    pub clock_skew_seconds: i64,
    /// How long a client may take from accept to its `StartupMessage`.
    #[serde(with = "seconds")]
    pub handshake_timeout: Duration,
    /// The resources of the workspace's app, in their order; none: one for the emulated endpoint's database.
    pub app_resources: Vec<AppResource>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            token_ttl: Duration::from_hours(1),
            workspace_token_ttl: Duration::from_hours(1),
            suspend_after: Duration::ZERO,
            wake_delay: Duration::from_secs(2),
            while_asleep: WhileAsleep::default(),
            on_suspend: OnSuspend::default(),
            is_disabled: false,
            native_login: false,
            pooler_oauth: false,
            databases_without_extension: Vec::new(),
            is_listening: true,
            clock_skew_seconds: 0,
            // The edge's `handshake_timeout` default.
            handshake_timeout: Duration::from_secs(15),
            app_resources: Vec::new(),
        }
    }
}

/// What a connection meets while the compute sleeps or wakes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhileAsleep {
    /// FATAL 28000 "External authorization failed." after the `StartupMessage`, as sent by Lakebase's edge.
    #[default]
    ExternalAuthorization,
    /// FATAL 57P03 "the database system is starting up" after the password.
    StartingUp,
    /// A reset at once.
    Reset,
    /// The connection ends without a word after the `StartupMessage`.
    Close,
    /// The connection waits until the compute is up.
    Hold,
}

/// What running sessions meet when the compute goes to sleep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSuspend {
    /// FATAL 57P01 "terminating connection due to administrator command".
    #[default]
    Terminate,
    /// A reset.
    Reset,
    /// An end without a word.
    Close,
}

/// Durations as numbers of seconds, fractions allowed.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        value: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(value.as_secs_f64())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let duration =
            Duration::try_from_secs_f64(f64::deserialize(deserializer)?).map_err(Error::custom)?;
        if duration > super::super::MAX_DURATION {
            return Err(Error::custom("longer than 100 years"));
        }
        Ok(duration)
    }
}
