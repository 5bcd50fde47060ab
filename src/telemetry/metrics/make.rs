//! Metrics of which every child is there from the start.

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, core::Collector};

pub(super) fn add<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: Result<C, prometheus::Error>,
) -> Result<C, prometheus::Error> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

pub(super) fn counters(
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

pub(super) fn histograms(
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
