//! A histogram of times that costs each query little: an observation is two additions.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus::{
    Opts, Registry,
    core::{Collector, Desc, Describer},
    proto::{self, MetricFamily, MetricType},
};

use super::metric::{Declaration, Metric};

/// The upper bound of the first bucket in microseconds; each further one has twice that of the last.
const FIRST: u64 = 125;
/// Bounds up to 131 s; a further bucket is for the rest.
const BOUNDS: usize = 21;

/// Times by size, from 125 us to 131 s; cheap to clone.
#[derive(Clone)]
pub struct Times(Arc<Inner>);

struct Inner {
    opts: Opts,
    desc: Desc,
    buckets: [AtomicU64; BOUNDS + 1],
    micros: AtomicU64,
}

impl Times {
    /// Adds times.
    #[inline]
    pub fn add(&self, took: &Took) {
        // Relaxed: each number is shown by itself.
        if let Some(bucket) = self.0.buckets.get(took.bucket) {
            bucket.fetch_add(took.count.into(), Ordering::Relaxed);
        }
        self.0.micros.fetch_add(took.micros, Ordering::Relaxed);
    }

    /// The sum of all times in microseconds.
    pub fn micros(&self) -> u64 {
        self.0.micros.load(Ordering::Relaxed)
    }

    fn histogram(&self) -> proto::Histogram {
        let mut histogram = proto::Histogram::default();
        let (mut count, mut bound) = (0, Duration::from_micros(FIRST));
        let mut buckets = Vec::with_capacity(BOUNDS);
        for (at, number) in self.0.buckets.iter().enumerate() {
            count += number.load(Ordering::Relaxed);
            if at < BOUNDS {
                let mut bucket = proto::Bucket::default();
                bucket.set_cumulative_count(count);
                bucket.set_upper_bound(bound.as_secs_f64());
                buckets.push(bucket);
                bound *= 2;
            }
        }
        histogram.set_bucket(buckets);
        histogram.set_sample_count(count);
        histogram.set_sample_sum(Duration::from_micros(self.micros()).as_secs_f64());
        histogram
    }
}

/// Times to add, prepared once for several histograms.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    bucket: usize,
    count: u32,
    micros: u64,
}

impl Took {
    /// Times with their sum in microseconds: what a pipeline took is divided equally among its queries.
    #[inline]
    pub fn new(micros: u64, count: u32) -> Self {
        let each = match count {
            0 | 1 => micros,
            several => micros / u64::from(several),
        };
        Self {
            bucket: bucket(each),
            count,
            micros,
        }
    }
}

/// The first bucket whose bound is not below `micros`.
#[inline]
fn bucket(micros: u64) -> usize {
    let doublings = u64::BITS - (micros.saturating_sub(1) / FIRST).leading_zeros();
    (doublings as usize).min(BOUNDS)
}

impl Metric for Times {
    fn register(
        registry: &Registry,
        declaration: &Declaration<'_>,
    ) -> Result<Self, prometheus::Error> {
        let opts = declaration.opts();
        let times = Self(Arc::new(Inner {
            desc: opts.describe()?,
            opts,
            buckets: Default::default(),
            micros: AtomicU64::new(0),
        }));
        registry.register(Box::new(times.clone()))?;
        Ok(times)
    }
}

impl Collector for Times {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.0.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut metric = proto::Metric::default();
        metric.set_histogram(self.histogram());
        let mut family = MetricFamily::default();
        family.set_name(self.0.desc.fq_name.clone());
        family.set_help(self.0.opts.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(vec![metric]);
        vec![family]
    }
}

impl fmt::Debug for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Times").field(&self.0.desc.fq_name).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::Metrics;

    #[test]
    fn a_time_is_counted_up_to_its_bound() {
        for (micros, expected) in [
            (0, 0),
            (FIRST, 0),
            (FIRST + 1, 1),
            (2 * FIRST, 1),
            (2 * FIRST + 1, 2),
            (FIRST << 20, BOUNDS - 1),
            ((FIRST << 20) + 1, BOUNDS),
            (u64::MAX, BOUNDS),
        ] {
            assert_eq!(bucket(micros), expected, "{micros}");
        }
    }

    #[test]
    fn the_times_of_a_pipeline_are_equal_and_add_up() {
        let metrics = Metrics::new().unwrap();
        metrics.query_seconds.add(&Took::new(4000, 4));
        metrics.query_seconds.add(&Took::new(1_000_000_000, 1));
        assert_eq!(metrics.query_seconds.micros(), 1_000_004_000);
        let text = metrics.render();
        for line in [
            "_bucket{le=\"0.0005\"} 0",
            "_bucket{le=\"0.001\"} 4",
            "_bucket{le=\"131.072\"} 4",
            "_bucket{le=\"+Inf\"} 5",
            "_sum 1000.004",
            "_count 5",
        ] {
            let line = format!("lakebase_proxy_query_seconds{line}\n");
            assert!(text.contains(&line), "{line}{text}");
        }
    }
}
