//! Declaring a metric: one line with its field, type, name and help text.

use enum_map::EnumMap;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
    core::{Atomic, Collector, GenericGauge},
    exponential_buckets,
};

use crate::telemetry::labels::{FailureClass, Label};

type Result<T> = std::result::Result<T, prometheus::Error>;

/// Exponential buckets of a histogram.
#[derive(Clone, Copy)]
pub(super) struct Buckets {
    pub(super) start: f64,
    pub(super) factor: f64,
    pub(super) count: usize,
}

/// The declaration of a metric.
pub(super) struct Declaration<'a> {
    pub(super) name: &'a str,
    pub(super) help: &'a str,
    /// Of a histogram.
    pub(super) buckets: Option<Buckets>,
}

impl Declaration<'_> {
    pub(super) fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }

    fn histogram_opts(&self) -> Result<HistogramOpts> {
        let opts = HistogramOpts::from(self.opts());
        Ok(match self.buckets {
            Some(Buckets {
                start,
                factor,
                count,
            }) => opts.buckets(exponential_buckets(start, factor, count)?),
            None => opts,
        })
    }
}

/// A metric, or all children of a labeled one.
pub(super) trait Metric: Sized {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self>;
}

fn add<C: Collector + Clone + 'static>(registry: &Registry, made: Result<C>) -> Result<C> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

impl Metric for IntCounter {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        add(registry, Self::with_opts(declaration.opts()))
    }
}

impl<P: Atomic + 'static> Metric for GenericGauge<P> {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        add(registry, Self::with_opts(declaration.opts()))
    }
}

impl Metric for Histogram {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        add(registry, Self::with_opts(declaration.histogram_opts()?))
    }
}

impl<L: Label> Metric for EnumMap<L, IntCounter> {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        // Creates every child now: Prometheus' `rate` misses the first event of a counter that appears with it.
        let vec = add(registry, IntCounterVec::new(declaration.opts(), &[L::NAME]))?;
        Ok(Self::from_fn(|label: L| {
            vec.with_label_values(&[label.text()])
        }))
    }
}

impl<L: Label> Metric for EnumMap<L, IntGauge> {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        let vec = add(registry, IntGaugeVec::new(declaration.opts(), &[L::NAME]))?;
        Ok(Self::from_fn(|label: L| {
            vec.with_label_values(&[label.text()])
        }))
    }
}

impl<L: Label> Metric for EnumMap<L, Histogram> {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        let vec = add(
            registry,
            HistogramVec::new(declaration.histogram_opts()?, &[L::NAME]),
        )?;
        Ok(Self::from_fn(|label: L| {
            vec.with_label_values(&[label.text()])
        }))
    }
}

/// Attempts to log in at the endpoint.
pub struct Logins {
    /// Logged in.
    pub ok: IntCounter,
    /// Not logged in, by class.
    pub failed: EnumMap<FailureClass, IntCounter>,
}

impl Metric for Logins {
    fn register(registry: &Registry, declaration: &Declaration<'_>) -> Result<Self> {
        let vec = add(
            registry,
            IntCounterVec::new(declaration.opts(), &["outcome", FailureClass::NAME]),
        )?;
        Ok(Self {
            ok: vec.with_label_values(&["ok", "none"]),
            failed: EnumMap::from_fn(|class: FailureClass| {
                vec.with_label_values(&["failed", class.as_str()])
            }),
        })
    }
}

/// Declares a struct of metrics: `field: Type = "name", "help text.", BUCKETS;`
macro_rules! metrics {
    (
        $(#[$doc:meta])* pub struct $metrics:ident {
            $($field:ident: $metric:ty = $name:literal, $help:literal $(, $buckets:ident)?;)+
            ..
            $($(#[$other_doc:meta])* $other_vis:vis $other:ident: $other_type:ty,)*
        }
    ) => {
        $(#[$doc])*
        pub struct $metrics {
            $(#[doc = $help] pub $field: $metric,)+
            $($(#[$other_doc])* $other_vis $other: $other_type,)*
        }

        impl $metrics {
            fn register(
                registry: &prometheus::Registry,
                $($other: $other_type,)*
            ) -> Result<Self, prometheus::Error> {
                Ok(Self {
                    $($field: metric::Metric::register(
                        registry,
                        &metric::Declaration { name: $name, help: $help, buckets: None$(.or(Some($buckets)))? },
                    )?,)+
                    $($other,)*
                })
            }
        }
    };
}
pub(super) use metrics;
