//! The sources of settings, for loading them again.

use std::path::{Path, PathBuf};

use super::{Config, ConfigError, Environment, Roots, Settings, TlsMode, file};

/// The layers as of the start; only the file may change.
#[derive(Clone, Debug)]
pub struct Source {
    flags: Settings,
    defaults: Settings,
    environment: Environment,
}

impl Source {
    /// From flags (with `LAKEBASE_PROXY_*`) and the environment; the flags may name a file.
    pub fn new(flags: Settings, environment: Environment) -> Self {
        Self {
            flags,
            defaults: Settings::default(),
            environment,
        }
    }

    /// Adds a layer of defaults below the file.
    #[must_use]
    pub fn with_defaults(mut self, defaults: Settings) -> Self {
        self.defaults = defaults;
        self
    }

    /// The environment.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Merges the layers, with the file as it is now.
    pub fn load(&self) -> Result<Config, ConfigError> {
        Config::resolve(self.settings()?, self.environment.clone())
    }

    fn settings(&self) -> Result<Settings, ConfigError> {
        Ok(self.flags.clone().with_file()?.or(self.defaults.clone()))
    }

    /// Loads them again. Refuses files that cannot be read twice, such as pipes.
    pub fn load_again(&self) -> Result<Config, ConfigError> {
        self.file().map_or(Ok(()), file::check_lasting)?;
        let settings = self.settings()?;
        if let Some(path) = settings.local_password_file() {
            file::check_lasting(&path)?;
        }
        Config::resolve(settings, self.environment.clone())
    }

    /// The configuration file, if any.
    pub fn file(&self) -> Option<&Path> {
        self.flags.config_file.as_deref()
    }

    /// Every file that a reload reads.
    pub fn files(&self, config: &Config) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.file().map(Path::to_owned).into_iter().collect();
        // With `trust` the file is not read.
        if config.local_password.is_some() {
            files.extend(config.settings.local_password_file());
        }
        // Not their password files, which the credential source watches itself.
        for endpoint in &config.endpoints {
            if let TlsMode::Verified(Roots::File(path)) = &endpoint.tls
                && !files.contains(path)
            {
                files.push(path.clone());
            }
        }
        files
    }
}
