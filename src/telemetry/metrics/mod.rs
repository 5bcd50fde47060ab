//! The metrics of one process, in registries of its own, so that tests run side by side in one process.
//!
//! Names and label values are in [`names`]. Resolve a label child once (`with_label_values` hashes and
//! locks) and keep it where it is used often.

mod make;
mod process;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, atomic::Ordering},
};

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, exponential_buckets,
};

use self::{
    make::{add, counters, histograms},
    process::{EndpointRegistry, ProcessMetrics},
};
use super::names;

/// Content type of what [`Metrics::render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Everything counted, as seen by whoever counts.
pub struct Metrics {
    /// Clients whose connection was accepted.
    pub clients_opened: IntCounter,
    /// Clients whose connection has ended.
    pub clients_closed: IntCounter,
    /// Clients connected now; see [`GaugeGuard`].
    pub clients_active: IntGauge,
    /// Clients that wait for their login now.
    pub clients_waiting: IntGauge,
    /// How many sessions there may be at a time, over all endpoints.
    pub clients_limit: IntGauge,
    /// Clients sent away, by [`names::reason`].
    pub clients_refused: IntCounterVec,
    /// Login attempts at the endpoint, by [`names::outcome`] and [`names::class`].
    pub upstream_connects: IntCounterVec,
    /// Logged-in connections to the endpoint now.
    pub upstream_active: IntGauge,
    /// Time that login attempts took, by [`names::phase`].
    pub upstream_connect_seconds: HistogramVec,
    /// Logins tried again for the same client, by [`names::retry`].
    pub upstream_retries: IntCounterVec,
    /// TLS handshakes with the endpoint, by [`names::handshake`].
    pub tls_handshakes: IntCounterVec,
    /// How long the endpoint took to answer once it had been found asleep.
    pub wake_seconds: Histogram,
    /// How long sessions lasted, by [`names::end`].
    pub session_seconds: HistogramVec,
    /// Time that clients waited in login, from their startup message to our answer.
    pub hold_seconds: Histogram,
    /// Bytes passed on, by [`names::direction`].
    pub relay_bytes: IntCounterVec,
    /// Answers of the endpoint up to a ReadyForQuery: a simple query each, or all up to a Sync.
    pub queries: IntCounter,
    /// Those after which no transaction was open.
    pub transactions: IntCounter,
    /// Cancel requests, by [`names::cancel`].
    pub cancels: IntCounterVec,
    /// Sessions ended by a panic; anything but zero is a defect of ours.
    pub session_panics: IntCounter,
    /// Attempts to mint a credential, by [`names::refresh`].
    pub credential_refreshes: IntCounterVec,
    /// Time that minting took, by [`names::step`].
    pub mint_seconds: HistogramVec,
    /// Unix time at which the current credential expires; 0 while there is none, `+Inf` when it never does.
    pub credential_expiry: Gauge,
    /// Unix time at which the current credential was minted; 0 while there is none.
    pub credential_minted: Gauge,
    /// Unix time at which the next credential will be asked for; 0 where none will.
    pub credential_next_refresh: Gauge,
    /// Attempts to reload the settings, by [`names::reload`].
    pub config_reloads: IntCounterVec,
    /// 1 unless the last of them was refused.
    pub config_last_reload_successful: IntGauge,
    /// Log lines that standard error did not take.
    pub log_lines_dropped: IntCounter,
    /// Tells the endpoint's registry from the others.
    number: u64,
    process: Arc<ProcessMetrics>,
}

impl Metrics {
    /// The metrics of a process without endpoints by name, as tests have them.
    pub fn new() -> Result<Arc<Self>, prometheus::Error> {
        Self::register(&ProcessMetrics::new()?, None)
    }

    /// The metrics of a process's first endpoint.
    pub fn of_endpoint(name: &str) -> Result<Arc<Self>, prometheus::Error> {
        Self::register(&ProcessMetrics::new()?, Some(name))
    }

    /// The metrics of another endpoint of the same process: shown by the same [`render`](Self::render).
    pub fn of_another(&self, name: &str) -> Result<Arc<Self>, prometheus::Error> {
        Self::register(&self.process, Some(name))
    }

    fn register(
        process: &Arc<ProcessMetrics>,
        endpoint: Option<&str>,
    ) -> Result<Arc<Self>, prometheus::Error> {
        let labels = endpoint.map(|name| HashMap::from([("endpoint".to_owned(), name.to_owned())]));
        let ours = Registry::new_custom(Some(names::PREFIX.to_owned()), labels)?;

        // 0.5 ms to 131 s: a warm login is a few milliseconds, a cold one may take the whole connect timeout of 60 s.
        let login_buckets = exponential_buckets(0.0005, 2.0, 19)?;
        let credential_minted = add(
            &ours,
            Gauge::new(
                names::CREDENTIAL_MINTED,
                "Unix time at which the current database credential was minted; 0 while there is none.",
            ),
        )?;
        let metrics = Self {
            clients_opened: add(&ours, IntCounter::new(names::CLIENTS_OPENED, "Client connections accepted."))?,
            clients_closed: add(
                &ours,
                IntCounter::new(names::CLIENTS_CLOSED, "Client connections that have ended."),
            )?,
            clients_waiting: add(
                &ours,
                IntGauge::new(names::CLIENTS_WAITING, "Clients that wait for their login at the endpoint now."),
            )?,
            clients_limit: process.clients_limit.clone(),
            clients_active: add(&ours, IntGauge::new(names::CLIENTS_ACTIVE, "Client connections open now."))?,
            clients_refused: counters(
                &ours,
                names::CLIENTS_REFUSED,
                "Client connections answered with an error instead of a session, by reason.",
                "reason",
                names::reason::ALL,
            )?,
            upstream_connects: add(
                &ours,
                IntCounterVec::new(
                    Opts::new(
                        names::UPSTREAM_CONNECTS,
                        "Attempts to connect and log in to the endpoint, by outcome and failure class.",
                    ),
                    &["outcome", "class"],
                ),
            )?,
            upstream_active: add(
                &ours,
                IntGauge::new(names::UPSTREAM_ACTIVE, "Connections logged in at the endpoint now."),
            )?,
            upstream_connect_seconds: histograms(
                &ours,
                HistogramOpts::new(
                    names::UPSTREAM_CONNECT_SECONDS,
                    "Time that attempts to log in to the endpoint took, by phase; the phase total is all of one attempt.",
                )
                .buckets(login_buckets.clone()),
                "phase",
                names::phase::ALL,
            )?,
            upstream_retries: counters(
                &ours,
                names::UPSTREAM_RETRIES,
                "Logins at the endpoint tried again for the same client, by the class of the failure before.",
                "class",
                names::retry::ALL,
            )?,
            tls_handshakes: counters(
                &ours,
                names::TLS_HANDSHAKES,
                "TLS handshakes completed with the endpoint, by kind.",
                "kind",
                names::handshake::ALL,
            )?,
            wake_seconds: add(
                &ours,
                Histogram::with_opts(
                    HistogramOpts::new(
                        names::WAKE_SECONDS,
                        "Time from the first failed attempt at a sleeping endpoint until it answered.",
                    )
                    .buckets(login_buckets.clone()),
                ),
            )?,
            session_seconds: histograms(
                &ours,
                // 10 ms to 46 h: Lakebase ends connections after three days.
                HistogramOpts::new(
                    names::SESSION_SECONDS,
                    "Time that sessions lasted after their login, by who ended them.",
                )
                .buckets(exponential_buckets(0.01, 4.0, 13)?),
                "end",
                names::end::ALL,
            )?,
            hold_seconds: add(
                &ours,
                Histogram::with_opts(
                    HistogramOpts::new(
                        names::HOLD_SECONDS,
                        "Time that clients waited from their startup message until they were served or refused.",
                    )
                    .buckets(login_buckets),
                ),
            )?,
            relay_bytes: counters(
                &ours,
                names::RELAY_BYTES,
                "Bytes passed between clients and the endpoint after login, by direction.",
                "direction",
                names::direction::ALL,
            )?,
            queries: add(
                &ours,
                IntCounter::new(
                    names::QUERIES,
                    "Queries that the endpoint has answered: simple ones, and groups of extended ones that end with a Sync.",
                ),
            )?,
            transactions: add(
                &ours,
                IntCounter::new(
                    names::TRANSACTIONS,
                    "Transactions that have ended, committed or not; a query outside a transaction is one.",
                ),
            )?,
            cancels: counters(
                &ours,
                names::CANCELS,
                "Cancel requests received from clients, by outcome.",
                "outcome",
                names::cancel::ALL,
            )?,
            session_panics: process.session_panics.clone(),
            credential_refreshes: counters(
                &ours,
                names::CREDENTIAL_REFRESHES,
                "Attempts to get a new database credential from the workspace, by outcome.",
                "outcome",
                names::refresh::ALL,
            )?,
            mint_seconds: process.mint_seconds.clone(),
            credential_expiry: add(
                &ours,
                Gauge::new(
                    names::CREDENTIAL_EXPIRY,
                    "Unix time at which the current database credential expires; 0 while there is none.",
                ),
            )?,
            credential_minted: credential_minted.clone(),
            credential_next_refresh: add(
                &ours,
                Gauge::new(
                    names::CREDENTIAL_NEXT_REFRESH,
                    "Unix time at which the next database credential will be asked for; 0 where none will.",
                ),
            )?,
            config_reloads: process.config_reloads.clone(),
            config_last_reload_successful: process.config_last_reload_successful.clone(),
            log_lines_dropped: process.log_lines_dropped.clone(),
            number: process.endpoints_ever.fetch_add(1, Ordering::Relaxed),
            process: Arc::clone(process),
        };
        let credential_age = add(
            &ours,
            Gauge::new(
                names::CREDENTIAL_AGE,
                "Age of the current database credential at the time of the scrape; NaN while there is none.",
            ),
        )?;
        metrics
            .upstream_connects
            .with_label_values(&[names::outcome::OK, names::class::NONE]);
        for class in names::class::ALL
            .iter()
            .filter(|class| **class != names::class::NONE)
        {
            metrics
                .upstream_connects
                .with_label_values(&[names::outcome::FAILED, class]);
        }
        let shown = EndpointRegistry {
            number: metrics.number,
            registry: ours,
            credential_minted,
            credential_age,
        };
        process
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(shown);
        Ok(Arc::new(metrics))
    }

    /// The endpoint is no more: [`render`](Self::render) does not show it.
    pub fn retire(&self) {
        let mut endpoints = self
            .process
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        endpoints.retain(|shown| shown.number != self.number);
    }

    /// Everything of the process, all endpoints included, in the Prometheus text format.
    pub fn render(&self) -> String {
        self.process.render()
    }
}

/// Holds a gauge up by one for as long as it lives.
#[derive(Debug)]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    /// Adds one to `gauge` until the guard is dropped.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts when it is dropped, also by a panic.
#[derive(Debug)]
pub struct CountOnDrop(IntCounter);

impl CountOnDrop {
    /// Adds one to `counter` in the end.
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
    fn every_label_value_is_visible_as_zero_before_anything_happens() {
        let text = Metrics::new().unwrap().render();
        for reason in names::reason::ALL {
            let line = format!(
                "lakebase_proxy_client_connections_refused_total{{reason=\"{reason}\"}} 0\n"
            );
            assert!(text.contains(&line), "{line} is missing in\n{text}");
        }
        for line in [
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
    fn every_metric_carries_a_help_text_and_only_process_metrics_lack_the_prefix() {
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
    fn endpoints_of_one_process_are_told_apart_by_a_label() {
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
    fn a_guard_gives_back_what_it_took() {
        let metrics = Metrics::new().unwrap();
        let guard = GaugeGuard::new(&metrics.clients_active);
        assert_eq!(metrics.clients_active.get(), 1);
        drop(guard);
        assert_eq!(metrics.clients_active.get(), 0);
    }
}
