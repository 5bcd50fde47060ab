//! The file of settings.

use std::{fs, path::Path};

use super::{ConfigError, Settings};

impl Settings {
    /// These settings, and the file's where they say nothing.
    pub fn with_file(mut self) -> Result<Self, ConfigError> {
        match self.config_file.take() {
            Some(path) => Ok(self.or(read(&path)?)),
            None => Ok(self),
        }
    }
}

/// Reads a file of settings.
pub fn read(path: &Path) -> Result<Settings, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::File {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}
