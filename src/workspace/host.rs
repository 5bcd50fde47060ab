//! The workspace's address in its normal form.

use std::{fmt, net::IpAddr};

use url::Url;

use super::WorkspaceError;
use crate::config::without_userinfo;

/// Addresses of account consoles, which have no workspace API.
const ACCOUNT_CONSOLES: [&str; 3] = [
    "accounts.cloud.databricks.com",
    "accounts.azuredatabricks.net",
    "accounts.gcp.databricks.com",
];

pub(super) const SET_HOST: &str = "set `DATABRICKS_HOST` to the workspace's address, such as `https://dbc-1234.cloud.databricks.com`, or run `databricks auth login`, or name a profile of ~/.databrickscfg with --profile";

/// The address of a workspace: scheme, host and port, nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    origin: Url,
    is_loopback: bool,
}

impl Host {
    /// Parses an address with or without a scheme, also one copied from a browser. Also returns the workspace id in it
    /// (`?o=`), as in addresses of unified hosts.
    pub fn parse(text: &str) -> Result<(Self, Option<String>), WorkspaceError> {
        let text = text.trim();
        let with_scheme = if text.contains("://") {
            text.to_owned()
        } else {
            format!("https://{text}")
        };
        let invalid = || {
            let shown = without_userinfo(text);
            WorkspaceError::new(format!("`DATABRICKS_HOST` is not an address: `{shown}`"))
                .with_hint(SET_HOST)
        };
        let mut url = Url::parse(&with_scheme).map_err(|source| invalid().with_source(source))?;
        let name = url.host_str().map(str::to_owned).ok_or_else(invalid)?;
        // Messages and logs show the address, so that it must hold no password.
        if !url.username().is_empty() || url.password().is_some() {
            return Err(invalid());
        }
        if ACCOUNT_CONSOLES.contains(&name.as_str()) {
            let message = format!("`{name}` is an account console, not a workspace");
            return Err(WorkspaceError::new(message).with_hint(SET_HOST));
        }
        let is_loopback = is_loopback(&name);
        match url.scheme() {
            "https" => {}
            // Elsewhere the workspace token would cross a network in clear text.
            "http" if is_loopback => {}
            "http" => {
                return Err(WorkspaceError::new(format!(
                    "`DATABRICKS_HOST` must be https: `{text}`"
                ))
                .with_hint("only an address on this machine's loopback may be http"));
            }
            _ => return Err(invalid()),
        }
        let workspace_id = url
            .query_pairs()
            .find(|(key, value)| {
                // The parameters that the SDK for Go reads (`config/config.go`).
                matches!(&**key, "o" | "w" | "workspace_id")
                    && !value.is_empty()
                    && value.bytes().all(|byte| byte.is_ascii_digit())
            })
            .map(|(_, value)| value.into_owned());
        // An address copied from a browser has a path. As in the SDK for Go, only scheme, host and port count.
        url.set_path("/");
        url.set_query(None);
        url.set_fragment(None);
        Ok((
            Self {
                origin: url,
                is_loopback,
            },
            workspace_id,
        ))
    }

    /// The host name.
    pub fn name(&self) -> &str {
        self.origin.host_str().unwrap_or_default()
    }

    /// The address of a path, which must be literal or made of validated names.
    pub(super) fn join(&self, path: &str) -> Url {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(path, query)| (path, Some(query)));
        let mut url = self.origin.clone();
        url.set_path(path);
        url.set_query(query);
        url
    }

    /// Whether it is on this machine, where plain http is allowed and no HTTP proxy is used.
    pub fn is_loopback(&self) -> bool {
        self.is_loopback
    }

    /// Whether secrets for this workspace may be sent to `url`: https, or http when both are on this machine.
    pub(super) fn may_trust(&self, url: &Url) -> bool {
        match url.scheme() {
            "https" => true,
            "http" => self.is_loopback && url.host_str().is_some_and(is_loopback),
            _ => false,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.origin.as_str().trim_end_matches('/'))
    }
}

pub(super) fn is_loopback(host: &str) -> bool {
    // `Url::host_str` keeps the brackets of IPv6 addresses.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn common_forms_of_an_address_are_accepted() {
        for (text, expected) in [
            (
                "dbc-1.cloud.databricks.com",
                "https://dbc-1.cloud.databricks.com",
            ),
            (
                " https://dbc-1.cloud.databricks.com/ \n",
                "https://dbc-1.cloud.databricks.com",
            ),
            (
                "https://dbc-1.cloud.databricks.com:443",
                "https://dbc-1.cloud.databricks.com",
            ),
            (
                "https://DBC-1.cloud.databricks.com/browse/folders?x=1#y",
                "https://dbc-1.cloud.databricks.com",
            ),
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("http://[::1]:8080/", "http://[::1]:8080"),
            ("http://localhost:8080", "http://localhost:8080"),
            ("localhost:8080", "https://localhost:8080"),
        ] {
            assert_eq!(Host::parse(text).unwrap().0.to_string(), expected, "{text}");
        }
    }

    #[test]
    fn an_address_copied_from_a_browser_names_its_workspace() {
        let (host, id) = Host::parse("https://adb-1.11.azuredatabricks.net/?o=4711").unwrap();
        assert_eq!(host.to_string(), "https://adb-1.11.azuredatabricks.net");
        assert_eq!(id.as_deref(), Some("4711"));
        assert_eq!(Host::parse("https://a.example/?o=x'y").unwrap().1, None);
        let (_, id) = Host::parse("https://a.example/?o=&w=4711").unwrap();
        assert_eq!(id.as_deref(), Some("4711"));
    }

    fn refusal(text: &str) -> String {
        Host::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn plain_http_is_for_loopback_alone() {
        for text in [
            "http://dbc-1.cloud.databricks.com",
            "http://localhost.example.com",
            "http://10.0.0.1",
        ] {
            assert!(refusal(text).contains("must be https"), "{text}");
        }
        for text in ["ftp://localhost", "", "https://", "https://a b"] {
            assert!(refusal(text).contains("is not an address"), "{text}");
        }
        assert!(refusal("https://accounts.cloud.databricks.com").contains("account console"));
    }

    #[test]
    fn a_password_in_an_address_is_refused_and_not_repeated() {
        let error = Host::parse("https://me:hunter2@dbc-1.cloud.databricks.com").unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }

    #[test]
    fn secrets_for_a_remote_workspace_are_sent_over_https_only() {
        let remote = Host::parse("dbc-1.cloud.databricks.com").unwrap().0;
        let local = Host::parse("http://localhost:1").unwrap().0;
        let url = |text: &str| Url::parse(text).unwrap();
        assert!(remote.may_trust(&url("https://login.example.com/token")));
        assert!(!remote.may_trust(&url("http://localhost:1/token")));
        assert!(!local.may_trust(&url("http://example.com/token")));
        assert!(local.may_trust(&url("http://127.0.0.1:2/token")));
    }

    proptest! {
        /// A host that is accepted keeps its name, is https unless it is on this machine, and is accepted again.
        #[test]
        fn an_accepted_host_is_accepted_again(text in "(https?://)?[a-zA-Z0-9.:@-]{0,20}(/[a-z?=&0-9#]{0,12})?") {
            if let Ok((host, _)) = Host::parse(&text) {
                let shown = host.join("/").to_string();
                let (again, _) = Host::parse(&shown).unwrap();
                prop_assert_eq!(again.name(), host.name());
                prop_assert!(shown.starts_with("https://") || host.is_loopback());
            }
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = Host::parse(&text);
        }
    }
}
