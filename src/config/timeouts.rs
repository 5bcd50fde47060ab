//! Time limits towards the endpoint, and TCP keepalive.

use std::time::Duration;

/// Timeouts of connecting to the endpoint; each is a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// From the client's request to its session or refusal.
    pub connect_timeout: Duration,
    /// One attempt at the server.
    pub server_connect_timeout: Duration,
    /// Waiting for a credential, and for the look-up of the endpoint; shorter than most drivers wait, so that the reason
    /// reaches the client.
    pub credential_timeout: Duration,
    /// Waiting for room at an endpoint that has none.
    pub capacity_timeout: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_mins(1),
            server_connect_timeout: Duration::from_secs(15),
            credential_timeout: Duration::from_secs(8),
            capacity_timeout: Duration::from_secs(10),
        }
    }
}

/// TCP keepalive settings, for both sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between probes.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up.
    pub count: u32,
    /// How long sent data may stay unacknowledged (`TCP_USER_TIMEOUT`); zero leaves it to the kernel.
    pub user_timeout: Duration,
}

impl Keepalive {
    /// How long the endpoint may leave a request unacknowledged before the path to it counts as lost: as long as probes of an
    /// idle connection take. Keepalive itself sends no probe while sent data is unacknowledged, and Linux alone goes on
    /// retransmitting for 15 minutes. `None` where the settings have a time of their own, or no keepalive.
    pub(crate) fn loss_timeout(&self) -> Option<Duration> {
        let probing = self.idle + self.interval * self.count;
        (self.user_timeout.is_zero() && !self.idle.is_zero()).then_some(probing)
    }
}

impl Default for Keepalive {
    /// 30 s, 10 s, 5 probes; no unconditional user timeout, as libpq: Linux also ends a connection whose peer is alive but
    /// has not read for that long, such as a server that waits for a lock in the middle of a COPY.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 5,
            user_timeout: Duration::ZERO,
        }
    }
}
