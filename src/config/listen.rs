//! The listen addresses of each endpoint.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
};

use super::{
    ConfigError, LOCALHOST, ListenSetting, ModeSetting, POSTGRES_PORT, PortSetting, Settings,
};

/// The prefix of socket names that libpq looks for; the port follows.
pub(crate) const SOCKET_NAME: &str = ".s.PGSQL.";

/// The addresses that one endpoint listens on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenAddresses {
    /// The port of TCP sockets and in the names of Unix sockets; 0 is any free one.
    pub port: u16,
    /// TCP addresses, each with that port.
    pub tcp: Vec<SocketAddr>,
    /// A Unix socket.
    pub unix: Option<UnixSocket>,
}

impl ListenAddresses {
    /// The TCP addresses that are bound: 127.0.0.1 includes ::1.
    pub(super) fn sockets(&self) -> Vec<SocketAddr> {
        let companion = |address: &SocketAddr| match address.ip() {
            IpAddr::V4(Ipv4Addr::LOCALHOST) => Some((Ipv6Addr::LOCALHOST, address.port()).into()),
            _ => None,
        };
        let companions = self.tcp.iter().filter_map(companion);
        self.tcp.iter().copied().chain(companions).collect()
    }

    /// The first address that both cannot bind; a free port (0) never conflicts.
    pub(crate) fn conflict(&self, other: &Self) -> Option<String> {
        if let Some(address) = conflict(&self.sockets(), &other.sockets()) {
            return Some(address.to_string());
        }
        let (ours, theirs) = self.unix.as_ref().zip(other.unix.as_ref())?;
        let conflicts =
            ours.directory == theirs.directory && self.port == other.port && self.port != 0;
        conflicts.then(|| {
            socket_path(&ours.directory, self.port)
                .display()
                .to_string()
        })
    }

    /// Whether the addresses are the same; the permissions of the socket, which a reload changes, are not compared.
    pub(crate) fn has_same_addresses(&self, other: &Self) -> bool {
        let directory =
            |addresses: &Self| addresses.unix.as_ref().map(|unix| unix.directory.clone());
        self.port == other.port && self.tcp == other.tcp && directory(self) == directory(other)
    }
}

/// The path of the socket with this port in `directory`.
pub(crate) fn socket_path(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!("{SOCKET_NAME}{port}"))
}

/// The first of our sockets that cannot be bound beside all of theirs.
///
/// `::` leaves 0.0.0.0 free: Postgres listeners on IPv6 set IPV6_V6ONLY. A dual-stack listener is in the list with both.
pub(super) fn conflict(ours: &[SocketAddr], theirs: &[SocketAddr]) -> Option<SocketAddr> {
    let overlap = |one: IpAddr, other: IpAddr| {
        let is_wide = one.is_unspecified() || other.is_unspecified();
        one == other || (is_wide && one.is_ipv4() == other.is_ipv4())
    };
    let is_taken = |ours: &SocketAddr| {
        let mut theirs = theirs.iter().filter(|theirs| theirs.port() == ours.port());
        ours.port() != 0 && theirs.any(|theirs| overlap(ours.ip(), theirs.ip()))
    };
    ours.iter().copied().find(is_taken)
}

impl fmt::Display for ListenAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut comma = "";
        for address in &self.tcp {
            write!(f, "{comma}{address}")?;
            comma = ", ";
        }
        if let Some(unix) = &self.unix {
            let path = socket_path(&unix.directory, self.port);
            write!(f, "{comma}{}", path.display())?;
        }
        Ok(())
    }
}

/// A Unix socket to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its directory, which must exist.
    pub directory: PathBuf,
    /// The file's permissions.
    pub mode: u32,
}

/// For the owner only.
const SOCKET_MODE: u32 = 0o600;
/// For all users, if the allowed ones are listed: the kernel reports the user of each client.
const SHARED_SOCKET_MODE: u32 = 0o666;

/// Assigns addresses to endpoints, one after another.
pub(super) struct AddressAssigner {
    addresses: Vec<IpAddr>,
    /// Whether endpoints without an address of their own listen on TCP.
    tcp: bool,
    next_port: u16,
    unix: Option<UnixSocket>,
    allow_remote: bool,
}

impl AddressAssigner {
    pub(super) fn new(settings: &Settings) -> Self {
        let mut unique: Vec<IpAddr> = Vec::new();
        for address in settings.address() {
            if !unique.contains(&address) {
                unique.push(address);
            }
        }
        // An unspecified address includes all of its family, which could not be bound beside it.
        let includes = |wide: &IpAddr, address: &IpAddr| {
            wide.is_unspecified() && wide != address && wide.is_ipv4() == address.is_ipv4()
        };
        let all = unique.clone();
        unique.retain(|address| !all.iter().any(|wide| includes(wide, address)));
        if unique.is_empty() {
            unique.push(LOCALHOST);
        }
        let mode = match settings.unix_socket_mode() {
            Some(ModeSetting(mode)) => mode,
            None if settings.unix_socket_allowed_uids.is_some() => SHARED_SOCKET_MODE,
            None => SOCKET_MODE,
        };
        Self {
            addresses: unique,
            tcp: settings.port() != PortSetting::None,
            next_port: match settings.port() {
                PortSetting::Port(port) => port,
                PortSetting::None => POSTGRES_PORT,
            },
            unix: settings
                .unix_socket()
                .map(|directory| UnixSocket { directory, mode }),
            allow_remote: settings.allow_remote(),
        }
    }

    /// The addresses of the next endpoint. Without TCP, its port only numbers the Unix socket.
    pub(super) fn next(
        &mut self,
        own: Option<ListenSetting>,
    ) -> Result<ListenAddresses, ConfigError> {
        let port = own.map_or(self.next_port, |own| own.port);
        // After any free port (0), the next one is any free port too.
        // At 65535 the next endpoint gets the same port, which `conflict::check` reports.
        self.next_port = if port == 0 { 0 } else { port.saturating_add(1) };
        let addresses: &[IpAddr] = match &own {
            Some(ListenSetting {
                address: Some(address),
                ..
            }) => std::slice::from_ref(address),
            _ if self.tcp => &self.addresses,
            _ => &[],
        };
        if self.unix.is_some() && cfg!(not(unix)) {
            return Err(ConfigError::new(
                "--unix-socket is set, and this system's Postgres clients use no Unix sockets",
                "remove it: they connect to 127.0.0.1",
            ));
        }
        let addresses = ListenAddresses {
            port,
            tcp: addresses
                .iter()
                .map(|address| SocketAddr::new(*address, port))
                .collect(),
            unix: self.unix.clone(),
        };
        if addresses.tcp.is_empty() && addresses.unix.is_none() {
            return Err(ConfigError::new(
                "--port is `none`, and there is no Unix socket",
                "set --port, or a directory for a Unix socket with --unix-socket",
            ));
        }
        let remote = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
        match addresses.tcp.iter().find(remote) {
            Some(address) if !self.allow_remote => Err(ConfigError::new(
                format!(
                    "--address {} can be reached from other machines",
                    address.ip()
                ),
                "every client that reaches it acts as the service principal; if that is intended, add --allow-remote",
            )),
            _ => Ok(addresses),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(port: u16, addresses: &[&str], directory: Option<&str>) -> ListenAddresses {
        let address = |ip: &&str| SocketAddr::new(ip.parse().unwrap(), port);
        ListenAddresses {
            port,
            tcp: addresses.iter().map(address).collect(),
            unix: directory.map(|directory| UnixSocket {
                directory: directory.into(),
                mode: 0o600,
            }),
        }
    }

    #[test]
    fn addresses_that_cannot_be_bound_together_conflict() {
        let conflict = |one: &[&str], other: &[&str]| {
            addresses(7, one, None)
                .conflict(&addresses(7, other, None))
                .is_some()
        };
        for (one, other, expected) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "0.0.0.0", true),
            ("0.0.0.0", "10.0.0.1", true),
            ("127.0.0.1", "::1", true),
            ("::", "::1", true),
            ("::", "0.0.0.0", false),
            ("::", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", false),
            ("10.0.0.1", "::1", false),
        ] {
            assert_eq!(conflict(&[one], &[other]), expected, "{one} {other}");
            assert_eq!(conflict(&[other], &[one]), expected, "{other} {one}");
        }
        assert!(conflict(&["127.0.0.1"], &["192.0.2.1", "127.0.0.1"]));
        let local = addresses(7, &["127.0.0.1"], None);
        assert_eq!(local.conflict(&addresses(8, &["127.0.0.1"], None)), None);
        let any = addresses(0, &["127.0.0.1"], Some("/s"));
        assert_eq!(any.conflict(&any), None, "any free port");
        let unix = addresses(7, &[], Some("/s"));
        let conflict = unix.conflict(&addresses(7, &["127.0.0.2"], Some("/s")));
        assert_eq!(conflict.as_deref(), Some("/s/.s.PGSQL.7"));
        assert_eq!(unix.conflict(&addresses(7, &[], Some("/t"))), None);
    }

    fn maker(settings: &str) -> AddressAssigner {
        AddressAssigner::new(&toml::from_str(settings).unwrap())
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
        let lonely = lonely.unwrap_err().to_string();
        assert!(lonely.contains("there is no Unix socket"), "{lonely}");
        let mut maker = maker("port = \"none\"\nunix_socket = \"/s\"");
        assert_eq!(maker.next(None).unwrap().to_string(), "/s/.s.PGSQL.5432");
        let own = Some("6000".parse().unwrap());
        assert_eq!(maker.next(own).unwrap().to_string(), "/s/.s.PGSQL.6000");
    }

    #[test]
    fn any_address_that_others_reach_must_be_meant() {
        let file = "address = [\"127.0.0.1\", \"0.0.0.0\"]";
        let refused = maker(file).next(None).unwrap_err().to_string();
        assert_eq!(
            refused,
            "--address 0.0.0.0 can be reached from other machines"
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
