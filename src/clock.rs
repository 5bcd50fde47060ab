//! The one source of wall-clock time.
//!
//! Monotonic time is `tokio::time`, which tests can pause. Credential lifetimes are judged by the wall clock, because
//! timers stand still while a laptop sleeps and the server's notion of expiry does not.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

/// A source of wall-clock time; cheap to clone.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    System,
    Simulated {
        origin: Timestamp,
        started: Instant,
        offset_ms: Arc<AtomicI64>,
    },
}

impl Clock {
    /// The machine's own clock.
    pub fn system() -> Self {
        Self(Kind::System)
    }

    /// A clock that reads `origin` now and advances with `tokio::time` (which a test may pause).
    pub fn simulated(origin: Timestamp) -> Self {
        Self(Kind::Simulated {
            origin,
            started: Instant::now(),
            offset_ms: Arc::default(),
        })
    }

    /// Wall-clock time.
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Kind::System => Timestamp::now(),
            Kind::Simulated {
                origin,
                started,
                offset_ms,
            } => {
                let elapsed =
                    SignedDuration::try_from(started.elapsed()).unwrap_or(SignedDuration::MAX);
                let offset = SignedDuration::from_millis(offset_ms.load(Ordering::Relaxed));
                origin
                    .saturating_add(elapsed.saturating_add(offset))
                    .unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// Moves a simulated clock without its timers, as a suspended laptop does. No effect on the system clock.
    pub fn jump(&self, by: SignedDuration) {
        if let Kind::Simulated { offset_ms, .. } = &self.0 {
            let millis = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
            offset_ms.fetch_add(millis, Ordering::Relaxed);
        }
    }
}
