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
    toml::from_str(&text).map_err(|error| ConfigError::Parse {
        path: path.to_owned(),
        line: line_of(&text, &error),
        message: message_of(&text, &error),
    })
}

fn line_of(text: &str, error: &toml::de::Error) -> usize {
    let begins = error.span().map_or(0, |span| span.start);
    let before = text.get(..begins).unwrap_or_default();
    before.matches('\n').count().saturating_add(1)
}

/// One line: the setting, where the message does not name it, and no list of all the settings that there are.
fn message_of(text: &str, error: &toml::de::Error) -> String {
    let message = error.message();
    let said = message.split(", expected one of").next().unwrap_or(message);
    let said = said.replace('\n', "; ");
    let line = text.lines().nth(line_of(text, error).saturating_sub(1));
    let key = line.and_then(|line| line.split_once('='));
    match key.map(|(key, _)| key.trim()) {
        Some(key) if !key.is_empty() && !said.contains(key) => format!("{key}: {said}"),
        _ => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_is_said_in_one_line_with_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.toml");
        for (text, said) in [
            ("port = 1\n\nprot = 2\n", "line 3: unknown field `prot`"),
            ("port = \n", "line 1: port: "),
            (
                "\n[[endpoint]]\nname = 3\n",
                "line 3: name: invalid type: integer `3`",
            ),
            (
                "port = 1\nconnect_timeout = \"soon\"",
                "line 2: connect_timeout: `soon` is not a length of time",
            ),
        ] {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            assert!(
                error.contains("p.toml`, line ") && error.len() < 300 && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
