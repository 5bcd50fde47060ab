//! `config/lakebase-proxy.toml` has every setting at its default.

use std::path::Path;

use clap::{Args, Command};
use lakebase_proxy::config::{self, Config, Environment, Settings};

const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/config/lakebase-proxy.toml");

fn text() -> String {
    std::fs::read_to_string(REFERENCE).unwrap()
}

/// The keys it names, be they commented out because their default depends on something else.
fn keys(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# ").unwrap_or(line).split_once(" = "))
        .map(|(key, _)| key)
        .collect()
}

#[test]
fn it_names_every_setting() {
    let text = text();
    let keys = keys(&text);
    for flag in Settings::augment_args(Command::new("flags")).get_arguments() {
        let key = flag.get_long().unwrap().replace('-', "_");
        match key.as_str() {
            // Itself, and the one that is a table.
            "config_file" => {}
            "endpoint" => assert!(text.contains("[[endpoint]]")),
            key => assert!(keys.contains(&key), "{key} is not explained"),
        }
    }
}

#[test]
fn it_changes_nothing() {
    let environment = || {
        let name = "projects/p/branches/b/endpoints/e";
        Environment::from_variables([("ENDPOINT_NAME".to_owned(), name.to_owned())])
    };
    let settings = config::read(Path::new(REFERENCE)).unwrap();
    let with = Config::resolve(settings, environment()).unwrap();
    let without = Config::resolve(Settings::default(), environment()).unwrap();
    let change = without.change_to(with);
    assert!(change.is_empty(), "{change:#?}");
}

#[test]
fn its_examples_of_endpoints_parse() {
    let text = text();
    let (_, examples) = text.split_once("--- Endpoints").unwrap();
    let examples: String = examples
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| line.starts_with("[[") || keys(line).iter().any(|key| !key.contains(' ')))
        .flat_map(|line| [line, "\n"])
        .collect();
    let settings: Settings = toml::from_str(&examples).unwrap();
    assert_eq!(settings.endpoints.len(), 3, "{examples}");
}
