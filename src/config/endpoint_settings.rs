//! Endpoints as configured: `[[endpoint]]` tables and `--endpoint` flags.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    path::PathBuf,
    str::FromStr,
};

use clap::ValueEnum;
use serde::Deserialize;

use super::{
    PinSessions, PoolMode,
    values::{host_addresses, scalar},
};

/// One `[[endpoint]]` table, or one `--endpoint NAME?key=value&...` flag.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointSettings {
    /// `projects/P/branches/B/endpoints/E`, or an instance's name.
    pub name: Option<String>,
    /// Its host, if not looked up.
    pub host: Option<String>,
    /// The addresses to dial, if the host is not to be resolved.
    #[serde(deserialize_with = "host_address")]
    pub host_address: Vec<IpAddr>,
    /// Its port.
    pub port: Option<NonZeroU16>,
    /// The role to log in as.
    pub user: Option<String>,
    /// The default database.
    pub database: Option<String>,
    /// The listener: an address with a port, or a port.
    pub listen: Option<ListenSetting>,
    /// Whether to use the read-only host.
    pub read_only: bool,
    /// How its clients share server connections, if not as the setting of this name has it.
    pub pool_mode: Option<PoolMode>,
    /// Whether they are refused what needs a connection for longer than a transaction, if not as the setting of this name has it.
    pub pin_sessions: Option<PinSessions>,
    /// The source of its credential, if not the workspace.
    pub credential: Option<CredentialSetting>,
}

/// The source of a credential that the workspace does not mint.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum CredentialSetting {
    /// A program that prints JSON: a token and optionally its expiry.
    Command(Vec<String>),
    /// A variable that holds a password.
    PasswordEnv(String),
    /// A file that holds a password; reloaded when it changes.
    PasswordFile(PathBuf),
}

/// `127.0.0.1:5433`, or a port alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenSetting {
    /// The address, if given.
    pub address: Option<IpAddr>,
    /// The port; 0 is any free one.
    pub port: u16,
}

impl FromStr for ListenSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if let Ok(port) = text.parse() {
            return Ok(Self {
                address: None,
                port,
            });
        }
        let socket: SocketAddr = text.parse().map_err(|_| {
            format!(
                "`{text}` is neither a port nor an address with a port, such as `127.0.0.1:5433`"
            )
        })?;
        Ok(Self {
            address: Some(socket.ip()),
            port: socket.port(),
        })
    }
}

impl<'de> Deserialize<'de> for ListenSetting {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer)
    }
}

fn host_address<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<IpAddr>, D::Error> {
    host_addresses(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

impl FromStr for EndpointSettings {
    type Err = String;

    /// The syntax of Cloud SQL Auth Proxy: `port` and `address` are the listener's.
    fn from_str(text: &str) -> Result<Self, String> {
        let (place, query) = text.split_once('?').unwrap_or((text, ""));
        let place = place.trim();
        let mut settings = Self::default();
        // Only hosts contain dots; resource names and instance names do not.
        if place.contains('.') && !place.contains('/') {
            settings.host = Some(place.to_owned());
        } else if !place.is_empty() {
            settings.name = Some(place.to_owned());
        }
        let mut address = None;
        let mut port = None;
        for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let wrong = || format!("`{value}` is no value for `{key}` in --endpoint");
            match &*key {
                "address" => address = Some(value.parse().map_err(|_| wrong())?),
                "port" => port = Some(value.parse().map_err(|_| wrong())?),
                "database" => settings.database = Some(value.into_owned()),
                "host" => settings.host = Some(value.into_owned()),
                "host_address" | "host-address" => {
                    settings.host_address = host_addresses(&value).map_err(|_| wrong())?;
                }
                "read_only" | "read-only" => {
                    settings.read_only = match &*value {
                        // `?read_only` alone is `true`, as is the flag of a boolean setting.
                        "" | "true" | "1" => true,
                        "false" | "0" => false,
                        _ => return Err(wrong()),
                    };
                }
                "pool_mode" | "pool-mode" => {
                    let mode = PoolMode::from_str(&value, true);
                    settings.pool_mode = Some(mode.map_err(|_| wrong())?);
                }
                "pin_sessions" | "pin-sessions" => {
                    let pins = PinSessions::from_str(&value, true);
                    settings.pin_sessions = Some(pins.map_err(|_| wrong())?);
                }
                "user" => settings.user = Some(value.into_owned()),
                _ => {
                    return Err(format!(
                        "`{key}` is no key of --endpoint; there are port, address, database, user, host, host_address, read_only, pool_mode, pin_sessions"
                    ));
                }
            }
        }
        if settings.name.is_none() && settings.host.is_none() {
            return Err("--endpoint needs a name or a host".to_owned());
        }
        settings.listen = match (address, port) {
            (None, None) => None,
            (address, Some(port)) => Some(ListenSetting { address, port }),
            (Some(_), None) => {
                return Err("--endpoint with an address needs a port, too".to_owned());
            }
        };
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flag_reads_as_cloud_sqls_users_write_it() {
        let parsed: EndpointSettings =
            "projects/p/branches/b/endpoints/e?port=5433&database=app%20db&read_only=true"
                .parse()
                .unwrap();
        assert_eq!(
            parsed.name.as_deref(),
            Some("projects/p/branches/b/endpoints/e")
        );
        assert_eq!(
            parsed.listen,
            Some(ListenSetting {
                address: None,
                port: 5433
            })
        );
        assert_eq!(parsed.database.as_deref(), Some("app db"));
        assert!(parsed.read_only);
        let host: EndpointSettings = "ep-x.database.cloud.databricks.com".parse().unwrap();
        assert_eq!(
            host.host.as_deref(),
            Some("ep-x.database.cloud.databricks.com")
        );
        let through: EndpointSettings = "ep-x.database.x?host_address=10.0.0.7,%3A%3A1"
            .parse()
            .unwrap();
        assert_eq!(
            through.host_address,
            ["10.0.0.7", "::1"].map(|address| address.parse::<IpAddr>().unwrap())
        );
        let table: EndpointSettings =
            toml::from_str("host = \"h\"\nhost_address = \"10.0.0.7\"").unwrap();
        assert_eq!(table.host_address.len(), 1);
        for wrong in [
            "",
            "?port=1",
            "x?prot=1",
            "x?port=70000",
            "x?read_only=maybe",
            "x?address=127.0.0.1",
            "x?host_address=db.example.com",
        ] {
            assert!(wrong.parse::<EndpointSettings>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_table_names_where_its_credential_comes_from() {
        let table: EndpointSettings = toml::from_str(
            "host = \"db\"\nlisten = 5433\ncredential = { password_env = \"PGPASSWORD\" }",
        )
        .unwrap();
        assert_eq!(
            table.credential,
            Some(CredentialSetting::PasswordEnv("PGPASSWORD".to_owned()))
        );
        assert_eq!(
            table.listen,
            Some(ListenSetting {
                address: None,
                port: 5433
            })
        );
        let two: Result<EndpointSettings, _> =
            toml::from_str("credential = { password_env = \"A\", password_file = \"b\" }");
        assert!(two.is_err());
        let listen: EndpointSettings = toml::from_str("listen = \"[::1]:7\"").unwrap();
        assert_eq!(
            listen.listen.and_then(|l| l.address),
            Some("::1".parse().unwrap())
        );
    }

    proptest! {
        #[test]
        fn no_flag_makes_it_panic(text in "\\PC*|[a-z./-]{0,9}[?](port|address|database|user|host|read_only|&|=|[0-9a-z%:.]{1,5}){0,9}") {
            if let Ok(settings) = text.parse::<EndpointSettings>() {
                prop_assert!(settings.name.is_some() || settings.host.is_some());
            }
        }

        #[test]
        fn a_flag_is_read_back(database in "[^\\pC]{1,12}", user in "[^\\pC]{1,12}", port: u16) {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            query.append_pair("database", &database).append_pair("user", &user);
            query.append_pair("port", &port.to_string());
            let settings: EndpointSettings = format!("name?{}", query.finish()).parse().unwrap();
            prop_assert_eq!(settings.database, Some(database));
            prop_assert_eq!(settings.user, Some(user));
            prop_assert_eq!(settings.listen.map(|listen| listen.port), Some(port));
        }
    }
}
