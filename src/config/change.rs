//! From the settings in force to others: what can be put in force at once, and what needs a restart.
//!
//! Pure: nothing is bound, looked up or told to anybody here. A setting that is new in [`Config`] does not compile until
//! it has been decided here which it is.

use secrecy::{ExposeSecret, SecretString};

use super::{Config, CredentialSource, EndpointConfig, Keepalive, LogOptions, Timeouts};

/// What is put in force by a reload; anything else needs a restart.
pub(super) const CHANGEABLE: &[&str] = &[
    "admin_console",
    "allow_remote",
    "client_tls",
    "unix_socket_allowed_uids",
    "database_mapping",
    "connect_timeout",
    "server_connect_timeout",
    "credential_timeout",
    "capacity_timeout",
    "client_login_timeout",
    "max_connections",
    "tcp_keepalive_idle",
    "tcp_keepalive_interval",
    "tcp_keepalive_count",
    "tcp_user_timeout",
    "min_sigterm_delay",
    "max_sigterm_delay",
    "exit_when_idle",
    "exit_zero_on_sigterm",
    "log_filter",
    "client_tls_cert",
    "client_tls_key",
    "local_auth",
    "local_password_file",
    "unix_socket_mode",
];

/// The one setting of endpoints that is put in force for those that stay.
const SOCKET_MODE: &str = "unix_socket_mode";

/// The way from one [`Config`] to another.
#[derive(Clone, Debug)]
pub struct Change {
    /// What is in force afterwards: the new settings, but for those that need a restart.
    pub config: Config,
    /// The settings that are put in force.
    pub applied: Vec<&'static str>,
    /// The settings that stay as they are until a restart.
    pub restart: Vec<String>,
    /// Endpoints that there were not.
    pub added: Vec<EndpointConfig>,
    /// Endpoints that are no more.
    pub removed: Vec<EndpointConfig>,
}

impl Change {
    /// Whether nothing is to be done and nothing to be said.
    pub fn is_empty(&self) -> bool {
        self.applied.is_empty()
            && self.restart.is_empty()
            && self.added.is_empty()
            && self.removed.is_empty()
    }
}

impl Config {
    /// Whether clients must know the same.
    pub fn has_same_password(&self, other: &Self) -> bool {
        exposed(self.local_password.as_ref()) == exposed(other.local_password.as_ref())
    }

    /// What has to happen for `new` to be in force.
    pub fn change_to(&self, new: Self) -> Change {
        let Self {
            endpoints,
            database_mapping,
            allow_remote,
            allowed_uids,
            client_tls,
            client_tls_required,
            local_password,
            // Counts by what is in it.
            local_password_file,
            workspace,
            // Follows from the endpoints.
            password_variables,
            timeouts,
            client_login_timeout,
            max_connections,
            keepalive,
            http,
            notes,
            admin,
            lazy_refresh,
            run_connection_test,
            min_sigterm_delay,
            grace,
            exit_when_idle,
            exit_zero_on_sigterm,
            log,
            watch_config,
            admin_console,
            shown,
            // Of the environment, which does not change.
            threads: _,
        } = new;
        let Timeouts {
            connect_timeout,
            server_connect_timeout,
            credential_timeout,
            capacity_timeout,
        } = timeouts;
        let Keepalive {
            idle,
            interval,
            count,
            user_timeout,
        } = keepalive;
        let LogOptions { filter, structured } = log;

        let mut config = self.clone();
        let mut applied = Vec::new();
        let mut restart = Vec::new();
        macro_rules! apply {
            ($($name:literal: $($field:ident).+ = $new:expr;)+) => {
                $(if config.$($field).+ != $new {
                    config.$($field).+ = $new;
                    applied.push($name);
                })+
            };
        }
        macro_rules! keep {
            ($($name:literal: $old:expr, $new:expr;)+) => {
                $(if $old != $new {
                    restart.push($name.to_owned());
                })+
            };
        }
        apply! {
            "admin_console": admin_console = admin_console;
            "allow_remote": allow_remote = allow_remote;
            "client_tls": client_tls = client_tls;
            "unix_socket_allowed_uids": allowed_uids = allowed_uids;
            "database_mapping": database_mapping = database_mapping;
            "connect_timeout": timeouts.connect_timeout = connect_timeout;
            "server_connect_timeout": timeouts.server_connect_timeout = server_connect_timeout;
            "credential_timeout": timeouts.credential_timeout = credential_timeout;
            "capacity_timeout": timeouts.capacity_timeout = capacity_timeout;
            "client_login_timeout": client_login_timeout = client_login_timeout;
            "max_connections": max_connections = max_connections;
            "tcp_keepalive_idle": keepalive.idle = idle;
            "tcp_keepalive_interval": keepalive.interval = interval;
            "tcp_keepalive_count": keepalive.count = count;
            "tcp_user_timeout": keepalive.user_timeout = user_timeout;
            "min_sigterm_delay": min_sigterm_delay = min_sigterm_delay;
            "max_sigterm_delay": grace = grace;
            "exit_when_idle": exit_when_idle = exit_when_idle;
            "exit_zero_on_sigterm": exit_zero_on_sigterm = exit_zero_on_sigterm;
            "log_filter": log.filter = filter;
        }
        keep! {
            "profile": self.workspace.profile, workspace.profile;
            "http_address or http_port": self.http, http;
            "notes": self.notes, notes;
            "quitquitquit or admin_port": self.admin, admin;
            "lazy_refresh": self.lazy_refresh, lazy_refresh;
            "run_connection_test": self.run_connection_test, run_connection_test;
            "structured_logs": self.log.structured, structured;
            "watch_config": self.watch_config, watch_config;
        }

        if config.client_tls_required != client_tls_required {
            config.client_tls_required = client_tls_required;
            if !applied.contains(&"client_tls") {
                applied.push("client_tls");
            }
        }
        config.local_password_file = local_password_file;
        if exposed(self.local_password.as_ref()) != exposed(local_password.as_ref()) {
            config.local_password = local_password;
            applied.push("local_auth");
        }

        for setting in shown.into_iter().filter(|setting| setting.changeable) {
            let old = config.shown.iter_mut().find(|old| old.key == setting.key);
            if let Some(old) = old {
                *old = setting;
            }
        }

        let mut old: Vec<Option<&EndpointConfig>> = self.endpoints.iter().map(Some).collect();
        let mut take = |is_it: &dyn Fn(&EndpointConfig) -> bool| {
            old.iter_mut()
                .find(|old| old.is_some_and(is_it))
                .and_then(Option::take)
        };
        let same: Vec<Option<&EndpointConfig>> = endpoints
            .iter()
            .map(|endpoint| take(&|old| old.is_same(endpoint)))
            .collect();
        let mut added = Vec::new();
        config.endpoints.clear();
        for (endpoint, same) in endpoints.into_iter().zip(same) {
            // One that has moved to where it cannot be bound while the old one is there, which stays.
            let moved = same.is_none() && self.endpoints.iter().any(|old| old.clashes(&endpoint));
            let kept = same.or_else(|| take(&|old| old.clashes(&endpoint)));
            let mut differs = kept.map_or_else(Vec::new, |kept| kept.differs(&endpoint));
            if moved {
                differs.insert(0, "address, port or unix_socket");
            }
            let called = kept.unwrap_or(&endpoint).called();
            if !differs.is_empty() {
                restart.push(format!("{} of endpoint `{called}`", differs.join(", ")));
            }
            if let Some(kept) = kept {
                let mut kept = kept.clone();
                if let (false, Some(ours), Some(theirs)) =
                    (moved, &mut kept.listen.unix, &endpoint.listen.unix)
                    && ours.mode != theirs.mode
                {
                    ours.mode = theirs.mode;
                    if !applied.contains(&SOCKET_MODE) {
                        applied.push(SOCKET_MODE);
                    }
                }
                config.endpoints.push(kept);
            } else if !moved {
                config.endpoints.push(endpoint.clone());
                added.push(endpoint);
            }
        }
        let removed = old.into_iter().flatten().cloned().collect();
        if !added.is_empty() || config.endpoints.len() != self.endpoints.len() {
            config.password_variables = password_variables;
        }
        Change {
            config,
            applied,
            restart,
            added,
            removed,
        }
    }
}

fn exposed(password: Option<&SecretString>) -> Option<&str> {
    password.map(SecretString::expose_secret)
}

impl EndpointConfig {
    /// Whether the clients of one are the clients of the other: they connect at the same place.
    pub fn is_same(&self, other: &Self) -> bool {
        // Any free port is as good as any other, so that only the name tells.
        let is_told_by_name = self.listen.port == 0;
        self.listen.is_same(&other.listen)
            && (!is_told_by_name
                || (self.called() == other.called() && self.read_only == other.read_only))
    }

    /// Whether they are the same in all they say.
    pub fn is_equal(&self, other: &Self) -> bool {
        self.is_same(other) && self.differs(other).is_empty()
    }

    /// Whether they cannot listen side by side.
    fn clashes(&self, other: &Self) -> bool {
        self.listen.conflict(&other.listen).is_some()
    }

    /// The settings that are not the same.
    fn differs(&self, other: &Self) -> Vec<&'static str> {
        let pairs = [
            ("name", self.name == other.name),
            ("host", self.host == other.host),
            ("host_address", self.host_addresses == other.host_addresses),
            ("port", self.port == other.port),
            ("user", self.user == other.user),
            ("database", self.database == other.database),
            ("the app's name", self.app == other.app),
            ("read_only", self.read_only == other.read_only),
            ("TLS", self.tls == other.tls),
            ("credential", self.credential.is_same(&other.credential)),
        ];
        let differs = pairs.into_iter().filter(|(_, is_same)| !is_same);
        differs.map(|(name, _)| name).collect()
    }
}

impl CredentialSource {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Workspace, Self::Workspace) => true,
            (Self::Command(one), Self::Command(other)) => one == other,
            (Self::PasswordFile(one), Self::PasswordFile(other)) => one == other,
            (Self::Password(one), Self::Password(other)) => {
                one.expose_secret() == other.expose_secret()
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Environment;

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
    fn what_is_said_to_be_changeable_is_changed() {
        let (_, code) = include_str!("change.rs").split_once("apply! {\n").unwrap();
        let (code, _) = code.split_once("\n        }").unwrap();
        let names: Vec<&str> = code
            .lines()
            .filter_map(|line| line.split('"').nth(1))
            .collect();
        // Those behind them are of several fields, or are told by another's name.
        assert_eq!(names, CHANGEABLE[..names.len()]);
        assert_eq!(CHANGEABLE.len(), names.len() + 5);
    }

    #[test]
    fn what_is_shown_is_what_is_in_force() {
        let file = |port| format!("connect_timeout = \"{port}s\"\nhttp_port = {port}");
        let change = change(&file(40), &file(50));
        let shown = |key: &str| {
            let setting = change
                .config
                .shown
                .iter()
                .find(|setting| setting.key == key);
            setting.unwrap().value.clone()
        };
        assert_eq!(
            (shown("connect_timeout"), shown("http_port")),
            ("50s".to_owned(), "40".to_owned())
        );
    }

    #[test]
    fn what_is_the_same_changes_nothing() {
        let file = "max_connections = 7\n[[endpoint]]\nhost = \"h\"\nuser = \"u\"\ncredential = { password_env = \"SECRET\" }";
        assert!(change(file, file).is_empty());
        assert!(change("", "port = 5432\nmax_sigterm_delay = \"10s\"").is_empty());
    }

    #[test]
    fn limits_times_and_the_filter_are_put_in_force() {
        let change = change(
            "max_connections = 7",
            "max_connections = 3\nconnect_timeout = 5\nlog_filter = \"debug\"\nexit_when_idle = 60\ntcp_keepalive_idle = 1",
        );
        let expected = [
            "connect_timeout",
            "max_connections",
            "tcp_keepalive_idle",
            "exit_when_idle",
            "log_filter",
        ];
        assert_eq!(change.applied, expected);
        assert!(change.restart.is_empty());
        assert_eq!(change.config.max_connections, 3);
        assert_eq!(
            change.config.timeouts.connect_timeout,
            Duration::from_secs(5)
        );
        assert_eq!(change.config.log.filter, "debug");
    }

    #[test]
    fn what_needs_a_restart_stays_and_is_named_each_time() {
        let old = config("http_port = 1");
        let new = "http_port = 2\nnotes = true\nstructured_logs = true\nquitquitquit = true\nprofile = \"p\"";
        let change = old.change_to(config(new));
        let expected = [
            "profile",
            "http_address or http_port",
            "notes",
            "quitquitquit or admin_port",
            "structured_logs",
        ];
        assert_eq!(change.restart, expected);
        assert!(change.applied.is_empty());
        assert_eq!(change.config.http, old.http);
        assert_eq!(change.config.change_to(config(new)).restart, expected);
    }

    #[test]
    fn endpoints_are_told_by_where_their_clients_connect() {
        let table = |name: &str, listen: u16, rest: &str| {
            format!("[[endpoint]]\nname = \"{name}\"\nlisten = {listen}\n{rest}\n")
        };
        let old = table("a", 1, "") + &table("b", 2, "");
        // The order does not matter, and one goes as another comes.
        let moved = change(&old, &(table("c", 3, "") + &table("a", 1, "")));
        let names = |endpoints: &[EndpointConfig]| -> Vec<String> {
            endpoints
                .iter()
                .map(|endpoint| endpoint.called().to_owned())
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

        // Where any port will do, the name tells.
        let free = change(
            &table("a", 0, ""),
            &(table("a", 0, "") + &table("b", 0, "")),
        );
        assert_eq!(names(&free.added), ["b"]);
        assert!(free.removed.is_empty());
    }

    #[test]
    fn an_endpoint_that_would_be_in_its_own_way_stays_where_it_is() {
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
        // One becomes two: the old one goes on alone.
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
    fn who_may_come_in_and_how_is_put_in_force() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "sesame").unwrap();
        let password = format!("local_password_file = {:?}", file.path());
        for (new, applied) in [
            ("client_tls = \"self-signed\"", &["client_tls"][..]),
            (&password, &["local_auth"]),
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
    fn another_credential_of_a_kept_endpoint_needs_a_restart() {
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
