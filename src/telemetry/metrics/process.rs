//! What is counted once for the whole process, and one text of it all.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{SystemTime, UNIX_EPOCH},
};

use prometheus::{
    Encoder, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder, exponential_buckets, proto::MetricFamily,
};

use super::make::{add, counters, histograms};
use crate::telemetry::names;

/// What is counted once for the whole process, and where each endpoint's own metrics are found at a scrape.
pub(super) struct ProcessMetrics {
    registries: [Registry; 2],
    pub(super) clients_limit: IntGauge,
    pub(super) mint_seconds: HistogramVec,
    pub(super) session_panics: IntCounter,
    pub(super) config_reloads: IntCounterVec,
    pub(super) config_last_reload_successful: IntGauge,
    pub(super) log_lines_dropped: IntCounter,
    pub(super) endpoints: Mutex<Vec<EndpointRegistry>>,
    /// How many endpoints there have been.
    pub(super) endpoints_ever: AtomicU64,
}

pub(super) struct EndpointRegistry {
    pub(super) number: u64,
    pub(super) registry: Registry,
    pub(super) credential_minted: Gauge,
    pub(super) credential_age: Gauge,
}

impl ProcessMetrics {
    pub(super) fn new() -> Result<Arc<Self>, prometheus::Error> {
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
            clients_limit: add(
                &ours,
                IntGauge::new(
                    names::CLIENTS_LIMIT,
                    "Sessions that there may be at a time, over all endpoints.",
                ),
            )?,
            session_panics: add(
                &ours,
                IntCounter::new(
                    names::SESSION_PANICS,
                    "Sessions ended by a panic; each one is a defect of the proxy.",
                ),
            )?,
            config_reloads: counters(
                &ours,
                names::CONFIG_RELOADS,
                "Attempts to reload the settings, by outcome.",
                "outcome",
                names::reload::ALL,
            )?,
            config_last_reload_successful: {
                let gauge = add(
                    &ours,
                    IntGauge::new(
                        names::CONFIG_LAST_RELOAD_SUCCESSFUL,
                        "1 unless the last attempt to reload the settings was refused.",
                    ),
                )?;
                gauge.set(1);
                gauge
            },
            log_lines_dropped: add(
                &ours,
                IntCounter::new(
                    names::LOG_LINES_DROPPED,
                    "Log lines dropped because what reads standard error does not keep up.",
                ),
            )?,
            registries: [ours, system],
            endpoints: Mutex::default(),
            endpoints_ever: AtomicU64::new(0),
        }))
    }

    /// Everything of the process, all endpoints included, in the Prometheus text format.
    pub(super) fn render(&self) -> String {
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
        for registry in &self.registries {
            gather(registry);
        }
        for endpoint in &*self
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn age_counts_from_the_mint_and_is_never_negative() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000);
        assert!((age(900.0, now) - 100.0).abs() < 1e-9);
        assert!(age(1_001.0, now).abs() < f64::EPSILON);
        assert!(age(0.0, now).is_nan());
    }
}
