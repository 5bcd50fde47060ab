//! The source of each setting, for `SHOW CONFIG` and `doctor`.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use clap::{ArgMatches, parser::ValueSource};

use super::Settings;

/// The prefix of the variables of flags.
pub(crate) const VARIABLE_PREFIX: &str = "LAKEBASE_PROXY_";

/// The source of a setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Its default.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// The command line.
    Flag,
    /// A profile of `~/.databrickscfg`.
    Profile {
        /// Its name.
        profile: String,
        /// The file.
        file: PathBuf,
    },
    /// A variable, of this name.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Flag => f.write_str("flag"),
            Self::Profile { profile, file } => {
                write!(f, "profile `{profile}` of `{}`", file.display())
            }
            Self::Variable(name) => write!(f, "variable {name}"),
        }
    }
}

/// The origins of settings by their keys in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// The origin of the setting with this key.
    pub fn of(&self, key: &str) -> &Origin {
        self.0.get(key).unwrap_or(&Origin::Default)
    }

    /// These, and those of `below` for other settings.
    pub(super) fn or(self, below: Self) -> Self {
        let mut all = below.0;
        all.extend(self.0);
        Self(all)
    }

    /// Takes over the origin of one setting.
    pub(super) fn take(&mut self, key: &str, from: &Self) {
        match from.0.get(key) {
            Some(origin) => self.0.insert(key.to_owned(), origin.clone()),
            None => self.0.remove(key),
        };
    }
}

impl Settings {
    /// Records which of these settings come from flags and which from variables.
    pub(crate) fn record_origins(&mut self, matches: &ArgMatches) {
        let keys = Self::declared().into_iter().map(|setting| setting.key);
        for key in keys.chain(["config_file"]) {
            let origin = match matches.value_source(key) {
                Some(ValueSource::CommandLine) => Origin::Flag,
                Some(ValueSource::EnvVariable) => Origin::Variable(variable(key)),
                _ => continue,
            };
            self.origins.0.insert(key.to_owned(), origin);
        }
    }

    /// Records `origin` for all settings that are set and have no origin yet.
    pub(super) fn originate(&mut self, origin: &Origin) {
        for (key, value) in toml::Table::try_from(&*self).unwrap_or_default() {
            if value.as_array().is_none_or(|items| !items.is_empty()) {
                self.origins.0.entry(key).or_insert_with(|| origin.clone());
            }
        }
    }
}

/// The variable of a flag or a key of the file.
pub(crate) fn variable(name: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", name.to_uppercase().replace('-', "_"))
}
