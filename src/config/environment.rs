//! The variables of the tutorial, libpq, the Databricks SDKs and Databricks Apps.

use std::{ffi::OsString, time::Duration};

use secrecy::SecretString;

use super::{ConfigError, Variables, WorkspaceSettings, client_access::PASSWORD_VARIABLE};

/// The variables whose value must be valid UTF-8, besides those of flags: names and prefixes of names.
const READ: [&str; 10] = [
    "ENDPOINT_NAME",
    "LAKEBASE_ENDPOINT",
    "PGHOST",
    "PGHOSTADDR",
    "PGPORT",
    "PGDATABASE",
    "PGUSER",
    "PGSSLMODE",
    "PGSSLROOTCERT",
    PASSWORD_VARIABLE,
];
const READ_FAMILIES: [&str; 3] = ["DATABRICKS_", "ARM_", "ACTIONS_ID_TOKEN_"];

/// The environment, read once. An empty or blank variable counts as unset.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `DATABRICKS_HOST`, the variables that authenticate to it, and all others.
    pub workspace: WorkspaceSettings,
    /// `NOTIFY_SOCKET` and `WATCHDOG_*`, as set by systemd.
    pub service_manager: ServiceManager,
}

/// The service manager that has started this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceManager {
    /// `NOTIFY_SOCKET`: a path, or an abstract name behind an `@`.
    pub socket: Option<OsString>,
    /// `WATCHDOG_USEC`: the process is restarted after this time without a notification. `None` if `WATCHDOG_PID` names another process.
    pub watchdog: Option<Duration>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        Self::from_variables(Self::variables_of_process())
    }

    /// The variables of this process that are valid UTF-8.
    pub fn variables_of_process() -> Vec<(String, String)> {
        let text = |(name, value): (OsString, OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        // Variables of other programs may hold any bytes; `check_process` refuses ours.
        Self::inherited().into_iter().filter_map(text).collect()
    }

    /// Refuses variables of the endpoint and the workspace that are not valid UTF-8. Counting them as unset would, for example,
    /// disable the local password.
    pub fn check_process() -> Result<(), ConfigError> {
        match unreadable(Self::inherited()) {
            Some(variable) => Err(ConfigError::not_text(&variable)),
            None => Ok(()),
        }
    }

    /// All variables of this process. Windows ignores the case of their names, such as `Path`, which are uppercase here.
    pub fn inherited() -> Vec<(OsString, OsString)> {
        let variables = std::env::vars_os();
        let uppercase = |(name, value): (OsString, OsString)| (name.to_ascii_uppercase(), value);
        if cfg!(windows) {
            variables.map(uppercase).collect()
        } else {
            variables.collect()
        }
    }

    /// An environment of these variables.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let variables: Variables = variables.into_iter().collect();
        let get = |name: &str| variables.get(name).map(str::to_owned);
        Self {
            service_manager: ServiceManager {
                socket: get("NOTIFY_SOCKET").map(OsString::from),
                watchdog: watchdog(get("WATCHDOG_USEC"), get("WATCHDOG_PID")),
            },
            workspace: WorkspaceSettings::from_variables(variables),
        }
    }

    /// The value of a variable, trimmed.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.workspace.variables.get(name)
    }

    /// The value of a variable that a setting names, not trimmed, since a password may start with a blank.
    pub fn secret(&self, name: &str) -> Option<SecretString> {
        let value = self.workspace.variables.raw(name)?;
        (!value.is_empty()).then(|| SecretString::from(value))
    }
}

/// The first of these variables that must be valid UTF-8 and is not.
fn unreadable(variables: Vec<(OsString, OsString)>) -> Option<String> {
    let is_read = |name: &str| {
        READ.contains(&name) || READ_FAMILIES.iter().any(|family| name.starts_with(family))
    };
    variables.into_iter().find_map(|(name, value)| {
        let name = name.into_string().ok()?;
        (is_read(&name) && value.to_str().is_none()).then_some(name)
    })
}

/// The watchdog interval, unless it is for another process.
fn watchdog(microseconds: Option<String>, process: Option<String>) -> Option<Duration> {
    // sd_watchdog_enabled(3): a parent's interval is inherited with its WATCHDOG_PID.
    if process.is_some_and(|id| id.parse() != Ok(std::process::id())) {
        return None;
    }
    let time = Duration::from_micros(microseconds?.parse().ok()?);
    (!time.is_zero()).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_variable_that_is_read_must_be_valid_utf_8() {
        use std::os::unix::ffi::OsStringExt;

        let found = |name: &str, value: &[u8]| {
            let value = OsString::from_vec(value.to_vec());
            unreadable(vec![(OsString::from(name), value)])
        };
        for name in ["PGHOST", "DATABRICKS_CLIENT_SECRET", PASSWORD_VARIABLE] {
            assert_eq!(found(name, b"p\xe4ss").as_deref(), Some(name));
            assert_eq!(found(name, "päss".as_bytes()), None);
        }
        assert_eq!(found("LS_COLORS", b"\xff"), None);
    }

    #[test]
    fn a_watchdog_of_another_process_is_ignored() {
        let of = |id: &str| watchdog(Some("3000000".to_owned()), Some(id.to_owned()));
        let ours = std::process::id();
        assert_eq!(of(&ours.to_string()), Some(Duration::from_secs(3)));
        assert_eq!(of(&(ours + 1).to_string()), None);
        assert_eq!(watchdog(Some("0".to_owned()), None), None);
        assert_eq!(
            watchdog(Some("1".to_owned()), None),
            Some(Duration::from_micros(1))
        );
    }
}
