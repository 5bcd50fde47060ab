//! Timeouts of connecting to the endpoint, and TCP keepalive.

use std::time::Duration;

use super::Settings;

/// Timeouts of connecting a client to the endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From the end of the endpoint's look-up to the client's session or refusal.
    pub connect_timeout: Duration,
    /// One connection attempt.
    pub server_connect_timeout: Duration,
    /// Waiting for a credential, and for the lookup of the endpoint.
    pub credential_timeout: Duration,
    /// Waiting for a connection at an endpoint that is at its limit.
    pub capacity_timeout: Duration,
}

/// TCP keepalive, for both sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub idle: Duration,
    /// Time between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is closed.
    pub count: u32,
    /// Limit for unacknowledged data (`TCP_USER_TIMEOUT`); zero leaves it to the kernel.
    ///
    /// Off by default, as in libpq: Linux also closes a connection whose peer is alive but has not read for that long, such
    /// as a server that waits for a lock in the middle of a COPY.
    pub user_timeout: Duration,
}

impl Keepalive {
    /// Limit for a request that the endpoint leaves unacknowledged: the time that probes of an idle connection take. `None` if
    /// the settings have a limit of their own, or no keepalive.
    ///
    /// The kernel sends no probes while sent data is unacknowledged; Linux would retransmit for 15 minutes.
    pub(crate) fn loss_timeout(&self) -> Option<Duration> {
        let probing = self.idle + self.interval * self.count;
        (self.user_timeout.is_zero() && !self.idle.is_zero()).then_some(probing)
    }
}

impl Settings {
    /// The timeouts in force.
    pub fn timeouts(&self) -> Timeouts {
        Timeouts {
            connect_timeout: self.connect_timeout().0,
            server_connect_timeout: self.server_connect_timeout().0,
            credential_timeout: self.credential_timeout().0,
            capacity_timeout: self.capacity_timeout().0,
        }
    }

    /// The keepalive in force.
    pub fn keepalive(&self) -> Keepalive {
        Keepalive {
            idle: self.tcp_keepalive_idle().0,
            interval: self.tcp_keepalive_interval().0,
            count: self.tcp_keepalive_count(),
            user_timeout: self.tcp_user_timeout().0,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Settings::default().timeouts()
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Settings::default().keepalive()
    }
}
