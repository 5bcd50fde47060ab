//! The settings in force with their origins, and whether they are valid. Secrets are shown as present or absent.

use std::{error::Error, fmt::Display, net::IpAddr};

use url::Url;

use super::{check::Finding, report::Setting};
use crate::{
    config::{
        Attribute, Config, ConfigError, EndpointConfig, Origin, PASSWORD_VARIABLE, Settings,
        ShownSetting, TlsMode, VARIABLE_PREFIX, variable,
    },
    net::tls,
    telemetry::chain,
    workspace::{ResolvedSettings, Workspace},
};

/// The longest value that is shown, in characters.
const MAX_VALUE: usize = 100;

/// How a variable's value may be shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Secret,
    /// An address, without what may be a password in it.
    Url,
}

impl Kind {
    fn of(attribute: Attribute) -> Self {
        match attribute {
            Attribute::Host | Attribute::DiscoveryUrl | Attribute::ActionsIdTokenRequestUrl => {
                Self::Url
            }
            _ if attribute.is_secret() => Self::Secret,
            _ => Self::Plain,
        }
    }
}

/// Variables shown beside those of the workspace's settings. The last column is shown for a variable that is not set; if it
/// is empty, the variable is left out.
const VARIABLES: &[(&str, Kind, &str)] = &[
    ("ENDPOINT_NAME", Kind::Plain, ""),
    ("LAKEBASE_ENDPOINT", Kind::Plain, ""),
    ("PGHOST", Kind::Plain, "looked up"),
    ("PGHOSTADDR", Kind::Plain, ""),
    ("PGPORT", Kind::Plain, "5432"),
    ("PGDATABASE", Kind::Plain, "databricks_postgres"),
    ("PGUSER", Kind::Plain, "the workspace identity"),
    ("PGSSLMODE", Kind::Plain, "verify-full"),
    ("PGSSLROOTCERT", Kind::Plain, "system"),
    ("PGPASSWORD", Kind::Secret, ""),
    ("PGAPPNAME", Kind::Plain, ""),
    ("DATABRICKS_APP_NAME", Kind::Plain, ""),
    ("DATABRICKS_APP_PORT", Kind::Plain, ""),
    ("DATABRICKS_OIDC_TOKEN", Kind::Secret, ""),
    ("HTTPS_PROXY", Kind::Url, ""),
    ("https_proxy", Kind::Url, ""),
    ("ALL_PROXY", Kind::Url, ""),
    ("NO_PROXY", Kind::Plain, ""),
    ("no_proxy", Kind::Plain, ""),
    ("SSL_CERT_FILE", Kind::Plain, ""),
    ("SSL_CERT_DIR", Kind::Plain, ""),
];

/// The attributes of the workspace that are shown although they are absent.
const EXPECTED: [Attribute; 4] = [
    Attribute::Host,
    Attribute::ClientId,
    Attribute::ClientSecret,
    Attribute::Token,
];

/// The settings of the addresses for clients.
const LISTENING: [&str; 4] = ["address", "endpoint", "port", "unix_socket"];

/// The flag of a setting.
fn flag(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// The settings to show.
pub(super) fn list(
    variables: &[(String, String)],
    flags: &Settings,
    config: Option<&Config>,
) -> Vec<Setting> {
    let mut list = Vec::new();
    let mut add = |name: &str, value: String, source: &dyn Display| {
        list.push(Setting {
            name: name.to_owned(),
            value,
            source: source.to_string(),
        });
    };
    // An invalid profile is the first step's finding.
    let resolved = config.and_then(|config| ResolvedSettings::new(config.workspace.clone()).ok());
    let of_profile = resolved.iter().flat_map(|settings| {
        let attributes = Attribute::ALL
            .iter()
            .map(|&it| (it, settings.text(it), settings.origin(it)));
        // Variables are in the list by their own names.
        attributes
            .filter(|(_, value, origin)| value.is_some() && !matches!(origin, Origin::Variable(_)))
    });
    let of_profile: Vec<_> = of_profile.collect();
    let of_workspace = Attribute::ALL.iter().flat_map(|&attribute| {
        let is_shown =
            EXPECTED.contains(&attribute) && of_profile.iter().all(|(it, ..)| *it != attribute);
        let unset = if is_shown { "absent" } else { "" };
        let names = attribute.variables().iter();
        names.map(move |&name| (name, Kind::of(attribute), unset))
    });
    for (name, kind, unset) in VARIABLES.iter().copied().chain(of_workspace) {
        let is_set = |(known, value): &&(String, String)| known == name && !value.trim().is_empty();
        match variables.iter().find(is_set) {
            Some((_, value)) => add(name, shown(kind, value), &"environment"),
            None if unset.is_empty() => {}
            None => add(name, unset.to_owned(), &"not set"),
        }
    }
    for (attribute, value, origin) in &of_profile {
        if let (Some(value), [key, ..]) = (value, attribute.keys()) {
            add(key, shown(Kind::of(*attribute), value), origin);
        }
    }
    let in_force = config.map_or_else(Vec::new, |config| config.settings.shown());
    let given = || in_force.iter().filter(|it| it.origin != Origin::Default);
    for setting in given() {
        let value = shown(Kind::Plain, &setting.value);
        add(&flag(&setting.key), value, &setting.origin);
    }
    let mut own: Vec<_> = variables
        .iter()
        .filter(|(name, value)| name.starts_with(VARIABLE_PREFIX) && !value.is_empty())
        .collect();
    // The environment has no order of its own.
    own.sort_unstable();
    for (name, value) in own {
        let is_it = |setting: &&ShownSetting| name.eq_ignore_ascii_case(&variable(&setting.key));
        let is_password = name == PASSWORD_VARIABLE;
        let kind = if is_password {
            Kind::Secret
        } else {
            Kind::Plain
        };
        let value = shown(kind, value);
        match in_force.iter().find(is_it).filter(|_| !is_password) {
            // In the list already.
            Some(ShownSetting {
                origin: Origin::Variable(_),
                ..
            }) => {}
            Some(ShownSetting { key, origin, .. }) => {
                let source = format!("not in force: {} is from the {origin}", flag(key));
                add(name, value, &source);
            }
            None => add(name, value, &"environment"),
        }
    }
    if let Some(path) = &flags.config_file {
        let path = shown(Kind::Plain, &path.display().to_string());
        add("--config-file", path, &flags.origins.of("config_file"));
    }
    for endpoint in config.iter().flat_map(|config| &config.endpoints) {
        let mut sources: Vec<String> = given()
            .filter(|setting| LISTENING.contains(&setting.key.as_str()))
            .map(|setting| format!("{} from the {}", flag(&setting.key), setting.origin))
            .collect();
        if sources.is_empty() {
            sources.push(Origin::Default.to_string());
        }
        let value = format!("{} for {}", endpoint.listen, display_name(endpoint));
        add("listen", value, &sources.join(", "));
    }
    list
}

/// The endpoint's name for reports.
pub(super) fn display_name(endpoint: &EndpointConfig) -> String {
    shown(Kind::Plain, endpoint.display_name())
}

/// Whether the settings can be used.
pub(super) fn check(
    config: Result<&Config, &ConfigError>,
    workspace: Option<&Result<Workspace, Finding>>,
) -> Finding {
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            return Finding::failed(error.to_string())
                .detail(cause(error))
                .hint(error.hint());
        }
    };
    let workspace = match workspace {
        Some(Err(finding)) => return finding.clone(),
        Some(Ok(workspace)) => format!("{} to {}", workspace.auth_kind().label(), workspace.host()),
        None => "no workspace is needed".to_owned(),
    };
    let unusable = config.endpoints.iter().find_map(unusable);
    unusable.unwrap_or_else(|| Finding::ok(format!("complete; {workspace}")))
}

/// Endpoint settings that cannot work.
fn unusable(endpoint: &EndpointConfig) -> Option<Finding> {
    let TlsMode::Verified(roots) = &endpoint.tls else {
        return None;
    };
    if let Err(error) = tls::verifier(roots) {
        let fix = "set PGSSLROOTCERT to a PEM file of trusted roots, or unset it to use the system's (Debian: apt install ca-certificates)";
        let finding = Finding::failed(error.to_string()).detail(cause(&error));
        return Some(finding.fix(fix));
    }
    let host = endpoint.host.as_deref()?;
    // TLS clients send no SNI for an address (RFC 6066 section 3), and the endpoint refuses logins without it (08006).
    host.parse::<IpAddr>().ok()?;
    let message =
        format!("PGHOST is `{host}`, an address: TLS to the endpoint needs its name (SNI)");
    let fix = "set PGHOST to the endpoint's host name (ep-...database...), or unset it to have it looked up";
    Some(Finding::failed(message).fix(fix))
}

/// The causes of an error.
fn cause(error: &dyn Error) -> Option<String> {
    error.source().map(|source| chain(source).to_string())
}

/// A value without secrets, on one line.
fn shown(kind: Kind, value: &str) -> String {
    let value = value.trim();
    // A token may be in the wrong variable.
    let mut prefixes = ["dapi", "dose", "dkea", "eyJ"].iter();
    let value = match kind {
        _ if prefixes.any(|prefix| value.starts_with(prefix)) => return "present".to_owned(),
        Kind::Secret => return "present".to_owned(),
        Kind::Url => without_secrets(value),
        Kind::Plain => value.to_owned(),
    };
    let mut shown: String = value.chars().take(MAX_VALUE).collect();
    shown = shown.replace(char::is_control, " ");
    if value.chars().count() > MAX_VALUE {
        shown.push_str("...");
    }
    shown
}

/// An address without user, password and query.
pub(super) fn without_secrets(text: &str) -> String {
    // `user:password@host` would parse, with the user for a scheme.
    let Some(mut url) = Url::parse(text).ok().filter(|_| text.contains("://")) else {
        // Without a scheme it is no URL, but may hold a password all the same.
        let text = text.rsplit_once('@').map_or(text, |(_, host)| host);
        return text.split(['?', '#']).next().unwrap_or_default().to_owned();
    };
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Environment;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    #[test]
    fn secrets_are_present_or_absent() {
        let variables = variables(&[
            ("DATABRICKS_CLIENT_SECRET", "hunter2"),
            ("PGPASSWORD", "hunter2"),
            ("HTTPS_PROXY", "http://me:hunter2@proxy:3128/?key=hunter2"),
            (
                "DATABRICKS_HOST",
                "me:hunter2@dbc-1.cloud.databricks.com?o=1",
            ),
            ("DATABRICKS_CLIENT_ID", "dosehunter2"),
            ("UNHEARD_OF", "hunter2"),
        ]);
        let list = list(&variables, &Settings::default(), None);
        let value = |name: &str| {
            list.iter()
                .find(|setting| setting.name == name)
                .map(|setting| setting.value.as_str())
        };
        assert_eq!(value("DATABRICKS_CLIENT_SECRET"), Some("present"));
        assert_eq!(value("DATABRICKS_TOKEN"), Some("absent"));
        assert_eq!(value("PGPASSWORD"), Some("present"));
        assert_eq!(value("HTTPS_PROXY"), Some("http://proxy:3128/"));
        assert_eq!(value("DATABRICKS_HOST"), Some("dbc-1.cloud.databricks.com"));
        assert_eq!(value("DATABRICKS_CLIENT_ID"), Some("present"));
        assert!(!format!("{list:?}").contains("hunter2"));
    }

    #[test]
    fn each_setting_names_its_source() {
        let variables = variables(&[
            ("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e"),
            ("LAKEBASE_PROXY_PORT", "6000"),
            ("LAKEBASE_PROXY_PROT", "6000"),
        ]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "connect_timeout = \"9s\"\nport = 6001").unwrap();
        // As if given as a flag.
        let settings = Settings {
            port: Some("7000".parse().unwrap()),
            config_file: Some(file.path().to_owned()),
            ..Settings::default()
        };
        let environment = Environment::from_variables(variables.clone());
        let config = Config::resolve(settings.clone(), environment).unwrap();
        let list = list(&variables, &settings, Some(&config));
        let source = |name: &str| {
            list.iter()
                .find(|setting| setting.name == name)
                .map(|setting| setting.source.as_str())
        };
        assert_eq!(source("ENDPOINT_NAME"), Some("environment"));
        assert_eq!(source("PGHOST"), Some("not set"));
        assert_eq!(source("--port"), Some("flag"));
        let of_file = format!("file {}", file.path().display());
        assert_eq!(source("--connect-timeout"), Some(of_file.as_str()));
        assert_eq!(
            source("LAKEBASE_PROXY_PORT"),
            Some("not in force: --port is from the flag")
        );
        assert_eq!(source("LAKEBASE_PROXY_PROT"), Some("environment"));
        assert_eq!(source("listen"), Some("--port from the flag"));
    }

    #[test]
    fn an_address_for_a_host_is_refused_before_a_connection() {
        let variables = variables(&[
            ("ENDPOINT_NAME", "projects/p/branches/b/endpoints/e"),
            ("PGHOST", "10.0.0.1"),
        ]);
        let config =
            Config::resolve(Settings::default(), Environment::from_variables(variables)).unwrap();
        let finding = check(Ok(&config), None);
        assert!(finding.message.contains("SNI"), "{finding:?}");
    }
}
