//! Logs and metrics.
//!
//! A leaf: every room may use it, and it imports none of them. It knows how things are written down, not what they mean.

mod escape;
mod known;
pub mod labels;
mod line;
pub mod logging;
pub mod metrics;
mod redact;
mod repeats;
mod sink;

pub use escape::{Escaped, escape, escape_json};
pub(crate) use known::KnownSecrets;
pub use logging::{LogError, LogHandle, chain, last_words};
pub use metrics::{CountOnDrop, GaugeGuard, Metrics, total};
pub use redact::redact;
pub use sink::LogGuard;
