//! Logs and metrics.
//!
//! A leaf: every room may use it, and it imports none of them. It knows how things are written down, not what they mean.

pub mod logging;
pub mod metrics;
pub mod names;
mod redact;
mod repeats;

pub use logging::{DEFAULT_FILTER, LogError, LogHandle, LogOptions, chain};
pub use metrics::{CountOnDrop, GaugeGuard, Metrics};
pub use redact::{redact, without_userinfo};
