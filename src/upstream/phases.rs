//! The phases of a client's login: the current one, for the error of a timeout, and the duration of each, for the metrics
//! and the session's span, whose fields the listener declares.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use enum_map::{Enum, EnumMap};
use tokio::time::Instant;
use tracing::{Span, field::debug};

use super::failure::Failure;
use crate::telemetry::{Metrics, labels::LoginPhase};

/// The phases of one client's login, over all of its attempts.
pub(super) struct Phases<'a> {
    pub(super) metrics: &'a Metrics,
    // Atomic, as the mutex below: a login's future holds a reference to this and must be Send. Only one task uses it.
    current: AtomicUsize,
    durations: Mutex<EnumMap<LoginPhase, Duration>>,
}

impl<'a> Phases<'a> {
    pub(super) fn new(metrics: &'a Metrics) -> Self {
        Self {
            metrics,
            current: AtomicUsize::default(),
            durations: Mutex::default(),
        }
    }

    /// Runs a phase of an attempt; only its success is observed.
    pub(super) async fn run<T>(
        &self,
        phase: LoginPhase,
        step: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        self.current.store(phase.into_usize(), Ordering::Relaxed);
        let started = Instant::now();
        let done = step.await?;
        self.observe(phase, started.elapsed());
        Ok(done)
    }

    /// Observes a phase that took this long.
    pub(super) fn observe(&self, phase: LoginPhase, took: Duration) {
        self.metrics.upstream_connect_seconds[phase].observe(took.as_secs_f64());
        let mut durations = self.durations();
        // A client may wait before each attempt; of the attempts, the last one's phases count.
        let before = match phase {
            LoginPhase::Queue | LoginPhase::Credential => durations[phase],
            _ => Duration::ZERO,
        };
        durations[phase] = before + took;
    }

    /// The phase that is running.
    pub(super) fn current(&self) -> LoginPhase {
        LoginPhase::from_usize(self.current.load(Ordering::Relaxed))
    }

    /// Records the durations in the session's span.
    pub(super) fn record(&self) {
        let span = Span::current();
        if !span.is_disabled() {
            for (phase, took) in &*self.durations() {
                span.record(phase.as_str(), debug(took));
            }
        }
    }

    fn durations(&self) -> MutexGuard<'_, EnumMap<LoginPhase, Duration>> {
        self.durations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
