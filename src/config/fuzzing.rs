//! Entry points for tests/fuzz: the configuration file and the flag `--endpoint`.

use std::path::Path;

use super::{ConfigError, EndpointSettings, file};

/// Every error is one line and names a line of the file.
pub fn settings_file(text: &str) {
    if let Err(ConfigError::Parse { line, message, .. }) = file::parse(Path::new("f"), text) {
        assert!(!message.contains('\n'), "{message:?}");
        assert!(
            (1..=text.matches('\n').count() + 1).contains(&line),
            "{line}"
        );
    }
}

/// An accepted endpoint has a name or a host.
pub fn endpoint_flag(text: &str) {
    if let Ok(settings) = text.parse::<EndpointSettings>() {
        assert!(settings.name.is_some() || settings.host.is_some());
    }
}
