//! The metrics of one process, in registries of its own, so that tests run side by side in one process.
//!
//! To add one, add a line to [`Metrics`] or, if it is counted once for all endpoints, to [`ProcessMetrics`]. The name is
//! `<noun>_<unit>` in base units (seconds, bytes), counters end in `_total`, the registry adds [`PREFIX`]; the help text
//! states what is counted and when. Labels are enums in [`labels`](super::labels).

mod metric;
mod process;
mod times;

use std::{collections::HashMap, sync::Arc};

use enum_map::{EnumArray, EnumMap};
use prometheus::{Gauge, Histogram, IntCounter, IntGauge, Registry};

use self::metric::{Buckets, metrics};
pub use self::{
    metric::Logins,
    process::ProcessMetrics,
    times::{Times, Took},
};
use super::labels::{
    CancelOutcome, Direction, FailureClass, LoginPhase, PinReason, PoolClose, PoolLease, PoolReset,
    PoolServer, PoolVerification, Reason, RefreshOutcome, SessionEnd, TlsHandshake,
};

/// Before each name; the standard `process_*` metrics have none.
pub const PREFIX: &str = "lakebase_proxy";
/// Content type of what [`Metrics::render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// 0.5 ms to 131 s: a warm login takes a few milliseconds, a cold one up to the connect timeout of 60 s.
const LOGIN: Buckets = Buckets {
    start: 0.0005,
    factor: 2.0,
    count: 19,
};
/// 20 us to 84 s: from a connection at hand to the query_wait_timeout.
const WAIT: Buckets = Buckets {
    start: 0.000_02,
    factor: 4.0,
    count: 12,
};
/// 10 ms to 46 h: Lakebase ends connections after three days.
const SESSION: Buckets = Buckets {
    start: 0.01,
    factor: 4.0,
    count: 13,
};

metrics! {
    /// The metrics of one endpoint.
    pub struct Metrics {
        clients_opened: IntCounter = "client_connections_opened_total",
            "Client connections accepted.";
        clients_closed: IntCounter = "client_connections_closed_total",
            "Client connections closed.";
        clients_active: IntGauge = "client_connections_active",
            "Client connections open now.";
        clients_waiting: IntGauge = "client_connections_waiting",
            "Clients waiting for their login at the endpoint now.";
        clients_refused: EnumMap<Reason, IntCounter> = "client_connections_refused_total",
            "Client connections refused with an error, by reason.";
        upstream_connects: Logins = "upstream_connects_total",
            "Attempts to connect and log in to the endpoint, by outcome and failure class.";
        upstream_active: IntGauge = "upstream_connections_active",
            "Connections logged in at the endpoint now.";
        upstream_connect_seconds: EnumMap<LoginPhase, Histogram> = "upstream_connect_duration_seconds",
            "Duration of attempts to log in to the endpoint, by phase; the phase total is one whole attempt.", LOGIN;
        upstream_retries: EnumMap<FailureClass, IntCounter> = "upstream_retries_total",
            "Logins at the endpoint retried for the same client, by the class of the failure before.";
        tls_handshakes: EnumMap<TlsHandshake, IntCounter> = "upstream_tls_handshakes_total",
            "TLS handshakes completed with the endpoint, by kind.";
        wake_seconds: Histogram = "endpoint_wake_duration_seconds",
            "Time from the first failed attempt at a sleeping endpoint to its first answer.", LOGIN;
        session_seconds: EnumMap<SessionEnd, Histogram> = "session_duration_seconds",
            "Duration of sessions from login to close, by the side that ended them.", SESSION;
        hold_seconds: Histogram = "client_hold_duration_seconds",
            "Time from a client's startup message to its login or refusal.", LOGIN;
        server_assignments: IntCounter = "server_assignments_total",
            "Clients given a server connection, one of their own or a pool's.";
        relay_bytes: EnumMap<Direction, IntCounter> = "relay_bytes_total",
            "Bytes relayed between clients and the endpoint after login, by direction.";
        queries: IntCounter = "queries_total",
            "Queries answered by the endpoint: a simple query, or a group of extended ones that ends with a Sync.";
        transactions: IntCounter = "transactions_total",
            "Transactions ended, committed or not; a query outside a transaction is one.";
        query_seconds: Times = "query_seconds",
            "Time from the receipt of a query, or from the answer before it in a pipeline, to its whole answer.";
        transaction_seconds: Times = "transaction_seconds",
            "Time from the first query of a transaction to its end; the client's own time in between is included.";
        pool_servers: EnumMap<PoolServer, IntGauge> = "pool_servers",
            "Server connections of pools now, by state.";
        pool_limit: IntGauge = "pool_limit",
            "Server connections that the pools in use may have by their settings.";
        pool_limit_learned: IntGauge = "pool_limit_learned",
            "The same, lowered to what the server has been seen to accept.";
        pool_clients_waiting: IntGauge = "pool_clients_waiting",
            "Clients waiting for a server connection of a pool now.";
        pool_wait_seconds: Histogram = "pool_wait_seconds",
            "Time that a client waited for its server connection of a pool.", WAIT;
        pool_leases: EnumMap<PoolLease, IntCounter> = "pool_leases_total",
            "Server connections that pools gave to clients, by how the client got it.";
        pool_closes: EnumMap<PoolClose, IntCounter> = "pool_server_closes_total",
            "Server connections of pools that were closed, by reason.";
        pool_pins: EnumMap<PinReason, IntCounter> = "pool_pins_total",
            "Clients that began to keep their server connections although they are at rest, by reason.";
        pool_refused_pins: EnumMap<PinReason, IntCounter> = "pool_refused_pins_total",
            "Requests refused because their clients would have kept their server connections, by reason.";
        pool_resets: EnumMap<PoolReset, IntCounter> = "pool_resets_total",
            "Resets of server connections that a client had left, by result.";
        pool_local_answers: IntCounter = "pool_local_answers_total",
            "Resets of clients at rest, such as DISCARD ALL, that were answered without a server connection.";
        pool_verifications: EnumMap<PoolVerification, IntCounter> = "pool_verifications_total",
            "Queries that looked whether a client can part with its server connection, by result.";
        pool_hidden_losses: IntCounter = "pool_hidden_losses_total",
            "Server connections of pools that ended without a client, so that none noticed.";
        pool_wait_timeouts: IntCounter = "pool_wait_timeouts_total",
            "Clients refused because no server connection of the pool became free in time.";
        cancels: EnumMap<CancelOutcome, IntCounter> = "cancel_requests_total",
            "Cancel requests received from clients, by outcome.";
        credential_refreshes: EnumMap<RefreshOutcome, IntCounter> = "credential_refreshes_total",
            "Attempts to mint a database credential, by outcome.";
        credential_expiry: Gauge = "credential_expiry_timestamp_seconds",
            "Unix time at which the current database credential expires; 0 without a credential, +Inf if it never does.";
        credential_minted: Gauge = "credential_minted_timestamp_seconds",
            "Unix time at which the current database credential was minted; 0 without a credential.";
        credential_next_refresh: Gauge = "credential_next_refresh_timestamp_seconds",
            "Unix time of the next attempt to mint a database credential; 0 if none is planned.";
        credential_age: Gauge = "credential_age_seconds",
            "Age of the current database credential at the time of the scrape; NaN without a credential.";
        ..
        /// The metrics of the whole process.
        pub process: Arc<ProcessMetrics>,
        /// The registry of this endpoint's metrics.
        own_registry: Registry,
    }
}

impl Metrics {
    /// The metrics of a process without named endpoints, for tests.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        Self::with_registry(ProcessMetrics::new()?, None)
    }

    /// The metrics of a process's first endpoint.
    pub fn of_endpoint(name: &str) -> Result<Arc<Self>, prometheus::Error> {
        Self::with_registry(ProcessMetrics::new()?, Some(name))
    }

    /// The metrics of another endpoint of the same process; each endpoint's [`render`](Self::render) includes all.
    pub fn of_another(&self, name: &str) -> Result<Arc<Self>, prometheus::Error> {
        Self::with_registry(Arc::clone(&self.process), Some(name))
    }

    fn with_registry(
        process: Arc<ProcessMetrics>,
        endpoint: Option<&str>,
    ) -> Result<Arc<Self>, prometheus::Error> {
        let labels = endpoint.map(|name| HashMap::from([("endpoint".to_owned(), name.to_owned())]));
        let registry = Registry::new_custom(Some(PREFIX.to_owned()), labels)?;
        let metrics = Arc::new(Self::register(&registry.clone(), process, registry)?);
        metrics.process.endpoints().push(Arc::downgrade(&metrics));
        Ok(metrics)
    }

    /// Removes the endpoint from [`render`](Self::render).
    pub fn retire(&self) {
        self.process
            .endpoints()
            // By identity, since a reload may have added another endpoint of this name.
            .retain(|endpoint| !std::ptr::eq(endpoint.as_ptr(), self));
    }

    /// All metrics of the process, of every endpoint, in the Prometheus text format.
    pub fn render(&self) -> String {
        self.process.render()
    }
}

/// The sum of all children.
pub fn total<L: EnumArray<IntCounter>>(counters: &EnumMap<L, IntCounter>) -> u64 {
    counters.values().map(IntCounter::get).sum()
}

/// Increments a gauge until dropped.
#[derive(Debug)]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    /// Adds one to `gauge`.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Clone for GaugeGuard {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts when dropped, also by a panic.
#[derive(Debug)]
pub struct CountOnDrop(IntCounter);

impl CountOnDrop {
    /// Will add one to `counter`.
    pub fn new(counter: &IntCounter) -> Self {
        Self(counter.clone())
    }
}

impl Drop for CountOnDrop {
    fn drop(&mut self) {
        self.0.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_child_is_visible_as_zero_from_the_start() {
        let text = Metrics::new().unwrap().render();
        for line in [
            "lakebase_proxy_client_connections_refused_total{reason=\"max_connections\"} 0\n",
            "lakebase_proxy_upstream_connects_total{class=\"none\",outcome=\"ok\"} 0\n",
            "lakebase_proxy_upstream_connects_total{class=\"waking\",outcome=\"failed\"} 0\n",
            "lakebase_proxy_relay_bytes_total{direction=\"from_server\"} 0\n",
            "lakebase_proxy_cancel_requests_total{outcome=\"unknown\"} 0\n",
            "lakebase_proxy_credential_refreshes_total{outcome=\"success\"} 0\n",
            "lakebase_proxy_credential_mint_duration_seconds_count{step=\"workspace_token\"} 0\n",
            "lakebase_proxy_upstream_connect_duration_seconds_count{phase=\"tls\"} 0\n",
            "lakebase_proxy_session_duration_seconds_count{end=\"server\"} 0\n",
            "lakebase_proxy_upstream_retries_total{class=\"capacity\"} 0\n",
            "lakebase_proxy_upstream_tls_handshakes_total{kind=\"resumed\"} 0\n",
            "lakebase_proxy_endpoint_wake_duration_seconds_count 0\n",
            "lakebase_proxy_session_panics_total 0\n",
            "lakebase_proxy_log_lines_dropped_total 0\n",
            "lakebase_proxy_credential_age_seconds NaN\n",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("class=\"none\",outcome=\"failed\""));
    }

    #[test]
    fn every_metric_has_a_help_text_and_all_but_process_metrics_the_prefix() {
        let text = Metrics::new().unwrap().render();
        for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(
                name.starts_with("lakebase_proxy_") || name.starts_with("process_"),
                "{name}"
            );
            assert!(
                text.contains(&format!("# HELP {name} ")),
                "{name} has no help text"
            );
        }
    }

    #[test]
    fn endpoints_of_one_process_differ_in_a_label() {
        let one = Metrics::of_endpoint("a").unwrap();
        let other = one.of_another("b").unwrap();
        other.clients_opened.inc();
        let text = one.render();
        let name = "lakebase_proxy_client_connections_opened_total";
        assert!(
            text.contains(&format!(
                "{name}{{endpoint=\"a\"}} 0\n{name}{{endpoint=\"b\"}} 1\n"
            )),
            "{text}"
        );
        assert_eq!(
            text.matches("# TYPE lakebase_proxy_client_connections_opened_total")
                .count(),
            1
        );
        assert!(
            other.render().contains("{endpoint=\"a\"}"),
            "each shows all"
        );
        one.retire();
        let text = other.render();
        assert!(!text.contains("endpoint=\"a\"") && text.contains("endpoint=\"b\""));
    }

    #[test]
    fn two_sets_of_metrics_do_not_share_counts() {
        let (one, other) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.clients_opened.inc();
        assert_eq!(other.clients_opened.get(), 0);
    }

    #[test]
    fn a_dropped_guard_decrements_its_gauge() {
        let metrics = Metrics::new().unwrap();
        let guard = GaugeGuard::new(&metrics.clients_active);
        assert_eq!(metrics.clients_active.get(), 1);
        drop(guard);
        assert_eq!(metrics.clients_active.get(), 0);
    }
}
