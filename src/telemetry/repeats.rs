//! Rate limit for equal warnings, so that a flood of one warning does not hide other events.
//!
//! Of lines at WARN and ERROR that differ in the session only, [`PASS`] are logged in a [`INTERVAL`]; the others are counted,
//! and the count is logged at its end.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Filter};

use super::sink::Sink;

/// Lines of one kind that pass in a [`INTERVAL`].
const PASS: u32 = 10;
/// How long a kind is counted.
const INTERVAL: Duration = Duration::from_secs(30);
/// Kinds distinguished by their fields; further ones only by their place in the code.
const KINDS: usize = 256;
/// Fields that differ where the line is the same.
const PARTICULARS: [&str; 4] = ["session", "after", "peer", "duration"];

/// Counts kinds of lines; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Repeats(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kinds: Mutex<HashMap<u64, Kind>>,
    held_back: Notify,
}

#[derive(Debug)]
struct Kind {
    since: Instant,
    passed: u32,
    held_back: u64,
    level: Level,
    message: String,
}

impl Repeats {
    /// Logs what has been held back, a [`INTERVAL`] after it began; for ever.
    pub(super) async fn summarize(&self) {
        loop {
            let Some(due) = self.due() else {
                // `notify_one` leaves a permit, so that a line held back since `due` is not missed.
                self.0.held_back.notified().await;
                continue;
            };
            sleep_until(due).await;
            for Kind {
                held_back: times,
                level,
                message,
                ..
            } in self.take(Instant::now())
            {
                if level == Level::ERROR {
                    tracing::error!(times, "repeated: {message}");
                } else {
                    tracing::warn!(times, "repeated: {message}");
                }
            }
        }
    }

    fn passes(&self, key: u64, place: u64, level: Level, message: String, now: Instant) -> bool {
        let mut kinds = self.kinds();
        let mut key = key;
        if kinds.len() >= KINDS && !kinds.contains_key(&key) {
            kinds.retain(|_, kind| kind.held_back > 0 || now - kind.since < INTERVAL);
            if kinds.len() >= KINDS {
                key = place;
            }
        }
        let kind = kinds.entry(key).or_insert_with(|| Kind {
            since: now,
            passed: 0,
            held_back: 0,
            level,
            message,
        });
        // With held-back lines, `take` ends the interval: a reset here would lose their number.
        if now - kind.since >= INTERVAL && kind.held_back == 0 {
            (kind.since, kind.passed) = (now, 0);
        }
        if kind.passed < PASS {
            kind.passed += 1;
            return true;
        }
        kind.held_back += 1;
        // The first alone sets the time of the summary.
        if kind.held_back == 1 {
            self.0.held_back.notify_one();
        }
        false
    }

    /// When the first count is due.
    fn due(&self) -> Option<Instant> {
        let kinds = self.kinds();
        let counted = kinds.values().filter(|kind| kind.held_back > 0);
        counted.map(|kind| kind.since + INTERVAL).min()
    }

    /// The kinds whose interval is over and that were held back; all such begin anew.
    fn take(&self, now: Instant) -> Vec<Kind> {
        let mut kinds = self.kinds();
        let over = kinds.extract_if(|_, kind| now - kind.since >= INTERVAL);
        over.map(|(_, kind)| kind)
            .filter(|kind| kind.held_back > 0)
            .collect()
    }

    fn kinds(&self) -> MutexGuard<'_, HashMap<u64, Kind>> {
        self.0.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber> Filter<S> for Repeats {
    fn enabled(&self, _metadata: &Metadata<'_>, _context: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _context: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        let level = *metadata.level();
        let is_a_count = metadata.target() == module_path!() || metadata.target() == Sink::TARGET;
        // Levels grow with verbosity. A count that was held back would be counted again.
        if level > Level::WARN || is_a_count {
            return true;
        }
        let mut place = DefaultHasher::new();
        metadata.callsite().hash(&mut place);
        let mut content = Content {
            hasher: place.clone(),
            message: String::new(),
        };
        event.record(&mut content);
        self.passes(
            // A collision only limits two kinds of lines together.
            content.hasher.finish(),
            place.finish(),
            level,
            content.message,
            Instant::now(),
        )
    }
}

/// The content of a line.
struct Content {
    hasher: DefaultHasher,
    message: String,
}

impl Visit for Content {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if PARTICULARS.contains(&field.name()) {
            return;
        }
        let text = format!("{value:?}");
        field.name().hash(&mut self.hasher);
        text.hash(&mut self.hasher);
        if field.name() == "message" {
            self.message = text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(repeats: &Repeats, key: u64, now: Instant) -> bool {
        repeats.passes(key, 0, Level::WARN, format!("line {key}"), now)
    }

    #[test]
    fn a_few_pass_and_the_rest_are_counted() {
        let repeats = Repeats::default();
        let now = Instant::now();
        let passed = (0..100).filter(|_| log(&repeats, 1, now)).count();
        assert_eq!(passed, PASS as usize);
        assert!(log(&repeats, 2, now), "another kind is not held back");
        assert_eq!(repeats.due(), Some(now + INTERVAL));
        assert!(repeats.take(now + INTERVAL / 2).is_empty());
        let counted = repeats.take(now + INTERVAL);
        assert_eq!(counted.len(), 1);
        assert_eq!(counted[0].held_back, 100 - u64::from(PASS));
        assert_eq!(
            (counted[0].level, counted[0].message.as_str()),
            (Level::WARN, "line 1")
        );
        assert!(log(&repeats, 1, now + INTERVAL), "it begins anew");
        assert_eq!(repeats.due(), None);
    }

    #[test]
    fn a_line_now_and_then_always_passes() {
        let repeats = Repeats::default();
        let now = Instant::now();
        assert!((0..1000).all(|turn| log(&repeats, 1, now + INTERVAL / 5 * turn)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let repeats = Repeats::default();
        let now = Instant::now();
        for key in 1..10_000 {
            log(&repeats, key, now);
        }
        assert!(repeats.kinds().len() <= KINDS + 1);
        assert!(!log(&repeats, 77_777, now), "held back with its place");
        assert!(log(&repeats, 88_888, now + INTERVAL), "room again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_in_the_log_is_a_few_lines_and_a_count() {
        use tracing_subscriber::{Layer as _, fmt::MakeWriter, layer::SubscriberExt as _};

        #[derive(Clone, Default)]
        struct Lines(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        impl MakeWriter<'_> for Lines {
            type Writer = Self;
            fn make_writer(&self) -> Self {
                self.clone()
            }
        }

        let (repeats, lines) = (Repeats::default(), Lines::default());
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(lines.clone())
            .with_filter(repeats.clone());
        let _log = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        for session in 0..1000 {
            tracing::warn!(session, "client refused");
            tracing::info!(session, "something else");
        }
        tracing::warn!(session = 1, reason = "other", "client refused");
        let logged = |text: &str| {
            String::from_utf8(lines.0.lock().unwrap().clone())
                .unwrap()
                .matches(text)
                .count()
        };
        assert_eq!(logged("client refused"), PASS as usize + 1);
        assert_eq!(logged("something else"), 1000, "only warnings are counted");
        tokio::select! {
            () = repeats.summarize() => {}
            () = tokio::time::sleep(INTERVAL * 2) => {}
        }
        assert_eq!(logged("repeated: client refused times=990"), 1);
    }
}
