//! The settings in force: the environment's, completed from a profile of `~/.databrickscfg`.
//!
//! The choice of the profile is that of the Databricks SDKs. Reads one file; sends nothing.

use std::{
    io,
    ops::Deref,
    path::{Path, PathBuf},
};

use secrecy::SecretString;
use tracing::debug;

use super::{
    WorkspaceError,
    auth::{self, AuthKind},
    databrickscfg::{DEFAULT, Profiles},
    host::{Host, SET_HOST},
};
use crate::{
    config::{Attribute, Origin, WorkspaceSettings},
    net::file,
};

/// The section for the CLI's own settings: the default profile and the storage of tokens.
const RESERVED: &str = "__settings__";
const DEFAULT_FILE: &str = "~/.databrickscfg";
/// Far above any real file.
const MAX_FILE: u64 = 1024 * 1024;

/// Secrets of related tools, beside attributes and the variables of a kind: access to managed identities on Azure's hosts, and
/// settings of other SDKs.
const SECRET_VARIABLES: &[&str] = &[
    "ARM_CLIENT_CERTIFICATE_PASSWORD",
    "ARM_OIDC_REQUEST_TOKEN",
    "ARM_OIDC_TOKEN",
    "AZURE_CLIENT_CERTIFICATE_PASSWORD",
    "AZURE_CLIENT_SECRET",
    "AZURE_PASSWORD",
    "DATABRICKS_GOOGLE_CREDENTIALS",
    "IDENTITY_HEADER",
    "MSI_SECRET",
];

/// Addresses of HTTP proxies, which may hold a password; each is read in lower case too.
const PROXY_VARIABLES: [&str; 3] = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"];

/// Settings completed from a profile.
#[derive(Clone, Debug)]
pub struct ResolvedSettings {
    settings: WorkspaceSettings,
    /// The profile that was read.
    profile: Option<String>,
    /// A selected profile whose file does not exist. An error only if other settings do not suffice.
    missing: Option<(String, PathBuf)>,
}

impl Deref for ResolvedSettings {
    type Target = WorkspaceSettings;

    fn deref(&self) -> &WorkspaceSettings {
        &self.settings
    }
}

impl ResolvedSettings {
    /// Completes settings from the profile.
    pub fn new(settings: WorkspaceSettings) -> Result<Self, WorkspaceError> {
        let mut resolved = Self {
            settings,
            profile: None,
            missing: None,
        };
        resolved.read_profile()?;
        // Last: Model Serving's address counts only if neither the environment nor the profile has one.
        if resolved.host.is_none()
            && let Some((name, host)) = auth::serving_host(&resolved.variables)
        {
            let (origin, host) = (Origin::Variable(name.to_owned()), host.to_owned());
            resolved.settings.set(Attribute::Host, &host, origin);
        }
        Ok(resolved)
    }

    fn read_profile(&mut self) -> Result<(), WorkspaceError> {
        let selected = self.settings.profile.clone();
        // A host or authentication in the environment without a profile: the SDKs ignore the file.
        let is_configured = Attribute::ALL.iter().any(|&attribute| {
            (attribute.family().is_some() || attribute == Attribute::Host)
                && self.text(attribute).is_some()
        });
        if selected.is_none() && is_configured {
            return Ok(());
        }
        let Some(path) = self.profile_file() else {
            return Ok(());
        };
        let Some(text) = read(&path)? else {
            self.missing = selected.map(|profile| (profile, path));
            return Ok(());
        };
        let file = path.display();
        let profiles = Profiles::parse(&text).map_err(|source| {
            WorkspaceError::new(format!("cannot understand the profiles in `{file}`"))
                .with_hint("a profile is a line `[name]` and lines `key = value` below it")
                .with_source(source)
        })?;
        let reserved = profiles.get(RESERVED);
        let default = reserved.and_then(|section| section.get("default_profile"));
        let selected = selected.or_else(|| default.cloned());
        let name = selected.as_deref().unwrap_or(DEFAULT);
        if name == RESERVED {
            let message = format!("`{RESERVED}` is a reserved name, not a profile");
            return Err(WorkspaceError::new(message).with_hint("name a profile that holds a host"));
        }
        // A profile inherits nothing from `DEFAULT`, as in the SDKs. Only a selected one must exist.
        let Some(section) = profiles.get(name) else {
            let names: Vec<&str> = profiles.names().filter(|name| *name != RESERVED).collect();
            return selected.map_or(Ok(()), |profile| {
                let message = format!("`{file}` has no profile `{profile}`");
                Err(WorkspaceError::new(message).with_hint(if names.is_empty() {
                    "the file has no profile at all: run `databricks auth login`".to_owned()
                } else {
                    format!("it has {}", listed(&names))
                }))
            });
        };
        debug!(profile = name, %file, "reading a profile");
        for &attribute in Attribute::ALL {
            // A profile cannot select another; and the environment wins over it, as in the SDKs.
            let is_pointer = matches!(attribute, Attribute::Profile | Attribute::ConfigFile);
            if is_pointer || self.text(attribute).is_some() {
                continue;
            }
            let value = attribute.keys().iter().find_map(|&key| section.get(key));
            if let Some(value) = value
                .map(|value| value.trim())
                .filter(|value| !value.is_empty())
            {
                let origin = Origin::Profile {
                    profile: name.to_owned(),
                    file: path.clone(),
                };
                self.settings.set(attribute, value, origin);
            }
        }
        self.profile = Some(name.to_owned());
        Ok(())
    }

    /// The file of profiles; `None` without a home directory.
    fn profile_file(&self) -> Option<PathBuf> {
        let path = self.config_file.as_deref().unwrap_or(DEFAULT_FILE);
        let Some(rest) = path.strip_prefix('~') else {
            return Some(PathBuf::from(path));
        };
        // As in the SDKs, `~` is expanded here and not by the shell.
        let (first, second) = if cfg!(windows) {
            // Shells of Unix set HOME there, to paths that only they understand.
            ("USERPROFILE", "HOME")
        } else {
            ("HOME", "USERPROFILE")
        };
        let home = self.variables.get(first);
        let home = home.or_else(|| self.variables.get(second))?;
        Some(PathBuf::from(format!("{home}{rest}")))
    }

    /// The name of the profile that was read.
    pub fn profile_name(&self) -> Option<&str> {
        self.profile.as_deref()
    }

    /// The kinds of authentication, in the order in which they are tried.
    pub fn auth_kinds(&self) -> Result<Vec<AuthKind>, WorkspaceError> {
        let (host, _) = self.address()?;
        let sources = auth::choose(self, &host)?;
        Ok(sources.iter().map(|source| source.kind).collect())
    }

    /// The workspace's address, and the workspace id in it.
    pub fn address(&self) -> Result<(Host, Option<String>), WorkspaceError> {
        if let Some(host) = &self.host {
            return Host::parse(host);
        }
        self.check_profile_file()?;
        let hint = match self.azure_workspace_resource_id {
            None => SET_HOST,
            Some(_) => {
                "`DATABRICKS_AZURE_RESOURCE_ID` alone is not enough: set `DATABRICKS_HOST`, which `az databricks workspace show --ids RESOURCE_ID --query workspaceUrl` prints"
            }
        };
        Err(WorkspaceError::new("`DATABRICKS_HOST` is not set").with_hint(hint))
    }

    /// Fails if the file of the selected profile does not exist.
    pub(super) fn check_profile_file(&self) -> Result<(), WorkspaceError> {
        let Some((profile, path)) = &self.missing else {
            return Ok(());
        };
        let path = path.display();
        let message = format!("the profile `{profile}` is selected, but `{path}` does not exist");
        Err(WorkspaceError::new(message).with_hint("run `databricks auth login`, which writes it, or set `DATABRICKS_HOST` and unset `DATABRICKS_CONFIG_PROFILE`"))
    }

    /// The values of all secret settings.
    pub(super) fn secrets(&self) -> Vec<SecretString> {
        let secrets = Attribute::ALL
            .iter()
            .filter(|attribute| attribute.is_secret());
        let values = secrets.filter_map(|&attribute| self.text(attribute));
        values.map(SecretString::from).collect()
    }

    /// The value of a setting is of no use.
    pub(super) fn invalid(&self, attribute: Attribute, problem: &str) -> WorkspaceError {
        WorkspaceError::new(format!("{} {problem}", self.named(attribute)))
    }
}

/// The variables that hold secrets of the workspace: those of settings, those that settings name, and related ones.
pub(crate) fn secret_variables(settings: &WorkspaceSettings) -> Vec<String> {
    let attributes = Attribute::ALL
        .iter()
        .filter(|attribute| attribute.is_secret());
    let names = attributes.flat_map(|attribute| attribute.variables());
    let mut names: Vec<String> = names
        .chain(SECRET_VARIABLES)
        .copied()
        .chain(auth::secret_variables())
        .map(str::to_owned)
        .collect();
    // A profile may name one, too; one that cannot be read ends the start anyway.
    match ResolvedSettings::new(settings.clone()) {
        Ok(resolved) => names.extend(resolved.oidc_token_env.clone()),
        Err(_) => names.extend(settings.oidc_token_env.clone()),
    }
    for name in PROXY_VARIABLES {
        for name in [name.to_owned(), name.to_ascii_lowercase()] {
            if settings.variables.get(&name).is_some_and(has_password) {
                names.push(name);
            }
        }
    }
    names
}

fn has_password(address: &str) -> bool {
    let (_, rest) = address.split_once("://").unwrap_or(("", address));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    authority.contains('@')
}

/// The file's text; `None` where it does not exist.
fn read(path: &Path) -> Result<Option<String>, WorkspaceError> {
    let read = file::read(path, MAX_FILE);
    match read.and_then(|bytes| file::text(&bytes).map(str::to_owned)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => {
            let message = format!("cannot read the profiles in `{}`", path.display());
            Err(WorkspaceError::new(message)
                .with_hint("check the file's permissions, or `DATABRICKS_CONFIG_FILE`")
                .with_source(source))
        }
    }
}

/// Names in backticks, up to a number.
fn listed(names: &[&str]) -> String {
    const MAX: usize = 12;
    let quoted = names.iter().take(MAX).map(|name| format!("`{name}`"));
    let more = names.len().saturating_sub(MAX);
    let more = (more > 0).then(|| format!("{more} more"));
    quoted.chain(more).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    const FILE: &str = "\
host = https://default.example
token = dapi-default
[work]
host = https://work.example
client_id = sp
client_secret = s#1 # the secret
[half]
token = dapi-half
[other]
host = https://other.example
";

    fn home(file: Option<&str>) -> TempDir {
        let home = tempfile::tempdir().unwrap();
        if let Some(file) = file {
            fs::write(home.path().join(".databrickscfg"), file).unwrap();
        }
        home
    }

    fn resolved(
        file: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<ResolvedSettings, WorkspaceError> {
        let home = home(file);
        let mut all = vec![("HOME".to_owned(), home.path().display().to_string())];
        all.extend(
            variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        ResolvedSettings::new(WorkspaceSettings::from_variables(all.into_iter().collect()))
    }

    /// `host token client_id` and the profile.
    fn resolved_text(file: &str, variables: &[(&str, &str)]) -> String {
        let settings = resolved(Some(file), variables).unwrap();
        let text = |attribute| settings.text(attribute).unwrap_or("-");
        format!(
            "{} {} {} {}",
            text(Attribute::Host).trim_start_matches("https://"),
            text(Attribute::Token),
            text(Attribute::ClientId),
            settings.profile_name().unwrap_or("-")
        )
    }

    #[test]
    fn the_profile_is_chosen_as_the_sdks_choose_it() {
        let with_default = format!("[__settings__]\ndefault_profile = other\n[DEFAULT]\n{FILE}");
        for (file, variables, expected) in [
            (FILE, &[][..], "default.example dapi-default - DEFAULT"),
            (with_default.as_str(), &[], "other.example - - other"),
            (
                with_default.as_str(),
                &[("DATABRICKS_CONFIG_PROFILE", "DEFAULT")],
                "default.example dapi-default - DEFAULT",
            ),
            (
                FILE,
                &[("DATABRICKS_CONFIG_PROFILE", " work ")],
                "work.example - sp work",
            ),
            // Configured without a profile: the file is ignored.
            (FILE, &[("DATABRICKS_HOST", "h")], "h - - -"),
            (FILE, &[("DATABRICKS_TOKEN", "t")], "- t - -"),
            (FILE, &[("ARM_TENANT_ID", "t")], "- - - -"),
            // Other settings do not prevent the use of the file.
            (
                FILE,
                &[("DATABRICKS_WORKSPACE_ID", "7")],
                "default.example dapi-default - DEFAULT",
            ),
            // The environment wins over the profile, value by value.
            (
                FILE,
                &[
                    ("DATABRICKS_CONFIG_PROFILE", "half"),
                    ("DATABRICKS_HOST", "h"),
                ],
                "h dapi-half - half",
            ),
            // A profile does not inherit.
            (
                FILE,
                &[("DATABRICKS_CONFIG_PROFILE", "half")],
                "- dapi-half - half",
            ),
            ("[a]\nhost = x\n", &[], "- - - -"),
            ("", &[], "- - - -"),
        ] {
            assert_eq!(
                resolved_text(file, variables),
                expected,
                "{file} {variables:?}"
            );
        }
    }

    #[test]
    fn the_origin_of_each_value_is_kept() {
        let settings = resolved(
            Some(FILE),
            &[
                ("DATABRICKS_CONFIG_PROFILE", "work"),
                ("DATABRICKS_HOST", "h"),
            ],
        )
        .unwrap();
        assert_eq!(settings.named(Attribute::Host), "`DATABRICKS_HOST`");
        let secret = settings.named(Attribute::ClientSecret);
        assert!(
            secret.starts_with("`client_secret` from profile `work` of `")
                && secret.ends_with(".databrickscfg`"),
            "{secret}"
        );
        assert_eq!(settings.text(Attribute::ClientSecret), Some("s#1"));
    }

    #[test]
    fn mistakes_in_the_file_are_reported() {
        let message = |file: Option<&str>, profile: &str| {
            let error = resolved(file, &[("DATABRICKS_CONFIG_PROFILE", profile)])
                .err()
                .map(|error| format!("{error} / {}", error.hint().unwrap_or_default()));
            error.unwrap_or_default()
        };
        let missing = message(Some(FILE), "Work");
        assert!(
            missing.contains("no profile `Work` / it has `DEFAULT`, `half`, `other`, `work`"),
            "{missing}"
        );
        assert!(message(Some(FILE), "__settings__").contains("reserved"));
        assert!(message(Some("[work\n"), "work").contains("cannot understand"));
        let settings = resolved(None, &[("DATABRICKS_CONFIG_PROFILE", "work")]).unwrap();
        let error = settings.address().unwrap_err();
        assert!(
            error.to_string().contains("does not exist") && error.to_string().contains("`work`"),
            "{error}"
        );
    }

    #[test]
    fn the_file_can_be_set_also_relative_to_the_home_directory() {
        let home = home(None);
        fs::write(home.path().join("mine"), "[DEFAULT]\nhost = mine\n").unwrap();
        for file in [
            "~/mine".to_owned(),
            home.path().join("mine").display().to_string(),
        ] {
            let variables = [
                ("HOME".to_owned(), home.path().display().to_string()),
                ("DATABRICKS_CONFIG_FILE".to_owned(), file),
            ];
            let settings = WorkspaceSettings::from_variables(variables.into_iter().collect());
            let settings = ResolvedSettings::new(settings).unwrap();
            assert_eq!(settings.host.as_deref(), Some("mine"));
        }
    }

    #[test]
    fn every_secret_has_its_variable_in_the_list() {
        let variables = [
            ("DATABRICKS_OIDC_TOKEN_ENV", "MY_OIDC"),
            ("HTTPS_PROXY", "http://me:pass@proxy:3128"),
            ("http_proxy", "me:pass@proxy:3128"),
            ("ALL_PROXY", "http://proxy:3128/@"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = WorkspaceSettings::from_variables(variables.into_iter().collect());
        let names = secret_variables(&settings);
        for name in [
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
            "ARM_CLIENT_SECRET",
            "DATABRICKS_CLIENT_SECRET",
            "DATABRICKS_METADATA_SERVICE_URL",
            "DATABRICKS_PASSWORD",
            "DATABRICKS_TOKEN",
            "GOOGLE_CREDENTIALS",
            "HTTPS_PROXY",
            "IDENTITY_HEADER",
            "MSI_SECRET",
            "MY_OIDC",
            "http_proxy",
        ] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
        for name in ["ALL_PROXY", "DATABRICKS_HOST", "DATABRICKS_CLIENT_ID"] {
            assert!(!names.iter().any(|known| known == name), "{name}");
        }
    }
}
