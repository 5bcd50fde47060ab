//! Where each setting was given, for `SHOW CONFIG` and `doctor`.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use clap::{ArgMatches, Args, Command, parser::ValueSource};

use super::Settings;

/// Where a setting was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: its default.
    Default,
    /// The file of settings.
    File(PathBuf),
    /// The command line.
    Flag,
    /// A variable, of this name.
    Variable(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => write!(f, "variable {name}"),
        }
    }
}

/// The origins of settings by their keys in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// Where the setting with this key was given.
    pub fn of(&self, key: &str) -> &Origin {
        self.0.get(key).unwrap_or(&Origin::Default)
    }

    /// These, and those of `below` for other settings.
    pub(super) fn or(self, below: Self) -> Self {
        let mut all = below.0;
        all.extend(self.0);
        Self(all)
    }
}

impl Settings {
    /// Notes which of these settings come from flags and which from their variables, whose names begin with `prefix`.
    pub fn note_origins(&mut self, matches: &ArgMatches, prefix: &str) {
        for argument in Self::augment_args(Command::new("settings")).get_arguments() {
            let Some(flag) = argument.get_long() else {
                continue;
            };
            let key = flag.replace('-', "_");
            let origin = match matches.value_source(argument.get_id().as_str()) {
                Some(ValueSource::CommandLine) => Origin::Flag,
                Some(ValueSource::EnvVariable) => {
                    Origin::Variable(format!("{prefix}{}", key.to_uppercase()))
                }
                _ => continue,
            };
            self.origins.0.insert(key, origin);
        }
    }

    /// Notes that what is set and has no origin yet has this one.
    pub(super) fn originate(&mut self, origin: &Origin) {
        let set = toml::Table::try_from(&*self).unwrap_or_default();
        for (key, value) in set {
            let is_empty = value.as_array().is_some_and(Vec::is_empty);
            if !is_empty {
                self.origins.0.entry(key).or_insert_with(|| origin.clone());
            }
        }
    }
}
