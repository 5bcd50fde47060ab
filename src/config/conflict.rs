//! Conflicts between the listeners of this process, which the kernel would report only as an address in use.

use std::net::SocketAddr;

use super::{ConfigError, EndpointConfig, addresses_conflict};

/// Refuses listeners that cannot all be bound. `others` are those of no endpoint, each with the flag of its port.
pub(super) fn check(
    endpoints: &[EndpointConfig],
    others: &[(&str, Option<SocketAddr>)],
) -> Result<(), ConfigError> {
    let conflict = |one: &str, other: &str, place: String| {
        ConfigError::new(
            format!("{one} and {other} would both listen on {place}"),
            "set a different port for each (0 = any free one)",
        )
    };
    for (index, endpoint) in endpoints.iter().enumerate() {
        let called = format!("the endpoint `{}`", endpoint.called());
        for other in endpoints.iter().skip(index.saturating_add(1)) {
            if let Some(place) = endpoint.listen.conflict(&other.listen) {
                let other = format!("the endpoint `{}`", other.called());
                return Err(conflict(&called, &other, place));
            }
        }
        for (flag, address) in others {
            let conflicts = |address: &SocketAddr| {
                let mut tcp = endpoint.listen.tcp.iter();
                tcp.any(|ours| addresses_conflict(*ours, *address))
            };
            if let Some(address) = address.filter(conflicts) {
                return Err(conflict(&called, flag, address.to_string()));
            }
        }
    }
    for (index, (flag, address)) in others.iter().enumerate() {
        for (other, theirs) in others.iter().skip(index.saturating_add(1)) {
            if let Some((ours, theirs)) = address.zip(*theirs)
                && addresses_conflict(ours, theirs)
            {
                return Err(conflict(flag, other, ours.to_string()));
            }
        }
    }
    Ok(())
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
        ] {
            assert!(resolve(&file).is_ok(), "{file}");
        }
    }
}
