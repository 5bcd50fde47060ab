//! Conflicts between the listeners of this process, which the kernel would report only as an address in use.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{ConfigError, EndpointConfig, listen};

/// Refuses listeners that cannot all be bound. `http` are those of HTTP, each with the flag of its port.
pub(super) fn check(
    endpoints: &[EndpointConfig],
    http: &[(&str, Option<SocketAddr>)],
) -> Result<(), ConfigError> {
    let conflict = |one: &str, other: &str, place: String| {
        ConfigError::new(
            format!("{one} and {other} would both listen on {place}"),
            "set a different port for each (0 = any free one)",
        )
    };
    let mut taken = Vec::new();
    for (index, endpoint) in endpoints.iter().enumerate() {
        let called = format!("the endpoint `{}`", endpoint.display_name());
        for other in endpoints.iter().take(index) {
            if let Some(place) = other.listen.conflict(&endpoint.listen) {
                let other = format!("the endpoint `{}`", other.display_name());
                return Err(conflict(&other, &called, place));
            }
        }
        taken.push((called, endpoint.listen.sockets()));
    }
    for (flag, address) in http {
        let sockets = address.map(dual_stack).unwrap_or_default();
        for (other, theirs) in &taken {
            if let Some(place) = listen::conflict(&sockets, theirs) {
                return Err(conflict(other, flag, place.to_string()));
            }
        }
        taken.push(((*flag).to_owned(), sockets));
    }
    Ok(())
}

/// The addresses that an HTTP listener takes: `::` includes IPv4, so that probes and scrapers of both families reach it.
fn dual_stack(address: SocketAddr) -> Vec<SocketAddr> {
    let all_ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    match address.ip() {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => vec![address, all_ipv4],
        _ => vec![address],
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, ConfigError, Environment};

    fn resolve(file: &str) -> Result<Config, ConfigError> {
        let name = ("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e");
        let variables = [(name.0.to_owned(), name.1.to_owned())];
        let environment = Environment::from_variables(variables);
        Config::resolve(toml::from_str(file).unwrap(), environment)
    }

    #[test]
    fn conflicting_listeners_are_named() {
        let endpoint =
            |listen: &str| format!("[[endpoint]]\nname = \"{listen}\"\nlisten = \"{listen}\"\n");
        let both = |one, other| endpoint(one) + &endpoint(other);
        for (file, words) in [
            (
                both("127.0.0.1:7", "[::1]:7"),
                ["endpoint `127.0.0.1:7`", "endpoint `[::1]:7`"],
            ),
            (
                format!("allow_remote = true\n{}", both("7", "0.0.0.0:7")),
                ["endpoint `7`", "endpoint `0.0.0.0:7`"],
            ),
            (
                "http_port = 5432".to_owned(),
                ["the endpoint `projects/", "--http-port"],
            ),
            (
                "http_port = 8000\nnotes = true".to_owned(),
                ["--http-port", "--notes-port"],
            ),
            (
                "http_address = \"0.0.0.0\"\nhttp_port = 9091\nquitquitquit = true".to_owned(),
                ["--http-port", "--admin-port"],
            ),
            (
                "http_address = \"::\"\nhttp_port = 5432".to_owned(),
                ["the endpoint `projects/", "--http-port"],
            ),
        ] {
            let error = resolve(&file).unwrap_err();
            let message = error.to_string();
            for word in words {
                assert!(message.contains(word), "{word}: {message}");
            }
            assert!(error.hint().is_some());
        }
        for file in [
            both("7", "8"),
            both("127.0.0.1:7", "127.0.0.2:7"),
            "port = 0\nhttp_port = 0\nnotes = true\nnotes_port = 0".to_owned(),
            "http_port = 8000\nnotes_port = 8000".to_owned(),
            "http_address = \"::1\"\nhttp_port = 9091\nquitquitquit = true".to_owned(),
        ] {
            assert!(resolve(&file).is_ok(), "{file}");
        }
    }
}
