//! Metrics counted once for the whole process, and the text of all metrics.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{SystemTime, UNIX_EPOCH},
};

use enum_map::EnumMap;
use prometheus::{
    Encoder, Gauge, Histogram, IntCounter, IntGauge, Opts, Registry, TextEncoder,
    proto::MetricFamily,
};

use super::{
    Metrics, PREFIX,
    metric::{self, Buckets, metrics},
};
use crate::telemetry::labels::{MintStep, ReloadOutcome};

/// 10 ms to 41 s: calls over the internet.
const MINT: Buckets = Buckets {
    start: 0.01,
    factor: 2.0,
    count: 13,
};

metrics! {
    /// Metrics counted once for the whole process.
    pub struct ProcessMetrics {
        clients_limit: IntGauge = "client_connections_limit",
            "Maximum concurrent sessions, over all endpoints.";
        mint_seconds: EnumMap<MintStep, Histogram> = "credential_mint_duration_seconds",
            "Duration of minting a database credential, by step.", MINT;
        session_panics: IntCounter = "session_panics_total",
            "Sessions ended by a panic; each one is a defect of the proxy.";
        config_reloads: EnumMap<ReloadOutcome, IntCounter> = "config_reloads_total",
            "Attempts to reload the settings, by outcome.";
        config_last_reload_successful: IntGauge = "config_last_reload_successful",
            "1 unless the last attempt to reload the settings was refused.";
        log_lines_dropped: IntCounter = "log_lines_dropped_total",
            "Log lines dropped because the reader of standard error does not keep up.";
        ..
        registries: [Registry; 2],
        endpoints: Mutex<Vec<Weak<Metrics>>>,
    }
}

impl ProcessMetrics {
    pub(super) fn new() -> Result<Arc<Self>, prometheus::Error> {
        let ours = Registry::new_custom(Some(PREFIX.to_owned()), None)?;
        // Stock dashboards expect `process_*` without a prefix.
        let system = Registry::new();
        #[cfg(target_os = "linux")]
        system.register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))?;
        let build = Gauge::with_opts(
            Opts::new("build_info", "Always 1; the version is a label.")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        build.set(1.0);
        ours.register(Box::new(build))?;
        let metrics = Self::register(&ours.clone(), [ours, system], Mutex::default())?;
        metrics.config_last_reload_successful.set(1);
        Ok(Arc::new(metrics))
    }

    pub(super) fn endpoints(&self) -> MutexGuard<'_, Vec<Weak<Metrics>>> {
        // No panic leaves the list half changed, and metrics must stay available.
        self.endpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn render(&self) -> String {
        let mut families = BTreeMap::new();
        let mut gather = |registry: &Registry| {
            for mut family in registry.gather() {
                // The text format requires one group of lines per metric, and all endpoints have the same metrics.
                match families.entry(family.name().to_owned()) {
                    Entry::Vacant(entry) => drop(entry.insert(family)),
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
        for endpoint in self.endpoints().iter().filter_map(Weak::upgrade) {
            let minted = endpoint.credential_minted.get();
            endpoint.credential_age.set(age(minted, SystemTime::now()));
            gather(&endpoint.own_registry);
        }
        let mut text = Vec::with_capacity(16 * 1024);
        let families: Vec<_> = families.into_values().collect();
        // Only a family without children is an error, and gather() omits those.
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            tracing::error!(%error, "cannot encode the metrics");
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
