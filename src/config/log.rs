//! The log's filter and format.

use super::Settings;

/// Life-cycle events of the proxy, warnings of other crates.
pub const DEFAULT_FILTER: &str = "warn,lakebase_proxy=info";

/// How to log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Directives such as `info` or `warn,lakebase_proxy=debug`.
    pub filter: String,
    /// JSON, one object per line, instead of text.
    pub structured: bool,
    /// Text without time, source and details, for the demo.
    pub brief: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Settings::default().log_options()
    }
}

impl Settings {
    /// The log options in force.
    pub fn log_options(&self) -> LogOptions {
        LogOptions {
            filter: self.log_filter(),
            structured: self.structured_logs(),
            brief: false,
        }
    }
}
