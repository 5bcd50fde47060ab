//! Times from services and programs. An expiry is a date or seconds since 1970, as a number or in quotes; headers hold
//! dates (RFC 9110) and waits.
//!
//! A time above the range of [`Timestamp`] becomes [`FAR`].

use std::time::Duration;

use jiff::{SignedDuration, Timestamp, civil::DateTime, fmt::rfc2822, tz::TimeZone};
use serde::{Deserialize, Deserializer};

/// The year 9998, in place of all later times; leaves room for arithmetic, as `Timestamp` ends with the year 9999.
pub(crate) const FAR: Timestamp = Timestamp::constant(253_339_228_800, 0);
/// The longest `Retry-After` that is obeyed; the header allows any number, also one too large to add to the time.
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_hours(24);
/// `Date` has whole seconds and a delay; a smaller difference is not skew.
const SKEW_NOISE: SignedDuration = SignedDuration::from_secs(2);
/// `Timestamp` ends within this year.
const FIRST_YEAR_BEYOND: u64 = 9999;

/// A number; some services quote them, as protobuf's JSON does with 64 bits.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Number {
    Number(f64),
    Text(String),
}

impl Number {
    /// `None` if it is not a number.
    pub(crate) fn value(&self) -> Option<f64> {
        let value = match self {
            Self::Number(number) => *number,
            Self::Text(text) => text.trim().parse().ok()?,
        };
        (!value.is_nan()).then_some(value)
    }

    /// As seconds since 1970.
    pub(crate) fn timestamp(&self) -> Option<Timestamp> {
        from_seconds(self.value()?)
    }
}

/// Seconds since 1970.
pub(crate) fn from_seconds(seconds: f64) -> Option<Timestamp> {
    if seconds.is_nan() || seconds < 0.0 {
        return None;
    }
    let at = SignedDuration::try_from_secs_f64(seconds).ok();
    let at = at.and_then(|since| Timestamp::from_duration(since).ok());
    Some(at.unwrap_or(FAR).min(FAR))
}

/// RFC 3339 with any offset, or without one and then in this zone; or seconds since 1970.
pub(crate) fn from_text(text: &str, zone: &TimeZone) -> Option<Timestamp> {
    let text = text.trim();
    if let Ok(at) = text.parse::<Timestamp>() {
        return Some(at.min(FAR));
    }
    // `Timestamp` ends on 9999-12-30, and refuses these.
    if is_beyond(text) {
        return Some(FAR);
    }
    if let Ok(seconds) = text.parse::<f64>() {
        return from_seconds(seconds);
    }
    let time: DateTime = text.parse().ok()?;
    let zoned = time.to_zoned(zone.clone()).ok()?;
    Some(zoned.timestamp().min(FAR))
}

/// A date whose year is 9999 or later, with any number of digits.
fn is_beyond(text: &str) -> bool {
    // ISO 8601 puts a sign before years of more than four digits.
    let mut parts = text.strip_prefix('+').unwrap_or(text).splitn(3, '-');
    let [Some(year), Some(month), Some(rest)] = [parts.next(), parts.next(), parts.next()] else {
        return false;
    };
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let (day, time) = rest.split_at_checked(2).unwrap_or_default();
    is_digits(year)
        && [month, day]
            .iter()
            .all(|part| part.len() == 2 && is_digits(part))
        && (time.is_empty() || time.starts_with(['T', 't', ' ']))
        && year.parse::<u64>().unwrap_or(u64::MAX) >= FIRST_YEAR_BEYOND
}

/// A time in any of these forms; without an offset, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) Timestamp);

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let at = match Number::deserialize(deserializer)? {
            Number::Number(seconds) => from_seconds(seconds),
            Number::Text(text) => from_text(&text, &TimeZone::UTC),
        };
        at.map(Self)
            .ok_or_else(|| serde::de::Error::custom("not a point in time"))
    }
}

/// RFC 9110's preferred form, which is also an RFC 2822 date.
pub(super) fn http_date(text: &str) -> Option<Timestamp> {
    rfc2822::parse(text).ok().map(|date| date.timestamp())
}

/// Seconds or a date (RFC 9110 section 10.2.3).
pub(super) fn retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    // Databricks sends seconds (`errors/customizer.py` of the SDK for Python).
    if let Ok(seconds) = text.trim().parse() {
        return Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    }
    let wait = http_date(text)?.duration_since(now);
    Some(
        Duration::try_from(wait)
            .unwrap_or_default()
            .min(MAX_RETRY_AFTER),
    )
}

pub(super) fn skew(date: Timestamp, received_at: Timestamp) -> Option<SignedDuration> {
    // The time lies somewhere in that second.
    let skew = date
        .duration_since(received_at)
        .saturating_add(SignedDuration::from_millis(500));
    (skew.abs() > SKEW_NOISE).then_some(skew)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn moment(json: &str) -> Option<Timestamp> {
        serde_json::from_str(json).ok().map(|Moment(at)| at)
    }

    #[test]
    fn every_form_is_parsed() {
        let expected: Timestamp = "2033-05-18T03:33:20Z".parse().unwrap();
        for json in [
            "2000000000",
            "2000000000.0",
            r#""2000000000""#,
            r#"" 2033-05-18T03:33:20Z ""#,
            r#""2033-05-18T05:33:20+02:00""#,
            r#""2033-05-18 03:33:20""#,
        ] {
            assert_eq!(moment(json), Some(expected), "{json}");
        }
        for json in [
            "-1",
            "null",
            "[]",
            r#""soon""#,
            r#""""#,
            r#""NaN""#,
            r#""9999-soon-01""#,
        ] {
            assert_eq!(moment(json), None, "{json}");
        }
    }

    /// `9999-12-31T23:59:59Z` is what services write for "never".
    #[test]
    fn a_time_above_the_range_is_far_away() {
        for json in [
            r#""9999-12-31T23:59:59Z""#,
            r#""9999-12-31T23:59:59.999999999Z""#,
            r#""9999-12-31 23:59:59""#,
            r#""9999-01-01""#,
            r#""10000-01-01T00:00:00Z""#,
            r#""+275760-09-13T00:00:00.000Z""#,
            r#""292278994-08-17T07:12:55.807Z""#,
            r#""99999999999999999999999-01-01T00:00:00Z""#,
            "253402300799",
            "9223372036854775807",
            "1e300",
            r#""1e999""#,
            r#""18446744073709551615""#,
        ] {
            assert_eq!(moment(json), Some(FAR), "{json}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(retry_after(" 7 ", now), Some(Duration::from_secs(7)));
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:50:07 GMT", now),
            Some(Duration::from_secs(30))
        );
        assert_eq!(
            retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now),
            Some(Duration::ZERO)
        );
        assert_eq!(retry_after("soon", now), None);
        assert_eq!(retry_after("-1", now), None);
    }

    /// Added to the time, the longest wait that a header can name ended the caller in a panic.
    #[test]
    fn the_longest_wait_can_be_added_to_the_time() {
        let now = Timestamp::UNIX_EPOCH;
        for text in ["18446744073709551615", "Wed, 29 Dec 9999 23:59:59 GMT"] {
            let wait = retry_after(text, now).unwrap();
            assert!(
                tokio::time::Instant::now().checked_add(wait).is_some(),
                "{text}"
            );
            assert_eq!(wait, MAX_RETRY_AFTER);
        }
    }

    #[test]
    fn a_difference_below_the_resolution_of_date_is_not_skew() {
        assert_eq!(skew(at(100), at(101)), None);
        assert_eq!(skew(at(102), at(101)), None);
        assert_eq!(
            skew(at(400), at(100)),
            Some(SignedDuration::from_millis(300_500))
        );
        assert_eq!(
            skew(at(100), at(400)),
            Some(SignedDuration::from_millis(-299_500))
        );
    }

    proptest! {
        #[test]
        fn nothing_panics(text in ".*", number: f64) {
            let _ = from_text(&text, &TimeZone::UTC);
            let _ = from_seconds(number);
        }

        #[test]
        fn no_header_makes_it_panic(text: String, second in any::<i64>()) {
            let now = Timestamp::from_second(second % 200_000_000_000).unwrap();
            prop_assert!(retry_after(&text, now).is_none_or(|wait| wait <= MAX_RETRY_AFTER));
            if let Some(date) = http_date(&text) {
                let _ = skew(date, now);
            }
        }

        #[test]
        fn seconds_are_read_back(seconds in 0_u64..86_400) {
            let read = retry_after(&seconds.to_string(), Timestamp::UNIX_EPOCH);
            prop_assert_eq!(read, Some(Duration::from_secs(seconds)));
        }
    }
}
