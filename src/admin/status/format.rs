//! Numbers, times and severities in readable form.

use std::time::Duration;

use jiff::Timestamp;

/// Severity, shown by a sign and a word besides the color.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Severity {
    Good,
    Warn,
    Bad,
}

impl Severity {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
        }
    }

    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Good => "●",
            Self::Warn => "◆",
            Self::Bad => "▲",
        }
    }
}

/// A name with its value.
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) value: String,
}

impl Figure {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }
}

/// `12 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`.
pub(super) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..600 => format!("{minutes} min {:02} s", seconds % 60),
        600..3600 => format!("{minutes} min"),
        3600..86_400 => format!("{hours} h {:02} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// `870 ms`, `3.2 s`, `1 min 05 s`.
pub(super) fn short_span(time: Duration) -> String {
    match time.as_millis() {
        0..1000 => format!("{} ms", time.as_millis()),
        1000..60_000 => format!("{:.1} s", time.as_secs_f64()),
        _ => span(time),
    }
}

/// `0 B`, `12 kB`, `1.4 GB`.
pub(super) fn bytes(count: u64) -> String {
    let mut value = Duration::from_secs(count).as_secs_f64();
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 999.5 {
            let digits = usize::from(unit != "B" && value < 9.95);
            return format!("{value:.digits$} {unit}");
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// `1 234 567`, with spaces that do not break.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

/// `19:24:11 UTC`, with the date unless it is today's.
pub(super) fn clock(at: Timestamp, now: Timestamp) -> String {
    let day = |at: Timestamp| at.strftime("%Y-%m-%d").to_string();
    if day(at) == day(now) {
        at.strftime("%H:%M:%S UTC").to_string()
    } else {
        at.strftime("%-d %b %Y, %H:%M:%S UTC").to_string()
    }
}

/// The format of `<time datetime>`.
pub(super) fn datetime(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2 min 05 s ago`; `just now` for a time to come.
pub(super) fn ago(at: Timestamp, now: Timestamp) -> String {
    match between(at, now).as_secs() {
        0 => "just now".to_owned(),
        _ => format!("{} ago", span(between(at, now))),
    }
}

/// From one time to a later one; zero if it is not later.
pub(super) fn between(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        let seconds = |seconds| span(Duration::from_secs(seconds));
        assert_eq!(seconds(0), "0 s");
        assert_eq!(seconds(125), "2 min 05 s");
        assert_eq!(seconds(1500), "25 min");
        assert_eq!(seconds(7_500), "2 h 05 min");
        assert_eq!(seconds(270_000), "3 d 3 h");
        assert_eq!(short_span(Duration::from_millis(870)), "870 ms");
        assert_eq!(short_span(Duration::from_millis(3240)), "3.2 s");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1400), "1.4 kB");
        assert_eq!(bytes(12_400_000), "12 MB");
        assert_eq!(bytes(999_600), "1.0 MB");
        assert_eq!(grouped(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(grouped(12), "12");
    }

    #[test]
    fn the_date_is_left_out_on_the_day() {
        let at: Timestamp = "2026-03-01T09:05:07Z".parse().unwrap();
        let later: Timestamp = "2026-03-01T09:07:12Z".parse().unwrap();
        assert_eq!(clock(at, later), "09:05:07 UTC");
        assert_eq!(ago(at, later), "2 min 05 s ago");
        assert_eq!(ago(later, at), "just now");
        let tomorrow: Timestamp = "2026-03-02T00:00:00Z".parse().unwrap();
        assert_eq!(clock(at, tomorrow), "1 Mar 2026, 09:05:07 UTC");
    }
}
