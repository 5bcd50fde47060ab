//! From the settings of listening to the places where each endpoint's clients connect.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{
    AddressSetting, ConfigError, ListenSetting, ModeSetting, PortSetting, Settings,
    resolve::POSTGRES_PORT,
};
use crate::listener::{Places, UnixPlace};

/// Its owner's alone.
const SOCKET_MODE: u32 = 0o600;
/// Everybody's, where the users are listed: then the kernel's word on who connects decides.
const SHARED_SOCKET_MODE: u32 = 0o666;

/// Gives each endpoint its places, one after another.
pub(super) struct PlaceMaker {
    addresses: Vec<IpAddr>,
    /// Whether there is TCP where an endpoint names no address of its own.
    tcp: bool,
    next_port: u16,
    unix: Option<UnixPlace>,
    allow_remote: bool,
}

impl PlaceMaker {
    pub(super) fn new(settings: &Settings) -> Self {
        let mut unique: Vec<IpAddr> = Vec::new();
        for AddressSetting(address) in settings.address.as_deref().unwrap_or_default() {
            if !unique.contains(address) {
                unique.push(*address);
            }
        }
        // Every address takes in each of its family, which could not be bound beside it.
        let every = |address: &IpAddr| {
            unique
                .iter()
                .any(|it| it.is_unspecified() && it != address && it.is_ipv4() == address.is_ipv4())
        };
        let covered: Vec<IpAddr> = unique.iter().copied().filter(every).collect();
        unique.retain(|address| !covered.contains(address));
        if unique.is_empty() {
            unique.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        let mode = match (
            settings.unix_socket_mode,
            &settings.unix_socket_allowed_uids,
        ) {
            (Some(ModeSetting(mode)), _) => mode,
            (None, Some(_)) => SHARED_SOCKET_MODE,
            (None, None) => SOCKET_MODE,
        };
        Self {
            addresses: unique,
            tcp: settings.port != Some(PortSetting::None),
            next_port: match settings.port {
                Some(PortSetting::Port(port)) => port,
                None | Some(PortSetting::None) => POSTGRES_PORT,
            },
            unix: settings
                .unix_socket
                .clone()
                .map(|directory| UnixPlace { directory, mode }),
            allow_remote: settings.allow_remote.unwrap_or(false),
        }
    }

    /// The next endpoint's. Where there is no TCP a port of its own only numbers its Unix socket.
    pub(super) fn next(&mut self, own: Option<ListenSetting>) -> Result<Places, ConfigError> {
        let port = own.map_or(self.next_port, |own| own.port);
        // Any free port for one is any free port for the next.
        self.next_port = if port == 0 { 0 } else { port.saturating_add(1) };
        let addresses: &[IpAddr] = match &own {
            Some(ListenSetting {
                address: Some(address),
                ..
            }) => std::slice::from_ref(address),
            _ if self.tcp => &self.addresses,
            _ => &[],
        };
        let places = Places {
            port,
            tcp: addresses
                .iter()
                .map(|address| SocketAddr::new(*address, port))
                .collect(),
            unix: self.unix.clone(),
        };
        if places.tcp.is_empty() && places.unix.is_none() {
            return Err(ConfigError::NoListener);
        }
        let remote = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
        match places.tcp.iter().find(remote) {
            Some(address) if !self.allow_remote => Err(ConfigError::Remote {
                address: address.ip(),
            }),
            _ => Ok(places),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maker(settings: &str) -> PlaceMaker {
        PlaceMaker::new(&toml::from_str(settings).unwrap())
    }

    #[test]
    fn every_endpoint_has_every_address_at_a_port_of_its_own() {
        let mut maker = maker(
            "address = [\"127.0.0.1\", \"[::1]\", \"::1\"]\nport = 7000\nunix_socket = \"/run/x\"",
        );
        let mut next = |own: Option<&str>| {
            let own = own.map(|own| own.parse().unwrap());
            maker.next(own).unwrap().to_string()
        };
        assert_eq!(
            next(None),
            "127.0.0.1:7000, [::1]:7000, /run/x/.s.PGSQL.7000"
        );
        assert_eq!(next(Some("[::1]:8000")), "[::1]:8000, /run/x/.s.PGSQL.8000");
        assert_eq!(
            next(None),
            "127.0.0.1:8001, [::1]:8001, /run/x/.s.PGSQL.8001"
        );
    }

    #[test]
    fn every_address_takes_in_the_others_of_its_family() {
        let mut maker = maker(
            "address = [\"127.0.0.1\", \"0.0.0.0\", \"::1\", \"10.0.0.7\"]\nport = 7\nallow_remote = true",
        );
        assert_eq!(maker.next(None).unwrap().to_string(), "0.0.0.0:7, [::1]:7");
    }

    #[test]
    fn without_tcp_there_must_be_a_unix_socket() {
        let lonely = maker("port = \"none\"").next(None);
        assert!(matches!(lonely, Err(ConfigError::NoListener)));
        let mut maker = maker("port = \"none\"\nunix_socket = \"/s\"");
        assert_eq!(maker.next(None).unwrap().to_string(), "/s/.s.PGSQL.5432");
        let own = Some("6000".parse().unwrap());
        assert_eq!(maker.next(own).unwrap().to_string(), "/s/.s.PGSQL.6000");
    }

    #[test]
    fn any_address_that_others_reach_must_be_meant() {
        let file = "address = [\"127.0.0.1\", \"0.0.0.0\"]";
        let refused = maker(file).next(None);
        assert!(
            matches!(refused, Err(ConfigError::Remote { address }) if address.is_unspecified())
        );
        let meant = format!("{file}\nallow_remote = true");
        assert!(maker(&meant).next(None).is_ok());
    }

    #[test]
    fn a_socket_is_its_owners_unless_users_are_listed() {
        let mode = |more: &str| {
            let mut maker = maker(&format!("unix_socket = \"/s\"\n{more}"));
            maker.next(None).unwrap().unix.unwrap().mode
        };
        assert_eq!(mode(""), 0o600);
        assert_eq!(mode("unix_socket_allowed_uids = [1000]"), 0o666);
        assert_eq!(
            mode("unix_socket_allowed_uids = [1000]\nunix_socket_mode = \"0660\""),
            0o660
        );
    }
}
