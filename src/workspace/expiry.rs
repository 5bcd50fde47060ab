//! Times of expiry from services and programs: a date or seconds since 1970, as a number or in quotes.
//!
//! A time above the range of [`Timestamp`] becomes [`FAR`].

use jiff::{SignedDuration, Timestamp, civil::DateTime, tz::TimeZone};
use serde::{Deserialize, Deserializer};

/// The year 9998, in place of all later times; leaves room for arithmetic, as `Timestamp` ends with the year 9999.
pub(crate) const FAR: Timestamp = Timestamp::constant(253_339_228_800, 0);
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        #[test]
        fn nothing_panics(text in ".*", number: f64) {
            let _ = from_text(&text, &TimeZone::UTC);
            let _ = from_seconds(number);
        }
    }
}
