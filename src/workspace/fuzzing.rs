//! Entry points for tests/fuzz: answers of the workspace, and files of the Databricks tools.

use jiff::Timestamp;
use reqwest::StatusCode;

use super::{
    BranchName, EndpointName, Host, HostName, InstanceName, Reference, auth,
    databrickscfg::Profiles, error_body, times,
};
use crate::{telemetry::KnownSecrets, workspace::times::Number};

/// An answer to a request: as a refusal, and as a token.
pub fn answer(status: u16, body: &[u8]) {
    auth::fuzzing::token_response(body);
    let Ok(status) = StatusCode::from_u16(status) else {
        return;
    };
    let parsed = error_body::parse(status, body, None, &KnownSecrets::default());
    assert!(!parsed.message.is_empty());
    for text in [
        Some(&parsed.message),
        parsed.code.as_ref(),
        parsed.request_id.as_ref(),
    ] {
        let text = text.map_or("", String::as_str);
        assert!(!text.chars().any(char::is_control), "{text:?}");
        let length = text.chars().count();
        let longest = error_body::MAX_TEXT + "...".len();
        assert!(length <= longest, "{length} characters");
    }
}

/// Headers and fields that hold a time or a token.
pub fn times(text: &str) {
    let now = Timestamp::UNIX_EPOCH;
    let _ = times::retry_after(text, now);
    let _ = times::retry_after(text, Timestamp::MAX);
    if let Some(date) = times::http_date(text) {
        let _ = times::skew(date, now);
        let _ = times::skew(date, Timestamp::MIN);
    }
    let _ = error_body::proto_duration(&Number::Text(text.to_owned()));
    auth::fuzzing::times(text);
    auth::fuzzing::claims(text);
}

/// `~/.databrickscfg`: a mistake has the number of a line, and every listed profile is found.
pub fn databrickscfg(text: &str) {
    match Profiles::parse(text) {
        Ok(profiles) => {
            for name in profiles.names() {
                assert!(profiles.get(name).is_some(), "{name:?}");
            }
        }
        Err(error) => assert!((1..=text.matches('\n').count() + 1).contains(&error.line)),
    }
}

/// Names of resources and hosts, as people write them; what is accepted is accepted again as it is shown.
pub fn names(text: &str) {
    if let Ok(name) = text.parse::<EndpointName>() {
        assert_eq!(
            name.as_str().parse::<EndpointName>().expect("the same"),
            name
        );
        assert!(name.branch().parse::<BranchName>().is_ok());
    }
    if let Ok(name) = text.parse::<BranchName>() {
        assert_eq!(name.as_str().parse::<BranchName>().expect("the same"), name);
    }
    if let Ok(name) = text.parse::<HostName>() {
        assert_eq!(name.as_str().parse::<HostName>().expect("the same"), name);
        let _ = name.read_only();
    }
    if let Err(error) = text.parse::<EndpointName>() {
        let _ = error.hint();
    }
    let _ = text.parse::<InstanceName>();
    let _ = text.parse::<Reference>();
    if let Ok((host, _)) = Host::parse(text) {
        let _ = (host.name(), host.is_loopback());
    }
}
