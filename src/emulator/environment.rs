//! What a client must know, as the environment variables that the tutorial and the SDKs read.

use std::{
    io::{self, Write},
    path::Path,
};

use secrecy::ExposeSecret;

use super::{Emulator, EmulatorError, shared::Names, temporary};

/// How variables are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum EnvironmentFormat {
    /// `NAME=value`, for `docker --env-file`, systemd and dotenv libraries
    #[default]
    Dotenv,
    /// `export NAME=value`, for `. FILE` in a shell
    Shell,
}

impl Emulator {
    /// The variables with which the Databricks SDKs, libpq and the proxy find this emulator. Holds a secret.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let app = &self.shared.identities.app;
        let secret = app
            .client_secret
            .as_ref()
            .map(|secret| secret.expose_secret().to_owned());
        vec![
            ("DATABRICKS_HOST", self.shared.workspace_url.clone()),
            ("DATABRICKS_CLIENT_ID", app.name.clone()),
            ("DATABRICKS_CLIENT_SECRET", secret.unwrap_or_default()),
            ("ENDPOINT_NAME", Names::ENDPOINT.to_owned()),
            ("PGHOST", self.shared.names.host.clone()),
            ("PGPORT", self.pg_port.to_string()),
            ("PGDATABASE", self.shared.names.database.clone()),
            ("PGUSER", app.name.clone()),
            ("PGSSLMODE", "require".to_owned()),
            ("PGSSLROOTCERT", self.authority.display().to_string()),
        ]
    }

    /// [`Emulator::environment`] in lines.
    pub(super) fn environment_text(&self, format: EnvironmentFormat) -> String {
        let export = match format {
            EnvironmentFormat::Dotenv => "",
            EnvironmentFormat::Shell => "export ",
        };
        let lines = self.environment().into_iter();
        let lines: Vec<String> = lines
            .map(|(name, value)| format!("{export}{name}={}\n", quoted(&value)))
            .collect();
        lines.concat()
    }

    /// Writes [`Emulator::environment`] to a file, which is 0600 and appears whole.
    pub fn write_env_file(
        &self,
        path: &Path,
        format: EnvironmentFormat,
    ) -> Result<(), EmulatorError> {
        replace_file(path, &self.environment_text(format)).map_err(|source| {
            EmulatorError::EnvironmentFile {
                path: path.to_owned(),
                source,
            }
        })
    }
}

/// Plain where a shell and an env-file reader agree on it, else in single quotes.
fn quoted(value: &str) -> String {
    let is_plain =
        |character: char| character.is_ascii_alphanumeric() || "-_./:@%+,=".contains(character);
    if value.chars().all(is_plain) {
        value.to_owned()
    } else {
        format!("'{}'", value.replace('\'', r"'\''"))
    }
}

fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    temporary::set_mode(&mut builder, 0o600);
    let mut file = builder.tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_file_is_private_and_replaces_what_was_there() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("env");
        fs::write(&path, "old").unwrap();
        replace_file(&path, "NEW=1\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "NEW=1\n");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;

            let permissions = fs::metadata(&path).unwrap().permissions();
            assert_eq!(permissions.mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_values_that_need_it_are_quoted() {
        assert_eq!(quoted("http://127.0.0.1:1"), "http://127.0.0.1:1");
        assert_eq!(quoted("/tmp/my dir/it's"), r"'/tmp/my dir/it'\''s'");
    }
}
