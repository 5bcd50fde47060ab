//! Entry points for tests/fuzz: the configuration file and the flag `--endpoint`.

use std::path::Path;

use super::{EndpointSettings, file};

/// Every error is one line and names a line of the file.
pub fn settings_file(text: &str) {
    if let Err(error) = file::parse(Path::new("f"), text) {
        let message = error.to_string();
        assert!(!message.contains('\n'), "{message:?}");
        let line = message.strip_prefix("in the configuration file `f`, line ");
        let line = line.and_then(|rest| rest.split_once(':')?.0.parse().ok());
        assert!(
            line.is_some_and(|line| (1..=text.matches('\n').count() + 1).contains(&line)),
            "{message}"
        );
    }
}

/// An accepted endpoint has a name or a host.
pub fn endpoint_flag(text: &str) {
    if let Ok(settings) = text.parse::<EndpointSettings>() {
        assert!(settings.name.is_some() || settings.host.is_some());
    }
}
