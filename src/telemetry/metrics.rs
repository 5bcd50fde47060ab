//! The metrics of one process, in registries of its own, so that tests run side by side in one process.
//!
//! Names and label values are in [`names`]. Resolve a label child once (`with_label_values` hashes and
//! locks) and keep it where it is used often.

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, Opts, Registry, TextEncoder, core::Collector, exponential_buckets,
    proto::MetricFamily,
};

use super::names;

/// Content type of what [`Metrics::render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Everything counted, as seen by whoever counts.
pub struct Metrics {
    /// Clients whose connection was accepted.
    pub clients_opened: IntCounter,
    /// Clients connected now; see [`GaugeGuard`].
    pub clients_active: IntGauge,
    /// Clients sent away, by [`names::reason`].
    pub clients_refused: IntCounterVec,
    /// Login attempts at the endpoint, by [`names::outcome`] and [`names::class`].
    pub upstream_connects: IntCounterVec,
    /// Logged-in connections to the endpoint now.
    pub upstream_active: IntGauge,
    /// Time that login attempts took, by [`names::phase`].
    pub upstream_connect_seconds: HistogramVec,
    /// Time that clients waited in login, from their startup message to our answer.
    pub hold_seconds: Histogram,
    /// Bytes passed on, by [`names::direction`].
    pub relay_bytes: IntCounterVec,
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
    process: Arc<ProcessMetrics>,
}

/// What is counted once for the whole process, and where each endpoint's own metrics are found at a scrape.
struct ProcessMetrics {
    registries: [Registry; 2],
    mint_seconds: HistogramVec,
    session_panics: IntCounter,
    endpoints: Mutex<Vec<EndpointRegistry>>,
}

struct EndpointRegistry {
    registry: Registry,
    credential_minted: Gauge,
    credential_age: Gauge,
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

    /// Everything of the process, all endpoints included, in the Prometheus text format.
    pub fn render(&self) -> String {
        let mut families = BTreeMap::new();
        let mut gather = |registry: &Registry| {
            for mut family in registry.gather() {
                match families.entry(family.name().to_owned()) {
                    Entry::Vacant(place) => drop(place.insert(family)),
                    Entry::Occupied(mut same) => {
                        let same: &mut MetricFamily = same.get_mut();
                        same.mut_metric().append(&mut family.take_metric());
                    }
                }
            }
        };
        for registry in &self.process.registries {
            gather(registry);
        }
        for endpoint in &*self
            .process
            .endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
        {
            endpoint
                .credential_age
                .set(age(endpoint.credential_minted.get(), SystemTime::now()));
            gather(&endpoint.registry);
        }
        let mut text = Vec::with_capacity(16 * 1024);
        let families: Vec<_> = families.into_values().collect();
        // Only a family without children is an error, and gather() leaves those out.
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

impl ProcessMetrics {
    fn new() -> Result<Arc<Self>, prometheus::Error> {
        let ours = Registry::new_custom(Some(names::PREFIX.to_owned()), None)?;
        // Stock dashboards look for `process_*` without a prefix.
        let system = Registry::new();
        #[cfg(target_os = "linux")]
        system.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        let build = add(
            &ours,
            GaugeVec::new(
                Opts::new(names::BUILD_INFO, "Always 1; the version is a label."),
                &["version"],
            ),
        )?;
        build
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1.0);
        // 10 ms to 41 s: calls over the internet.
        let mint_buckets = exponential_buckets(0.01, 2.0, 13)?;
        Ok(Arc::new(Self {
            mint_seconds: histograms(
                &ours,
                HistogramOpts::new(
                    names::MINT_SECONDS,
                    "Time that getting a database credential took, by step.",
                )
                .buckets(mint_buckets),
                "step",
                names::step::ALL,
            )?,
            session_panics: add(
                &ours,
                IntCounter::new(
                    names::SESSION_PANICS,
                    "Sessions ended by a panic; each one is a defect of the proxy.",
                ),
            )?,
            registries: [ours, system],
            endpoints: Mutex::default(),
        }))
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

fn age(minted: f64, now: SystemTime) -> f64 {
    if minted <= 0.0 {
        return f64::NAN;
    }
    let now = now
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64();
    (now - minted).max(0.0)
}

fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: Result<C, prometheus::Error>,
) -> Result<C, prometheus::Error> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    values: &[&str],
) -> Result<IntCounterVec, prometheus::Error> {
    let vec = add(
        registry,
        IntCounterVec::new(Opts::new(name, help), &[label]),
    )?;
    for value in values {
        vec.with_label_values(&[value]);
    }
    Ok(vec)
}

fn histograms(
    registry: &Registry,
    opts: HistogramOpts,
    label: &str,
    values: &[&str],
) -> Result<HistogramVec, prometheus::Error> {
    let vec = add(registry, HistogramVec::new(opts, &[label]))?;
    for value in values {
        vec.with_label_values(&[value]);
    }
    Ok(vec)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
            "lakebase_proxy_session_panics_total 0\n",
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
    }

    #[test]
    fn two_sets_of_metrics_do_not_share_counts() {
        let (one, other) = (Metrics::new().unwrap(), Metrics::new().unwrap());
        one.clients_opened.inc();
        assert_eq!(other.clients_opened.get(), 0);
    }

    #[test]
    fn age_counts_from_the_mint_and_is_never_negative() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000);
        assert!((age(900.0, now) - 100.0).abs() < 1e-9);
        assert!(age(1_001.0, now).abs() < f64::EPSILON);
        assert!(age(0.0, now).is_nan());
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
