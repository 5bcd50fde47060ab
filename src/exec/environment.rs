//! The environment of the child: that of the proxy, with the proxy as database server.

use std::ffi::{OsStr, OsString};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, PercentEncode, utf8_percent_encode};
use secrecy::{ExposeSecret, SecretString};

use crate::listener::ClientAddress;

/// Variables that would lead a client elsewhere, or require what a local connection does not have.
const REMOVED: [&str; 16] = [
    // The service manager may take the program's notifications for the proxy's.
    "NOTIFY_SOCKET",
    "PGCHANNELBINDING",
    "PGGSSENCMODE",
    "PGHOSTADDR",
    "PGPASSFILE",
    "PGPASSWORD",
    "PGREQUIREAUTH",
    "PGREQUIREPEER",
    "PGREQUIRESSL",
    "PGSERVICE",
    "PGSERVICEFILE",
    "PGSSLCERT",
    "PGSSLCRL",
    "PGSSLKEY",
    "PGSSLNEGOTIATION",
    "PGSSLROOTCERT",
];

/// The service manager's sockets and the proxy's own settings.
const REMOVED_PREFIXES: [&str; 2] = ["LISTEN_", "LAKEBASE_PROXY_"];

/// Shorter secrets are matched by name only, as other values may contain them by chance.
const MIN_SECRET_LEN: usize = 8;

const DATABASE_URL: &str = "DATABASE_URL";

/// All but the unreserved characters of RFC 3986, which are valid in every part of a URL.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// The proxy's listener for clients on this machine.
#[derive(Clone, Debug)]
pub struct ProxyAddress {
    /// Its address.
    pub address: ClientAddress,
    /// The local password, if there is one.
    pub password: Option<SecretString>,
    /// The role at the endpoint.
    pub user: String,
    /// The default database.
    pub database: String,
}

/// The child's variables, without `secrets` and all that contain the value of one: copies, and URLs around it.
pub(super) fn variables(
    inherited: impl IntoIterator<Item = (OsString, OsString)>,
    proxy: &ProxyAddress,
    secrets: &[String],
) -> Vec<(OsString, OsString)> {
    let ours = [
        ("PGHOST", proxy.address.host()),
        ("PGPORT", proxy.address.port().to_string()),
        ("PGSSLMODE", "disable".to_owned()),
        ("PGUSER", proxy.user.clone()),
        ("PGDATABASE", proxy.database.clone()),
    ];
    let replaced = |name: &OsStr| ours.iter().any(|(ours, _)| name == *ours);
    let is_secret = |name: &OsStr| secrets.iter().any(|secret| name == secret.as_str());
    let inherited: Vec<(OsString, OsString)> = inherited.into_iter().collect();
    let values = inherited.iter().filter(|(name, _)| is_secret(name));
    let values = values.map(|(_, value)| value.as_encoded_bytes().trim_ascii());
    let values: Vec<_> = values
        .filter(|value| value.len() >= MIN_SECRET_LEN)
        .collect();
    let mut variables: Vec<(OsString, OsString)> = inherited
        .iter()
        .filter(|(name, value)| {
            // An empty variable counts as unset.
            let no_url = name == DATABASE_URL && value.is_empty();
            !replaced(name)
                && !no_url
                && !is_removed(name)
                && !is_secret(name)
                && !values.iter().any(|secret| contains(value, secret))
        })
        .cloned()
        .collect();
    let has_url = variables.iter().any(|(name, _)| name == DATABASE_URL);
    variables.extend(
        ours.into_iter()
            .map(|(name, value)| (name.into(), value.into())),
    );
    if let Some(password) = &proxy.password {
        variables.push(("PGPASSWORD".into(), password.expose_secret().into()));
    }
    if !has_url {
        variables.push((DATABASE_URL.into(), url(proxy).into()));
    }
    variables
}

fn is_removed(name: &OsStr) -> bool {
    REMOVED.iter().any(|removed| name == *removed)
        || REMOVED_PREFIXES
            .iter()
            .any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
}

fn contains(value: &OsStr, secret: &[u8]) -> bool {
    value
        .as_encoded_bytes()
        .windows(secret.len())
        .any(|part| part == secret)
}

fn url(proxy: &ProxyAddress) -> String {
    let mut user = percent_encoded(&proxy.user).to_string();
    if let Some(password) = &proxy.password {
        user.push(':');
        user.extend(percent_encoded(password.expose_secret()));
    }
    let database = percent_encoded(&proxy.database);
    match &proxy.address {
        // SocketAddr writes IPv6 addresses in brackets, as URLs need.
        ClientAddress::Tcp(address) => {
            format!("postgresql://{user}@{address}/{database}?sslmode=disable")
        }
        ClientAddress::Unix { port, .. } => {
            let host = proxy.address.host();
            let host = percent_encoded(&host);
            format!("postgresql://{user}@/{database}?host={host}&port={port}&sslmode=disable")
        }
    }
}

fn percent_encoded(text: &str) -> PercentEncode<'_> {
    utf8_percent_encode(text, RESERVED)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn child(inherited: &[(&str, &str)], secrets: &[String]) -> BTreeMap<String, String> {
        let proxy = ProxyAddress {
            address: ClientAddress::Tcp("127.0.0.1:6000".parse().unwrap()),
            password: None,
            user: "me@example.com".to_owned(),
            database: "a/b ü".to_owned(),
        };
        let inherited = inherited
            .iter()
            .map(|&(name, value)| (name.into(), value.into()));
        let variables = variables(inherited, &proxy, secrets);
        let count = variables.len();
        let text = |text: OsString| text.into_string().unwrap();
        let variables: BTreeMap<_, _> = variables
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect();
        assert_eq!(variables.len(), count, "each once");
        variables
    }

    #[test]
    fn the_child_connects_to_the_proxy() {
        let inherited = [
            ("PGHOST", "ep.database.cloud.databricks.com"),
            ("PGSSLMODE", "require"),
            ("HOME", "/h"),
        ];
        let child = child(&inherited, &[]);
        let expected = [
            (
                "DATABASE_URL",
                "postgresql://me%40example.com@127.0.0.1:6000/a%2Fb%20%C3%BC?sslmode=disable",
            ),
            ("HOME", "/h"),
            ("PGDATABASE", "a/b ü"),
            ("PGHOST", "127.0.0.1"),
            ("PGPORT", "6000"),
            ("PGSSLMODE", "disable"),
            ("PGUSER", "me@example.com"),
        ];
        assert_eq!(
            child.into_iter().collect::<Vec<_>>(),
            expected.map(|(n, v)| (n.to_owned(), v.to_owned()))
        );
    }

    #[test]
    fn the_child_gets_the_local_password() {
        let proxy = ProxyAddress {
            address: ClientAddress::Tcp("127.0.0.1:6000".parse().unwrap()),
            password: Some("p@ss".into()),
            user: "me".to_owned(),
            database: "d".to_owned(),
        };
        let theirs = [("PGPASSWORD".into(), "another".into())];
        let variables = variables(theirs, &proxy, &[]);
        let passwords = variables.iter().filter(|(name, _)| name == "PGPASSWORD");
        assert_eq!(
            passwords.map(|(_, value)| value).collect::<Vec<_>>(),
            ["p@ss"]
        );
        let url = "postgresql://me:p%40ss@127.0.0.1:6000/d?sslmode=disable";
        assert!(variables.contains(&("DATABASE_URL".into(), url.into())));
    }

    #[test]
    fn a_unix_socket_is_given_as_its_directory() {
        let proxy = ProxyAddress {
            address: ClientAddress::Unix {
                directory: "/run/my app".into(),
                port: 5432,
            },
            password: None,
            user: "me".to_owned(),
            database: "d".to_owned(),
        };
        let variables = variables([], &proxy, &[]);
        let has = |name: &str, value: &str| variables.contains(&(name.into(), value.into()));
        assert!(has("PGHOST", "/run/my app") && has("PGPORT", "5432"));
        assert!(has(
            "DATABASE_URL",
            "postgresql://me@/d?host=%2Frun%2Fmy%20app&port=5432&sslmode=disable"
        ));
    }

    #[test]
    fn variables_that_lead_elsewhere_are_removed() {
        let names = [
            "PGPASSWORD",
            "PGPASSFILE",
            "PGHOSTADDR",
            "PGSERVICE",
            "PGSERVICEFILE",
            "PGSSLROOTCERT",
            "PGSSLCERT",
            "PGSSLKEY",
            "PGSSLCRL",
            "PGSSLNEGOTIATION",
            "PGREQUIRESSL",
            "PGREQUIREAUTH",
            "PGREQUIREPEER",
            "PGCHANNELBINDING",
            "PGGSSENCMODE",
            "NOTIFY_SOCKET",
            "LISTEN_FDS",
            "LISTEN_PID",
            "LISTEN_FDNAMES",
            "LAKEBASE_PROXY_PORT",
        ];
        let kept = [
            "PGAPPNAME",
            "PGOPTIONS",
            "LISTENER",
            "LAKEBASE_ENDPOINT",
            "DATABRICKS_TOKEN",
        ];
        let inherited: Vec<_> = names
            .into_iter()
            .chain(kept)
            .map(|name| (name, "x"))
            .collect();
        let child = child(&inherited, &[]);
        for name in names {
            assert!(!child.contains_key(name), "{name}");
        }
        for name in kept {
            assert!(child.contains_key(name), "{name}");
        }
    }

    #[test]
    fn a_database_url_is_kept_unless_empty() {
        let own = child(&[("DATABASE_URL", "sqlite://x")], &[]);
        assert_eq!(own["DATABASE_URL"], "sqlite://x");
        let empty = child(&[("DATABASE_URL", "")], &[]);
        assert!(empty["DATABASE_URL"].starts_with("postgresql://"));
    }

    #[test]
    fn secrets_are_stripped_on_request() {
        let inherited = [
            ("MY_PASSWORD", "s"),
            ("MY_OIDC", "a-long-secret"),
            ("COPY", "a-long-secret"),
            ("INSIDE", "amqp://me:a-long-secret@host"),
            ("DATABRICKS_HOST", "h"),
            ("LETTER", "s"),
        ];
        let names = ["MY_PASSWORD", "MY_OIDC"].map(str::to_owned).to_vec();
        let stripped = child(&inherited, &names);
        for name in ["MY_PASSWORD", "MY_OIDC", "COPY", "INSIDE"] {
            assert!(!stripped.contains_key(name), "{name}");
        }
        // Too short to be matched by value.
        assert!(stripped.contains_key("DATABRICKS_HOST") && stripped.contains_key("LETTER"));
        assert!(child(&inherited, &[]).contains_key("MY_OIDC"));
    }
}
