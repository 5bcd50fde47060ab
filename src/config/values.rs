//! The types of settings, each parsed alike from a flag, a variable and the file.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Postgres' port.
pub(super) const POSTGRES_PORT: u16 = 5432;
/// The address of every listener unless set.
pub(crate) const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// What Lakebase calls the database of a new project.
pub const DEFAULT_DATABASE: &str = "databricks_postgres";

/// A port to listen on, or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSetting {
    /// Do not listen.
    None,
    /// This port; 0 is any free one.
    Port(u16),
}

impl PortSetting {
    /// The socket address with this port; `None` if the port is off.
    pub(crate) fn at(self, address: IpAddr) -> Option<SocketAddr> {
        match self {
            Self::None => None,
            Self::Port(port) => Some(SocketAddr::new(address, port)),
        }
    }
}

impl FromStr for PortSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "none" => Ok(Self::None),
            port => port.parse().map(Self::Port).map_err(|_| {
                format!("`{port}` is neither a port (0 to 65535, 0 = any free one) nor `none`")
            }),
        }
    }
}

impl<'de> Deserialize<'de> for PortSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer)
    }
}

impl Serialize for PortSetting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_str("none"),
            Self::Port(port) => serializer.serialize_u16(*port),
        }
    }
}

/// 100 years: adding it to the time overflows no timer.
const MAX_DURATION: Duration = Duration::from_hours(876_600);

/// A duration: `90s`, `1m 30s`, or a plain number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DurationSetting(pub Duration);

impl DurationSetting {
    /// No time.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// A number of seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl FromStr for DurationSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let wrong = || {
            format!(
                "`{text}` is not a length of time such as `15s`, `1m 30s` or a number of seconds"
            )
        };
        // First, as the parser of durations requires units.
        let duration = if let Ok(seconds) = text.parse::<f64>() {
            // Fails for a negative number, infinity and NaN, all of which `f64` parses.
            Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?
        } else {
            let duration: SignedDuration = text.parse().map_err(|_| wrong())?;
            Duration::try_from(duration).map_err(|_| wrong())?
        };
        if duration > MAX_DURATION {
            return Err(format!("`{text}` is longer than 100 years"));
        }
        Ok(Self(duration))
    }
}

impl<'de> Deserialize<'de> for DurationSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer)
    }
}

/// Parses an IP address; an IPv6 address may be in brackets.
pub(super) fn address(text: &str) -> Result<IpAddr, String> {
    let text = text.trim();
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let address = match bare {
        Some(bare) => bare.parse().map(IpAddr::V6),
        None => text.parse(),
    };
    address.map_err(|_| {
        format!("`{text}` is not an IP address such as `127.0.0.1`, `::1` or `[::1]`; the port is another setting")
    })
}

/// Deserializes an address, or a list of them.
pub(super) fn addresses<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<IpAddr>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a value, or a list of values")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    let texts = match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(texts) => texts,
    };
    let addresses: Result<_, _> = texts.iter().map(|text| address(text)).collect();
    addresses.map(Some).map_err(de::Error::custom)
}

/// Parses IP addresses separated by commas, as in libpq's `hostaddr`.
pub(super) fn host_addresses(text: &str) -> Result<Vec<IpAddr>, String> {
    let address = |text: &str| {
        let text = text.trim();
        text.parse()
            .map_err(|_| format!("`{text}` is not an IP address"))
    };
    text.split(',').map(address).collect()
}

/// File permissions in octal, as for `chmod`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModeSetting(pub u32);

impl FromStr for ModeSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        u32::from_str_radix(text.trim_start_matches("0o"), 8)
            .ok()
            // `from_str_radix` accepts a plus sign.
            .filter(|mode| *mode <= 0o777 && !text.starts_with('+'))
            .map(Self)
            .ok_or_else(|| format!("`{text}` is not a file's permissions in octal, such as `0660`"))
    }
}

impl<'de> Deserialize<'de> for ModeSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A bare 660 would be decimal in TOML.
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// TLS for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ClientTlsSetting {
    /// Off.
    Off,
    /// With the certificate of --client-tls-cert or a self-signed one; mandatory for other machines
    Required,
    /// With a self-signed certificate
    SelfSigned,
}

/// Authentication of TCP clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LocalAuth {
    /// None
    Trust,
    /// SCRAM-SHA-256
    Password,
}

/// The mapping of the database name that a client sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DatabaseMapping {
    /// That database; if it does not exist and is named like the user, as libpq sends by default, the configured one
    #[default]
    Default,
    /// Always that database
    Exact,
}

impl Serialize for ModeSetting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:04o}", self.0))
    }
}

impl Serialize for DurationSetting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}s", self.0.as_secs_f64()))
    }
}

/// An address without a user name and password before the host.
pub(crate) fn without_userinfo(address: &str) -> Cow<'_, str> {
    // From the last `@`, since a password may contain one.
    match address.rsplit_once('@') {
        Some((_, host)) => format!("...@{host}").into(),
        None => address.into(),
    }
}

/// Deserializes a string or a number of the file as the text of a flag.
pub(super) fn scalar<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = String>,
{
    let text = match toml::Value::deserialize(deserializer)? {
        toml::Value::String(text) => text,
        number @ (toml::Value::Integer(_) | toml::Value::Float(_)) => number.to_string(),
        other => {
            let found = de::Unexpected::Other(other.type_str());
            return Err(de::Error::invalid_type(found, &"a string or a number"));
        }
    };
    text.parse().map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, seconds) in [
            ("15s", 15.0),
            ("1m 30s", 90.0),
            ("60", 60.0),
            ("0.5", 0.5),
            ("1h", 3600.0),
        ] {
            assert_eq!(
                text.parse(),
                Ok(DurationSetting(Duration::from_secs_f64(seconds))),
                "{text}"
            );
        }
        for text in ["", "soon", "-1", "-5s", "NaN", "1e400"] {
            assert!(text.parse::<DurationSetting>().is_err(), "{text}");
        }
    }

    /// A longer one, added to the time, caused a panic in each session.
    #[test]
    fn no_duration_is_too_long_to_add_to_the_time() {
        for text in ["1e19", "10000000000", "9223372036854775807s", "876601h"] {
            let error = text.parse::<DurationSetting>().unwrap_err();
            assert!(error.contains("100 years"), "{error}");
        }
        let longest: DurationSetting = "876600h".parse().unwrap();
        assert!(Instant::now().checked_add(longest.0).is_some());
    }

    #[test]
    fn addresses_may_be_in_brackets() {
        for (text, address) in [("127.0.0.1", "127.0.0.1"), ("[::1]", "::1"), ("::", "::")] {
            assert_eq!(super::address(text), Ok(address.parse().unwrap()));
        }
        for text in ["", "localhost", "[127.0.0.1]", "[::1", "127.0.0.1:5432"] {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn modes_are_octal() {
        for (text, mode) in [("0600", 0o600), ("660", 0o660), ("0o666", 0o666)] {
            assert_eq!(text.parse(), Ok(ModeSetting(mode)));
        }
        for text in ["", "0800", "1777", "rw", "+600", "-1"] {
            assert!(text.parse::<ModeSetting>().is_err(), "{text}");
        }
    }

    #[test]
    fn ports_may_be_turned_off() {
        assert_eq!("none".parse(), Ok(PortSetting::None));
        assert_eq!("0".parse(), Ok(PortSetting::Port(0)));
        assert!("65536".parse::<PortSetting>().is_err());
        assert!("".parse::<PortSetting>().is_err());
    }

    #[test]
    fn an_address_keeps_its_host_alone() {
        let given = "postgres://me:p@ss@db.example:5432/x";
        assert_eq!(without_userinfo(given), "...@db.example:5432/x");
        assert_eq!(without_userinfo("db.example"), "db.example");
    }

    proptest! {
        #[test]
        fn no_text_makes_them_panic(text in "\\PC*|[0-9a-z .:+\\[\\]-]{0,12}") {
            if let Ok(duration) = text.parse::<DurationSetting>() {
                prop_assert!(duration.0 <= MAX_DURATION);
            }
            if let Ok(mode) = text.parse::<ModeSetting>() {
                prop_assert!(mode.0 <= 0o777);
            }
            let _ = address(&text);
            let _ = host_addresses(&text);
            let _ = text.parse::<PortSetting>();
        }

        #[test]
        fn seconds_and_addresses_are_read_back(seconds in 0_u32..1_000_000_000, address: IpAddr) {
            let expected = DurationSetting(Duration::from_secs(seconds.into()));
            prop_assert_eq!(seconds.to_string().parse(), Ok(expected));
            prop_assert_eq!(format!("{seconds}s").parse(), Ok(expected));
            prop_assert_eq!(super::address(&address.to_string()), Ok(address));
        }
    }
}
