//! The configuration file.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use super::{ConfigError, Origin, Settings, similar::most_similar};

/// In bytes, so that a device or the wrong file does not exhaust memory.
const MAX_LEN: u64 = 1024 * 1024;

impl Settings {
    /// These settings, and those of the file for what they do not set.
    pub fn with_file(mut self) -> Result<Self, ConfigError> {
        self.originate(&Origin::Flag);
        match self.config_file.take() {
            Some(path) => {
                let mut file = read(&path)?;
                file.originate(&Origin::File(path));
                Ok(self.or(file))
            }
            None => Ok(self),
        }
    }
}

/// Reads a configuration file.
pub fn read(path: &Path) -> Result<Settings, ConfigError> {
    let text = text(path).map_err(|source| unreadable(path, source))?;
    parse(path, &text)
}

fn unreadable(path: &Path, source: io::Error) -> ConfigError {
    let hint = match source.kind() {
        io::ErrorKind::InvalidData => {
            "it must be a text file in UTF-8, of 1 MiB at most; config/lakebase-proxy.toml shows every setting"
        }
        io::ErrorKind::Unsupported => "reloading needs a regular file, not a pipe or a device",
        _ => "check the path, or omit --config-file: every setting has a flag and a variable",
    };
    let message = format!("cannot read the configuration file `{}`", path.display());
    ConfigError::new(message, hint).caused_by(source)
}

/// Parses the text of a configuration file.
pub(super) fn parse(path: &Path, text: &str) -> Result<Settings, ConfigError> {
    toml::from_str(text).map_err(|error| {
        // The error's Display has several lines and quotes the file.
        let (line, message) = (line_of(text, &error), message_of(text, &error));
        let path = path.display();
        ConfigError::new(
            format!("in the configuration file `{path}`, line {line}: {message}"),
            "config/lakebase-proxy.toml shows every setting",
        )
    })
}

/// Reads a text file of limited length.
pub(super) fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?
        // One byte more, to distinguish a longer file from one of exactly this length.
        .take(MAX_LEN.saturating_add(1))
        .read_to_string(&mut text)?;
    if u64::try_from(read).is_ok_and(|read| read > MAX_LEN) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "longer than 1 MiB",
        ));
    }
    Ok(text)
}

/// Refuses files that cannot be read again: reading a pipe would block, or return nothing the second time.
pub(super) fn check_lasting(path: &Path) -> Result<(), ConfigError> {
    let is_file = std::fs::metadata(path).map(|metadata| metadata.is_file());
    if is_file.map_err(|error| unreadable(path, error))? {
        return Ok(());
    }
    let error = io::Error::new(io::ErrorKind::Unsupported, "not a regular file");
    Err(unreadable(path, error))
}

fn line_of(text: &str, error: &toml::de::Error) -> usize {
    let start = error.span().map_or(0, |span| span.start);
    let before = text.get(..start).unwrap_or_default();
    before.matches('\n').count().saturating_add(1)
}

/// The message in one line, with the key if it lacks it, and the most similar key in place of the list of all.
fn message_of(text: &str, error: &toml::de::Error) -> String {
    let message = error.message();
    let (short, keys) = message
        .split_once(", expected one of")
        .unwrap_or((message, ""));
    let mut short = short.replace('\n', "; ");
    // The parser's terms for a string that does not end on its line.
    if short.contains("invalid basic string") || short.contains("invalid literal string") {
        "the text has no closing quote".clone_into(&mut short);
    }
    let names = |text: &str| {
        text.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let unknown = names(&short).pop().unwrap_or_default();
    if let Some(similar) = most_similar(&unknown, names(keys)) {
        return format!("{short}, did you mean `{similar}`?");
    }
    let short = match short.rsplit_once(", expected ") {
        // serde names Rust's type, which a user of the file need not know.
        Some((short, "usize" | "u16" | "u32" | "u64")) => {
            format!("{short}, expected a whole number")
        }
        _ => short,
    };
    let line = text.lines().nth(line_of(text, error).saturating_sub(1));
    let key = line.and_then(|line| line.split_once('='));
    match key.map(|(key, _)| key.trim()) {
        Some(key) if !key.is_empty() && !short.contains(key) => format!("{key}: {short}"),
        _ => short,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_file_is_text_of_limited_length() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.toml");
        fs::write(&path, b"# \xff\n").unwrap();
        let hint = |path: &Path| read(path).unwrap_err().hint().unwrap_or_default();
        assert!(hint(&path).contains("UTF-8"));
        #[cfg(unix)]
        assert!(hint(Path::new("/dev/zero")).contains("1 MiB"));
        assert!(check_lasting(&path).is_ok());
        #[cfg(unix)]
        assert!(check_lasting(Path::new("/dev/null")).is_err());
        assert!(check_lasting(&directory.path().join("none")).is_err());
    }

    #[test]
    fn an_error_is_one_line_with_its_position() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p.toml");
        for (text, expected) in [
            (
                "port = 1\n\nprot = 2\n",
                "line 3: unknown field `prot`, did you mean `port`?",
            ),
            (
                "port = \"1\n",
                "line 1: port: the text has no closing quote",
            ),
            (
                "max_connections = -1",
                "line 1: max_connections: invalid value: integer `-1`, expected a whole number",
            ),
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
            assert!(error.contains(expected), "{error}");
            assert!(
                error.contains("p.toml`, line ") && error.len() < 300 && !error.contains('\n'),
                "{error}"
            );
        }
    }

    proptest! {
        /// Every error is one line and names a line of the file.
        #[test]
        fn no_file_makes_it_panic(text in "(port|http_port|connect_timeout|\\[\\[endpoint\\]\\]|name|=|\"|'|[0-9a-z]{1,4}|[\\[\\]{}.,#-]|\n| |\\PC){0,20}") {
            if let Err(error) = parse(Path::new("f"), &text) {
                let message = error.to_string();
                prop_assert!(!message.contains('\n'), "{:?}", message);
                let line = message.strip_prefix("in the configuration file `f`, line ");
                let line: usize = line.and_then(|rest| rest.split_once(':')).unwrap().0.parse().unwrap();
                prop_assert!((1..=text.matches('\n').count() + 1).contains(&line));
            }
        }
    }
}
