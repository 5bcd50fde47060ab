//! The settings in force, for people: what `SHOW CONFIG` lists.

use super::{Origin, Settings, change::CHANGEABLE};

/// Every setting at its default, with the ones that have none commented out.
const REFERENCE: &str = include_str!("../../config/lakebase-proxy.toml");

/// One setting. None holds a secret: those are in variables and files of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownSetting {
    /// Its key in the file.
    pub key: String,
    /// What it is.
    pub value: String,
    /// What it would be; empty where that depends on something else.
    pub default: String,
    /// Whether a reload changes it.
    pub changeable: bool,
    /// Where it was given.
    pub origin: Origin,
}

/// Every setting but the tables of endpoints, in alphabetical order.
pub(super) fn shown(settings: &Settings) -> Vec<ShownSetting> {
    let given = toml::Table::try_from(settings).unwrap_or_default();
    let defaults: toml::Table = toml::from_str(REFERENCE).unwrap_or_default();
    let mut keys: Vec<&String> = given.keys().chain(defaults.keys()).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .map(|key| ShownSetting {
            value: text(given.get(key).or_else(|| defaults.get(key))),
            default: text(defaults.get(key)),
            changeable: CHANGEABLE.contains(&key.as_str()),
            origin: settings.origins.of(key).clone(),
            key: key.clone(),
        })
        .collect()
}

/// As in the file, without quotes; of a list its members, since one may be written without brackets.
fn text(value: Option<&toml::Value>) -> String {
    match value {
        None => String::new(),
        Some(toml::Value::String(text)) => text.clone(),
        Some(toml::Value::Array(values)) => {
            let values: Vec<String> = values.iter().map(|value| text(Some(value))).collect();
            values.join(", ")
        }
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;

    #[test]
    fn what_is_set_shows_beside_its_default() {
        let settings: Settings =
            toml::from_str("connect_timeout = \"90s\"\nport = \"none\"\nhttp_port = 0").unwrap();
        let shown = shown(&settings);
        let find = |key: &str| {
            let setting = shown.iter().find(|setting| setting.key == key).unwrap();
            (setting.value.as_str(), setting.default.as_str())
        };
        assert_eq!(find("connect_timeout"), ("90s", "60s"));
        assert_eq!(find("port"), ("none", "5432"));
        assert_eq!(find("http_port"), ("0", "9090"));
        assert_eq!(find("client_login_timeout"), ("15s", "15s"));
        assert_eq!(find("address"), ("127.0.0.1", "127.0.0.1"));
    }

    #[test]
    fn every_setting_with_a_default_is_shown_also_where_nothing_is_set() {
        let shown = shown(&Settings::default());
        for flag in Settings::augment_args(Command::new("flags")).get_arguments() {
            let key = flag.get_long().unwrap().replace('-', "_");
            let in_file = REFERENCE
                .lines()
                .any(|line| line.starts_with(&format!("{key} = ")));
            assert_eq!(
                shown.iter().any(|setting| setting.key == key),
                in_file,
                "{key}"
            );
        }
    }
}
