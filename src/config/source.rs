//! Where the settings come from, so that they can be had again.

use std::path::{Path, PathBuf};

use super::{Config, ConfigError, Environment, Roots, Settings, TlsMode, file};

/// The layers as they were at the start; only the file may say something else the next time.
#[derive(Clone, Debug)]
pub struct Source {
    flags: Settings,
    defaults: Settings,
    environment: Environment,
}

impl Source {
    /// Flags (with `LAKEBASE_PROXY_*`) and the environment; the flags may name a file.
    pub fn new(flags: Settings, environment: Environment) -> Self {
        Self {
            flags,
            defaults: Settings::default(),
            environment,
        }
    }

    /// With other defaults than the program's own, below the file.
    #[must_use]
    pub fn with_defaults(mut self, defaults: Settings) -> Self {
        self.defaults = defaults;
        self
    }

    /// The environment.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Puts the layers together, the file as it is now.
    pub fn load(&self) -> Result<Config, ConfigError> {
        Config::resolve(self.settings()?, self.environment.clone())
    }

    fn settings(&self) -> Result<Settings, ConfigError> {
        Ok(self.flags.clone().with_file()?.or(self.defaults.clone()))
    }

    /// The same once more, away from the threads that serve clients: a disk may take its time.
    pub async fn load_again(&self) -> Result<Config, ConfigError> {
        let source = self.clone();
        let loading = tokio::task::spawn_blocking(move || {
            source.file().map_or(Ok(()), file::check_lasting)?;
            let settings = source.settings()?;
            if let Some(path) = &settings.local_password_file {
                file::check_lasting(path)?;
            }
            Config::resolve(settings, source.environment)
        });
        match loading.await {
            Ok(loaded) => loaded,
            // Only a runtime that ends gives up on it.
            Err(_) => std::future::pending().await,
        }
    }

    /// The file, if there is one.
    pub fn file(&self) -> Option<&Path> {
        self.flags.config_file.as_deref()
    }

    /// Every file that a reload reads.
    pub fn files(&self, config: &Config) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = self.file().map(Path::to_owned).into_iter().collect();
        if config.local_password.is_some() {
            files.extend(config.settings.local_password_file());
        }
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
