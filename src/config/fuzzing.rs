//! Opened to tests/fuzz: a file of settings and the flag `--endpoint`.

use std::path::Path;

use super::{ConfigError, EndpointSettings, file};

/// A mistake is reported in one line, at a line that exists.
pub fn settings_file(text: &str) {
    if let Err(ConfigError::Parse { line, message, .. }) = file::parse(Path::new("f"), text) {
        assert!(!message.contains('\n'), "{message:?}");
        assert!(
            (1..=text.matches('\n').count() + 1).contains(&line),
            "{line}"
        );
    }
}

/// What is accepted has a name or a host.
pub fn endpoint_flag(text: &str) {
    if let Ok(settings) = text.parse::<EndpointSettings>() {
        assert!(settings.name.is_some() || settings.host.is_some());
    }
}
