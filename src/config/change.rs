//! Compares the configuration in force with a new one: what a reload applies, and what needs a restart.

use secrecy::{ExposeSecret, SecretString};

use super::{Config, EndpointConfig, declare::Reload};

const PIN_SESSIONS: &str = "pin_sessions";
const POOL_MODE: &str = "pool_mode";
const SOCKET_MODE: &str = "unix_socket_mode";
/// The keys of an endpoint's listener.
const MOVED: &str = "address, port or unix_socket";

/// The step from one [`Config`] to another.
#[derive(Clone, Debug)]
pub struct Change {
    /// The configuration after the reload: the new settings, except those that need a restart.
    pub config: Config,
    /// The settings that are applied.
    pub applied: Vec<&'static str>,
    /// The settings that keep their value until a restart.
    pub restart: Vec<String>,
    /// New endpoints.
    pub added: Vec<EndpointConfig>,
    /// Endpoints that no longer exist.
    pub removed: Vec<EndpointConfig>,
}

impl Change {
    /// Whether there is nothing to apply and nothing to report.
    pub fn is_empty(&self) -> bool {
        self.applied.is_empty()
            && self.restart.is_empty()
            && self.added.is_empty()
            && self.removed.is_empty()
    }

    fn needs_restart(&mut self, keys: &[&str], endpoint: &str) {
        if !keys.is_empty() {
            let keys = keys.join(", ");
            self.restart
                .push(format!("{keys} of endpoint `{endpoint}`"));
        }
    }

    fn apply(&mut self, key: &'static str) {
        if !self.applied.contains(&key) {
            self.applied.push(key);
        }
    }
}

impl Config {
    /// Whether clients need the same password.
    pub fn has_same_password(&self, other: &Self) -> bool {
        exposed(self.local_password.as_ref()) == exposed(other.local_password.as_ref())
    }

    /// The change from this configuration to `new`.
    pub fn change_to(&self, new: Self) -> Change {
        let restart = self.settings.differing(&new.settings, Reload::Restart);
        let mut change = Change {
            config: self.clone(),
            applied: self.settings.differing(&new.settings, Reload::Live),
            restart: restart.into_iter().map(str::to_owned).collect(),
            added: Vec::new(),
            removed: Vec::new(),
        };
        change.config.settings.take(&new.settings, Reload::Live);
        // The settings may be the same: a file of the password that was rewritten, a default that follows from another key.
        if !self.has_same_password(&new) {
            change.apply("local_auth");
            change.config.local_password = new.local_password;
        }
        if self.client_tls != new.client_tls {
            change.apply("client_tls");
            change.config.client_tls = new.client_tls;
        }
        let restarts = change.restart.len();
        self.change_endpoints(new.endpoints, &mut change);
        // An endpoint that keeps its old addresses keeps the settings from which they follow, so that SHOW CONFIG stays true.
        if change.restart.len() == restarts {
            change.config.settings.take(&new.settings, Reload::Endpoint);
        }
        if !change.added.is_empty() || change.config.endpoints.len() != self.endpoints.len() {
            change.config.password_variables = new.password_variables;
        }
        change
    }

    fn change_endpoints(&self, new: Vec<EndpointConfig>, change: &mut Change) {
        let mut old: Vec<Option<&EndpointConfig>> = self.endpoints.iter().map(Some).collect();
        let mut take = |is_match: &dyn Fn(&EndpointConfig) -> bool| {
            old.iter_mut()
                .find(|old| old.is_some_and(is_match))
                .and_then(Option::take)
        };
        // Endpoints at the same addresses are matched first, so that a conflicting one cannot claim them.
        let same: Vec<_> = new
            .iter()
            .map(|endpoint| take(&|old| old.has_same_listener(endpoint)))
            .collect();
        change.config.endpoints.clear();
        for (endpoint, same) in new.into_iter().zip(same) {
            // Its new addresses cannot be bound while the old listener, which stays, is open.
            let moved = same.is_none() && self.endpoints.iter().any(|old| old.conflicts(&endpoint));
            let Some(kept) = same.or_else(|| take(&|old| old.conflicts(&endpoint))) else {
                if moved {
                    change.needs_restart(&[MOVED], endpoint.display_name());
                } else {
                    change.config.endpoints.push(endpoint.clone());
                    change.added.push(endpoint);
                }
                continue;
            };
            let mut differences = kept.differences(&endpoint);
            if moved {
                differences.insert(0, MOVED);
            }
            change.needs_restart(&differences, kept.display_name());
            let mut kept = kept.clone();
            // A socket that stays takes a new mode; a moved one exists after the restart only.
            if let (false, Some(ours), Some(theirs)) =
                (moved, &mut kept.listen.unix, &endpoint.listen.unix)
                && ours.mode != theirs.mode
            {
                ours.mode = theirs.mode;
                change.apply(SOCKET_MODE);
            }
            if kept.pool_mode != endpoint.pool_mode {
                kept.pool_mode = endpoint.pool_mode;
                change.apply(POOL_MODE);
            }
            if kept.pin_sessions != endpoint.pin_sessions {
                kept.pin_sessions = endpoint.pin_sessions;
                change.apply(PIN_SESSIONS);
            }
            change.config.endpoints.push(kept);
        }
        change.removed = old.into_iter().flatten().cloned().collect();
    }
}

fn exposed(password: Option<&SecretString>) -> Option<&str> {
    // `SecretString` implements no comparison. Both passwords are ours, so that its time reveals nothing.
    password.map(SecretString::expose_secret)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DurationSetting, EndpointSettings, Environment, PinSessions, PoolMode};

    const NAME: &str = "projects/p/branches/b/endpoints/e";

    fn config(file: &str) -> Config {
        let variables = [("ENDPOINT_NAME", NAME), ("SECRET", "s"), ("OTHER", "o")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let environment = Environment::from_variables(variables);
        Config::resolve(toml::from_str(file).unwrap(), environment).unwrap()
    }

    fn change(old: &str, new: &str) -> Change {
        config(old).change_to(config(new))
    }

    #[test]
    fn the_shown_settings_are_those_in_force() {
        let file = |port| format!("connect_timeout = \"{port}s\"\nhttp_port = {port}");
        let shown = change(&file(40), &file(50)).config.settings.shown();
        let value = |key: &str| {
            let setting = shown.iter().find(|setting| setting.key == key);
            setting.unwrap().value.clone()
        };
        let values = (value("connect_timeout"), value("http_port"));
        assert_eq!(values, ("50s".to_owned(), "40".to_owned()));
    }

    #[test]
    fn equal_settings_change_nothing() {
        let file = "max_connections = 7\n[[endpoint]]\nhost = \"h\"\nuser = \"u\"\ncredential = { password_env = \"SECRET\" }";
        assert!(change(file, file).is_empty());
        assert!(change("", "port = 5432\nmax_sigterm_delay = \"10s\"").is_empty());
    }

    #[test]
    fn live_settings_are_applied() {
        let change = change(
            "max_connections = 7",
            "max_connections = 3\nconnect_timeout = 5\nlog_filter = \"debug\"\nexit_when_idle = 60\ntcp_keepalive_idle = 1",
        );
        let expected = [
            "max_connections",
            "connect_timeout",
            "tcp_keepalive_idle",
            "exit_when_idle",
            "log_filter",
        ];
        assert_eq!(change.applied, expected);
        assert!(change.restart.is_empty());
        assert_eq!(change.config.settings.max_connections(), 3);
        assert_eq!(
            change.config.settings.connect_timeout(),
            DurationSetting::from_secs(5)
        );
        assert_eq!(change.config.settings.log_filter(), "debug");
    }

    #[test]
    fn settings_that_need_a_restart_keep_their_value_and_are_named_each_time() {
        let old = config("http_port = 1");
        let new = "http_port = 2\nnotes = true\nstructured_logs = true\nquitquitquit = true\nprofile = \"p\"";
        let change = old.change_to(config(new));
        let expected = [
            "profile",
            "http_port",
            "notes",
            "quitquitquit",
            "structured_logs",
        ];
        assert_eq!(change.restart, expected);
        assert!(change.applied.is_empty());
        assert_eq!(change.config.http, old.http);
        assert_eq!(change.config.change_to(config(new)).restart, expected);
    }

    #[test]
    fn how_an_endpoint_pools_is_applied() {
        let of = |own: &str| {
            let table = "host = \"h\"\nname = \"projects/p/branches/b/endpoints/e\"\nlisten = 5433";
            format!("pin_sessions = \"refuse\"\n[[endpoint]]\n{table}\n{own}")
        };
        let own = "pool_mode = \"transaction\"\npin_sessions = \"pin\"";
        let change = change(&of(""), &of(own));
        assert_eq!(change.applied, ["pool_mode", "pin_sessions"]);
        let endpoint = &change.config.endpoints[0];
        let pool = endpoint.pool(&change.config.settings);
        assert_eq!(
            (endpoint.pool_mode, pool.pin_sessions),
            (PoolMode::Transaction, PinSessions::Pin)
        );
        let before = config(&of(""));
        let pool = before.endpoints[0].pool(&before.settings);
        assert_eq!(pool.pin_sessions, PinSessions::Refuse);
        let flag: EndpointSettings = "e?pin-sessions=refuse".parse().unwrap();
        assert_eq!(flag.pin_sessions, Some(PinSessions::Refuse));
    }

    #[test]
    fn endpoints_are_matched_by_their_addresses() {
        let table = |name: &str, listen: u16, rest: &str| {
            format!("[[endpoint]]\nname = \"{name}\"\nlisten = {listen}\n{rest}\n")
        };
        let old = table("a", 1, "") + &table("b", 2, "");
        // The order does not matter; one is removed and another added.
        let moved = change(&old, &(table("c", 3, "") + &table("a", 1, "")));
        let names = |endpoints: &[EndpointConfig]| -> Vec<String> {
            endpoints
                .iter()
                .map(|endpoint| endpoint.display_name().to_owned())
                .collect()
        };
        assert_eq!(names(&moved.added), ["c"]);
        assert_eq!(names(&moved.removed), ["b"]);
        assert_eq!(names(&moved.config.endpoints), ["c", "a"]);
        assert!(moved.restart.is_empty() && moved.applied.is_empty());

        let other = change(
            &old,
            &(table("a", 1, "database = \"d\"\nuser = \"u\"") + &table("z", 2, "")),
        );
        assert_eq!(
            other.restart,
            ["user, database of endpoint `a`", "name of endpoint `b`"]
        );
        assert!(other.added.is_empty() && other.removed.is_empty());
        assert_eq!(names(&other.config.endpoints), ["a", "b"]);

        // With any free port, the name matches.
        let free = change(
            &table("a", 0, ""),
            &(table("a", 0, "") + &table("b", 0, "")),
        );
        assert_eq!(names(&free.added), ["b"]);
        assert!(free.removed.is_empty());
    }

    #[test]
    fn an_endpoint_whose_new_address_conflicts_with_its_old_one_stays() {
        let listen = |listen: &str| {
            format!("allow_remote = true\n[[endpoint]]\nname = \"a\"\nlisten = \"{listen}\"\n")
        };
        for (old, new) in [
            ("127.0.0.1:7", "0.0.0.0:7"),
            ("0.0.0.0:7", "127.0.0.1:7"),
            ("127.0.0.1:7", "[::1]:7"),
        ] {
            let change = change(&listen(old), &listen(new));
            assert_eq!(
                change.restart,
                ["address, port or unix_socket of endpoint `a`"]
            );
            assert!(change.added.is_empty() && change.removed.is_empty());
            assert_eq!(change.config.endpoints[0].listen.to_string(), old);
        }
        // One becomes two: the old one stays alone.
        let both = listen("127.0.0.1:7") + "[[endpoint]]\nname = \"b\"\nlisten = \"127.0.0.2:7\"\n";
        let split = change(&listen("0.0.0.0:7"), &both);
        assert_eq!(split.restart.len(), 2);
        assert_eq!(split.config.endpoints.len(), 1);
        assert!(split.added.is_empty() && split.removed.is_empty());

        let socket = change("", "unix_socket = \"/s\"");
        assert_eq!(
            socket.restart,
            [format!("address, port or unix_socket of endpoint `{NAME}`")]
        );
        let free = change(&listen("127.0.0.1:7"), &listen("127.0.0.1:8"));
        assert_eq!((free.added.len(), free.removed.len()), (1, 1));
    }

    #[test]
    fn client_access_is_applied() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "sesame").unwrap();
        let password = format!("local_password_file = {:?}", file.path());
        for (new, applied) in [
            ("client_tls = \"off\"", &["client_tls"][..]),
            (&password, &["local_password_file", "local_auth"]),
            (
                "unix_socket_allowed_uids = [7]",
                &["unix_socket_allowed_uids", "unix_socket_mode"],
            ),
            ("unix_socket_mode = \"0660\"", &["unix_socket_mode"]),
        ] {
            let socket = "unix_socket = \"/s\"\n";
            let change = change(socket, &format!("{socket}{new}"));
            assert_eq!(change.applied, applied, "{new}");
            assert!(change.restart.is_empty() && change.added.is_empty());
        }
    }

    #[test]
    fn a_new_credential_of_an_endpoint_needs_a_restart() {
        let table = |credential: &str| {
            format!("[[endpoint]]\nhost = \"h\"\nuser = \"u\"\ncredential = {{ {credential} }}")
        };
        for other in [
            "password_env = \"OTHER\"",
            "password_file = \"f\"",
            "command = [\"c\"]",
        ] {
            let change = change(&table("password_env = \"SECRET\""), &table(other));
            assert_eq!(change.restart, ["credential of endpoint `h`"], "{other}");
        }
    }
}
