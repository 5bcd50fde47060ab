//! Logs to standard error, as text or JSON, with a filter that can change at runtime.

use std::{backtrace::Backtrace, error::Error, fmt, io, panic};

use prometheus::IntCounter;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt as lines, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

use super::{
    escape::Escaped,
    line::{BriefFields, EscapedFields, JsonLines},
    redact::redact,
    repeats::Repeats,
    sink::{LogGuard, Sink},
};
use crate::config::LogOptions;

/// Changes the filter at runtime.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    repeats: Repeats,
    sink: Sink,
}

impl LogHandle {
    /// Counts dropped lines, including earlier ones.
    pub fn count_dropped(&self, counter: &IntCounter) {
        self.sink.count_dropped(counter);
    }

    /// Replaces the filter; the one in force stays if `filter` is not valid.
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        self.filter
            .reload(parse(filter)?)
            .map_err(|error| LogError::new("the log filter can no longer be changed", error))
    }

    /// Logs the number of suppressed lines; runs for ever.
    pub async fn summarize(&self) {
        self.repeats.summarize().await;
    }

    /// The filter in force.
    pub fn filter(&self) -> String {
        self.filter
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }
}

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct LogError {
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl LogError {
    fn new(message: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self {
            message: message.into(),
            source: Some(Box::new(source)),
        }
    }
}

/// Whether a filter is valid.
pub fn check_filter(filter: &str) -> Result<(), LogError> {
    parse(filter).map(drop)
}

/// Sets up the process's log, once. What is logged is written by the time that the guard is dropped, within a bound.
pub fn init(options: &LogOptions) -> Result<(LogHandle, LogGuard), LogError> {
    let (filter, handle) = reload::Layer::new(parse(&options.filter)?);
    let repeats = Repeats::default();
    let (sink, guard) =
        Sink::stderr().map_err(|error| LogError::new("cannot start to log", error))?;
    // By default the layer reports its own failures with eprintln!, which would wait for the reader of standard error.
    let layer = if options.structured {
        let sink = sink.clone();
        lines::layer()
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .with_writer(move || JsonLines(sink.clone()))
            .log_internal_errors(false)
            .with_filter(repeats.clone())
            .boxed()
    } else if options.brief {
        let sink = sink.clone();
        lines::layer()
            .without_time()
            .with_target(false)
            .with_ansi(is_colored())
            .fmt_fields(BriefFields)
            .with_writer(move || sink.clone())
            .log_internal_errors(false)
            .with_filter(repeats.clone())
            .boxed()
    } else {
        let sink = sink.clone();
        lines::layer()
            .with_ansi(is_colored())
            .fmt_fields(EscapedFields)
            .with_writer(move || sink.clone())
            .log_internal_errors(false)
            .with_filter(repeats.clone())
            .boxed()
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .try_init()
        .map_err(|error| LogError::new("logging is already set up", error))?;
    // Not before, as the hook writes to the subscriber.
    panic::set_hook(Box::new(log_panic));
    let handle = LogHandle {
        filter: handle,
        repeats,
        sink,
    };
    Ok((handle, guard))
}

/// A panic as one line of the log: the default hook writes several to standard error, and waits for its reader.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("(not text)");
    let place = panic.location().map(ToString::to_string);
    let backtrace = Backtrace::capture();
    let has_backtrace = backtrace.status() == std::backtrace::BacktraceStatus::Captured;
    tracing::error!(
        place,
        thread = std::thread::current().name(),
        backtrace = has_backtrace.then(|| backtrace.to_string()),
        "panicked: {}; hint: this is a defect of lakebase-proxy, please report it",
        // A panic's text may quote what a peer has sent.
        redact(message)
    );
}

/// Writes the final error to standard error, with or without a log, and waits a bounded time for its reader.
pub fn write_stderr(text: &str) {
    // The guard waits for the writing thread when it is dropped.
    if let Ok((sink, _guard)) = Sink::stderr() {
        sink.push(text.as_bytes());
    }
}

/// An error with all of its causes on one line: `cannot connect: connection refused`.
///
/// A cause may contain external text: control characters are escaped, so that one event stays one line, and anything like a
/// token is removed.
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// See [`chain`].
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut next = Some(self.0);
        let mut text = String::new();
        while let Some(error) = next {
            let message = error.to_string();
            // Some crates repeat their source in their own message.
            if text.is_empty() {
                text.push_str(&message);
            } else if !text.ends_with(&message) {
                text.push_str(": ");
                text.push_str(&message);
            }
            next = error.source();
        }
        Escaped(redact(&text)).fmt(f)
    }
}

/// Whether standard error is a terminal, unless `NO_COLOR` or a similar variable overrides that.
fn is_colored() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    if filter.trim().is_empty() {
        // It would mean errors only.
        return Err(LogError {
            message: "the log filter is empty; to log nothing, use `off`".to_owned(),
            source: None,
        });
    }
    EnvFilter::builder().parse(filter).map_err(|source| {
        // The parser's error does not name the directive.
        let directive = filter
            .split(',')
            .map(str::trim)
            .find(|part| EnvFilter::builder().parse(part).is_err())
            .unwrap_or(filter);
        LogError::new(
            format!("invalid log filter directive `{directive}`"),
            source,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULT_FILTER;

    #[derive(Debug, thiserror::Error)]
    #[error("{message}")]
    struct Layered {
        message: &'static str,
        #[source]
        source: Option<Box<Layered>>,
    }

    fn layered(messages: &[&'static str]) -> Layered {
        let (message, rest) = messages.split_first().unwrap();
        Layered {
            message,
            source: (!rest.is_empty()).then(|| Box::new(layered(rest))),
        }
    }

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = layered(&["cannot mint", "request failed: timed out", "timed out"]);
        assert_eq!(
            chain(&error).to_string(),
            "cannot mint: request failed: timed out"
        );
    }

    #[test]
    fn a_chain_stays_on_one_line() {
        let error = layered(&["server refused", "no\n2026-01-01 ERROR forged\u{1b}[31m"]);
        assert_eq!(
            chain(&error).to_string(),
            "server refused: no\\n2026-01-01 ERROR forged\\u{1b}[31m"
        );
    }

    #[test]
    fn an_invalid_directive_is_named() {
        let error = parse("warn,lakebase_proxy=loud,h2=info").unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid log filter directive `lakebase_proxy=loud`"
        );
    }

    #[test]
    fn an_empty_filter_silences_nothing() {
        let error = parse(" ").unwrap_err();
        assert!(error.to_string().contains("is empty"), "{error}");
    }

    #[test]
    fn the_default_filter_is_valid() {
        assert!(parse(DEFAULT_FILTER).is_ok());
    }
}
