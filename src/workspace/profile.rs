//! Which profile of `~/.databrickscfg` is meant, and what it adds to the settings. The choice is the SDKs'.

use std::path::{Path, PathBuf};

use tracing::debug;

use crate::files;

use super::{
    databrickscfg::{DEFAULT, Profiles},
    settings::{Attribute, Settings, SettingsError, Source},
};

/// Holds what is no profile: which one is the default, and how the CLI keeps its tokens.
const RESERVED: &str = "__settings__";
const DEFAULT_FILE: &str = "~/.databrickscfg";
/// Far above any real one.
const MAX_FILE: u64 = 1024 * 1024;

/// Fills in what the profile says and nothing else does. Expects trimmed settings.
pub(super) fn read(settings: &mut Settings) -> Result<(), SettingsError> {
    // Whoever says where to go and who they are without naming a profile does not mean the file.
    let is_configured = Attribute::ALL.iter().any(|&attribute| {
        (attribute.way().is_some() || attribute == Attribute::Host)
            && settings.text(attribute).is_some()
    });
    if settings.profile.is_none() && is_configured {
        return Ok(());
    }
    let Some(path) = path(settings) else {
        return Ok(());
    };
    let Some(text) = text(&path)? else {
        if let Some(profile) = settings.profile.clone() {
            settings.origin.missing = Some((profile, path));
        }
        return Ok(());
    };
    let profiles = Profiles::parse(&text).map_err(|source| SettingsError::FileSyntax {
        path: path.clone(),
        source,
    })?;
    let default = profiles
        .get(RESERVED)
        .and_then(|section| section.get("default_profile"));
    let asked = settings.profile.clone().or(default.map(str::to_owned));
    if asked.as_deref() == Some(RESERVED) {
        return Err(SettingsError::ReservedProfile);
    }
    let name = asked.as_deref().unwrap_or(DEFAULT);
    let Some(section) = profiles.get(name) else {
        return match asked {
            Some(profile) => Err(SettingsError::NoProfile {
                profile,
                known: profiles
                    .names()
                    .filter(|name| *name != RESERVED)
                    .map(str::to_owned)
                    .collect(),
                path,
            }),
            None => Ok(()),
        };
    };
    debug!(profile = name, file = %path.display(), "reading a profile");
    for &attribute in Attribute::ALL {
        // A profile does not name another one, nor another file.
        if matches!(attribute, Attribute::Profile | Attribute::ConfigFile)
            || settings.text(attribute).is_some()
        {
            continue;
        }
        let value = attribute.names().iter().find_map(|key| section.get(key));
        if let Some(value) = value.map(str::trim).filter(|value| !value.is_empty()) {
            settings.set(attribute, Some(value.to_owned()));
            let source = Source::Profile {
                profile: name.to_owned(),
                file: path.clone(),
            };
            settings.origin.sources.insert(attribute, source);
        }
    }
    settings.origin.profile = Some((name.to_owned(), path));
    Ok(())
}

/// The file, with `~` made the home directory; `None` where there is no home.
fn path(settings: &Settings) -> Option<PathBuf> {
    let path = settings.config_file.as_deref().unwrap_or(DEFAULT_FILE);
    let Some(rest) = path.strip_prefix('~') else {
        return Some(PathBuf::from(path));
    };
    let variables = &settings.variables;
    let home = variables
        .get("HOME")
        .or_else(|| variables.get("USERPROFILE"))?;
    Some(PathBuf::from(format!("{home}{rest}")))
}

/// `None`: there is no such file.
fn text(path: &Path) -> Result<Option<String>, SettingsError> {
    let read = files::read(path, MAX_FILE);
    match read.and_then(|bytes| files::text(&bytes).map(str::to_owned)) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SettingsError::File {
            path: path.to_owned(),
            source,
        }),
    }
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

    fn resolved(file: Option<&str>, variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        let home = home(file);
        let mut all = vec![("HOME".to_owned(), home.path().display().to_string())];
        all.extend(
            variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        );
        Settings::from_variables(all.into_iter().collect()).resolve()
    }

    /// `host token client_id` and the profile.
    fn told(file: &str, variables: &[(&str, &str)]) -> String {
        let settings = resolved(Some(file), variables).unwrap();
        let text = |attribute| settings.text(attribute).unwrap_or("-");
        format!(
            "{} {} {} {}",
            text(Attribute::Host).trim_start_matches("https://"),
            text(Attribute::Token),
            text(Attribute::ClientId),
            settings
                .origin
                .profile
                .as_ref()
                .map_or("-", |(name, _)| name.as_str())
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
            // Configured without a profile: the file is not meant.
            (FILE, &[("DATABRICKS_HOST", "h")], "h - - -"),
            (FILE, &[("DATABRICKS_TOKEN", "t")], "- t - -"),
            (FILE, &[("ARM_TENANT_ID", "t")], "- - - -"),
            // What is not about authentication does not keep it from being read.
            (
                FILE,
                &[("DATABRICKS_WORKSPACE_ID", "7")],
                "default.example dapi-default - DEFAULT",
            ),
            // The environment goes before the profile, value by value.
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
            assert_eq!(told(file, variables), expected, "{file} {variables:?}");
        }
    }

    #[test]
    fn the_source_of_each_value_is_kept() {
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
    fn what_is_wrong_with_the_file_is_told() {
        let message = |file: Option<&str>, profile: &str| {
            let error = resolved(file, &[("DATABRICKS_CONFIG_PROFILE", profile)])
                .err()
                .map(|error| format!("{error} / {}", error.hint().unwrap_or_default()));
            error.unwrap_or_default()
        };
        let missing = message(Some(FILE), "Work");
        assert!(
            missing.contains("no profile `Work` / it has `DEFAULT`, `work`, `half`, `other`"),
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
    fn another_file_may_be_named_also_from_the_home_directory() {
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
            let settings = Settings::from_variables(variables.into_iter().collect())
                .resolve()
                .unwrap();
            assert_eq!(settings.host.as_deref(), Some("mine"));
        }
    }
}
