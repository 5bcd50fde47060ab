//! The pools of an endpoint on the page.

use super::format::{grouped, short_span};
use crate::{
    status::{EndpointSnapshot, PoolSnapshot},
    telemetry::labels::{PoolClose, PoolServer},
};

/// The pools of an endpoint.
pub(super) struct PoolsView<'a> {
    pub(super) rows: Vec<PoolView<'a>>,
    /// Connections closed so far, by reason.
    pub(super) closes: String,
}

/// A row of the table of pools.
pub(super) struct PoolView<'a> {
    pub(super) database: &'a str,
    pub(super) used: String,
    pub(super) idle: String,
    pub(super) resetting: String,
    pub(super) opening: String,
    pub(super) limit: String,
    pub(super) waiting: String,
    /// Clients wait, or the pool is paused.
    pub(super) is_held: bool,
}

impl<'a> PoolsView<'a> {
    /// `None` for an endpoint without pools.
    pub(super) fn new(endpoint: &'a EndpointSnapshot) -> Option<Self> {
        let pools = endpoint.pools.iter().filter(|pool| !pool.is_empty());
        let rows: Vec<_> = pools.map(PoolView::new).collect();
        let closes = endpoint.metrics.pool_closes.iter();
        let closes: Vec<String> = closes
            .filter(|(_, count)| count.get() > 0)
            .map(|(reason, count)| format!("{} {}", grouped(count.get()), close(reason)))
            .collect();
        let closes = closes.join(", ");
        (!rows.is_empty() || !closes.is_empty()).then_some(Self { rows, closes })
    }
}

impl<'a> PoolView<'a> {
    fn new(pool: &'a PoolSnapshot) -> Self {
        let servers = |state| count(pool.servers[state]);
        let waiting = match pool.waiting {
            0 => count(0),
            clients => format!("{}, up to {}", count(clients), short_span(pool.max_wait)),
        };
        Self {
            database: &pool.database,
            used: servers(PoolServer::Leased),
            idle: servers(PoolServer::Idle),
            resetting: servers(PoolServer::Resetting),
            opening: servers(PoolServer::Opening),
            limit: match pool.learned_limit {
                Some(learned) if learned < pool.limit => {
                    format!(
                        "{} (the server accepts {})",
                        count(pool.limit),
                        count(learned)
                    )
                }
                _ => count(pool.limit),
            },
            waiting: if pool.is_paused {
                format!("{waiting}; paused")
            } else {
                waiting
            },
            is_held: pool.is_paused || pool.waiting > 0,
        }
    }
}

fn count(count: usize) -> String {
    grouped(u64::try_from(count).unwrap_or(u64::MAX))
}

fn close(reason: PoolClose) -> &'static str {
    match reason {
        PoolClose::Abandoned => "left in the middle of a request",
        PoolClose::Cancelled => "after a cancel request",
        PoolClose::Unresettable => "with what no reset undoes",
        PoolClose::ResetFailed => "after a failed reset",
        PoolClose::Server => "by the server",
        PoolClose::IdleTimeout => "idle for too long",
        PoolClose::Lifetime => "at the end of their lifetime",
        PoolClose::Surplus => "in favor of others",
        PoolClose::Retired => "by a command or a reload",
        PoolClose::Shutdown => "by the shutdown",
        PoolClose::Taken => "taken for good by a client",
        PoolClose::Session => "with their session",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use enum_map::enum_map;

    use super::*;

    #[test]
    fn a_row_names_the_longest_wait_and_what_the_server_accepts() {
        let mut pool = PoolSnapshot {
            database: "d".to_owned(),
            servers: enum_map! { PoolServer::Leased => 7, PoolServer::Opening => 1, _ => 0 },
            retained: 0,
            idle: Vec::new(),
            waiting: 3,
            max_wait: Duration::from_millis(1250),
            limit: 20,
            learned_limit: Some(7),
            is_paused: false,
        };
        let view = PoolView::new(&pool);
        assert_eq!((view.used.as_str(), view.opening.as_str()), ("7", "1"));
        assert_eq!(view.limit, "20 (the server accepts 7)");
        assert_eq!(
            (view.waiting.as_str(), view.is_held),
            ("3, up to 1.2 s", true)
        );
        pool.learned_limit = None;
        pool.waiting = 0;
        let view = PoolView::new(&pool);
        assert_eq!((view.limit.as_str(), view.waiting.as_str()), ("20", "0"));
        assert!(!view.is_held);
        pool.is_paused = true;
        assert_eq!(PoolView::new(&pool).waiting, "0; paused");
    }
}
