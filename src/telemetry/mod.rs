//! Logs and metrics.
//!
//! Every module but `config` may use it, and it imports only `config`, for the options of the log. It
//! formats and counts events without knowing their meaning.

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
pub use logging::{LogError, LogHandle, chain, write_stderr};
pub use metrics::{CountOnDrop, GaugeGuard, Metrics, total};
pub use redact::redact;
pub use sink::LogGuard;
