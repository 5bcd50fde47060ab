//! Logs to standard error: text for people, JSON for collectors, and a level that can be changed while running.

use std::{error::Error, fmt, io};

use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt as lines, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

use super::{redact::redact, repeats::Repeats};

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

/// Changes what is logged while the process runs.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    repeats: Repeats,
}

impl LogHandle {
    /// Replaces the filter; the one in force stays if `filter` is not valid.
    pub fn set_filter(&self, filter: &str) -> Result<(), LogError> {
        self.filter
            .reload(parse(filter)?)
            .map_err(|source| LogError::Reload { source })
    }

    /// Logs how often lines of a flood were not logged; for ever.
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
pub enum LogError {
    /// Nothing at all, which would be read as errors only.
    #[error("the log filter is empty; to log nothing, say `off`")]
    Empty,
    /// A directive of the filter makes no sense.
    #[error("invalid log filter directive `{directive}`")]
    Filter {
        /// The offending part.
        directive: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Something else has taken the process's one log.
    #[error("logging is already set up")]
    AlreadySet {
        /// What the subscriber says.
        #[source]
        source: tracing_subscriber::util::TryInitError,
    },
    /// The log is gone.
    #[error("the log filter can no longer be changed")]
    Reload {
        /// What the subscriber says.
        #[source]
        source: reload::Error,
    },
}

/// Whether a filter could be put in force.
pub fn check_filter(filter: &str) -> Result<(), LogError> {
    parse(filter).map(drop)
}

/// Sets up the process's log, once.
pub fn init(options: &LogOptions) -> Result<LogHandle, LogError> {
    let (filter, handle) = reload::Layer::new(parse(&options.filter)?);
    let repeats = Repeats::default();
    // A closed standard error must not become a panic: by default the layer reports its own failures with eprintln!.
    let layer = if options.structured {
        lines::layer()
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .with_writer(io::stderr)
            .log_internal_errors(false)
            .with_filter(repeats.clone())
            .boxed()
    } else {
        lines::layer()
            .with_ansi(is_coloured())
            .with_writer(io::stderr)
            .log_internal_errors(false)
            .with_filter(repeats.clone())
            .boxed()
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .try_init()
        .map_err(|source| LogError::AlreadySet { source })?;
    Ok(LogHandle {
        filter: handle,
        repeats,
    })
}

/// An error with all of its causes on one line: `cannot connect: connection refused`.
///
/// A cause may hold what a stranger sent: control characters are escaped, so that one event stays one line, and what looks
/// like a token is taken out.
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// See [`chain`].
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;

        let mut next = Some(self.0);
        let mut said = String::new();
        while let Some(error) = next {
            let message = error.to_string();
            // Some crates repeat their source in their own message.
            if said.is_empty() {
                said.push_str(&message);
            } else if !said.ends_with(&message) {
                said.push_str(": ");
                said.push_str(&message);
            }
            next = error.source();
        }
        for character in redact(&said).chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                f.write_char(character)?;
            }
        }
        Ok(())
    }
}

/// A terminal, and neither `NO_COLOR` nor its kin say otherwise.
fn is_coloured() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != anstream::ColorChoice::Never
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    if filter.trim().is_empty() {
        return Err(LogError::Empty);
    }
    EnvFilter::builder().parse(filter).map_err(|source| {
        // The parser does not say which directive it means.
        let directive = filter
            .split(',')
            .map(str::trim)
            .find(|part| EnvFilter::builder().parse(part).is_err())
            .unwrap_or(filter);
        LogError::Filter {
            directive: directive.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_chain_stays_on_one_line_whatever_a_stranger_sent() {
        let error = layered(&["server said", "no\n2026-01-01 ERROR forged\u{1b}[31m"]);
        assert_eq!(
            chain(&error).to_string(),
            "server said: no\\n2026-01-01 ERROR forged\\u{1b}[31m"
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
        assert!(matches!(parse(" "), Err(LogError::Empty)));
    }

    #[test]
    fn the_default_filter_is_valid() {
        assert!(parse(DEFAULT_FILTER).is_ok());
    }
}
