//! What is logged, and in which format.

/// Quiet on success: our own life-cycle events, other crates' warnings.
pub const DEFAULT_FILTER: &str = "warn,lakebase_proxy=info";

/// How to log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Directives such as `info` or `warn,lakebase_proxy=debug`; see [`DEFAULT_FILTER`].
    pub filter: String,
    /// One JSON object a line instead of text.
    pub structured: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            filter: DEFAULT_FILTER.to_owned(),
            structured: false,
        }
    }
}
